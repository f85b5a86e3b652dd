"""Pseudo labels while training: a teacher labels the unlabelled images of a batch, and the student learns them."""

import copy
import functools

import pytest
import torch
from mmengine.structures import InstanceData, PixelData

import mmkd
from mmkd.errors import ConfigError
from mmkd.hosts.detection.boxes import pairwise_iof, pairwise_iou
from mmkd.hosts.detection.ignored import assigners, leaving_out_ignored
from mmkd.sources.teacher_labels import TeacherLabels
from mmkd.testing import detectors, models, segmentors
from mmkd.testing.batches import random_batch

DETECTORS = {
    'retinanet': detectors.retinanet,
    'gfl': detectors.gfl,
    'atss': detectors.atss,
    'fcos': detectors.fcos,
    'faster_rcnn': detectors.faster_rcnn,
}
LAYER = {'detector': 'neck', 'segmentor': 'backbone.layer4'}
BOXES = torch.tensor([[4.0, 6, 40, 50], [30, 10, 90, 60], [8, 8, 30, 30], [50, 20, 50, 40]])
SCORES = torch.tensor([0.9, 0.6, 0.4, 0.95])
LABELS = torch.tensor([2, 0, 1, 1])


def build(make=detectors.retinanet, teacher=None, source=None, distillers=None, **options):
    student = models.build(make(), seed=0)
    layer = LAYER['segmentor' if hasattr(student, 'decode_head') else 'detector']
    model = mmkd.distill(
        student,
        source or dict(config=models.build(teacher or make(), seed=1)),
        dict(it=dict(type='CWD', layer=layer)) if distillers is None else distillers,
        pseudo_labels=dict(dict(score=0.5), **options.pop('labels', {})),
        **options,
    )
    for each in model.sources.values():
        each.load()
    return model.eval()  # batch norms and dropout are not what is tested here


def predicts(model, boxes=BOXES, scores=SCORES, labels=LABELS):
    """Let the teacher say this of each image."""
    model.sources['teacher'].predict = lambda student, inputs, samples: [
        InstanceData(bboxes=boxes, scores=scores, labels=labels) for _ in samples
    ]
    return model


def batch(model, unlabelled=(1, 2), images=4):
    data = model.data_preprocessor(random_batch(model, (images, 3, 64, 96)), True)
    for index, sample in enumerate(data['data_samples']):
        sample.set_metainfo(dict(domain='target' if index in unlabelled else 'source'))
        if index in unlabelled:
            if 'gt_instances' in sample:
                sample.gt_instances = sample.gt_instances[:0]
            else:
                sample.gt_sem_seg.data.fill_(255)
    return data


def part(data, indices):
    return dict(inputs=data['inputs'][list(indices)], data_samples=[data['data_samples'][index] for index in indices])


def losses(model, data):
    torch.manual_seed(0)
    return model(**copy.deepcopy(data), mode='loss')


def of(found, prefix=''):
    return {
        key.removeprefix(prefix): sum(value) if isinstance(value, list) else value
        for key, value in found.items()
        if (key.startswith(prefix) if prefix else not key.startswith(('it.', 'unlabelled.', 'task.')))
    }


def same(found, expected, factor=1.0):
    assert expected.keys() <= found.keys()
    for key, value in expected.items():
        times = factor if 'loss' in key else 1
        torch.testing.assert_close(found[key], times * value, rtol=1e-5, atol=1e-6)


def plain_losses(make, data):
    return losses(models.build(make(), seed=0).eval(), data)


@pytest.mark.parametrize('name', [name for name in DETECTORS if name != 'faster_rcnn'])
def test_the_student_learns_the_certain_boxes_as_the_plain_model_learns_objects(name):
    """Those that are sure enough and have a side; two-stage detectors draw regions at random."""
    model = predicts(build(DETECTORS[name], labels=dict(weight=0.25)))
    data = batch(model)
    found = losses(model, data)
    expected = part(data, (1, 2))
    for sample in expected['data_samples']:
        sample.gt_instances = InstanceData(bboxes=BOXES[:2], labels=LABELS[:2])
    same(of(found, 'unlabelled.'), of(plain_losses(DETECTORS[name], expected)), 0.25)
    same(of(found), of(plain_losses(DETECTORS[name], part(data, (0, 3)))))
    assert found['unlabelled.objects'] == 2


