import math
import os
import subprocess
import sys

import pytest
import torch
from mmcv.ops import RoIAlign
from mmdet.structures.bbox import bbox_overlaps

from mmkd.distill import distill
from mmkd.distillers.detection import gdetkd
from mmkd.distillers.detection.gdetkd import GDetKD
from mmkd.distillers.detection.mimic import mean_square
from mmkd.distillers.memory import Memory
from mmkd.errors import ConfigError
from mmkd.hosts.detection.dense_heads import dense_head
from mmkd.hosts.detection.rois import best_predictions, to_rois
from mmkd.hosts.running import probe
from mmkd.taps import Taps
from mmkd.testing import detectors, models
from mmkd.testing.batches import random_batch

HEADS = dict(cls_weight=1.0, bbox_weight=1.0)
PAIRS = {
    'faster_rcnn': dict(HEADS),
    'retinanet': dict(head='bbox_head', embedding_layer='bbox_head.cls_convs.0'),
    'fcos': dict(head='bbox_head', embedding_layer='bbox_head.cls_convs.0'),
    'gfl': dict(head='bbox_head'),
    'atss': dict(head='bbox_head'),
}


def random_rois(number=12, images=3):
    first = 60 * torch.rand(number, 2)
    boxes = torch.cat([first, first + 10 + 40 * torch.rand(number, 2)], 1)
    return torch.cat([torch.arange(number)[:, None] % images, boxes], 1)


def softmax(values):
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def dot(first, second):
    return sum(a * b for a, b in zip(first, second))


def test_levels_are_mixed_as_plain_loops():
    levels = torch.randn(5, 4, 3, 2, 2, dtype=torch.float64)
    keys, teacher_keys = torch.randn(5, 4, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    mixed, attention = gdetkd.aggregate_levels(levels, keys, teacher_keys, 0.7)
    for region in range(5):
        expected = softmax(
            [dot(keys[region, level].tolist(), teacher_keys[region].tolist()) / 0.7 for level in range(4)]
        )
        assert attention[region].tolist() == pytest.approx(expected, rel=1e-6)
        total = sum(weight * levels[region, level] for level, weight in enumerate(expected))
        torch.testing.assert_close(mixed[region], total)
    torch.testing.assert_close(attention.sum(1), torch.ones(5, dtype=torch.float64))


def test_equal_levels_are_mixed_to_themselves():
    """Then the loss is Mimic's, but for its half: the mean square between the pooled features."""
    level, teacher = torch.randn(2, 5, 3, 2, 2, dtype=torch.float64)
    mixed, _ = gdetkd.aggregate_levels(
        level[:, None].expand(-1, 4, -1, -1, -1), torch.randn(5, 4, 6).double(), torch.randn(5, 6).double(), 1.0
    )
    torch.testing.assert_close(mixed, level)
    loss = mean_square(mixed, teacher).item()
    squares = [(a - b) ** 2 for a, b in zip(level.flatten().tolist(), teacher.flatten().tolist())]
    assert loss == pytest.approx(sum(squares) / len(squares), rel=1e-6)
    assert mean_square(mixed, mixed).item() == 0


def test_a_level_whose_key_is_the_teachers_is_chosen():
    keys = 10 * torch.eye(4)[None].expand(4, -1, -1)
    _, attention = gdetkd.aggregate_levels(torch.randn(4, 4, 3, 2, 2), keys, 10 * torch.eye(4), 1.0)
    torch.testing.assert_close(attention, torch.eye(4))


def test_negatives_as_plain_loops():
    rois = random_rois(30)
    found = gdetkd.negatives(rois, 0.5)
    excluded = 0
    for i, a in enumerate(rois):
        for j, b in enumerate(rois):
            near = bbox_overlaps(a[None, 1:], b[None, 1:]).item() > 0.5
            expected = i != j and not (a[0] == b[0] and near)
            assert found[i, j].item() == expected
            excluded += i != j and not expected
    assert excluded > 0


@pytest.mark.parametrize('entries', [0, 4, 7])
def test_the_contrastive_loss_as_plain_loops(entries):
    student, teacher = torch.randn(2, 6, 5, dtype=torch.float64)
    memory, filled = torch.randn(7, 5, dtype=torch.float64), torch.arange(7) < entries
    negative = (torch.rand(6, 6) > 0.4) & ~torch.eye(6, dtype=torch.bool)
    negative[0] = False

    def g(a, b):
        return math.exp(dot(a, b) / math.sqrt(dot(a, a) * dot(b, b)) / 0.2)

    s, t, m = student.tolist(), teacher.tolist(), memory.tolist()[:entries]
    total = 0.0
    for i in range(6):
        others = sum(g(s[i], t[j]) for j in range(6) if negative[i, j]) + sum(g(s[i], each) for each in m)
        total -= math.log(g(s[i], t[i]) / (g(s[i], t[i]) + others))
    found = gdetkd.contrastive_loss(student, teacher, negative, memory, filled, 0.2)
    assert found.item() == pytest.approx(total / 6, rel=1e-6)
    scaled = gdetkd.contrastive_loss(3 * student, 0.5 * teacher, negative, memory, filled, 0.2)
    torch.testing.assert_close(scaled, found)  # cosines


def test_class_loss_as_plain_loops():
    student, teacher = 2 * torch.randn(2, 6, 4, dtype=torch.float64)
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist()):
        total += sum(q * math.log(q / p) for p, q in zip(softmax(s), softmax(t)))
    assert gdetkd.class_loss(student, teacher).item() == pytest.approx(total / 6, rel=1e-6)
    assert gdetkd.class_loss(teacher, teacher).item() == 0


