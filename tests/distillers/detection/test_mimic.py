import math

import pytest
import torch
from mmcv.ops import RoIAlign
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData

from mmkd.distillers.detection.mimic import Mimic, half_mean_square, teacher_proposals
from mmkd.errors import ConfigError
from mmkd.hosts.running import probe
from mmkd.taps import Taps
from mmkd.testing import detectors, models


def test_half_mean_square_as_plain_loops():
    random = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 3, 2, 2, dtype=torch.float64, generator=random)
    total = 0.0
    for s, t in zip(student, teacher):
        elements = list(zip(s.flatten().tolist(), t.flatten().tolist()))
        total += sum((b - a) ** 2 for a, b in elements) / len(elements)
    assert half_mean_square(student, teacher).item() == pytest.approx(total / (2 * 5), rel=1e-6)


def test_the_order_and_number_of_regions_do_not_matter():
    student, teacher = torch.randn(2, 5, 3, 2, 2)
    expected = half_mean_square(student, teacher)
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(half_mean_square(student[order], teacher[order]), expected)
    torch.testing.assert_close(half_mean_square(student.repeat(2, 1, 1, 1), teacher.repeat(2, 1, 1, 1)), expected)


def test_no_region_is_a_differentiable_zero():
    student = torch.zeros(0, 3, 2, 2, requires_grad=True)
    loss = half_mean_square(student, torch.zeros(0, 3, 2, 2))
    loss.backward()
    assert loss.item() == 0


def ready(student, teacher, distiller):
    distiller.prepare(student, teacher)
    distiller.setup(probe(student, distiller.student_layers), probe(teacher, distiller.teacher_layers))
    return student, teacher, distiller


def two_stage(**options):
    student = models.build(detectors.faster_rcnn(), seed=0)
    teacher = models.build(detectors.faster_rcnn(channels=24), seed=1).eval()
    return ready(student, teacher, Mimic(**options))


def samples(number=2):
    return [DetDataSample(metainfo=dict(img_shape=(96, 128))) for _ in range(number)]


def test_two_stage_terms_are_of_the_students_rois_each_with_its_weight():
    """The teacher's features are pooled by its own extractor from the boxes that the student's was given."""
    student, teacher, distiller = two_stage(feature_weight=2.0, cls_weight=3.0, bbox_weight=5.0)
    images = torch.randn(2, 3, 96, 128)
    rois = torch.tensor([[0.0, 10, 20, 60, 70], [1, 5, 5, 100, 90], [1, 30, 0, 50, 16]])
    with Taps(student, distiller.student_layers) as s:
        student.roi_head._bbox_forward(student.extract_feat(images), rois)
    with Taps(teacher, distiller.teacher_layers) as t:
        teacher.extract_feat(images)
    found = distiller(s, t, samples())
    results = []
    for model, taps in ((student, s), (teacher, t)):
        results.append(model.roi_head._bbox_forward(taps['neck'], rois))
    adapted = distiller.adapters[0](results[0]['bbox_feats'])
    expected = {
        'loss_feature': 2 * 0.5 * (adapted - results[1]['bbox_feats']).square().mean(),
        'loss_cls': 3 * (results[0]['cls_score'] - results[1]['cls_score']).square().mean(),
        'loss_bbox': 5 * (results[0]['bbox_pred'] - results[1]['bbox_pred']).square().mean(),
    }
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert value > 0
        torch.testing.assert_close(found[key], value)


@pytest.mark.parametrize('weights', [dict(), dict(cls_weight=1.0), dict(bbox_weight=1.0)])
def test_a_term_of_weight_0_is_not_there(weights):
    _, _, distiller = two_stage(**weights)
    assert ('roi_head.bbox_head' in distiller.student_layers) == bool(weights)
    rois = torch.tensor([[0.0, 10, 20, 60, 70]])
    student, teacher, distiller = two_stage(**weights)
    images = torch.randn(1, 3, 96, 128)
    with Taps(student, distiller.student_layers) as s:
        student.roi_head._bbox_forward(student.extract_feat(images), rois)
    with Taps(teacher, distiller.teacher_layers) as t:
        teacher.extract_feat(images)
    names = {'loss_feature', *(f'loss_{each.removesuffix("_weight")}' for each in weights)}
    assert distiller(s, t, samples(1)).keys() == names