def test_samples_are_labelled_as_copies():
    model = predicts(build())
    data = batch(model)
    before = copy.deepcopy(data['data_samples'])
    model(**data, mode='loss')
    for sample, other in zip(data['data_samples'], before):
        assert torch.equal(sample.gt_instances.bboxes, other.gt_instances.bboxes)
        assert not hasattr(sample, 'pred_instances')


@pytest.mark.parametrize('make', [detectors.retinanet, detectors.faster_rcnn, segmentors.pspnet])
@pytest.mark.parametrize('unlabelled', [(), (1, 2), (0, 1, 2, 3)])
def test_every_parameter_has_a_gradient_whatever_the_batch_has(make, unlabelled):
    """Which several processes count on; and the teacher has none."""
    model = build(make, labels=dict(score=0.05))
    found = losses(model, batch(model, unlabelled))
    model.parse_losses(found)[0].backward()
    assert all(each.grad is not None for each in model.parameters() if each.requires_grad)
    assert any(key.startswith('unlabelled.') for key in found) == bool(unlabelled)
    assert not any(each.requires_grad for each in model.sources['teacher'].model.parameters())


@pytest.mark.parametrize('make', [detectors.retinanet, detectors.faster_rcnn])
@pytest.mark.parametrize('distillers', [{}, None])
def test_a_real_teachers_boxes_are_those_that_it_predicts_by_itself(make, distillers):
    """In pixels of the input, at its own scale too. mmcv's RoIAlign takes maps in the layout of channels_last for others."""
    for scale in (1.0, 2.0):
        teacher = models.build(make(), seed=1)
        model = build(make, source=dict(config=teacher, scale=scale), distillers=distillers)
        data = batch(model)
        found = model.sources['teacher'].predict(model, data['inputs'], data['data_samples'])
        large = torch.nn.functional.interpolate(data['inputs'], scale_factor=scale, mode='bilinear')
        samples = [copy.deepcopy(each) for each in data['data_samples']]
        for sample in samples:
            size = tuple(int(scale * side) for side in sample.img_shape)
            sample.set_metainfo(dict(img_shape=size, batch_input_shape=size, pad_shape=size))
        expected = teacher.eval().predict(large, samples, rescale=False)
        for one, other in zip(found, expected):
            assert len(one.bboxes) == len(other.pred_instances) > 0
            torch.testing.assert_close(one.bboxes * scale, other.pred_instances.bboxes, rtol=1e-3, atol=1e-2)
            torch.testing.assert_close(one.scores, other.pred_instances.scores, rtol=1e-3, atol=1e-4)


def test_classes_are_the_students_own_and_others_are_no_objects():
    """Teacher's class 0 is the student's 2, its 2 the student's 0; of its 1 and 3 the student knows nothing."""
    model = build(source=dict(config=models.build(detectors.retinanet(classes=4), seed=1), classes={2: 0, 0: 2}))
    labels = TeacherLabels(score=0.3)
    labels.connect(model, model.sources)
    predicts(model, labels=torch.tensor([2, 0, 1, 3]))
    (sample,), factor, _ = labels(model, *part(batch(model), (1,)).values())
    assert factor == 1.0
    assert sample.gt_instances.labels.tolist() == [0, 2]
    assert torch.equal(sample.gt_instances.bboxes, BOXES[:2])
    assert sample.labelled_for == (0, 2)  # the student's class 1 is no background