@pytest.mark.parametrize('agnostic', [False, True])
def test_class_aware_box_loss_as_plain_loops(agnostic):
    student, teacher = torch.randn(2, 6, 4 if agnostic else 12, dtype=torch.float64)
    logits = 2 * torch.randn(6, 4, dtype=torch.float64)
    total = 0.0
    for s, t, z in zip(student.tolist(), teacher.tolist(), logits.tolist()):
        p = softmax(z)
        for side in range(4):
            place = [side if agnostic else 4 * c + side for c in range(3)]
            total += abs(sum(p[c] * (t[place[c]] - s[place[c]]) for c in range(3)))
    found = gdetkd.class_aware_box_loss(student, teacher, logits)
    assert found.item() == pytest.approx(total / 6, rel=1e-6)
    assert gdetkd.class_aware_box_loss(teacher, teacher, logits).item() == 0


@pytest.mark.parametrize('positives', [0, 3, 10, 95, 100])
def test_at_most_a_quarter_of_the_drawn_regions_is_positive(positives):
    positive = torch.zeros(2, 100, dtype=torch.bool)
    positive[0, torch.randperm(100)[:positives]] = True
    drawn = gdetkd.draw_regions(positive, 40, 0.25)
    assert drawn.shape == (2, 40)
    assert all(len(set(row)) == 40 for row in drawn.tolist())
    expected = max(min(positives, 10), 40 - (100 - positives))  # more only where negatives are too few
    assert positive.gather(1, drawn).sum(1).tolist() == [expected, 0]
    assert not torch.equal(drawn, gdetkd.draw_regions(positive, 40, 0.25))
    assert gdetkd.draw_regions(positive, 500, 0.25).sort(1)[0].tolist() == [list(range(100))] * 2


def test_the_memory_keeps_the_last_regions():
    """A ring of 8 with 3 a step: all of few regions, an even spread of many."""
    memory = Memory(8, 1, 3)
    kept = []
    for start, number in ((0, 3), (10, 2), (20, 0), (30, 6), (40, 3), (50, 1)):
        memory.add(torch.arange(start, start + number).float()[:, None])
        kept += (
            [start, start + 2, start + 4] if number == 6 else [*range(start, start + number)] + [None] * (3 - number)
        )
        last = kept[-8:]
        found = memory.keys[memory.filled, 0].tolist()
        assert sorted(found) == sorted(each for each in last if each is not None)
    assert memory.cursor.item() == 18 % 8
    assert not memory.keys.requires_grad


