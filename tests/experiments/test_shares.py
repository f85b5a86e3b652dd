"""One rule for the weights of all methods of a comparison, with checks and runs by stand-ins."""

import json
import sys

import pytest
from mmengine.config import Config

from mmkd.experiments import shares
from mmkd.experiments.runs import RunFailed
from mmkd.experiments.shares import Share, times, warm_up
from mmkd.hosts.mmengine import CONFIG_ROOT

# Instead of `mmkd check`: writes what it would find, and notes how it was called.
STAND_IN = """
import json, os, pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index('--work-dir') + 1])
with pathlib.Path(__file__).with_name('checked').open('a') as file:
    file.write(json.dumps(sys.argv[1:]) + chr(10))
if folder.name in os.environ.get('FAIL', '?'):
    sys.exit('error: made to fail')
(folder / 'check.json').write_text(json.dumps(dict(together=0.0 if folder.name in os.environ.get('NONE', '?') else 4.0)))
"""


@pytest.fixture
def checked(tmp_path, monkeypatch):
    script = tmp_path / 'check.py'
    script.write_text(STAND_IN)
    monkeypatch.setattr(shares, 'CHECK', (sys.executable, str(script)))
    return lambda: [json.loads(line) for line in (tmp_path / 'checked').read_text().splitlines()]


@pytest.mark.parametrize(('share', 'together', 'factor'), [(0.5, 4.0, 0.25), (0.5, 0.02, 50.0), (0.2, 2.0, 0.125)])
def test_with_the_factor_the_share_is_the_one_that_was_asked_for(tmp_path, share, together, factor):
    (tmp_path / 'check.json').write_text(json.dumps(dict(together=together)))
    found = Share('gid', str(CONFIG_ROOT / 'shapes' / 'gid_retinanet.py'), tmp_path, share=share)
    assert found.factor == pytest.approx(factor)
    assert found.factor * together / (found.factor * together + 1) == pytest.approx(share)
    assert found.changes() == {'model.distillers.gid.factor': found.factor}


@pytest.mark.parametrize('together', [0.0, float('inf')])
def test_no_factor_gives_a_share_to_what_has_no_gradient(tmp_path, together):
    (tmp_path / 'check.json').write_text(json.dumps(dict(together=together)))
    with pytest.raises(RunFailed, match='no factor makes its share 0.5'):
        _ = Share('gid', 'gid.py', tmp_path, share=0.5).factor


def test_a_factor_of_the_config_is_multiplied():
    assert times(0.5, 4.0) == 2.0
    ramp = dict(type='linear', value=1.0, start=0.5, end=100)
    assert times(ramp, 4.0) == dict(type='linear', value=4.0, start=2.0, end=100)


def test_the_warm_up_is_that_of_the_learning_rate():
    assert warm_up(Config.fromfile(CONFIG_ROOT / 'gid_retinanet.py')) == 500
    assert warm_up(Config.fromfile(CONFIG_ROOT / 'kd_pspnet.py')) == 50  # mmseg's has none
    assert warm_up(Config(dict(param_scheduler=None))) == 50


def test_methods_are_measured_and_trained_with_their_factor_beside_the_plain_runs(
    tmp_path, notes, checked, compare, capsys
):
    folder = tmp_path / 'work'
    command = ['shapes', 'gid_retinanet', 'cwd_retinanet', '--seeds', '3', '--work-dir', folder]
    compare(*command)
    compare(*command, '--share', '0.5')
    assert [call['folder'] for call in notes()] == [
        'retinanet_teacher', 'retinanet_student_seed3', 'cwd_retinanet_seed3', 'gid_retinanet_seed3',
        'cwd_retinanet_seed3', 'gid_retinanet_seed3',
    ]  # fmt: skip
    plain, balanced = (Config.fromfile(notes()[index]['arguments'][0]) for index in (3, 5))
    assert 'factor' not in plain.model.distillers.gid
    assert balanced.model.distillers.gid.factor == 0.25
    del balanced.model.distillers.gid['factor']
    assert balanced.to_dict() == plain.to_dict()
    arguments = checked()[1]
    assert arguments[1:] == [
        '--images', '0', '--warm-up', '50', '--batches', '5', '--work-dir', f'{folder}/share_0.5/gid_retinanet_check',
    ]  # fmt: skip
    found = json.loads((folder / 'share_0.5' / 'results.json').read_text())
    assert found['methods']['gid_retinanet']['factor'] == 0.25
    table = (folder / 'share_0.5' / 'table.md').read_text()
    assert '| factor |' in table
    assert '| 0.25 |' in table
    assert 'is 50 % of its sum' in table
    assert 'factor' not in (folder / 'table.md').read_text()
    compare(*command, '--share', '0.5')
    assert len(notes()) == 6
    assert len(checked()) == 2
    assert capsys.readouterr().out.count('finished before, reused') == 2 + 4
    compare(*command[:3], '--seeds', '4', '--work-dir', folder, '--share', '0.5')
    assert len(checked()) == 2  # one factor for seeds that come later too
    added = [Config.fromfile(call['arguments'][0]) for call in notes()[6:]]
    assert [each.model.distillers.gid.factor for each in added if 'gid' in each.model.get('distillers', {})] == [0.25]


@pytest.mark.parametrize(
    ('why', 'said'),
    [('FAIL', 'cwd_retinanet not measured: error: made to fail'), ('NONE', 'no factor makes its share')],
)
def test_a_method_without_a_factor_is_not_trained_and_the_others_are(
    tmp_path, notes, checked, compare, monkeypatch, capsys, why, said
):
    monkeypatch.setenv(why, 'cwd_retinanet_check')
    with pytest.raises(SystemExit):
        compare('shapes', 'gid_retinanet', 'cwd_retinanet', '--seeds', '0', '--work-dir', tmp_path, '--share', '0.5')
    trained = [call['folder'] for call in notes()]
    assert trained == ['retinanet_teacher', 'retinanet_student_seed0', 'gid_retinanet_seed0']
    assert said in capsys.readouterr().out


@pytest.mark.parametrize('share', ['0', '1', '-1'])
def test_a_share_is_between_0_and_1(compare, share, capsys):
    with pytest.raises(SystemExit):
        compare('shapes', '--share', share)
    assert '--share: expected a number between 0 and 1' in capsys.readouterr().err
