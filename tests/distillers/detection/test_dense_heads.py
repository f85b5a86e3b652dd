import pytest
import torch
from mmdet.models.task_modules.assigners import MaxIoUAssigner
from mmengine.structures import InstanceData

from mmkd.distillers.detection.dense_heads import DenseHead, dense_head, max_iou_assigned
from mmkd.errors import ConfigError
from mmkd.testing import detectors


def random_boxes(*shape, size=128.0):
    first = torch.rand(*shape, 2) * 0.8 * size
    return torch.cat([first, first + 2 + torch.rand(*shape, 2) * 0.4 * size], -1)


@pytest.mark.parametrize(
    'options',
    [
        dict(pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0.0),
        dict(pos_iou_thr=0.7, neg_iou_thr=0.3, min_pos_iou=0.3),
        dict(pos_iou_thr=0.5, neg_iou_thr=0.5, match_low_quality=False),
        dict(pos_iou_thr=0.5, neg_iou_thr=0.4, gt_max_assign_all=False),
    ],
)
@pytest.mark.parametrize('present', [8, 3, 1, 0])
def test_the_mask_is_the_assigners(options, present):
    assigner = MaxIoUAssigner(**options)
    priors, boxes = random_boxes(400), random_boxes(2, 8)
    inside = torch.rand(2, 400) > 0.1
    valid = (torch.arange(8) < present).expand(2, 8)
    mask = max_iou_assigned(assigner, priors, boxes, valid, inside)
    for image in range(2):
        instances = InstanceData(bboxes=boxes[image, :present], labels=torch.zeros(present, dtype=torch.long))
        result = assigner.assign(InstanceData(priors=priors[inside[image]]), instances)
        expected = torch.zeros(400, dtype=torch.bool)
        expected[inside[image]] = result.gt_inds > 0
        assert torch.equal(mask[image], expected)
    assert mask.any() == (present > 0)


def test_assigned_slots_are_those_of_the_heads_own_targets():
    """Also with images of different sizes, whose padding the head leaves out."""
    model = detectors.build(detectors.retinanet(), seed=0)
    head = dense_head(model.bbox_head)
    outputs = model.bbox_head(model.extract_feat(torch.randn(2, 3, 96, 128)))
    metas = [dict(img_shape=(96, 128), pad_shape=(96, 128)), dict(img_shape=(60, 64), pad_shape=(64, 64))]
    boxes = random_boxes(2, 6, size=64.0)
    mask = head.assigned(outputs, boxes, torch.ones(2, 6, dtype=torch.bool), metas)
    instances = [InstanceData(bboxes=each, labels=torch.zeros(6, dtype=torch.long)) for each in boxes]
    sizes = [level.shape[2:] for level in outputs[0]]
    anchors, flags = model.bbox_head.get_anchors(sizes, metas, device='cpu')
    labels = model.bbox_head.get_targets(anchors, flags, instances, metas)[0]
    expected = torch.cat(labels, 1) < model.bbox_head.num_classes
    assert expected.any()
    assert torch.equal(mask, expected)


def test_slots_decode_as_the_head_predicts():
    model = detectors.build(detectors.retinanet(), seed=0).eval()
    head = dense_head(model.bbox_head)
    metas = [dict(img_shape=(96, 128), scale_factor=(1.0, 1.0))]
    with torch.no_grad():
        outputs = model.bbox_head(model.extract_feat(torch.randn(1, 3, 96, 128)))
        cfg = dict(nms_pre=10**6, score_thr=-1.0, max_per_img=10**6)
        from mmengine.config import ConfigDict

        (result,) = model.bbox_head.predict_by_feat(
            *outputs, batch_img_metas=metas, cfg=ConfigDict(cfg), with_nms=False
        )
        boxes = head.decode(head.priors(outputs), head.regression(outputs)[0])
        logits = [level.permute(0, 3, 4, 1, 2).reshape(-1, head.classes) for level in head.class_logits(outputs)]
    scores = torch.cat(logits).sigmoid()
    boxes = torch.minimum(boxes.clamp(min=0), torch.tensor([128.0, 96.0, 128.0, 96.0]))
    # mmdet lists each slot once per class, best first within a level
    order = result.scores.argsort(descending=True)
    best = scores.flatten().argsort(descending=True)
    torch.testing.assert_close(result.scores[order], scores.flatten()[best])
    torch.testing.assert_close(result.bboxes[order[:20]], boxes[best[:20] // head.classes])


def test_a_head_that_cannot_be_read_is_refused():
    softmax = detectors.retinanet(bbox_head=dict(loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, gamma=None)))
    softmax.bbox_head.loss_cls = dict(type='CrossEntropyLoss', use_sigmoid=False)
    with pytest.raises(ConfigError, match='softmax class scores'):
        dense_head(detectors.build(softmax).bbox_head)
    with pytest.raises(ConfigError, match='Conv2d.*not known'):
        dense_head(torch.nn.Conv2d(1, 1, 1))
    other = detectors.retinanet()
    other.train_cfg.assigner = dict(type='ATSSAssigner', topk=9)
    with pytest.raises(ConfigError, match='ATSSAssigner; MaxIoUAssigner is needed'):
        dense_head(detectors.build(other).bbox_head).check_assigner()


def test_a_third_party_adds_a_head():
    class OwnHead(torch.nn.Module):
        pass

    @dense_head.register(OwnHead)
    class OwnDenseHead(DenseHead):
        def __init__(self, head):
            self.head = head

    assert type(dense_head(OwnHead())) is OwnDenseHead
