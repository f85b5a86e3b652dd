"""Two-stage detectors other than Faster R-CNN, as small as those of :mod:`mmkd.testing.detectors`."""

from copy import deepcopy
from typing import Any

from mmengine.config import ConfigDict

from mmkd.testing import detectors


def cascade_rcnn(channels: int = 16, stages: int = 2, **changes: Any) -> ConfigDict:
    """A Cascade R-CNN: class-agnostic boxes, deltas of a stage half as large as those of the one before."""
    config = detectors.faster_rcnn(channels)
    config.type = 'CascadeRCNN'
    head = config.roi_head
    box_heads, assigned = [], []
    for stage in range(stages):
        box_heads.append(deepcopy(head.bbox_head))
        box_heads[-1].reg_class_agnostic = True
        box_heads[-1].bbox_coder.target_stds = [each / 2**stage for each in (0.1, 0.1, 0.2, 0.2)]
        assigned.append(deepcopy(config.train_cfg.rcnn))
    head.update(
        type='CascadeRoIHead', num_stages=stages, stage_loss_weights=[1, 0.5, 0.25][:stages], bbox_head=box_heads
    )
    config.train_cfg.rcnn = assigned
    config.merge(changes)
    return config


def double_head_rcnn(channels: int = 16) -> ConfigDict:
    """Pools each region twice; its box head takes both features."""
    config = detectors.faster_rcnn(channels)
    head = config.roi_head
    head.update(type='DoubleHeadRoIHead', reg_roi_scale_factor=1.3)
    coder, loss = head.bbox_head.bbox_coder, head.bbox_head.loss_cls
    head.bbox_head = dict(
        type='DoubleConvFCBBoxHead',
        num_convs=1,
        num_fcs=1,
        in_channels=channels,
        conv_out_channels=4 * channels,
        fc_out_channels=32,
        roi_feat_size=7,
        num_classes=3,
        bbox_coder=coder,
        reg_class_agnostic=False,
        loss_cls=loss,
        loss_bbox=dict(type='L1Loss'),
    )
    return config


def grid_rcnn(channels: int = 16) -> ConfigDict:
    """Its box head has classes alone; boxes come from a grid of points."""
    config = detectors.faster_rcnn(channels)
    config.type = 'GridRCNN'
    head = config.roi_head
    head.update(
        type='GridRoIHead',
        grid_roi_extractor=dict(
            type='SingleRoIExtractor',
            roi_layer=dict(type='RoIAlign', output_size=14, sampling_ratio=0),
            out_channels=channels,
            featmap_strides=[4, 8, 16, 32],
        ),
        grid_head=dict(
            type='GridHead',
            grid_points=9,
            num_convs=1,
            in_channels=channels,
            point_feat_channels=4,
            norm_cfg=dict(type='GN', num_groups=4),
            loss_grid=dict(type='CrossEntropyLoss', use_sigmoid=True),
        ),
    )
    head.bbox_head.with_reg = False
    config.train_cfg.rcnn.update(pos_radius=1, max_num_grid=8)
    return config


def sparse_rcnn(channels: int = 16) -> ConfigDict:
    """Its RPN has learnt boxes and no forward pass, and its box heads take the features of queries as well."""
    config = detectors.faster_rcnn(channels)
    config.type = 'SparseRCNN'
    config.rpn_head = dict(type='EmbeddingRPNHead', num_proposals=20, proposal_feature_channel=channels)
    box_head = dict(
        type='DIIHead',
        num_classes=3,
        num_heads=2,
        num_cls_fcs=1,
        num_reg_fcs=1,
        feedforward_channels=32,
        in_channels=channels,
        dynamic_conv_cfg=dict(
            type='DynamicConv', in_channels=channels, feat_channels=8, out_channels=channels, input_feat_shape=7
        ),
        loss_bbox=dict(type='L1Loss', loss_weight=5.0),
        loss_iou=dict(type='GIoULoss', loss_weight=2.0),
        loss_cls=dict(type='FocalLoss', use_sigmoid=True, loss_weight=2.0),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder', clip_border=False, target_stds=[0.5, 0.5, 1.0, 1.0]),
    )
    config.roi_head.update(
        type='SparseRoIHead',
        num_stages=2,
        stage_loss_weights=[1, 1],
        proposal_feature_channel=channels,
        bbox_head=[box_head] * 2,
    )
    assigner = dict(
        type='HungarianAssigner',
        match_costs=[dict(type='FocalLossCost'), dict(type='BBoxL1Cost'), dict(type='IoUCost')],
    )
    config.train_cfg = dict(
        rpn=None,
        rpn_proposal=None,
        rcnn=[dict(assigner=assigner, sampler=dict(type='PseudoSampler'), pos_weight=1)] * 2,
    )
    config.test_cfg = dict(rpn=None, rcnn=dict(max_per_img=20))
    return config


def cascade_rpn(channels: int = 16) -> ConfigDict:
    """Faster R-CNN whose RPN is a cascade of heads, without a forward pass of its own."""
    config = detectors.faster_rcnn(channels)
    stage = dict(
        type='StageCascadeRPNHead',
        in_channels=channels,
        feat_channels=channels,
        anchor_generator=dict(type='AnchorGenerator', scales=[8], ratios=[1.0], strides=[4, 8, 16, 32, 64]),
        adapt_cfg=dict(type='dilation', dilation=3),
        bridged_feature=True,
        with_cls=False,
        reg_decoded_bbox=True,
        bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_stds=[0.1, 0.1, 0.5, 0.5]),
        loss_bbox=dict(type='IoULoss', linear=True, loss_weight=7.0),
    )
    last = deepcopy(stage)
    last.update(
        adapt_cfg=dict(type='offset'),
        bridged_feature=False,
        with_cls=True,
        loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True),
    )
    config.rpn_head = dict(type='CascadeRPNHead', num_classes=1, num_stages=2, stages=[stage, last])
    rpn = config.train_cfg.rpn
    assigner = dict(type='RegionAssigner', center_ratio=0.2, ignore_ratio=0.5)
    region = dict(assigner=assigner, allowed_border=-1, pos_weight=-1, debug=False)
    config.train_cfg.rpn = [region, rpn]
    return config
