"""The code blocks of docs/extend.md run as they are printed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import mmkd
from mmkd.testing import detectors, models, segmentors
from mmkd.testing.batches import random_batch

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r'```python\n# (\S+\.py)\n(.*?)```', (ROOT / 'docs' / 'extend.md').read_text(), re.DOTALL)


@pytest.fixture
def package(tmp_path, monkeypatch):
    for name, code in BLOCKS:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [each for each in sys.modules if each.startswith('mypackage')]:
        del sys.modules[name]


def losses(student, teacher, **distillers):
    model = mmkd.distill(models.build(student, seed=0), teacher, distillers)
    model.init_weights()
    data = model.data_preprocessor(random_batch(model, (2, 3, 64, 64)), True)
    found = model.train()(**data, mode='loss')
    model.parse_losses(found)[0].backward()
    return found


def test_its_methods_work(package):
    built = [models.build(segmentors.pspnet(24), seed=seed) for seed in (1, 2)]
    l1 = dict(type='mypackage.l1.L1')
    assert losses(segmentors.pspnet(), built[0], l1=l1)['l1.loss'] > 0
    two = dict(large=built[0], other=built[1])
    ensemble = dict(type='mypackage.ensemble.Ensemble', teacher=['large', 'other'])
    assert losses(segmentors.pspnet(), two, ensemble=ensemble)['ensemble.loss'] > 0
    wide = detectors.retinanet(channels=24)
    found = losses(
        detectors.retinanet(),
        models.build(wide, seed=1),
        l2=dict(type='mypackage.l2.L2', layer='neck', loss_weight=2.0),
        terms=dict(type='mypackage.two_terms.TwoTerms', mean_weight=dict(type='constant', value=3.0)),
    )
    assert all(found[key] > 0 for key in ('l2.loss', 'terms.loss_mean', 'terms.loss_energy'))


def test_its_source_works(package):
    wide = detectors.retinanet(channels=24)
    checkpoint = models.save_weights(wide, package / 'teacher.pth')
    source = dict(type='mypackage.flipped.Flipped', config=wide, checkpoint=checkpoint)
    assert losses(detectors.retinanet(), source, l2=dict(type='mypackage.l2.L2', layer='neck'))['l2.loss'] > 0


@pytest.mark.slow
def test_its_test_passes_and_its_run_trains(package):
    (package / 'try').mkdir()
    for command in (
        ['-m', 'pytest', '-q', '-n0', '-p', 'no:cacheprovider', 'test_l2.py'],
        ['try_l2.py'],
        [str(ROOT / 'tools' / 'train.py'), 'try/config.py', '--no-check'],
    ):
        env = {'PYTHONPATH': f'{package}:{ROOT}', 'PATH': '/usr/bin:/bin', 'HOME': str(package), 'OMP_NUM_THREADS': '1'}
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert 'l2.loss' in done.stdout + done.stderr
