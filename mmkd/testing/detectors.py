"""Small detectors for tests: real mmdet classes, a few thousand parameters."""

from pathlib import Path
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, DefaultScope
from torch import nn


def retinanet(channels: int = 16, classes: int = 3, base: int = 8, **changes: Any) -> ConfigDict:
    """A RetinaNet config with levels P3 to P5 of ``channels`` channels.

    Args:
        channels: Of the pyramid and the head.
        classes: Number of classes.
        base: Width of the ResNet-18.
        changes: Merged into the config, such as ``bbox_head=dict(stacked_convs=1)``.
    """
    config = ConfigDict(
        type='RetinaNet',
        _scope_='mmdet',
        data_preprocessor=dict(
            type='DetDataPreprocessor',
            mean=[123.675, 116.28, 103.53],
            std=[58.395, 57.12, 57.375],
            bgr_to_rgb=True,
            pad_size_divisor=32,
        ),
        backbone=dict(type='ResNet', depth=18, base_channels=base, norm_eval=True),
        neck=dict(
            type='FPN',
            in_channels=[base, 2 * base, 4 * base, 8 * base],
            out_channels=channels,
            start_level=1,
            num_outs=3,
        ),
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
        test_cfg=dict(
            nms_pre=1000, min_bbox_size=0, score_thr=0.0, nms=dict(type='nms', iou_threshold=0.5), max_per_img=50
        ),
    )
    config.merge(changes)
    return config


def build(config: dict, seed: int | None = None) -> nn.Module:
    """Build a model from its config; with ``seed``, also initialise it, batch-norm statistics included."""
    with DefaultScope.overwrite_default_scope('mmdet'):
        if seed is None:
            return MODELS.build(config)
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            model = MODELS.build(config)
            model.init_weights()
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    nn.init.uniform_(module.running_mean, -0.2, 0.2)
                    nn.init.uniform_(module.running_var, 0.5, 1.5)
                    nn.init.uniform_(module.weight, 0.5, 1.5)
                    nn.init.uniform_(module.bias, -0.2, 0.2)
    return model


def save_weights(config: dict, path: str | Path, seed: int = 1) -> str:
    """Write a checkpoint of the initialised model; its path."""
    torch.save({'state_dict': build(config, seed).state_dict()}, path)
    return str(path)
