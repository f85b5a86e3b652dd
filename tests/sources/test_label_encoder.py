import copy
import io

import pytest
import torch

import mmkd
from mmkd.errors import ConfigError
from mmkd.hosts.detection.second_pass import losses_of_maps
from mmkd.sources.label_encoder import LabelPyramid, draw
from mmkd.taps import Taps
from mmkd.testing import detectors, models, segmentors
from mmkd.testing.batches import random_batch

CLASSES = 3
LABELENC = dict(it=dict(type='LabelEnc'))
BOXES = torch.tensor([[[2.0, 1, 8, 9], [4, 3, 12, 7], [1, 1, 4, 5]], [[0, 0, 6, 4], [0, 0, 0, 0], [0, 0, 0, 0]]])
LABELS = torch.tensor([[1, 1, 0], [2, 0, 0]])
VALID = torch.tensor([[True, True, True], [True, False, False]])


def test_the_drawing_as_plain_loops():
    brightness = torch.tensor([[0.5, 1.0, 0.25], [0.75, 1.0, 1.0]])
    found, dimmed = (
        draw(BOXES, LABELS, VALID, CLASSES, (10, 13)),
        draw(BOXES, LABELS, VALID, CLASSES, (10, 13), brightness),
    )
    assert found.shape == (2, CLASSES, 10, 13)
    for b in range(2):
        for c in range(CLASSES):
            for y in range(10):
                for x in range(13):
                    heights = [(0.0, 0.0)]
                    for k in range(3):
                        x1, y1, x2, y2 = BOXES[b, k].tolist()
                        if not VALID[b, k] or LABELS[b, k] != c:
                            continue
                        p = 1 - max(abs(x - (x1 + x2) / 2) / (x2 - x1), abs(y - (y1 + y2) / 2) / (y2 - y1))
                        if p >= 0.5:
                            heights.append((p, p * brightness[b, k].item()))
                    assert found[b, c, y, x].item() == pytest.approx(max(each for each, _ in heights))
                    assert dimmed[b, c, y, x].item() == pytest.approx(max(each for _, each in heights))
    assert found.max() == 1  # in the center of a box that has a pixel there
    assert not draw(BOXES, LABELS, torch.zeros_like(VALID), CLASSES, (10, 13)).any()


def distilled(family='retinanet', distillers=LABELENC, inherit=(), config=None, **teacher):
    student = models.build(config or getattr(detectors, family)(), seed=0)
    torch.manual_seed(0)
    model = mmkd.distill(student, dict(type='LabelEncoder', **teacher), copy.deepcopy(distillers), inherit=inherit)
    model.init_weights()
    return model.train()


def batch_of(model, objects=4):
    return model.data_preprocessor(random_batch(model, (2, 3, 96, 128), objects), True)


def saved(model, path):
    torch.save(dict(state_dict=model.state_dict()), path)
    return str(path)


def gradients(model, value):
    model.zero_grad()
    value.backward(retain_graph=True)
    return {name for name, each in model.named_parameters() if each.grad is not None and each.grad.abs().sum() > 0}


@pytest.mark.parametrize('family', ['retinanet', 'fcos', 'gfl', 'faster_rcnn'])
def test_the_first_training(family):
    """The encoder learns by the student's heads alone, the student's neck by the distance."""
    model = distilled(family)
    found = model(**batch_of(model), mode='loss')
    of_labels, of_distance = gradients(model, found['teacher.loss']), gradients(model, found['it.loss'])
    encoder = {name for name, _ in model.named_parameters() if name.startswith('sources.teacher.model')}
    assert encoder & of_labels
    assert any(name.startswith(('bbox_head', 'roi_head')) for name in of_labels)
    assert not any(name.startswith(('backbone', 'neck')) for name in of_labels)
    assert not encoder & of_distance
    assert not any('head' in name for name in of_distance)
    assert any(name.startswith('backbone') for name in of_distance)
    sum(value for key, value in found.items() if key in ('teacher.loss', 'it.loss')).backward()
    assert all(dict(model.named_parameters())[name].grad is not None for name in encoder)


