"""`mmkd check`, and the look at the teachers with which a training begins."""

import json
from pathlib import Path

import pytest
import torch
from mmengine.structures import PixelData
from tool import tool, train_together
from torch import nn

from mmkd.analysis import first_steps, scores
from mmkd.analysis.first_steps import Term
from mmkd.analysis.gradients import TASK
from mmkd.analysis.pictures import draw_batch, energy, maps_of, shown
from mmkd.analysis.scores import Scored, check_scores, evaluate
from mmkd.errors import ConfigError
from mmkd.taps import Taps
from mmkd.testing import detectors, models, segmentors
from mmkd.testing.batches import random_batch
from mmkd.testing.runs import distilled, shapes_config, streets_config

GID = dict(gid=dict(type='GID'))


class Knows(nn.Module):
    """Predicts what the labels say."""

    def test_step(self, data):
        for sample in data['data_samples']:
            if 'gt_sem_seg' in sample:
                sample.pred_sem_seg = PixelData(data=sample.gt_sem_seg.data)
            else:
                sample.pred_instances = sample.gt_instances.new()
                sample.pred_instances.bboxes = sample.gt_instances.bboxes.tensor
                sample.pred_instances.labels = sample.gt_instances.labels
                sample.pred_instances.scores = torch.ones(len(sample.gt_instances))
        return data['data_samples']


@pytest.fixture(scope='module')
def detection(tmp_path_factory):
    folder = tmp_path_factory.mktemp('detection')
    config = shapes_config(folder, distilled(folder, GID))
    config.val_dataloader.dataset.pipeline[-1].meta_keys = (
        'img_id',
        'img_path',
        'ori_shape',
        'img_shape',
        'scale_factor',
    )
    config.dump(folder / 'config.py')
    return config


@pytest.mark.parametrize('images', [3, 8, 100])
def test_of_cocos_images_those_alone_count_that_were_predicted(detection, images):
    found, number = evaluate(Knows(), detection, images)
    assert number == min(images, 8)
    assert found['coco/bbox_mAP'] == 1


def test_label_maps_are_scored(tmp_path):
    found, number = evaluate(Knows(), streets_config(tmp_path, segmentors.pspnet()), 4)
    assert (found['mIoU'], number) == (100, 4)


def test_a_teacher_that_knows_nothing_is_an_error_with_what_it_may_be(detection):
    with pytest.raises(
        ConfigError,
        match=r'^model\.teacher: coco/bbox_mAP 0(\.0\d+)? on 8 validation images, which is next to nothing\. .*--no-check',
    ):
        check_scores(detection, 8)
    assert check_scores(detection, 0) == []


def test_a_teacher_that_scores_is_a_line(detection, monkeypatch):
    monkeypatch.setattr(scores, 'evaluate', lambda model, config, images: ({'coco/bbox_mAP': 0.4321}, 5))
    (found,) = check_scores(detection, 5)
    assert str(found) == 'model.teacher: coco/bbox_mAP 0.4321 on 5 validation images'


@pytest.mark.parametrize(('value', 'fails'), [(2.5, True), (2.7, False)])
def test_half_of_what_a_model_scores_that_knows_one_class_of_19_is_nothing(tmp_path, monkeypatch, value, fails):
    config = streets_config(tmp_path, segmentors.pspnet())
    config.model = dict(teacher=dict(config=segmentors.pspnet()), student=config.model)
    monkeypatch.setattr(scores, '_score', lambda *args: Scored('model.teacher', 4, 'mIoU', value))
    if fails:
        with pytest.raises(ConfigError, match='mIoU 2.5 on 4'):
            check_scores(config, 4)
    else:
        assert check_scores(config, 4)


def test_what_cannot_be_scored_says_why(detection):
    config = detection.copy()
    config.val_evaluator = None
    (found,) = check_scores(config, 4)
    assert str(found) == 'model.teacher: not evaluated, the config has no val_dataloader or no val_evaluator'
    config = detection.copy()
    config.model = {**config.model, 'teacher': dict(config=detectors.retinanet(classes=80), checkpoint='none.pth')}
    (found,) = check_scores(config, 4)
    assert found.skipped == 'model.teacher.bbox_head has 80 classes and the validation data 6'


@pytest.mark.parametrize(
    ('name', 'times', 'advice'),
    [
        (TASK, 1.0, ''),
        ('gid.loss', 29.0, ''),
        ('gid.loss', 1 / 29, ''),
        ('gid.loss', 50.0, 'far above the task: a weight 0.02 times as large'),
        ('gid.loss', 0.001, 'far below the task: a weight 1000 times as large'),
        ('gid.loss', 0.0, 'it has no gradient at the backbone'),
    ],
)
def test_advice(name, times, advice):
    assert Term(name, 1.0, 0.5, 0.1, times).advice.startswith(advice)
    assert bool(Term(name, 1.0, 0.5, 0.1, times).advice) == bool(advice)


def test_losses_of_first_steps_are_those_of_the_model(detection):
    model = first_steps.build(detection)
    data = first_steps.batches(detection, 1)
    expected = model(**model.data_preprocessor(data[0], True), mode='loss')
    found, together = first_steps.measure(model, data)
    terms = {each.name: each for each in found}
    assert set(terms) == {TASK, 'gid.loss_feature', 'gid.loss_relation', 'gid.loss_cls', 'gid.loss_bbox'}
    assert terms['gid.loss_feature'].value == pytest.approx(float(expected['gid.loss_feature']), rel=1e-4)
    own = sum(
        float(sum(each)) if isinstance(each, list) else float(each) for key, each in expected.items() if '.' not in key
    )
    assert terms[TASK].value == pytest.approx(own, rel=1e-4)
    assert sum(each.share for each in terms.values()) == pytest.approx(1, abs=1e-4)
    assert terms[TASK].times == 1
    # the norm of a sum: no larger than the sum of norms, no smaller than their largest difference
    others = [each.times for each in found if each.name != TASK]
    assert max(others) - sum(sorted(others)[:-1]) <= together <= sum(others)