def test_a_step_may_have_more_than_the_memory_holds():
    memory = Memory(4, 1, 10)
    memory.add(torch.arange(10.0)[:, None])
    assert memory.keys.flatten().tolist() == [6, 7, 8, 9]


def test_a_resumed_memory_goes_on_where_it_was():
    keys = torch.randn(4, 5, 2)
    one, two = Memory(8, 2, 3), Memory(8, 2, 3)
    one.add(keys[0])
    one.add(keys[1])
    two.load_state_dict(one.state_dict())
    for memory in (one, two):
        memory.add(keys[2])
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
    assert set(one.state_dict()) == {'keys', 'filled', 'cursor'}


PROCESS = """
import sys, torch
import torch.distributed as dist
from mmkd.distillers.memory import Memory
rank = int(sys.argv[1])
dist.init_process_group('gloo', init_method='file://' + sys.argv[2] + '/store', rank=rank, world_size=2)
memory = Memory(10, 1, 2)
for step in range(3):
    memory.add(torch.arange(2.0)[: 2 if rank == 0 else step, None] + 10 * step + 100 * rank)
torch.save(memory.state_dict(), f'{sys.argv[2]}/{rank}.pth')
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_have_the_same_memory_of_both(tmp_path):
    """With 2 regions a step in the first, and 0, 1 and 2 in the second."""
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    running = [
        subprocess.Popen([sys.executable, '-c', PROCESS, str(rank), str(tmp_path)], env=environment)
        for rank in range(2)
    ]
    assert [process.wait(600) for process in running] == [0, 0]
    first, second = (torch.load(tmp_path / f'{rank}.pth', weights_only=True) for rank in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    # 12 rows in a ring of 10: those of the first process in the first step are gone
    assert sorted(first['keys'][first['filled'], 0].tolist()) == [10, 11, 20, 21, 110, 120, 121]
    assert first['cursor'].item() == 2


def pair(family, tmp_path, teacher=None, **options):
    teacher = teacher or detectors.faster_rcnn(24)
    checkpoint = models.save_weights(teacher, tmp_path / 'teacher.pth')
    options = dict(memory=64, keys_per_step=16, regions_per_image=20, candidates=60) | PAIRS[family] | options
    model = distill(
        models.build(getattr(detectors, family)(), seed=0),
        dict(config=teacher, checkpoint=checkpoint),
        dict(g=dict(type='GDetKD', **options)),
    )
    model.sources['teacher'].load()
    return model.train()


def losses(model, objects=4, images=2):
    batch = model.data_preprocessor(random_batch(model, (images, 3, 96, 128), objects), True)
    return {key[2:]: value for key, value in model(**batch, mode='loss').items() if key.startswith('g.')}


@pytest.mark.parametrize('family', PAIRS)
@pytest.mark.parametrize('objects', [4, 0])
def test_student_and_all_own_parts_learn_and_the_teacher_does_not(family, objects, tmp_path):
    model = pair(family, tmp_path)
    found = losses(model, objects)
    own = dict(model.distillers.g.named_parameters())
    assert set(own) >= {'log_tau', 'projection.weight', 'teacher_projection.weight', 'keys.0.weight', 'keys.2.bias'}
    assert any(name.startswith('adapters') for name in own)
    assert found.pop('tau').item() == pytest.approx(16)
    assert len(found) == (4 if family == 'faster_rcnn' else 2)
    assert all(torch.isfinite(loss) and loss > 0 and loss.requires_grad for loss in found.values())
    sum(found.values()).backward()
    for name, parameter in own.items():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name
    assert model.neck.lateral_convs[0].conv.weight.grad.any()
    assert all(each.grad is None for each in model.sources['teacher'].model.parameters())
    assert model.distillers.g.memory.filled.sum() == 16


def test_every_level_of_the_student_takes_part(tmp_path):
    """Of its RoI extractor, so not P6; whatever the size of the region."""
    model = pair('faster_rcnn', tmp_path, cls_weight=0.0, bbox_weight=0.0)
    distiller = model.distillers.g
    taps = {}
    for name, network, layers in (
        ('student', model, distiller.student_layers),
        ('teacher', model.sources['teacher'].model, ['neck']),
    ):
        taps[name] = probe(network, layers)
    levels = [level.detach().requires_grad_() for level in taps['student']['neck']]
    taps['student']._read['neck'] = tuple(levels)
    taps['student']._read[distiller.roi_head.extractor + ':input'] = (None, torch.tensor([[0, 10.0, 10, 40, 30]]))
    taps['student']._read[distiller.embedding] = (taps['student'][distiller.embedding][0][:1],)
    distiller(taps['student'], taps['teacher'], None)['loss_sgfi'].backward()
    assert [level.grad is not None and bool(level.grad.any()) for level in levels] == [True] * 4 + [False]


def test_no_region_at_all(tmp_path):
    """Differentiable zeros, and the other processes' regions still come in."""
    model = pair('faster_rcnn', tmp_path)
    distiller = model.distillers.g
    inputs = torch.randn(2, 3, 96, 128)
    rois = torch.zeros(0, 5)
    with Taps(model, distiller.student_layers) as student:
        features = model.extract_feat(inputs)
        model.roi_head._bbox_forward(features, rois)
    teacher = model.sources['teacher'](inputs, None)
    found = distiller(student, teacher, None)
    found.pop('tau')
    assert [loss.item() for loss in found.values()] == [0, 0, 0, 0]
    sum(found.values()).backward()
    assert all(each.grad is not None and not each.grad.any() for each in distiller.parameters())
    assert not distiller.memory.filled.any()


