import copy

import mmcv.ops
import pytest
import torch
from mmcv.cnn import ConvModule
from torch import nn

from mmkd.hosts.configs import build_model
from mmkd.testing import detectors
from mmkd.testing.stock import small_config


@pytest.mark.parametrize('kind', ['MMSyncBN', mmcv.ops.SyncBatchNorm])
def test_a_synchronized_batch_norm_is_a_batch_norm_in_one_process(kind):
    """The same weights and outputs; mmcv's cannot be built without a process group."""
    norm = dict(norm_cfg=dict(type=kind, requires_grad=True), conv_cfg=None)
    config = detectors.retinanet(neck=norm)
    model, plain = build_model(config), build_model(detectors.retinanet(neck=dict(norm_cfg=dict(type='BN'))))
    assert config.neck.norm_cfg.type is kind
    plain.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(model.extract_feat(images), plain.extract_feat(images), strict=True))
    assert isinstance(model.neck.lateral_convs[0], ConvModule)
    assert type(model.neck.lateral_convs[0].bn) is nn.BatchNorm2d


def test_with_a_process_group_it_stays_what_it_is(tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        model = build_model(detectors.retinanet(neck=dict(norm_cfg=dict(type='MMSyncBN'))))
    finally:
        torch.distributed.destroy_process_group()
    assert type(model.neck.lateral_convs[0].bn) is mmcv.ops.SyncBatchNorm


def test_a_config_stays_as_it_is():
    """mmdet's DETRs change what they are built from."""
    config = small_config('mmdet/detr/detr_r50_8xb2-150e_coco.py')
    before = copy.deepcopy(config)
    build_model(config)
    build_model(config)
    assert str(config) == str(before)
