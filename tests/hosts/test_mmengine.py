import pickle

import pytest
import torch
from mmengine import hub
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.registry import DefaultScope

from mmkd.errors import ConfigError
from mmkd.hosts.mmengine import config_path


def test_histories_and_numpy_scalars_load_with_torchs_safe_default(tmp_path):
    import numpy as np

    history = HistoryBuffer()
    history.update(0.25)
    history.update(np.float64(0.75))
    torch.save({'history': history, 'best': np.float64(0.5), 'flag': np.bool_(True)}, tmp_path / 'hub.pth')
    found = torch.load(tmp_path / 'hub.pth', weights_only=True)
    assert found['history'].data[0].tolist() == [0.25, 0.75]
    assert found['history'].mean() == 0.5
    assert found['best'] == 0.5


class Reads:
    """Asks for an attribute of something that is allowed, on the way to something that is not."""

    def __init__(self, owner, name):
        self.arguments = owner, name

    def __reduce__(self):
        return getattr, self.arguments


@pytest.mark.parametrize(
    ('owner', 'name'),
    [
        (HistoryBuffer, '__init__'),
        (HistoryBuffer, '__globals__'),
        (torch.Tensor, '__subclasses__'),
        (HistoryBuffer, 'update'),
    ],
)
def test_getattr_is_not_let_through(tmp_path, owner, name):
    torch.save(Reads(owner, name), tmp_path / 'evil.pth')
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / 'evil.pth', weights_only=True)


def test_other_bases_still_resolve_as_mmengine_has_it():
    config = Config.fromfile(config_path('mmkd::gid_retinanet.py'))
    assert config.model.student.backbone.depth == 50


def test_an_unknown_config_names_the_nearest():
    with pytest.raises(
        ConfigError, match="mmkd::shapes/gid_retina.py: mmkd has no such config; .*'shapes/gid_retinanet.py'"
    ):
        config_path('mmkd::shapes/gid_retina.py')


def test_mmengines_hub_has_its_configs():
    assert hub.get_config('mmkd::gid_retinanet.py').model.student.backbone.depth == 50
    assert hub.get_config('mmkd::shapes/gid_retinanet.py').model.type == 'mmkd.Distill'
    assert hub.get_config('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py').model.type == 'RetinaNet'
    with pytest.raises(ConfigError, match='mmkd::gid_retinanet.py: mmkd publishes no weights'):
        hub.get_config('mmkd::gid_retinanet.py', pretrained=True)


@pytest.mark.parametrize(
    ('name', 'kind'),
    [
        ('mmkd::shapes/cwd_retinanet.py', 'DistilledRetinaNet'),
        ('mmkd::shapes/retinanet_teacher.py', 'RetinaNet'),
        ('mmkd::streets/cwd_pspnet.py', 'DistilledEncoderDecoder'),
        ('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py', 'RetinaNet'),
    ],
)
def test_mmengines_hub_builds_their_models(name, kind):
    with DefaultScope.overwrite_default_scope('mmengine'):
        model = hub.get_model(name)
    assert type(model).__name__ == kind
    assert type(model.data_preprocessor).__name__ in ('DetDataPreprocessor', 'SegDataPreProcessor')
