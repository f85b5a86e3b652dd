import pytest
import torch

from mmkd.hosts.detection.dense_heads import dense_head
from mmkd.hosts.detection.rois import RoIHead, best_predictions, to_rois
from mmkd.taps import Taps
from mmkd.testing import detectors, models


def test_boxes_become_rois_with_their_images_index():
    boxes = torch.rand(3, 2, 4)
    rois = to_rois(boxes)
    assert rois[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.equal(rois[:, 1:], boxes.view(6, 4))


@pytest.mark.parametrize('shared', [False, True])
def test_the_teacher_sees_rois_as_mmdet_runs_it(shared):
    """Also with a shared head between pooling and box head, as detectors on C4 have."""
    teacher = models.build(detectors.faster_rcnn(), seed=0).eval()
    if shared:
        teacher.roi_head.shared_head = torch.nn.Conv2d(16, 16, 1)
    rois = torch.tensor([[0.0, 10, 20, 60, 70], [1, 5, 5, 100, 90]])
    roi_head = RoIHead()
    with torch.no_grad(), Taps(teacher, ['neck']) as taps:
        features = teacher.extract_feat(torch.randn(2, 3, 96, 128).contiguous(memory_format=torch.channels_last))
        expected = teacher.roi_head._bbox_forward([each.contiguous() for each in features], rois)
    with torch.no_grad():
        logits, deltas = roi_head.predict(taps, roi_head.pool(taps, 'neck', rois))
    torch.testing.assert_close(logits, expected['cls_score'])
    torch.testing.assert_close(deltas, expected['bbox_pred'])


def test_best_predictions_are_the_highest_scores_in_order_and_inside_the_image():
    model = models.build(detectors.retinanet(), seed=0).eval()
    metas = [dict(img_shape=(96, 128)), dict(img_shape=(80, 100))]
    with torch.no_grad():
        outputs = model.bbox_head(model.extract_feat(torch.randn(2, 3, 96, 128)))
    head = dense_head(model.bbox_head)
    boxes = best_predictions(head, outputs, 7, metas)
    flat = torch.cat([each.permute(0, 3, 4, 1, 2).reshape(2, -1, 3) for each in head.class_logits(outputs)], 1)
    decoded = head.decode(head.priors(outputs).expand(2, -1, -1), head.regression(outputs))
    for image, (height, width) in enumerate([(96, 128), (80, 100)]):
        index = flat[image].amax(1).argsort(descending=True)[:7]
        inside = torch.minimum(decoded[image, index].clamp(min=0), torch.tensor([width, height, width, height]))
        torch.testing.assert_close(boxes[image], inside)