WEIGHTS = dict(sgfi_weight=2.0, ckd_weight=3.0)
OPTIONS = dict(**WEIGHTS, tau=4.0, ckd_tau=0.2, max_overlap=0.1)


def remembering(distiller):
    """With ten regions of earlier steps in its memory."""
    distiller.memory.keys.normal_(generator=torch.Generator().manual_seed(0))
    distiller.memory.filled[:10] = True
    return distiller


def embedded(head, features):
    """What the classifier of a Shared2FCBBoxHead takes in."""
    features = features.flatten(1)
    for layer in head.shared_fcs:
        features = layer(features).relu()
    return features


def imitation_and_contrast(distiller, levels, strides, rois, embedding, teacher, target):
    """Both losses, unweighted, region by region; each pooled by mmcv from every level."""
    total = 0.0
    for index, roi in enumerate(rois):
        pooled = [
            RoIAlign(7, 1 / stride, 0, aligned=True)(level.contiguous(), roi[None])
            for level, stride in zip(levels, strides, strict=True)
        ]
        adapted = [distiller.adapters[0](each) for each in pooled]
        key = distiller.keys(target[index : index + 1]).flatten().tolist()
        share = softmax([dot(distiller.keys(each).flatten().tolist(), key) / 4 for each in adapted])
        mixed = sum(weight * each[0] for weight, each in zip(share, adapted))
        total += (mixed - target[index]).square().mean().item() / len(rois)
    contrast = gdetkd.contrastive_loss(
        distiller.projection(embedding),
        distiller.teacher_projection(embedded(teacher.roi_head.bbox_head, target)),
        gdetkd.negatives(rois, 0.1),
        distiller.teacher_projection(distiller.memory.keys),
        torch.arange(64) < 10,
        0.2,
    )
    return total, contrast.item()


