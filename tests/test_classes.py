"""A teacher of other classes than the student's."""

import copy

import pytest
import torch

import mmkd
from mmkd.classes import ClassMap, class_map
from mmkd.errors import ConfigError
from mmkd.testing import detectors, models, segmentors
from mmkd.testing.batches import random_batch

MAKERS = {
    'slots': (detectors.retinanet, 'bbox_head.retina_cls', 3),
    'locations': (detectors.fcos, 'bbox_head.conv_cls', 3),
    'distributions': (detectors.gfl, 'bbox_head.gfl_cls', 3),
    'regions': (detectors.faster_rcnn, 'roi_head.bbox_head.fc_cls', 3),
    'pixels': (segmentors.pspnet, 'decode_head.conv_seg', 19),
}


def pair(make, teacher_classes=None, classes=None, student=None, seed=1, **options):
    """A student with KD from a model of other weights."""
    changes = {} if teacher_classes is None else dict(classes=teacher_classes)
    teacher = models.build(make(**changes), seed=seed).eval()
    model = mmkd.distill(
        models.build(make(), seed=0) if student is None else student,
        dict(config=teacher, classes=classes),
        dict(kd=dict(type='KD', **options)),
    )
    model.sources['teacher'].load()
    return model.train()


def loss(model, batch=None):
    data = model.data_preprocessor(batch or random_batch(model, (2, 3, 64, 96)), True)
    torch.manual_seed(0)
    return model(**data, mode='loss')['kd.loss']


def permute_rows(model, layer, classes, order):
    """Let a classifier put out its classes in another order, background apart."""
    module = model.get_submodule(layer)
    for name in ('weight', 'bias'):
        value = getattr(module, name)
        rows = value.data.unflatten(0, (-1, classes)) if len(value) % classes == 0 else value.data[None]
        rows[:, : len(order)] = rows[:, order].clone()
        value.data.copy_(rows.reshape(value.shape))


@pytest.mark.parametrize('kind', MAKERS)
def test_the_identity_changes_nothing(kind):
    make, _, classes = MAKERS[kind]
    expected = loss(pair(make))
    assert expected > 0
    torch.testing.assert_close(loss(pair(make, classes={c: c for c in range(classes)})), expected)


@pytest.mark.parametrize('kind', MAKERS)
def test_a_map_undoes_a_permuted_teacher(kind):
    make, layer, classes = MAKERS[kind]
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(3)).tolist()
    assert order != sorted(order)
    expected = loss(pair(make))
    teacher = models.build(make(), seed=1).eval()
    permute_rows(teacher, layer, classes, order)

    def found(classes):
        model = mmkd.distill(
            models.build(make(), seed=0), dict(config=teacher, classes=classes), dict(kd=dict(type='KD'))
        )
        model.sources['teacher'].load()
        return loss(model.train())

    # the teacher's row i is what row order[i] was
    torch.testing.assert_close(found({own: order.index(own) for own in range(classes)}), expected)
    assert (found(None) - expected).abs() > 1e-3 * expected


@pytest.mark.parametrize('kind', ['slots', 'locations', 'distributions', 'pixels'])
def test_what_the_teacher_does_not_know_is_not_learnt(kind):
    """A class without a teacher contributes nothing, not even a gradient."""
    make, layer, classes = MAKERS[kind]
    model = pair(make, teacher_classes=4, classes={0: 2, 2: 0})
    loss(model).backward()
    weight = model.get_submodule(layer).weight.grad
    by_class = weight.unflatten(0, (-1, classes)).transpose(0, 1).flatten(1).abs().sum(1)
    assert (by_class > 0).tolist() == [c in (0, 2) for c in range(classes)]


def test_a_softmax_is_taken_over_the_shared_classes():
    """And, of regions, over the background, so that what is unknown to the teacher changes nothing."""
    model = pair(detectors.faster_rcnn, teacher_classes=2, classes={0: 1, 2: 0})
    expected = loss(model)
    model.roi_head.bbox_head.fc_cls.bias.data[1] += 3
    torch.testing.assert_close(loss(model), expected)
    model.roi_head.bbox_head.fc_cls.bias.data[3] += 3
    assert (loss(model) - expected).abs() > 1e-3


def test_a_teacher_of_more_classes():
    assert loss(pair(detectors.retinanet, teacher_classes=7, classes={0: 6, 1: 3, 2: 0})) > 0


def test_names_of_either_side():
    student, teacher = ('car', 'person', 'dog'), ('animal', 'vehicle')
    assert class_map(dict(car='vehicle', dog='animal'), student, teacher) == ClassMap((0, 2), (1, 0))
    assert class_map({2: 'animal', 'car': 1}, student, teacher) == ClassMap((0, 2), (1, 0))


@pytest.mark.parametrize(
    ('classes', 'message'),
    [
        ({}, "classes={}: expected the student's classes"),
        (dict(cat='animal'), "the student has no class 'cat'; the nearest are 'car'"),
        (dict(dog='vehicles'), "the teacher has no class 'vehicles'; the nearest are 'vehicle'"),
        (dict(dog='animal', person='animal'), "'dog' and 'person' of the student both are 'animal'"),
        ({'dog': 'animal', 2: 'vehicle'}, 'class 2 of the student is named twice'),
        ({'dog': 1.5}, "1.5: expected a class's name or its index"),
        ({'dog': -1}, "-1: expected a class's name or its index"),
    ],
)
def test_maps_that_are_none(classes, message):
    with pytest.raises(ConfigError, match=message):
        class_map(classes, ('car', 'person', 'dog'), ('animal', 'vehicle'))


