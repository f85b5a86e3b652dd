import pytest
import torch
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
    distiller.check(student, teacher)
    distiller.setup(probe(student, distiller.student_layers), probe(teacher, distiller.teacher_layers))
    return student, teacher, distiller


def two_stage(**options):
    student = models.build(detectors.faster_rcnn(), seed=0)
    teacher = models.build(detectors.faster_rcnn(channels=24), seed=1).eval()
    return ready(student, teacher, Mimic(**options))


def test_two_stage_features_are_those_of_the_students_rois():
    """The teacher's are pooled by its own extractor from the boxes that the student's was given."""
    student, teacher, distiller = two_stage(cls_weight=1.0, bbox_weight=1.0)
    images = torch.randn(2, 3, 96, 128)
    rois = torch.tensor([[0.0, 10, 20, 60, 70], [1, 5, 5, 100, 90], [1, 30, 0, 50, 16]])
    with Taps(student, distiller.student_layers) as s:
        student.roi_head._bbox_forward(student.extract_feat(images), rois)
    with Taps(teacher, distiller.teacher_layers) as t:
        teacher.extract_feat(images)
    from mmdet.structures import DetDataSample

    found = distiller(s, t, [DetDataSample(metainfo=dict(img_shape=(96, 128)))] * 2)
    results = []
    for model, taps in ((student, s), (teacher, t)):
        results.append(model.roi_head._bbox_forward(taps['neck'], rois))
    adapted = distiller.adapters[0](results[0]['bbox_feats'])
    expected = {
        'loss_feature': 0.5 * (adapted - results[1]['bbox_feats']).square().mean(),
        'loss_cls': (results[0]['cls_score'] - results[1]['cls_score']).square().mean(),
        'loss_bbox': (results[0]['bbox_pred'] - results[1]['bbox_pred']).square().mean(),
    }
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)


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
