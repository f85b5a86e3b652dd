"""Images that are labelled for some classes alone."""

import copy

import numpy as np
import pytest
import torch
from mmdet.structures.bbox import HorizontalBoxes

import mmkd
from mmkd.data.domains import LabelledFor
from mmkd.errors import ConfigError
from mmkd.testing import detectors, models, segmentors
from mmkd.testing.batches import random_batch

HEADS = {
    'retinanet': (detectors.retinanet, 'bbox_head.retina_cls', 3),
    'fcos': (detectors.fcos, 'bbox_head.conv_cls', 3),
    'gfl': (detectors.gfl, 'bbox_head.gfl_cls', 3),
    'faster_rcnn': (detectors.faster_rcnn, 'roi_head.bbox_head.fc_cls', 4),
    'pspnet': (segmentors.pspnet, 'decode_head.conv_seg', 19),
}


def build(make, **options):
    layer = 'backbone.layer4' if make is segmentors.pspnet else 'neck'
    model = mmkd.distill(
        models.build(make(), seed=0),
        dict(config=models.build(make(), seed=1)),
        dict(it=dict(type='CWD', layer=layer)),
        **options,
    )
    model.sources['teacher'].load()
    return model.train()


def batch(model, labelled_for=(None, None)):
    data = model.data_preprocessor(random_batch(model, (2, 3, 64, 96)), True)
    for sample, classes in zip(data['data_samples'], labelled_for):
        if classes is None:
            continue
        sample.set_metainfo(dict(labelled_for=classes))
        if 'gt_sem_seg' in sample:
            labels = sample.gt_sem_seg.data
            labels[:], labels[..., ::2] = classes[0], classes[-1]
        else:
            sample.gt_instances.labels[:] = classes[0]
    return data


def losses(model, data):
    torch.manual_seed(0)
    return model(**copy.deepcopy(data), mode='loss')


def task(found):
    return {key: value for key, value in found.items() if not key.startswith('it.')}


@pytest.mark.parametrize('head', HEADS)
def test_classes_that_are_not_labelled_get_no_gradient(head):
    make, layer, rows = HEADS[head]
    model = build(make)
    known = (0, 1) if head == 'pspnet' else (0,)  # a softmax over a single class has no gradient
    found = losses(model, batch(model, (known, known)))
    model.parse_losses(task(found))[0].backward()
    gradient = model.get_submodule(layer).weight.grad
    by_class = gradient.unflatten(0, (-1, rows)).transpose(0, 1).flatten(1).abs().sum(1)
    expected = [c in known or (head == 'faster_rcnn' and c == rows - 1) for c in range(rows)]
    assert (by_class > 0).tolist() == expected


@pytest.mark.parametrize('head', HEADS)
def test_images_that_are_labelled_for_all_are_as_ever(head):
    make, _, rows = HEADS[head]
    model = build(make)
    number = rows - (head == 'faster_rcnn')
    data = batch(model)
    expected = losses(model, data)
    for sample in data['data_samples']:
        sample.set_metainfo(dict(labelled_for=tuple(range(number))))
    found = losses(model, data)
    for key, value in task(expected).items():
        torch.testing.assert_close(found[key], value)


@pytest.mark.parametrize('head', HEADS)
def test_the_loss_is_that_of_a_head_that_never_says_the_others(head):
    make, layer, rows = HEADS[head]
    model = build(make)
    known = (0, 2)
    data = batch(model, (known, known))
    model.get_submodule(layer).bias.data.zero_()  # dense heads begin with next to no probability of any class
    found = losses(model, data)
    for sample in data['data_samples']:
        sample.set_metainfo(dict(labelled_for=None))
    assert abs(total(losses(model, data)) - total(found)) > 1e-4
    classifiers = [model.get_submodule(layer)]
    if head == 'pspnet':
        classifiers.append(model.auxiliary_head.conv_seg)
    number = rows - (head == 'faster_rcnn')
    for classifier in classifiers:
        for parameter, value in ((classifier.weight, 0.0), (classifier.bias, -1e4)):
            by_class = parameter.data.unflatten(0, (-1, rows))
            for c in set(range(number)) - set(known):
                by_class[:, c] = value
    expected = losses(model, data)
    for key in task(found):
        if 'acc' not in key:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-6)


def total(found):
    named = (value for key, value in task(found).items() if 'loss_cls' in key or 'loss_ce' in key)
    return sum(float(sum(value) if isinstance(value, list) else value) for value in named)


