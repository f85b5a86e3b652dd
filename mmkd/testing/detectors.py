"""Small detectors for tests: real mmdet classes, a few thousand parameters."""

from typing import Any

from mmengine.config import ConfigDict

PREPROCESSOR = dict(
    type='DetDataPreprocessor',
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    bgr_to_rgb=True,
    pad_size_divisor=32,
)
TEST = dict(nms_pre=1000, min_bbox_size=0, score_thr=0.0, nms=dict(type='nms', iou_threshold=0.5), max_per_img=50)


def _detector(
    kind: str, base: int, channels: int, changes: dict, start_level: int = 1, num_outs: int = 3, **parts: Any
) -> ConfigDict:
    """ResNet-18 of ``base`` channels and an FPN of ``channels``, which the tests' detectors share."""
    config = ConfigDict(
        type=kind,
        _scope_='mmdet',
        data_preprocessor=dict(PREPROCESSOR),
        backbone=dict(type='ResNet', depth=18, base_channels=base, norm_eval=True),
        neck=dict(
            type='FPN',
            in_channels=[base, 2 * base, 4 * base, 8 * base],
            out_channels=channels,
            start_level=start_level,
            num_outs=num_outs,
        ),
        **parts,
    )
    config.merge(changes)
    return config


def retinanet(channels: int = 16, classes: int = 3, base: int = 8, **changes: Any) -> ConfigDict:
    """A RetinaNet config with levels P3 to P5 of ``channels`` channels.

    Args:
        channels: Of the pyramid and the head.
        classes: Number of classes.
        base: Width of the ResNet-18.
        changes: Merged into the config, such as ``bbox_head=dict(stacked_convs=1)``.
    """
    return _detector(
        'RetinaNet',
        base,
        channels,
        changes,
        bbox_head=dict(
            type='RetinaHead',
            num_classes=classes,
            in_channels=channels,
            feat_channels=channels,
            stacked_convs=1,
            anchor_generator=dict(
                type='AnchorGenerator',
                octave_base_scale=3,
                scales_per_octave=1,
                ratios=[0.5, 1.0, 2.0],
                strides=[8, 16, 32],
            ),
            bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0.0] * 4, target_stds=[1.0] * 4),
            loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
            loss_bbox=dict(type='L1Loss', loss_weight=1.0),
        ),
        train_cfg=dict(
            assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0, ignore_iof_thr=-1),
            sampler=dict(type='PseudoSampler'),
            allowed_border=-1,
            pos_weight=-1,
            debug=False,
        ),
        test_cfg=dict(TEST),
    )


def _of_anchor_per_location(kind: str, head: dict, base: int, channels: int, classes: int, changes: dict) -> ConfigDict:
    return _detector(
        kind,
        base,
        channels,
        changes,
        bbox_head=dict(
            num_classes=classes,
            in_channels=channels,
            feat_channels=channels,
            stacked_convs=1,
            norm_cfg=None,
            anchor_generator=dict(
                type='AnchorGenerator', octave_base_scale=4, scales_per_octave=1, ratios=[1.0], strides=[8, 16, 32]
            ),
            **head,
        ),
        train_cfg=dict(assigner=dict(type='ATSSAssigner', topk=9), allowed_border=-1, pos_weight=-1, debug=False),
        test_cfg=dict(TEST),
    )


def atss(channels: int = 16, classes: int = 3, base: int = 8, **changes: Any) -> ConfigDict:
    """An ATSS config with levels P3 to P5; arguments as of :func:`retinanet`."""
    head = dict(
        type='ATSSHead',
        bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0.0] * 4, target_stds=[0.1, 0.1, 0.2, 0.2]),
        loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox=dict(type='GIoULoss', loss_weight=2.0),
        loss_centerness=dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0),
    )
    return _of_anchor_per_location('ATSS', head, base, channels, classes, changes)