def test_a_class_that_the_teacher_does_not_know_gets_no_gradient_of_its_labels():
    source = dict(config=models.build(detectors.retinanet(classes=4), seed=1), classes={0: 0, 2: 2})
    model = predicts(build(source=source, labels=dict(score=0.3)), labels=torch.tensor([0, 2, 0, 2]))
    found = losses(model, batch(model))
    total = sum(value for value in of(found, 'unlabelled.loss').values())
    gradient = torch.autograd.grad(total, model.bbox_head.retina_cls.bias)[0].view(-1, 3)
    assert (gradient[:, 1] == 0).all()
    assert (gradient[:, [0, 2]] != 0).any()


def test_where_the_teacher_is_sure_of_nothing_nothing_is_learnt():
    """As in mmdet: a batch without any object does not teach that all is background."""
    model = predicts(build(labels=dict(score=0.99)))
    found = losses(model, batch(model))
    assert found['unlabelled.objects'] == 0
    assert all(float(value) == 0 for value in of(found, 'unlabelled.').values())
    model.parse_losses(found)[0].backward()


def test_weights_are_schedules_and_teachers_are_read_now_and_then():
    model = predicts(build(labels=dict(weight=dict(type='linear', value=1.0, end=2)), source=None))
    model.train()
    model.backbone.eval()
    data = batch(model)
    found = [of(losses(model, data), 'unlabelled.') for _ in range(3)]
    assert found[0] == {}
    same(found[1], {key: value for key, value in found[2].items() if 'loss' in key}, 0.5)
    model.sources['teacher'].begin = 10
    assert of(losses(model, data), 'unlabelled.') == {}


def test_distillation_is_that_of_all_images_in_their_order():
    model = predicts(build())
    data = batch(model)
    with_labels = losses(model, data)['it.loss']
    model._teacher_labels = None
    torch.testing.assert_close(with_labels, losses(model, data)['it.loss'])


def test_labels_alone_without_any_distiller():
    model = predicts(build(distillers={}))
    found = losses(model, batch(model))
    assert of(found, 'unlabelled.')
    assert not model.distillers
    plain = model.plain()
    assert list(plain.state_dict()) == list(models.build(detectors.retinanet()).state_dict())
    assert not any(key.startswith('_teacher') for key in vars(plain))


def test_without_the_task_heads_learn_what_the_teacher_says():
    model = predicts(build(distillers={}, task_weight=0))
    found = losses(model, batch(model))
    assert of(found) == {}
    model.parse_losses(found)[0].backward()
    assert model.bbox_head.retina_cls.weight.grad.any()


def test_an_average_labels_as_well():
    model = build(source=dict(type='Average'), labels=dict(score=0.005), distillers={})
    found = losses(model, batch(model))
    assert found['unlabelled.objects'] > 0


# --- uncertain boxes


def uncertain(make, **labels):
    return predicts(build(make, labels=dict(dict(score=0.8, uncertain=0.3), **labels)))


@pytest.mark.parametrize('name', ['retinanet', 'gfl', 'atss', 'faster_rcnn'])
def test_uncertain_boxes_are_neither_objects_nor_background(name, monkeypatch):
    """Each negative of which more than half lies in one is left out; all else is as without them."""
    make = DETECTORS[name]
    model = models.build(make(), seed=0)
    seen = []
    for kind in {type(each) for each in assigners(model)}:

        def spy(self, pred_instances, *args, assign=kind.assign, **kwargs):
            result = assign(self, pred_instances, *args, **kwargs)
            seen.append((result.gt_inds.clone(), pred_instances.priors.clone(), result))
            return result

        monkeypatch.setattr(kind, 'assign', functools.wraps(kind.assign)(spy))
    data = batch(model, unlabelled=())
    region = torch.tensor([[20.0, 16, 80, 60]])
    for sample in data['data_samples']:
        sample.ignored_instances = InstanceData(bboxes=region, labels=torch.zeros(1, dtype=torch.long))
    with leaving_out_ignored(model):
        losses(model, data)
    assert not any('assign' in vars(each) for each in assigners(model))
    left = 0
    for own, priors, result in seen:
        inside = pairwise_iof(priors, region)[:, 0] > 0.5
        for prior, was, lies, now in zip(
            priors.tolist(), own.tolist(), inside.tolist(), result.gt_inds[-len(own) :].tolist()
        ):
            assert now == (-1 if was == 0 and lies else was), prior
            left += was == 0 and lies
    assert left > 0