def test_one_stage_features_are_those_of_the_best_predictions():
    """Of each image the boxes of the surest slots, each pooled by mmcv from the level that its area gives."""
    student = models.build(detectors.retinanet(), seed=0)
    teacher = models.build(detectors.retinanet(channels=24), seed=1)
    with torch.no_grad():
        student.bbox_head.retina_cls.weight.normal_()
        student.bbox_head.retina_reg.weight.normal_(std=0.1)
    options = dict(head='bbox_head', topk=7, pooled_size=4, sampling_ratio=3, feature_weight=3.0)
    _, _, distiller = ready(student, teacher, Mimic(**options))
    images = torch.randn(2, 3, 96, 128)
    with Taps(student, distiller.student_layers) as s:
        logits, deltas = student.bbox_head(student.extract_feat(images))
    with Taps(teacher, distiller.teacher_layers) as t:
        teacher.extract_feat(images)
    anchors = torch.cat(
        student.bbox_head.prior_generator.grid_priors([each.shape[2:] for each in logits], device='cpu')
    )
    total = 0.0
    for image in range(2):
        scores = torch.cat([each[image].permute(1, 2, 0).reshape(-1, 3) for each in logits]).amax(1)
        best = scores.topk(7)[1]
        flat = torch.cat([each[image].permute(1, 2, 0).reshape(-1, 4) for each in deltas])
        boxes = student.bbox_head.bbox_coder.decode(anchors[best], flat[best], max_shape=(96, 128)).detach()
        for box in boxes:
            area = (box[2] - box[0]) * (box[3] - box[1])
            level = min(max(math.floor(math.log2(math.sqrt(area) / (14 * 8) + 1e-6)), 0), 2)
            pool = RoIAlign(4, 1 / (8 * 2**level), 3, aligned=True)
            roi = torch.cat([torch.tensor([float(image)]), box])[None]
            own, other = (pool(taps['neck'][level].contiguous(), roi) for taps in (s, t))
            total += (distiller.adapters[0](own) - other).square().sum() / 2 / other.numel()
    found = distiller(s, t, samples())
    assert list(found) == ['loss_feature']
    assert total > 0
    torch.testing.assert_close(found['loss_feature'], 3 * total / 14)


def test_the_teachers_proposals_are_those_of_its_rpn():
    _, teacher, _ = two_stage()
    metas = [dict(img_shape=(96, 128), scale_factor=(1.0, 1.0)), dict(img_shape=(80, 100), scale_factor=(1.0, 1.0))]
    with torch.no_grad(), Taps(teacher, ['neck', 'rpn_head']) as taps:
        outputs = teacher.rpn_head(teacher.extract_feat(torch.randn(2, 3, 96, 128)))
    rois = teacher_proposals(taps, metas)
    expected = teacher.rpn_head.predict_by_feat(
        *outputs, batch_img_metas=metas, cfg=teacher.train_cfg.rpn_proposal, rescale=False
    )
    for index, each in enumerate(expected):
        assert isinstance(each, InstanceData)
        assert len(each) > 0
        assert torch.equal(rois[rois[:, 0] == index, 1:], each.bboxes)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(proposals='both'), 'proposals'),
        (dict(topk=0), 'topk'),
        (dict(head='bbox_head', cls_weight=1.0), 'two-stage'),
        (dict(head='bbox_head', proposals='teacher'), 'two-stage'),
    ],
)
def test_options_out_of_range_are_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        Mimic(**options)


@pytest.mark.parametrize(
    ('options', 'teacher', 'message'),
    [
        (dict(), detectors.retinanet(), 'a two-stage teacher is needed'),
        (dict(cls_weight=1.0), detectors.faster_rcnn(classes=5), 'second stage compares'),
        (
            dict(),
            detectors.faster_rcnn(roi_head=dict(bbox_roi_extractor=dict(roi_layer=dict(output_size=14)))),
            'cells; make them equal',
        ),
        (dict(adapter=None), detectors.faster_rcnn(channels=24), '16 and 24 channels with adapter=None'),
    ],
)
def test_pairs_that_cannot_be_compared_are_errors(options, teacher, message):
    with pytest.raises(ConfigError, match=message):
        ready(models.build(detectors.faster_rcnn()), models.build(teacher), Mimic(**options))