@pytest.mark.parametrize('family', ['retinanet', 'faster_rcnn'])
def test_the_second_training(family, tmp_path):
    """Its encoder is that of the first, frozen and no part of the model; neck and heads begin as what reads it."""
    first = distilled(family)
    with torch.no_grad():
        for each in first.parameters():
            each += 0.01 * torch.randn_like(each)
    heads = ['bbox_head'] if family == 'retinanet' else ['rpn_head', 'roi_head']
    model = distilled(family, inherit=['neck', *heads], checkpoint=saved(first, tmp_path / 'first.pth'))
    assert not [name for name in model.state_dict() if name.startswith('sources.')]
    for name, value in first.sources['teacher'].model.state_dict().items():
        assert torch.equal(model.sources['teacher'].model.state_dict()[name], value), name
        if name.startswith('neck'):
            assert torch.equal(model.state_dict()[name], value)
    for head in heads:
        for name, value in first.get_submodule(head).state_dict().items():
            assert torch.equal(model.get_submodule(head).state_dict()[name], value)
    batch = batch_of(model)
    found = model(**batch, mode='loss')
    assert 'teacher.loss' not in found
    learns = gradients(model, found['it.loss'])
    assert any(name.startswith('backbone') for name in learns)
    assert all(each.grad is None for each in model.sources['teacher'].model.parameters())
    expected = first.eval().sources['teacher'].model(batch['inputs'], batch['data_samples'])
    taps, _ = model.sources['teacher'].read(model, batch['inputs'], batch['data_samples'])
    for level, other in zip(taps['pyramid'], expected):
        torch.testing.assert_close(level, other)


def test_the_loss_is_that_of_layer_normed_maps():
    model = distilled()
    model.sources['teacher'].model.eval()  # without random brightness
    batch = batch_of(model)
    with torch.no_grad():
        features, labels = model.extract_feat(batch['inputs']), model.sources['teacher'].model(**batch)
        total = count = 0
        for own, other in zip(features, labels):
            own = model.distillers['it'].adapter(own)
            own, other = (torch.nn.functional.layer_norm(each, each.shape[1:]) for each in (own, other))
            total, count = total + (own - other).square().sum(), count + own.numel()
        found = model(**batch, mode='loss')['it.loss']
    torch.testing.assert_close(found, total / count)


def test_the_encoders_own_loss_is_the_students_over_its_maps():
    model = distilled()
    batch = batch_of(model)
    torch.manual_seed(3)
    found = model(**batch, mode='loss')['teacher.loss']
    torch.manual_seed(3)
    maps = model.sources['teacher'].model(**batch)
    torch.testing.assert_close(found, losses_of_maps(model, maps, batch['data_samples']))


