"""Sources through the real Runner: checkpoints, resume, EMA, export, two processes."""

import pytest
import torch
from tool import tool

from mmkd.testing import models
from mmkd.testing.runs import of_all_sources, shapes_config, streets_config

CASES = {'RetinaNet': shapes_config, 'PSPNet': streets_config}
pytestmark = pytest.mark.slow


def weights(path):
    return torch.load(path, map_location='cpu', weights_only=True)['state_dict']


@pytest.mark.parametrize('case', CASES)
def test_all_kinds_train_resume_bit_for_bit_beside_ema_and_are_exported(case, tmp_path):
    config = CASES[case](tmp_path, of_all_sources(tmp_path, case), iterations=6)
    config.custom_hooks = [dict(type='EMAHook', momentum=0.1)]
    config.default_hooks.checkpoint.interval = 3
    config.dump(tmp_path / 'config.py')
    printed = tool('train', tmp_path / 'config.py', '--work-dir', tmp_path / 'whole')
    assert 'peer.' in printed
    for name in config.model.distillers:
        assert f'{name}.loss' in printed
    whole = weights(tmp_path / 'whole' / 'iter_6.pth')
    kept = {name.split('.')[1] for name in whole if name.startswith('sources.')}
    assert kept == {'mean', 'peer'}  # nothing of the frozen teacher, nor of the student as its own

    stopped = tmp_path / 'stopped'
    stopped.mkdir()
    (stopped / 'iter_3.pth').write_bytes((tmp_path / 'whole' / 'iter_3.pth').read_bytes())
    (stopped / 'last_checkpoint').write_text(str(stopped / 'iter_3.pth'))
    tool('train', tmp_path / 'config.py', '--work-dir', stopped, '--resume')
    resumed = weights(stopped / 'iter_6.pth')
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name

    tool('export', tmp_path / 'config.py', tmp_path / 'whole' / 'iter_6.pth', tmp_path / 'plain')
    plain = models.build(config.model.student.to_dict())
    plain.load_state_dict(weights(tmp_path / 'plain.pth'), strict=True)