def test_a_factor_multiplies_how_strongly_a_method_pulls(detection):
    data = first_steps.batches(detection, 1)
    plain = first_steps.build(detection)
    weaker = detection.copy()
    weaker.model.distillers.gid.factor = 0.25
    weak = first_steps.build(weaker)
    weak.load_state_dict(plain.state_dict())
    (terms, together), (lower, less) = first_steps.measure(plain, data), first_steps.measure(weak, data)
    assert less == pytest.approx(0.25 * together, rel=1e-3)
    for one, other in zip(terms[1:], lower[1:]):
        assert (other.value, other.times) == pytest.approx((0.25 * one.value, 0.25 * one.times), rel=1e-3)


def test_a_warm_up_trains_the_student_by_its_own_losses(detection):
    model = first_steps.build(detection)
    before = {name: each.clone() for name, each in model.named_parameters()}
    first_steps.warm_up(model, detection, 3)
    moved = {name for name, each in model.named_parameters() if not torch.equal(each, before[name])}
    assert {'backbone.layer1.0.conv1.weight', 'bbox_head.retina_cls.weight'} <= moved
    assert not [name for name in moved if name.startswith('distillers')]


def test_a_warm_up_without_an_optimizer_is_one_line(detection):
    config = detection.copy()
    config.optim_wrapper = None
    with pytest.raises(ConfigError, match=r'^optim_wrapper: the config has none'):
        first_steps.warm_up(first_steps.build(config), config, 3)


def test_an_image_is_shown_as_it_was_loaded():
    loaded = torch.tensor([10.0, 100.0, 250.0]).reshape(3, 1, 1).expand(3, 4, 4)  # blue first
    model = models.build(detectors.retinanet())
    batch = model.data_preprocessor({'inputs': [loaded.to(torch.uint8)], 'data_samples': None})
    picture = shown(batch['inputs'][0], model.data_preprocessor)[0, 0]
    assert picture == pytest.approx([250 / 255, 100 / 255, 10 / 255], abs=0.01)


def test_energy_is_the_mean_of_absolute_values():
    assert energy(torch.tensor([[[1.0]], [[-3.0]]])).tolist() == [[2.0]]


def test_maps_of_both_networks_side_by_side(detection):
    model = first_steps.build(detection)
    batch = model.data_preprocessor(random_batch(model, (2, 3, 96, 96)), True)
    figure = draw_batch(model, batch['inputs'], batch['data_samples'])
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles[:3] == ['student: input', 'student: neck 16 /8', 'student: neck 16 /16']
    assert 'teacher: neck 24 /8' in titles
    assert len(figure.axes[0].patches) == len(batch['data_samples'][0].gt_instances)


def test_two_maps_of_one_shape_are_both_shown():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 4, 1))
    inputs = torch.rand(1, 3, 8, 8)

    class Both(torch.nn.Module):
        def forward(self, x):
            first = model[0](x)
            return first, model[1](first)

    network = torch.nn.ModuleDict(dict(both=Both()))
    with Taps(network, ['both']) as taps:
        network['both'](inputs)
    titles, levels = zip(*maps_of(taps, inputs))
    assert titles == ('both 4 /1', 'both 4 /1')
    assert not torch.equal(*levels)


def test_memory_is_that_of_the_process(detection):
    model = first_steps.build(detection)
    found = first_steps.memory(model, first_steps.batches(detection, 1)[0])
    assert 0 < found.step < found.there


@pytest.mark.slow
def test_the_command_writes_a_page_and_figures(detection, tmp_path):
    config = Path(detection.work_dir).parent / 'config.py'
    printed = tool('check', config, '--images', 0, '--work-dir', tmp_path / 'work')
    assert 'gid.loss_feature' in printed
    assert printed.splitlines()[-1].endswith('check.html')
    page = (tmp_path / 'work' / 'check.html').read_text()
    assert 'What the networks see' in page
    assert 'data:image/png' in page
    figures = json.loads((tmp_path / 'work' / 'check.json').read_text())
    assert {each['name'] for each in figures['losses']} >= {TASK, 'gid.loss_feature'}


@pytest.mark.slow
def test_a_teacher_that_knows_nothing_ends_the_check_and_the_first_training(detection, tmp_path):
    config = Path(detection.work_dir).parent / 'config.py'
    for command in ('check', 'train'):
        said = tool(command, config, '--work-dir', tmp_path / command, expect=1, scored=True).splitlines()[-1]
        assert said.startswith('error: model.teacher: coco/bbox_mAP 0')
    tool('train', config, '--work-dir', tmp_path / 'train')  # with --no-check
    tool('train', config, '--work-dir', tmp_path / 'train', scored=True)  # no first run any more


@pytest.mark.slow
def test_two_processes_score_a_teacher_together(detection, tmp_path):
    config = Path(detection.work_dir).parent / 'config.py'
    said = train_together(config, 2, '--work-dir', tmp_path / 'two', expect=1, scored=True)
    lines = {each.splitlines()[-1] for each in said}
    assert len(lines) == 1
    assert ' on 8 validation images, which is next to nothing' in lines.pop()


@pytest.mark.slow
def test_mistakes_of_the_command(tmp_path):
    plain = shapes_config(tmp_path, detectors.retinanet(classes=6))
    plain.dump(tmp_path / 'plain.py')
    said = tool('check', tmp_path / 'plain.py', expect=1).splitlines()[-1]
    assert said == 'error: model: it has no student; a plain model learns from nobody'