def test_brightness_is_random_in_training_alone():
    model = LabelPyramid(CLASSES, models.build(detectors.retinanet()).neck)
    batch = batch_of(models.build(detectors.retinanet()))
    first, second = (model.train()(**batch)[0] for _ in range(2))
    assert not torch.equal(first, second)
    first, second = (model.eval()(**batch)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_without_a_box_nothing_is_learnt(tmp_path):
    first = distilled()
    for model in (first, distilled(checkpoint=saved(first, tmp_path / 'first.pth'))):
        found = {key: value for key, value in model(**batch_of(model, 0), mode='loss').items() if 'loss' in key[-5:]}
        own = [value for key, value in found.items() if key in ('it.loss', 'teacher.loss')]
        assert all(value == 0 for value in own)
        sum(own).backward()
        trained = [*model.distillers.parameters(), *model.sources.parameters()]
        assert all(each.grad is not None and torch.isfinite(each.grad).all() for each in trained)


def test_before_the_distance_begins_the_encoder_learns_already():
    model = distilled(distillers=dict(it=dict(type='LabelEnc', loss_weight=dict(type='constant', value=1.0, begin=5))))
    found = model(**batch_of(model), mode='loss')
    assert found['teacher.loss'] > 0
    adapter = {name for name, _ in model.named_parameters() if '.adapter.' in name}
    assert gradients(model, found['it.loss']) <= adapter


def test_a_new_encoder_has_a_neck_of_its_own_weights():
    model = distilled()
    for name, value in model.neck.named_parameters():
        if name.endswith('weight'):
            assert not torch.equal(value, model.sources['teacher'].model.neck.get_parameter(name))


def test_any_method_can_read_the_pyramid():
    model = distilled(distillers=dict(it=dict(type='CWD', layer='neck', teacher_layer='pyramid')))
    found = model(**batch_of(model), mode='loss')
    assert any(name.startswith('backbone') for name in gradients(model, found['it.loss']))
    assert not any(name.startswith('sources') for name in gradients(model, found['it.loss']))


def test_the_plain_model_is_left_and_copies_are_whole(tmp_path):
    first = distilled()
    again = copy.deepcopy(first)
    assert again.sources['teacher'].kept is dict(again.sources.named_children())['teacher']
    again(**batch_of(again), mode='loss')['teacher.loss'].backward()
    assert any(each.grad is not None for each in again.sources.parameters())
    assert all(each.grad is None for each in first.sources.parameters())
    torch.save(first, io.BytesIO())
    second = distilled(checkpoint=saved(first, tmp_path / 'first.pth'))
    plain = models.build(detectors.retinanet(), seed=0)
    for model in (first, second):
        assert list(model.plain().state_dict()) == list(plain.state_dict())
        assert type(model) is type(plain)


def test_other_classes_or_another_neck_are_refused(tmp_path):
    path = saved(distilled(), tmp_path / 'first.pth')
    with pytest.raises(
        ConfigError, match=r"teacher.checkpoint .*holds 0 label encoders that fit this student's classes"
    ):
        distilled(config=detectors.retinanet(classes=4), checkpoint=path)
    plain = saved(models.build(detectors.retinanet()), tmp_path / 'plain.pth')
    with pytest.raises(ConfigError, match='holds 0 label encoders'):
        distilled(checkpoint=plain)
    with pytest.raises(ConfigError, match='no such file'):
        distilled(checkpoint=str(tmp_path / 'nothing.pth'))


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ConfigError, match='LabelEncoder runs the heads over maps made of labels'):
        mmkd.distill(models.build(segmentors.pspnet()), dict(type='LabelEncoder'), dict(LABELENC))
    student = models.build(detectors.retinanet())
    with pytest.raises(ConfigError, match=r"LabelEnc learns from labels, .* use teacher=dict\(type='LabelEncoder'\)"):
        mmkd.distill(student, dict(type='Own'), dict(LABELENC))
    with pytest.raises(ConfigError, match='there are 0 frozen teachers'):
        mmkd.distill(student, dict(type='LabelEncoder'), dict(LABELENC), inherit=['neck'])
    short = detectors.retinanet(
        backbone=dict(out_indices=(1, 2, 3)), neck=dict(in_channels=[16, 32, 64], start_level=0)
    )
    with pytest.raises(ConfigError, match='LabelEncoder needs a neck with four inputs'):
        mmkd.distill(models.build(short), dict(type='LabelEncoder'), dict(LABELENC))


def test_a_frozen_encoder_that_was_not_loaded_is_no_teacher(tmp_path):
    path = saved(distilled(), tmp_path / 'first.pth')
    student = models.build(detectors.retinanet(), seed=0)
    model = mmkd.distill(student, dict(type='LabelEncoder', checkpoint=path), dict(LABELENC)).train()
    with pytest.raises(ConfigError, match='its weights are not loaded yet'):
        model(**batch_of(model), mode='loss')


@pytest.mark.parametrize('second', [False, True])
def test_images_with_some_labels_are_refused(second, tmp_path):
    """Of the second training as well, whose frozen encoder has no losses of its own."""
    model = distilled()
    if second:
        model = distilled(inherit=['neck', 'bbox_head'], checkpoint=saved(model, tmp_path / 'first.pth'))
        model.init_weights()
    batch = batch_of(model)
    batch['data_samples'][0].set_metainfo(dict(labelled_for=(0, 1)))
    with pytest.raises(ConfigError, match='labelled for some classes alone'):
        model(**batch, mode='loss')


def test_the_pyramid_has_the_necks_shapes():
    model = distilled('faster_rcnn')
    batch = batch_of(model)
    with Taps(model, ['neck'], images=2) as taps:
        model.extract_feat(batch['inputs'])
    made = model.sources['teacher'].model(**batch)
    assert [each.shape for each in made] == [each.shape for each in taps['neck']]
