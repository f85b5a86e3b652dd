"""mmkd chain: configs that are trained one after the other, each with what those before have learnt."""

import re
import sys

import pytest
import torch
from mmengine.config import Config
from tool import tool

from mmkd.commands.chain import main
from mmkd.errors import ConfigError
from mmkd.experiments.chain import stages, train_chain
from mmkd.testing import detectors
from mmkd.testing.runs import shapes_config


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A large, a middle and a small detector; middle.py and small.py learn from the one before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('os.sched_getaffinity', lambda _: {0})
    config = shapes_config(tmp_path / 'data', detectors.retinanet(classes=6, channels=24), iterations=2)
    config.dump(tmp_path / 'large.py')
    for name, channels, teacher in (('middle', 20, 'large'), ('small', 16, 'middle'), ('again', 16, 'plain')):
        config.model = dict(
            type='mmkd.Distill',
            student=detectors.retinanet(classes=6, channels=channels),
            teacher=dict(config=f'{teacher}.py'),
            distillers=dict(cwd=dict(type='CWD', layer='neck')),
        )
        Config(config.to_dict()).dump(tmp_path / f'{name}.py')
    config.model = detectors.retinanet(classes=6)
    Config(config.to_dict()).dump(tmp_path / 'plain.py')
    return tmp_path


def test_each_teacher_has_the_weights_of_its_stage(folder):
    large, middle, small = stages(['large.py', 'middle.py', 'small.py'], folder / 'work')
    assert large.options == {}
    assert middle.options['model.teacher.checkpoint'] == str(large.checkpoint)
    assert small.options['model.teacher.checkpoint'] == str(middle.checkpoint)
    assert [run.folder.name for run in (large, middle, small)] == ['1_large', '2_middle', '3_small']


def test_generations_learn_from_the_latest(folder):
    """A model that is its own teacher."""
    first, second, third = stages(['plain.py', 'again.py', 'again.py'], folder / 'work')
    assert second.options['model.teacher.checkpoint'] == str(first.checkpoint)
    assert third.options['model.teacher.checkpoint'] == str(second.checkpoint)


def test_a_student_that_goes_on_keeps_its_weights_and_has_other_teachers(folder):
    _, second = stages(['small.py', 'again.py'], folder / 'work', go_on=True)
    assert second.options['load_from'].endswith('1_small/iter_2.pth')
    # again.py's teacher is the same model as small.py's student
    assert second.options['model.teacher.checkpoint'].endswith('1_small/iter_2.pth')


@pytest.mark.parametrize(
    ('names', 'go_on', 'message'),
    [
        (['large.py'], False, 'a chain has two configs or more, found 1'),
        (['plain.py', 'middle.py'], False, 'middle.py: none of its teachers is the student of an earlier config'),
        (['large.py', 'middle.py'], True, 'middle.py: --go-on: its student is another model than that of large.py'),
    ],
)
def test_configs_that_are_no_chain(names, go_on, message, folder):
    with pytest.raises(ConfigError, match=message):
        stages(names, folder / 'work', go_on)


def labels(folder):
    """The two trainings of LabelEnc."""
    for name, given in (('first', {}), ('second', dict(checkpoint='elsewhere.pth'))):
        config = Config.fromfile(folder / 'plain.py')
        config.model = dict(
            type='mmkd.Distill',
            student=detectors.retinanet(classes=6),
            teacher=dict(type='LabelEncoder', **given),
            inherit=['neck', 'bbox_head'] if given else [],
            distillers=dict(it=dict(type='LabelEnc')),
        )
        config.dump(folder / f'{name}.py')


def test_a_label_encoder_has_the_weights_of_the_stage_that_trained_it(folder):
    labels(folder)
    first, second = stages(['first.py', 'second.py'], folder / 'work')
    assert first.options == {}
    assert second.options == {'model.teacher.checkpoint': str(first.checkpoint)}
    with pytest.raises(ConfigError, match='second.py: none of its teachers'):
        stages(['plain.py', 'second.py'], folder / 'work')


@pytest.mark.long
def test_labels_are_encoded_and_then_followed(folder):
    labels(folder)
    runs = stages(['first.py', 'second.py'], folder / 'work')
    train_chain(runs)
    first, second = (torch.load(run.checkpoint, weights_only=True)['state_dict'] for run in runs)
    assert any(name.startswith('sources.teacher.model.neck') for name in first)
    assert not any(name.startswith('sources') for name in second)
    tool('export', runs[1].folder / 'second.py', runs[1].checkpoint, folder / 'exported')
    exported = torch.load(folder / 'exported.pth', weights_only=True)['state_dict']
    assert list(exported) == [name for name in second if not name.startswith('distillers.')]


@pytest.mark.slow
@pytest.mark.long
def test_a_chain_is_trained_and_goes_on(folder, monkeypatch, capsys):
    def chain(*arguments):
        monkeypatch.setattr(sys, 'argv', ['mmkd chain', *arguments])
        main()
        return capsys.readouterr()

    said = chain('large.py', 'middle.py', 'small.py', '--work-dir', 'work')
    assert re.search(r'3_small: coco/bbox_mAP \S+, work/3_small/iter_2.pth', said.out)
    assert 'work/2_middle/iter_2.pth' in (folder / 'work' / '3_small' / 'output.log').read_text()
    weights = torch.load(folder / 'work' / '3_small' / 'iter_2.pth', weights_only=True)['state_dict']
    assert 'neck.lateral_convs.0.conv.weight' in weights
    said = chain('large.py', 'middle.py', 'small.py', '--work-dir', 'work')
    assert (said.out + said.err).count('finished before, reused') == 3


@pytest.mark.slow
@pytest.mark.long
def test_a_stage_that_fails_ends_the_chain(folder, monkeypatch):
    config = Config.fromfile(folder / 'middle.py')
    config.model.distillers.cwd.layer = 'nek'
    config.dump(folder / 'middle.py')
    monkeypatch.setattr(sys, 'argv', ['mmkd chain', 'large.py', 'middle.py', 'small.py', '--work-dir', 'work'])
    with pytest.raises(SystemExit, match=r"error: 2_middle failed: .*'nek'"):
        main()
    assert not (folder / 'work' / '3_small').exists()