def test_two_stage_terms_are_of_the_students_rois_each_with_its_weight(tmp_path):
    model = pair('faster_rcnn', tmp_path, **OPTIONS, cls_weight=5.0, bbox_weight=7.0)
    distiller, teacher = remembering(model.distillers.g), model.sources['teacher'].model
    inputs, rois = torch.randn(2, 3, 96, 128), random_rois(6, 2)
    with Taps(model, distiller.student_layers) as student:
        features = model.extract_feat(inputs)
        own = model.roi_head._bbox_forward(features, rois)
    taps = model.sources['teacher'](inputs, None)
    with torch.no_grad():
        other = teacher.roi_head._bbox_forward([each.contiguous() for each in taps['neck']], rois)
        embedding = embedded(model.roi_head.bbox_head, own['bbox_feats'])
        arguments = (embedding, teacher, other['bbox_feats'])
        sgfi, ckd = imitation_and_contrast(distiller, features[:4], (4, 8, 16, 32), rois, *arguments)
    expected = {
        'loss_sgfi': 2 * sgfi,
        'loss_ckd': 3 * ckd,
        'loss_cls': 5 * gdetkd.class_loss(own['cls_score'], other['cls_score']).item(),
        'loss_bbox': 7 * gdetkd.class_aware_box_loss(own['bbox_pred'], other['bbox_pred'], other['cls_score']).item(),
        'tau': 4.0,
    }
    found = distiller(student, taps, None)
    assert {key: value.item() for key, value in found.items()} == pytest.approx(expected, rel=1e-4)
    assert min(expected.values()) > 1e-5


def test_one_stage_terms_are_of_the_drawn_regions_each_with_its_weight(tmp_path):
    model = pair('retinanet', tmp_path, **OPTIONS, regions_per_image=5, candidates=40)
    distiller, teacher = remembering(model.distillers.g), model.sources['teacher'].model
    data = model.data_preprocessor(random_batch(model, (2, 3, 96, 128)), True)
    with Taps(model, distiller.student_layers) as student:
        model.bbox_head(model.extract_feat(data['inputs']))
    taps = model.sources['teacher'](data['inputs'], None)
    torch.manual_seed(0)
    rois = to_rois(distiller.draw(student, data['data_samples']))
    assert len(rois) == 10
    metas = [sample.metainfo for sample in data['data_samples']]
    best = to_rois(best_predictions(dense_head(model.bbox_head), student['bbox_head'], 40, metas))
    assert (rois[:, None] == best).all(2).any(1).all()
    with torch.no_grad():
        target = teacher.roi_head._bbox_forward([each.contiguous() for each in taps['neck']], rois)['bbox_feats']
        embeddings = []
        for roi in rois:
            size = ((roi[3] - roi[1]) * (roi[4] - roi[2])).sqrt().item()
            level = min(max(math.floor(math.log2(size / (14 * 8) + 1e-6)), 0), 2)
            pool = RoIAlign(1, 1 / (8 * 2**level), 14, aligned=True)
            embeddings.append(pool(student['bbox_head.cls_convs.0'][level].contiguous(), roi[None]).flatten())
        arguments = (torch.stack(embeddings), teacher, target)
        sgfi, ckd = imitation_and_contrast(distiller, student['neck'], (8, 16, 32), rois, *arguments)
    torch.manual_seed(0)
    found = distiller(student, taps, data['data_samples'])
    expected = {'loss_sgfi': 2 * sgfi, 'loss_ckd': 3 * ckd, 'tau': 4.0}
    assert {key: value.item() for key, value in found.items()} == pytest.approx(expected, rel=1e-4)


