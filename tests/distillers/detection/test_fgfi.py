import pytest
import torch
from mmengine.structures import InstanceData

from mmkd.distillers.detection import fgfi
from mmkd.distillers.detection.fgfi import FGFI
from mmkd.errors import ConfigError
from mmkd.hosts.detection.boxes import pairwise_iou
from mmkd.hosts.running import probe
from mmkd.taps import Taps
from mmkd.testing import detectors, models

BOXES = torch.tensor(
    [[[10.0, 12, 40, 50], [60, 20, 126, 95], [0, 0, 5, 4]], [[30, 30, 54, 54], [70, 60, 99, 90], [0] * 4]]
)
VALID = torch.tensor([[True, True, True], [True, False, False]])


def grid(size, stride, sides):
    """Anchors as plain loops, (H, W, A, 4)."""
    anchors = torch.zeros(*size, len(sides), 4, dtype=torch.float64)
    for row in range(size[0]):
        for column in range(size[1]):
            for index, (width, height) in enumerate(sides):
                x, y = column * stride, row * stride
                box = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
                anchors[row, column, index] = torch.tensor(box)
    return anchors


LEVELS = [grid((12, 16), 8, [(24, 24), (34, 17)]), grid((6, 8), 16, [(48, 48), (68, 34)])]


def iou(a, b):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    area = [(each[2] - each[0]) * (each[3] - each[1]) for each in (a, b)]
    return width * height / (sum(area) - width * height)


def test_overlaps_are_those_of_single_boxes():
    for anchors in LEVELS:
        expected = pairwise_iou(BOXES.double(), anchors.flatten(0, 2).expand(2, -1, 4))
        found = fgfi.grid_iou(BOXES.double(), anchors)
        torch.testing.assert_close(found, expected.view_as(found))


@pytest.mark.parametrize('psi', [0.0, 0.5, 0.8])
@pytest.mark.parametrize('levels', ['best', 'all'])
def test_masks_as_plain_loops(psi, levels):
    expected = [torch.zeros(2, *anchors.shape[:2], dtype=torch.bool) for anchors in LEVELS]
    for image in range(2):
        for box in BOXES[image][VALID[image]].tolist():
            overlaps = [
                [[[iou(box, anchor) for anchor in cell] for cell in row] for row in anchors.tolist()]
                for anchors in LEVELS
            ]
            largest = [max(value for row in level for cell in row for value in cell) for level in overlaps]
            chosen = [largest.index(max(largest))] if levels == 'best' else range(len(LEVELS))
            for level in chosen:
                for row, cells in enumerate(overlaps[level]):
                    for column, cell in enumerate(cells):
                        expected[level][image, row, column] |= max(cell) > psi * largest[level]
    found = fgfi.imitation_masks(LEVELS, BOXES.double(), VALID, psi, levels)
    assert [each.sum().item() for each in found] == [each.sum().item() for each in expected]
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert all(each.any() for each in found)


def test_an_object_that_fits_two_levels_equally_marks_the_finer_one():
    anchors = [grid((4, 4), 16, [(32, 32)]), grid((2, 2), 32, [(32, 32)])]
    box = torch.tensor([[[16.0, 16, 48, 48]]], dtype=torch.float64)
    finer, coarser = fgfi.imitation_masks(anchors, box, torch.ones(1, 1, dtype=torch.bool))
    assert finer.any()
    assert not coarser.any()


def test_an_object_smaller_than_a_cell_marks_one_cell_or_more():
    masks = fgfi.imitation_masks(LEVELS, BOXES[:1, 2:].double(), torch.ones(1, 1, dtype=torch.bool), 0.9)
    assert sum(each.sum().item() for each in masks) >= 1