def gfl(channels: int = 16, classes: int = 3, base: int = 8, **changes: Any) -> ConfigDict:
    """A GFL config with levels P3 to P5 and distances of 0 to 16 strides; arguments as of :func:`retinanet`."""
    head = dict(
        type='GFLHead',
        reg_max=16,
        loss_cls=dict(type='QualityFocalLoss', use_sigmoid=True, beta=2.0, loss_weight=1.0),
        loss_dfl=dict(type='DistributionFocalLoss', loss_weight=0.25),
        loss_bbox=dict(type='GIoULoss', loss_weight=2.0),
    )
    return _of_anchor_per_location('GFL', head, base, channels, classes, changes)


def fcos(channels: int = 16, classes: int = 3, base: int = 8, **changes: Any) -> ConfigDict:
    """A FCOS config with levels P3 to P5, centre sampling and normalised distances; arguments as of :func:`retinanet`."""
    return _detector(
        'FCOS',
        base,
        channels,
        changes,
        bbox_head=dict(
            type='FCOSHead',
            num_classes=classes,
            in_channels=channels,
            feat_channels=channels,
            stacked_convs=1,
            norm_cfg=None,
            strides=[8, 16, 32],
            regress_ranges=((-1, 32), (32, 64), (64, 1e8)),
            norm_on_bbox=True,
            centerness_on_reg=True,
            center_sampling=True,
            loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
            loss_bbox=dict(type='GIoULoss', loss_weight=1.0),
            loss_centerness=dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0),
        ),
        test_cfg=dict(TEST),
    )


def faster_rcnn(channels: int = 16, classes: int = 3, base: int = 8, **changes: Any) -> ConfigDict:
    """A Faster R-CNN config with levels P2 to P6, of which RoIs use P2 to P5; arguments as of :func:`retinanet`."""
    coder = dict(type='DeltaXYWHBBoxCoder', target_means=[0.0] * 4)
    assigner = dict(type='MaxIoUAssigner', ignore_iof_thr=-1)
    sampler = dict(type='RandomSampler', neg_pos_ub=-1)
    proposals = dict(nms_pre=100, max_per_img=60, nms=dict(type='nms', iou_threshold=0.7), min_bbox_size=0)
    return _detector(
        'FasterRCNN',
        base,
        channels,
        changes,
        start_level=0,
        num_outs=5,
        rpn_head=dict(
            type='RPNHead',
            in_channels=channels,
            feat_channels=channels,
            anchor_generator=dict(
                type='AnchorGenerator', scales=[6], ratios=[0.5, 1.0, 2.0], strides=[4, 8, 16, 32, 64]
            ),
            bbox_coder=dict(**coder, target_stds=[1.0] * 4),
            loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0),
            loss_bbox=dict(type='L1Loss', loss_weight=1.0),
        ),
        roi_head=dict(
            type='StandardRoIHead',
            bbox_roi_extractor=dict(
                type='SingleRoIExtractor',
                roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=0),
                out_channels=channels,
                finest_scale=28,
                featmap_strides=[4, 8, 16, 32],
            ),
            bbox_head=dict(
                type='Shared2FCBBoxHead',
                in_channels=channels,
                fc_out_channels=2 * channels,
                roi_feat_size=7,
                num_classes=classes,
                bbox_coder=dict(**coder, target_stds=[0.1, 0.1, 0.2, 0.2]),
                reg_class_agnostic=False,
                loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
                loss_bbox=dict(type='L1Loss', loss_weight=1.0),
            ),
        ),
        train_cfg=dict(
            rpn=dict(
                assigner=dict(**assigner, pos_iou_thr=0.7, neg_iou_thr=0.3, min_pos_iou=0.3, match_low_quality=True),
                sampler=dict(**sampler, num=64, pos_fraction=0.5, add_gt_as_proposals=False),
                allowed_border=-1,
                pos_weight=-1,
                debug=False,
            ),
            rpn_proposal=proposals,
            rcnn=dict(
                assigner=dict(**assigner, pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.5, match_low_quality=False),
                sampler=dict(**sampler, num=24, pos_fraction=0.25, add_gt_as_proposals=True),
                pos_weight=-1,
                debug=False,
            ),
        ),
        test_cfg=dict(
            rpn=dict(proposals),
            rcnn=dict(score_thr=0.0, nms=dict(type='nms', iou_threshold=0.5), max_per_img=50),
        ),
    )