def test_trained_parts_have_the_sizes_of_the_options(tmp_path):
    options = dict(hidden_channels=10, key_channels=6, projection_channels=7, memory=40, keys_per_step=9)
    distiller = pair('retinanet', tmp_path, **options).distillers.g
    shapes = {name: tuple(each.shape) for name, each in distiller.state_dict().items() if 'bias' not in name}
    assert shapes == {
        'log_tau': (),
        'adapters.0.conv.weight': (24, 16, 1, 1),
        'keys.0.weight': (10, 24, 3, 3),
        'keys.2.weight': (6, 10, 3, 3),
        'projection.weight': (7, 16),
        'teacher_projection.weight': (7, 48),
        'memory.keys': (40, 48),
        'memory.filled': (40,),
        'memory.cursor': (),
    }
    biased = {name.removesuffix('.bias') for name in distiller.state_dict() if name.endswith('.bias')}
    assert biased == {'adapters.0.conv', 'keys.0', 'keys.2'}
    assert {(distiller.keys[each].stride, distiller.keys[each].padding) for each in (0, 2)} == {((2, 2), (1, 1))}
    distiller.memory.add(torch.randn(20, 48))
    assert distiller.memory.filled.sum() == 9


def test_the_memory_makes_negatives_of_earlier_steps(tmp_path):
    model = pair('retinanet', tmp_path)
    torch.manual_seed(0)
    first = losses(model)
    torch.manual_seed(0)
    second = losses(model)
    assert torch.equal(first['loss_sgfi'], second['loss_sgfi'])
    assert second['loss_ckd'] > first['loss_ckd']


def test_head_losses_are_zero_for_equal_networks(tmp_path):
    model = pair('faster_rcnn', tmp_path, teacher=detectors.faster_rcnn())
    model.load_state_dict(torch.load(tmp_path / 'teacher.pth', weights_only=True)['state_dict'], strict=False)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    found = losses(model)
    assert found['loss_cls'].item() == pytest.approx(0, abs=1e-6)
    assert found['loss_bbox'].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(('fraction', 'expected'), [(0.25, 5), (0.4, 8)])
def test_drawn_regions_are_inside_and_a_part_lies_on_objects(fraction, expected, tmp_path):
    model = pair('retinanet', tmp_path, candidates=400, positive_iou=0.2, positive_fraction=fraction)
    data = model.data_preprocessor(random_batch(model, (2, 3, 96, 128)), True)
    with Taps(model, model.distillers.g.student_layers) as student:
        model.bbox_head(model.extract_feat(data['inputs']))
    boxes = model.distillers.g.draw(student, data['data_samples'])
    assert boxes.shape == (2, 20, 4)
    assert (boxes >= 0).all()
    assert (boxes <= torch.tensor([128, 96, 128, 96])).all()
    for image, sample in zip(boxes, data['data_samples']):
        on_objects = bbox_overlaps(image, sample.gt_instances.bboxes).amax(1) > 0.2
        assert on_objects.sum() == expected


@pytest.mark.parametrize(
    ('family', 'teacher', 'options', 'message'),
    [
        ('retinanet', detectors.retinanet, dict(), 'a two-stage teacher is needed'),
        ('faster_rcnn', lambda: detectors.faster_rcnn(classes=5), dict(), 'GDetKD compares them'),
        ('faster_rcnn', detectors.faster_rcnn, dict(adapter=None, layer='backbone'), 'backbone'),
        (
            'retinanet',
            detectors.faster_rcnn,
            dict(embedding_layer='backbone'),
            "'backbone' of the student has 4 levels and 'bbox_head' 3 strides",
        ),
        ('retinanet', lambda: detectors.faster_rcnn(24), dict(adapter=None), '16 and 24 channels'),
    ],
)
def test_pairs_that_cannot_be_compared_are_errors(family, teacher, options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        pair(family, tmp_path, teacher(), **options)


@pytest.mark.parametrize(
    'options',
    [
        dict(tau=0),
        dict(ckd_tau=-1.0),
        dict(memory=0),
        dict(keys_per_step=1.5),
        dict(regions_per_image=0),
        dict(projection_channels=0),
        dict(positive_fraction=1.5),
        dict(max_overlap=-0.1),
        dict(head='bbox_head', cls_weight=1.0),
        dict(embedding_layer='bbox_head.cls_convs.3'),
    ],
)
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        GDetKD(**options)