def test_their_losses_have_no_gradient_there():
    """One image, one uncertain box, and no object: its places are not taught, the others are background."""
    model = uncertain(detectors.retinanet)
    predicts(model, torch.tensor([[0.0, 0, 96, 64], [0, 0, 0.5, 0.5]]), torch.tensor([0.5, 0.9]), torch.tensor([1, 1]))
    data = batch(model, unlabelled=(0, 1, 2, 3))
    seen = []
    handle = model.bbox_head.retina_cls.register_forward_hook(
        lambda m, i, output: seen.append(output) or output.retain_grad()
    )
    own = of(losses(model, data), 'unlabelled.')
    handle.remove()
    own['loss_cls'].backward()
    first = seen[
        0
    ].grad  # of stride 8: anchors of 24 pixels, of which those at the border lie in the image by less than half
    assert not first[:, :, 2:-2, 2:-2].any()


def test_without_uncertain_ones_all_else_is_background():
    few, all_certain = (
        predicts(
            build(labels=each),
            BOXES[:1] if index == 1 else BOXES,
            SCORES[:1] if index == 1 else SCORES,
            LABELS[:1] if index == 1 else LABELS,
        )
        for index, each in enumerate((dict(score=0.8), dict(score=0.8)))
    )
    data = batch(few)
    same(of(losses(few, data), 'unlabelled.'), of(losses(all_certain, data), 'unlabelled.'))
    known = of(losses(uncertain(detectors.retinanet), data), 'unlabelled.')
    assert known['loss_cls'] < of(losses(few, data), 'unlabelled.')['loss_cls']


def test_how_much_of_a_box_lies_in_another():
    inner, outer = torch.tensor([[0.0, 0, 10, 10], [5, 5, 15, 15], [40, 40, 50, 50]]), torch.tensor([[0.0, 0, 20, 10]])
    assert pairwise_iof(inner, outer)[:, 0].tolist() == [1.0, 0.5, 0.0]
    torch.testing.assert_close(pairwise_iou(inner, outer)[0, 0], torch.tensor(0.5))


# --- segmentors


def test_pixels_have_the_teachers_class_where_it_is_sure_of_it():
    model = build(segmentors.pspnet, labels=dict(score=0.6, weight=0.5), distillers={})
    logits = torch.zeros(19, 64, 96)
    logits[3, :32], logits[5, 32:, :48] = 8.0, 8.0  # of the lower right no class has more than 1/19
    model.sources['teacher'].predict = lambda student, inputs, samples: [logits.clone() for _ in samples]
    data = batch(model)
    data['data_samples'][2].set_metainfo(dict(img_shape=(40, 80)))
    expected = part(data, (1, 2))
    found = losses(model, data)
    labels = torch.full((1, 64, 96), 255)
    labels[:, :32], labels[:, 32:, :48] = 3, 5
    for sample, (height, width) in zip(expected['data_samples'], ((64, 96), (40, 80))):
        own = labels.clone()
        own[:, height:], own[:, :, width:] = 255, 255
        sample.gt_sem_seg = PixelData(data=own)
    same(of(found, 'unlabelled.'), of(plain_losses(segmentors.pspnet, expected)), 0.5)
    same(of(found), of(plain_losses(segmentors.pspnet, part(data, (0, 3)))))
    share = ((0.5 + 0.25) + (32 * 80 + 8 * 48) / (64 * 96)) / 2
    assert float(found['unlabelled.pixels']) == pytest.approx(share)