@pytest.mark.parametrize('head', ['retinanet', 'faster_rcnn', 'pspnet'])
def test_each_image_has_its_own(head):
    make, layer, rows = HEADS[head]
    model = build(make)
    known = ((0, 3), (1, 3)) if head == 'pspnet' else ((0,), (1,))
    found = losses(model, batch(model, known))
    model.parse_losses(task(found))[0].backward()
    gradient = model.get_submodule(layer).weight.grad
    by_class = gradient.unflatten(0, (-1, rows)).transpose(0, 1).flatten(1).abs().sum(1)
    assert (by_class[:2] > 0).all()
    assert by_class[2] == 0


def test_distillers_read_what_heads_say_of_all_classes():
    model = mmkd.distill(
        models.build(detectors.retinanet(), seed=0),
        dict(config=models.build(detectors.retinanet(), seed=1)),
        dict(it=dict(type='KD'), cwd=dict(type='CWD', layer='bbox_head.retina_cls')),
    )
    model.sources['teacher'].load()
    model.train()
    data = batch(model)
    expected = losses(model, data)
    found = losses(model, batch(model, ((0,), (1,))))
    for key in ('it.loss', 'cwd.loss'):
        torch.testing.assert_close(found[key], expected[key])
    assert (sum(found['loss_cls']) - sum(expected['loss_cls'])).abs() > 1e-4


def test_names_are_those_of_the_student():
    model = build(detectors.retinanet, class_names=('cat', 'dog', 'cow'))
    data = batch(model, ((1,), None))
    expected = losses(model, data)
    data['data_samples'][0].set_metainfo(dict(labelled_for=('dog',)))
    torch.testing.assert_close(losses(model, data)['loss_cls'], expected['loss_cls'])
    data['data_samples'][0].set_metainfo(dict(labelled_for=('dig',)))
    with pytest.raises(ConfigError, match="LabelledFor: the student has no class 'dig'; the nearest are 'dog'"):
        losses(model, data)


@pytest.mark.parametrize(
    ('classes', 'message'), [(('cat',), 'names of the student are not known'), ((7,), 'class 7; the student has 3')]
)
def test_classes_that_are_none(classes, message):
    model = build(detectors.retinanet)
    data = batch(model)
    data['data_samples'][0].set_metainfo(dict(labelled_for=classes))
    with pytest.raises(ConfigError, match=message):
        losses(model, data)


@pytest.mark.parametrize('classes', [(), 'car'])
def test_a_transform_for_no_classes(classes):
    with pytest.raises(ConfigError, match='expected a list of classes'):
        LabelledFor(classes)


def test_the_transform_marks_its_images():
    assert LabelledFor(('car', 3))({})['labelled_for'] == ('car', 3)


def test_heads_without_a_classifier_of_pixels_are_refused():
    from mmkd.hosts.partial_labels import labelled_classes

    model = build(segmentors.pspnet)
    data = batch(model, ((0, 1), None))
    del model.decode_head.conv_seg
    with pytest.raises(ConfigError, match='LabelledFor: decode_head is a PSPHead, in which classes cannot be left out'):
        with labelled_classes(model, data['data_samples'], None):
            pass


def test_labels_of_others_are_taken_out_where_all_classes_are_named():
    transform = LabelledFor(('cow', 'cat'), class_names=('cat', 'dog', 'cow'))
    boxes = HorizontalBoxes(torch.arange(16.0).view(4, 4))
    found = transform(
        dict(gt_bboxes=boxes, gt_bboxes_labels=np.array([1, 2, 0, 1]), gt_ignore_flags=np.array([0, 1, 0, 0], bool))
    )
    assert found['gt_bboxes'].tensor[:, 0].tolist() == [4, 8]
    assert found['gt_bboxes_labels'].tolist() == [2, 0]
    assert found['gt_ignore_flags'].tolist() == [True, False]
    assert found['labelled_for'] == ('cow', 'cat')
    nothing = transform(dict(gt_bboxes=boxes[:1], gt_bboxes_labels=np.array([1]), gt_ignore_flags=np.zeros(1, bool)))
    assert nothing['gt_bboxes'].tensor.shape == (0, 4)
    with pytest.raises(ConfigError, match="LabelledFor: the data set has no class 'cw'; the nearest are 'cow'"):
        LabelledFor(('cw',), class_names=('cat', 'dog', 'cow'))