def test_the_loss_as_plain_loops():
    student, teacher = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    mask = torch.rand(2, 4, 5) > 0.7
    total, count = 0.0, 0
    for image, row, column in torch.nonzero(mask).tolist():
        pairs = zip(student[image, :, row, column].tolist(), teacher[image, :, row, column].tolist())
        total += sum((a - b) ** 2 for a, b in pairs)
        count += 1
    loss = fgfi.imitation_loss(student, teacher, mask)
    assert loss.item() == pytest.approx(total / (2 * count), rel=1e-6)
    torch.testing.assert_close(
        fgfi.imitation_loss(*(x.repeat(3, 1, 1, 1) for x in (student, teacher)), mask.repeat(3, 1, 1)), loss
    )


def test_an_empty_mask_is_a_differentiable_zero():
    student = torch.randn(1, 3, 4, 5, requires_grad=True)
    loss = fgfi.imitation_loss(student, torch.randn(1, 3, 4, 5), torch.zeros(1, 4, 5, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert not student.grad.any()


def samples(boxes=(BOXES[0], BOXES[1, :1])):
    from mmdet.structures import DetDataSample

    found = []
    for each in boxes:
        sample = DetDataSample(metainfo=dict(img_shape=(96, 128), batch_input_shape=(96, 128)))
        sample.gt_instances = InstanceData(bboxes=each, labels=torch.zeros(len(each), dtype=torch.long))
        found.append(sample)
    return found


def pair(family='retinanet', same=False, teacher_family=None, **options):
    student = models.build(getattr(detectors, family)(), seed=0)
    teacher = models.build(getattr(detectors, teacher_family or family)(16 if same else 24), seed=0 if same else 1)
    options.setdefault('head', 'rpn_head' if family == 'faster_rcnn' else 'bbox_head')
    distiller = FGFI(**options)
    distiller.prepare(student, teacher)
    distiller.setup(probe(student, distiller.student_layers), probe(teacher, distiller.teacher_layers))
    return student, teacher, distiller


def tapped(student, teacher):
    images = torch.randn(2, 3, 96, 128)
    taps = []
    for model in (student, teacher):
        with Taps(model, ['neck']) as read:
            model.extract_feat(images)
        taps.append(read)
    return taps


@pytest.mark.parametrize('family', ['retinanet', 'gfl', 'atss', 'faster_rcnn'])
def test_masks_use_the_anchors_of_the_students_head(family):
    student, teacher, distiller = pair(family)
    taps, _ = tapped(student, teacher)
    head = student.get_submodule(distiller.head)
    sizes = [level.shape[2:] for level in taps['neck']]
    levels = head.prior_generator.grid_priors(sizes, device='cpu')
    best = torch.stack([pairwise_iou(BOXES, each.expand(2, -1, 4)).amax(2) for each in levels]).amax(0)
    found = distiller.masks(taps, samples())
    for mask, anchors, size in zip(found, levels, sizes):
        overlaps = pairwise_iou(BOXES, anchors.expand(2, -1, 4))
        marked = (overlaps > 0.5 * best[..., None]) & VALID[..., None] & (overlaps.amax(2) == best)[..., None]
        assert torch.equal(mask, marked.view(2, 3, *size, -1).any(4).any(1))
    assert sum(each.sum() for each in found) > 0


def test_zero_for_equal_networks():
    student, teacher, distiller = pair(same=True, adapter=None, loss_weight=1.0)
    assert distiller(*tapped(student, teacher), samples())['loss'].item() == 0


def test_levels_of_two_pyramids_have_the_masks_of_the_students():
    """P2 to P6 of a Faster R-CNN learn from P3 to P5 of a RetinaNet."""
    student, teacher, distiller = pair('faster_rcnn', teacher_family='retinanet', loss_weight=1.0)
    s, t = tapped(student, teacher)
    masks = distiller.masks(s, samples())[1:4]
    expected = 0.0
    for adapter, level, target, mask in zip(distiller.levels.adapters, s['neck'][1:4], t['neck'], masks, strict=True):
        expected += ((adapter(level) - target) ** 2 * mask[:, None]).sum() / (2 * max(mask.sum(), 1))
    assert expected > 0
    torch.testing.assert_close(distiller(s, t, samples())['loss'], expected)


@pytest.mark.parametrize(('psi', 'levels'), [(0.3, 'best'), (0.8, 'all')])
def test_the_shell_adds_up_the_levels_in_the_masks_of_its_options(psi, levels):
    student, teacher, distiller = pair(psi=psi, levels=levels, loss_weight=3.0)
    s, t = tapped(student, teacher)
    sizes = [level.shape[2:] for level in s['neck']]
    anchors = [
        each.view(*size, -1, 4)
        for each, size in zip(student.bbox_head.prior_generator.grid_priors(sizes, device='cpu'), sizes)
    ]
    masks = fgfi.imitation_masks(anchors, BOXES, VALID, psi, levels)
    others = fgfi.imitation_masks(anchors, BOXES, VALID)
    assert any(not torch.equal(*each) for each in zip(masks, others))
    total = 0.0
    for adapter, level, target, mask in zip(distiller.levels.adapters, s['neck'], t['neck'], masks, strict=True):
        if mask.any():
            total += ((adapter(level) - target) ** 2).sum(1)[mask].mean() / 2
    found = distiller(s, t, samples())
    assert list(found) == ['loss']
    torch.testing.assert_close(found['loss'], 3 * total)


@pytest.mark.parametrize('boxes', [(BOXES[0], BOXES[1, :1]), (BOXES[0, :0], BOXES[0, :0])])
def test_gradients_reach_student_and_adapters_and_never_the_teacher(boxes):
    student, teacher, distiller = pair(loss_weight=1.0)
    loss = distiller(*tapped(student, teacher), samples(boxes))['loss']
    loss.backward()
    assert (loss > 0) == bool(len(boxes[0]))
    gradients = [each.grad for each in distiller.parameters()]
    assert len(gradients) == 6
    assert all(torch.isfinite(each).all() for each in gradients)
    assert any(each.any() for each in gradients) == bool(len(boxes[0]))
    assert student.neck.lateral_convs[0].conv.weight.grad.any() == bool(len(boxes[0]))
    assert all(each.grad is None for each in teacher.parameters())


def test_nothing_is_learnt_in_the_first_400_iterations_but_adapters_take_part(monkeypatch):
    student, teacher, distiller = pair()
    assert [distiller.loss_weight.at(i) for i in (0, 399, 400, 10**6)] == [0, 0, 0.01, 0.01]
    loss = distiller(*tapped(student, teacher), samples())['loss']
    loss.backward()
    assert loss.item() == 0
    assert all(each.grad is not None and not each.grad.any() for each in distiller.parameters())


def test_the_adapter_is_a_small_convolution_and_a_relu_for_equal_channels_too():
    _, _, distiller = pair(same=True)
    for adapter in distiller.levels.adapters:
        assert adapter.conv.weight.shape == (16, 16, 3, 3)
        assert adapter.conv.weight.abs().max() <= 2e-4
        assert 0.5e-4 < adapter.conv.weight.std() < 1.1e-4
        assert not adapter.conv.bias.any()
        assert adapter(torch.randn(1, 16, 4, 4)).min() == 0


def test_a_head_without_anchors_is_an_error():
    with pytest.raises(ConfigError, match='FCOSHead. has no anchors'):
        pair('fcos')


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(layer='backbone'), "'backbone' of the student has 4 levels and 'bbox_head' 3 strides"),
        (dict(head='rpn_head'), "'rpn_head': RetinaNet has no such module"),
    ],
)
def test_layers_that_do_not_belong_together_are_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        pair(**options)


@pytest.mark.parametrize('options', [dict(psi=1.0), dict(psi=-0.1), dict(levels='fpn'), dict(loss_weight='1')])
def test_options_out_of_range_are_errors(options):
    message = 'finite number' if 'loss_weight' in options else next(iter(options))
    with pytest.raises(ConfigError, match=message):
        FGFI(**options)