def test_a_segmentors_teacher_says_what_it_says_by_itself():
    for mode in (dict(mode='whole'), dict(mode='slide', crop_size=(64, 64), stride=(32, 32))):
        teacher = models.build(segmentors.pspnet(test_cfg=mode), seed=1).eval()
        model = build(segmentors.pspnet, source=dict(config=teacher), distillers={})
        data = batch(model)
        found = model.sources['teacher'].predict(model, data['inputs'], data['data_samples'])
        with torch.no_grad():
            features = teacher.extract_feat(data['inputs'])
            whole = torch.nn.functional.interpolate(teacher.decode_head(features), (64, 96), mode='bilinear')
        assert found[0].shape == (19, 64, 96)
        if mode['mode'] == 'whole':
            torch.testing.assert_close(torch.stack(found), whole, rtol=1e-3, atol=1e-4)


def test_pixels_of_classes_that_the_student_does_not_have_are_ignored():
    teacher = models.build(segmentors.pspnet(classes=4), seed=1)
    model = build(segmentors.pspnet, source=dict(config=teacher, classes={7: 1, 2: 3}), distillers={})
    logits = torch.zeros(4, 64, 96)
    for index in range(4):
        logits[index, :, 24 * index : 24 * (index + 1)] = 9.0
    model.sources['teacher'].predict = lambda *given: [logits]
    (sample,), _, _ = model._teacher_labels(model, *part(batch(model), (1,)).values())
    assert sample.gt_sem_seg.data[0, 0, ::24].tolist() == [255, 7, 255, 2]


# --- what cannot be


def two(first, second):
    return dict(a=dict(config=models.build(first, seed=1)), b=second)


@pytest.mark.parametrize(
    ('labels', 'options', 'message'),
    [
        (dict(score=0), {}, r'score=0: expected a probability above 0'),
        (dict(score=1.5), {}, r'score=1.5: expected a probability'),
        (dict(score=0.5, uncertain=0.7), {}, r'uncertain=0.7: expected a probability below score=0.5'),
        (dict(uncertain='x'), {}, r"uncertain='x': expected a probability"),
        (dict(weight=-1), {}, r'pseudo_labels.weight=-1'),
        (dict(scores=0.5), {}, r"no option 'scores'; the nearest are 'score'"),
        (dict(teacher='large'), {}, r"pseudo_labels.teacher='large': there is none; there are teacher"),
        (dict(teacher=3), {}, r'pseudo_labels.teacher=3: expected a teacher'),
        (dict(), dict(source=dict(type='Own')), r"teacher='teacher': a Own labels no images"),
        (
            dict(),
            dict(source=two(detectors.retinanet(), dict(type='Average')), distillers={}),
            r'there are several teachers, a, b',
        ),
        (
            dict(teacher='b'),
            dict(source=two(detectors.retinanet(), dict(type='Peer', config=detectors.retinanet())), distillers={}),
            r"teacher='b': a Peer labels no images; a Teacher or an Average does",
        ),
        (dict(), dict(teacher=detectors.retinanet(classes=4)), r'the teacher has 4 classes, and the student 3'),
        (dict(), dict(teacher=segmentors.pspnet(), distillers={}), r'EncoderDecoder labels no images for RetinaNet'),
        (dict(uncertain=0.2), dict(make=detectors.fcos), r'FCOS has heads that cannot leave places out'),
        (dict(uncertain=0.2), dict(make=segmentors.pspnet), r'uncertain: is for detectors'),
        (dict(), dict(make=segmentors.pspnet, teacher=segmentors.pspnet(classes=4)), r'the teacher has 4 classes'),
    ],
)
def test_what_is_refused(labels, options, message):
    options.setdefault(
        'distillers',
        None
        if 'source' not in options
        else dict(it=dict(type='AT', layer='backbone.layer3', teacher_layer='backbone.layer4')),
    )
    with pytest.raises(ConfigError, match=message):
        build(labels=labels, **options)


def test_what_is_no_dict_and_an_empty_list_of_distillers():
    with pytest.raises(ConfigError, match=r'pseudo_labels=0.5: expected a dict'):
        TeacherLabels.read(0.5)
    with pytest.raises(ConfigError, match='distillers={}: expected a dict'):
        mmkd.distill(models.build(detectors.retinanet()), dict(config=models.build(detectors.retinanet())), {})
