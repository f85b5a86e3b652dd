"""Small segmentors for tests: real mmseg classes, a few thousand parameters."""

from typing import Any

from mmengine.config import ConfigDict

PREPROCESSOR = dict(
    type='SegDataPreProcessor',
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    bgr_to_rgb=True,
    pad_val=0,
    seg_pad_val=255,
    size_divisor=32,
)


def _segmentor(backbone: dict, head: dict, auxiliary: dict | None, changes: dict) -> ConfigDict:
    config = ConfigDict(
        type='EncoderDecoder',
        _scope_='mmseg',
        data_preprocessor=dict(PREPROCESSOR),
        backbone=backbone,
        decode_head=dict(
            dropout_ratio=0.1,
            align_corners=False,
            loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
            **head,
        ),
        train_cfg=dict(),
        test_cfg=dict(mode='whole'),
    )
    if auxiliary:
        config.auxiliary_head = dict(
            type='FCNHead',
            num_convs=1,
            concat_input=False,
            dropout_ratio=0.1,
            align_corners=False,
            loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=0.4),
            **auxiliary,
        )
    config.merge(changes)
    return config


def _resnet(base: int, strides: tuple[int, ...] = (1, 2, 1, 1), dilations: tuple[int, ...] = (1, 1, 2, 4)) -> dict:
    return dict(
        type='ResNetV1c',
        depth=18,
        base_channels=base,
        stem_channels=base,
        strides=strides,
        dilations=dilations,
        contract_dilation=True,
        norm_cfg=dict(type='BN'),
        norm_eval=False,
    )


def pspnet(channels: int = 16, classes: int = 19, base: int = 8, **changes: Any) -> ConfigDict:
    """A PSPNet config of output stride 8 with an auxiliary head.

    Args:
        channels: Of the head; its pre-classifier feature is ``decode_head.bottleneck``.
        classes: Number of classes.
        base: Width of the ResNet-18.
        changes: Merged into the config, such as ``decode_head=dict(dropout_ratio=0)``.
    """
    norm = dict(type='BN')
    head = dict(
        type='PSPHead',
        in_channels=8 * base,
        in_index=3,
        channels=channels,
        pool_scales=(1, 2, 3, 6),
        num_classes=classes,
        norm_cfg=norm,
    )
    auxiliary = dict(in_channels=4 * base, in_index=2, channels=channels, num_classes=classes, norm_cfg=norm)
    return _segmentor(_resnet(base), head, auxiliary, changes)


def deeplabv3(channels: int = 16, classes: int = 19, base: int = 8, **changes: Any) -> ConfigDict:
    """A DeepLabV3 config of output stride 16 with an auxiliary head; the arguments are those of :func:`pspnet`."""
    norm = dict(type='BN')
    head = dict(
        type='ASPPHead',
        in_channels=8 * base,
        in_index=3,
        channels=channels,
        dilations=(1, 6, 12),
        num_classes=classes,
        norm_cfg=norm,
    )
    auxiliary = dict(in_channels=4 * base, in_index=2, channels=channels, num_classes=classes, norm_cfg=norm)
    return _segmentor(_resnet(base, (1, 2, 2, 1), (1, 1, 1, 2)), head, auxiliary, changes)


def segformer(channels: int = 16, classes: int = 19, base: int = 8, **changes: Any) -> ConfigDict:
    """A SegFormer config of output stride 4 without an auxiliary head; the arguments are those of :func:`pspnet`."""
    backbone = dict(
        type='MixVisionTransformer',
        embed_dims=base,
        num_stages=4,
        num_layers=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        patch_sizes=[7, 3, 3, 3],
        sr_ratios=[8, 4, 2, 1],
        out_indices=(0, 1, 2, 3),
        mlp_ratio=2,
    )
    head = dict(
        type='SegformerHead',
        in_channels=[base, base, 2 * base, 2 * base],
        in_index=[0, 1, 2, 3],
        channels=channels,
        num_classes=classes,
        norm_cfg=dict(type='BN'),
    )
    return _segmentor(backbone, head, None, changes)


def cascade(channels: int = 16, classes: int = 19, base: int = 8, **changes: Any) -> ConfigDict:
    """An FCN whose logits an OCR head refines, ``decode_head.0`` and ``decode_head.1``; arguments as of :func:`pspnet`."""
    config = pspnet(channels, classes, base)
    fcn, common = config.pop('auxiliary_head'), dict(norm_cfg=dict(type='BN'), num_classes=classes, channels=channels)
    fcn.num_convs, fcn.in_index, fcn.in_channels = 1, 3, 8 * base
    ocr = dict(type='OCRHead', in_channels=8 * base, in_index=3, ocr_channels=8, dropout_ratio=0.1, **common)
    ocr.update(align_corners=False, loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False))
    config.update(type='CascadeEncoderDecoder', num_stages=2, decode_head=[fcn, ocr])
    config.merge(changes)
    return config