def test_names_that_nobody_knows():
    with pytest.raises(ConfigError, match=r"teacher: classes: 'car': the names of the student are not known"):
        pair(detectors.retinanet, classes=dict(car=0))
    with pytest.raises(ConfigError, match=r'teacher class 5; it has 3, 0 to 2'):
        pair(detectors.retinanet, classes={0: 5})
    with pytest.raises(ConfigError, match='student class 9; it has 3'):
        pair(detectors.faster_rcnn, classes={9: 1})


@pytest.mark.parametrize(
    ('entry', 'message'),
    [
        (dict(type='GID'), "GID reads 'bbox_head' of a teacher with other classes"),
        (dict(type='CWD', layer='bbox_head.retina_cls'), "CWD reads 'bbox_head.retina_cls' of a teacher with other"),
    ],
)
def test_methods_that_would_compare_other_classes_are_refused(entry, message):
    teacher = dict(config=models.build(detectors.retinanet()), classes={0: 1, 1: 0, 2: 2})
    with pytest.raises(ConfigError, match=message):
        mmkd.distill(models.build(detectors.retinanet()), teacher, dict(it=entry))
    mmkd.distill(models.build(detectors.retinanet()), teacher, dict(it=dict(type='CWD', layer='neck')))


def test_a_method_that_runs_the_teachers_head_by_itself_is_refused():
    teacher = dict(config=models.build(detectors.faster_rcnn()), classes={0: 1, 1: 0, 2: 2})
    with pytest.raises(ConfigError, match='Mimic compares classes, and those of its teacher are others'):
        mmkd.distill(models.build(detectors.faster_rcnn()), teacher, dict(it=dict(type='Mimic', cls_weight=1.0)))
    mmkd.distill(models.build(detectors.faster_rcnn()), teacher, dict(it=dict(type='Mimic')))
    mmkd.distill(models.build(detectors.faster_rcnn()), teacher, dict(it=dict(type='GID', head='rpn_head')))


@pytest.mark.parametrize('kind', ['DKD', 'Chen'])
def test_methods_that_always_compare_classes_of_regions_are_refused(kind):
    """Of as many classes as the student's, so that nothing else tells."""
    teacher = dict(config=models.build(detectors.faster_rcnn()), classes={0: 1, 1: 0, 2: 2})
    with pytest.raises(
        ConfigError, match=f'distillers.it: {kind} compares classes, and those of its teacher are others'
    ):
        mmkd.distill(models.build(detectors.faster_rcnn()), teacher, dict(it=dict(type=kind)))


def rows(tensor, classes, each, background):
    """A classifier's rows by class: (groups, classes, rows of a class that stand together, ...)."""
    return tensor[: len(tensor) - background].unflatten(0, (-1, classes, each))


@pytest.mark.parametrize('kind', MAKERS)
def test_of_an_inherited_classifier_the_rows_of_the_shared_classes_are_copied(kind):
    """An old model of fewer classes starts a student of more; all else of the head is copied as it is."""
    make, layer, number = MAKERS[kind]
    part = layer.partition('.')[0]
    teacher = models.build(make(classes=2), seed=1)
    for value in teacher.get_submodule(part).parameters():
        torch.nn.init.normal_(value)
    student = models.build(make(), seed=0)
    before = copy.deepcopy(student)
    options = dict(tau=1.0) if kind != 'regions' else {}
    model = mmkd.distill(
        student, dict(config=teacher, classes={0: 1, 2: 0}), dict(it=dict(type='KD', **options)), inherit=[part]
    )
    model.init_weights()
    extra = int(kind == 'regions')
    for name, value in model.get_submodule(part).named_parameters():
        source, own = teacher.get_parameter(f'{part}.{name}'), before.get_parameter(f'{part}.{name}')
        if 'conv_seg' not in name and '_cls.' not in name and 'fc_reg' not in name:
            assert torch.equal(value, source), name
            continue
        each = 4 if 'fc_reg' in name else 1
        background = extra if 'fc_cls' in name else 0

        assert torch.equal(rows(value, number, each, background)[:, 0], rows(source, 2, each, background)[:, 1]), name
        assert torch.equal(rows(value, number, each, background)[:, 2], rows(source, 2, each, background)[:, 0]), name
        assert torch.equal(rows(value, number, each, background)[:, 1], rows(own, number, each, background)[:, 1]), name
        if background:
            assert torch.equal(value[-1], source[-1])


def test_a_classifier_of_another_form_is_not_inherited():
    other = models.build(detectors.retinanet(classes=2, bbox_head=dict(anchor_generator=dict(ratios=[1.0]))))
    entry = dict(it=dict(type='CWD', layer='neck'))
    with pytest.raises(
        ConfigError, match=r'inherit: bbox_head.retina_cls.weight is \(9, 16, 3, 3\) in the student and \(2, '
    ):
        mmkd.distill(
            models.build(detectors.retinanet()), dict(config=other, classes={0: 1}), entry, inherit=['bbox_head']
        )
