import pytest
import torch
from mmdet.models.task_modules.assigners import MaxIoUAssigner
from mmengine.structures import InstanceData

from mmkd.errors import ConfigError
from mmkd.hosts.detection.assigners import max_iou_assigned
from mmkd.hosts.detection.dense_heads import DenseHead, dense_head
from mmkd.testing import detectors, models


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


@pytest.mark.parametrize('family', ['retinanet', 'atss', 'gfl'])
@pytest.mark.parametrize('whole_pixels', [False, True])
def test_assigned_slots_are_those_of_the_heads_own_targets(family, whole_pixels):
    """Also with images of different sizes, whose padding the head leaves out, and of boxes between two anchors."""
    model = models.build(getattr(detectors, family)(), seed=0)
    head = dense_head(model.bbox_head)
    outputs = model.bbox_head(model.extract_feat(torch.randn(2, 3, 96, 128)))
    metas = [dict(img_shape=(96, 128), pad_shape=(96, 128)), dict(img_shape=(60, 64), pad_shape=(64, 64))]
    boxes = random_boxes(2, 6, size=64.0)
    boxes = boxes.round() if whole_pixels else boxes
    mask = head.assigned(outputs, boxes, torch.ones(2, 6, dtype=torch.bool), metas)
    instances = [InstanceData(bboxes=each, labels=torch.zeros(6, dtype=torch.long)) for each in boxes]
    sizes = [level.shape[2:] for level in outputs[0]]
    anchors, flags = model.bbox_head.get_anchors(sizes, metas, device='cpu')
    labels = model.bbox_head.get_targets(anchors, flags, instances, metas)[0 if family == 'retinanet' else 1]
    expected = torch.cat(labels, 1) < model.bbox_head.num_classes
    assert expected.any()
    assert torch.equal(mask, expected)


@pytest.mark.parametrize('options', [dict(), dict(center_sampling=False), dict(center_sample_radius=0.7)])
def test_assigned_locations_are_those_of_fcos_targets(options):
    model = models.build(detectors.fcos(bbox_head=options), seed=0)
    head = dense_head(model.bbox_head)
    outputs = model.bbox_head(model.extract_feat(torch.randn(2, 3, 96, 128)))
    boxes = random_boxes(2, 6)
    valid = torch.arange(6) < torch.tensor([[6], [4]])
    mask = head.assigned(outputs, boxes, valid, [{}, {}])
    instances = [
        InstanceData(bboxes=each[there], labels=torch.zeros(int(there.sum()), dtype=torch.long))
        for each, there in zip(boxes, valid)
    ]
    points = model.bbox_head.prior_generator.grid_priors([level.shape[2:] for level in outputs[0]], device='cpu')
    labels = model.bbox_head.get_targets(points, instances)[0]
    expected = torch.cat([each.view(2, -1) for each in labels], 1) < model.bbox_head.num_classes
    assert expected.any()
    assert torch.equal(mask, expected)


@pytest.mark.parametrize('norm_on_bbox', [True, False])
def test_fcos_distances_are_in_strides_in_training_and_evaluation(norm_on_bbox):
    """Where mmdet's own outputs differ by the stride."""
    model = models.build(detectors.fcos(bbox_head=dict(norm_on_bbox=norm_on_bbox)), seed=0).eval()
    with torch.no_grad():
        for scale in model.bbox_head.scales:
            scale.scale.fill_(5.0)  # so that distances are not all 0
        features = model.extract_feat(torch.randn(2, 3, 96, 128))
        head = dense_head(model.bbox_head)
        in_evaluation = head.regression(model.bbox_head(features))
        model.train()
        in_training = head.regression(model.bbox_head(features))
    assert in_training.max() > 0
    torch.testing.assert_close(in_training, in_evaluation)


@pytest.mark.parametrize('family', ['retinanet', 'atss', 'gfl', 'fcos'])
def test_slots_decode_as_the_head_predicts(family):
    model = models.build(getattr(detectors, family)(), seed=0).eval()
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
        if len(outputs) == 3:  # mmdet multiplies class scores by centerness
            quality = torch.cat([level.permute(0, 2, 3, 1).reshape(-1, 1) for level in outputs[2]]).sigmoid()
        else:
            quality = 1.0
    scores = torch.cat(logits).sigmoid() * quality
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
        dense_head(models.build(softmax).bbox_head)
    with pytest.raises(ConfigError, match='Conv2d.*not known'):
        dense_head(torch.nn.Conv2d(1, 1, 1))
    other = detectors.retinanet()
    other.train_cfg.assigner = dict(type='ATSSAssigner', topk=9, alpha=0.8)
    with pytest.raises(ConfigError, match='ATSSAssigner; MaxIoUAssigner'):
        dense_head(models.build(other).bbox_head).check_assigner()


def test_a_third_party_adds_a_head():
    class OwnHead(torch.nn.Module):
        pass

    @dense_head.register(OwnHead)
    class OwnDenseHead(DenseHead):
        def __init__(self, head):
            self.head = head

    assert type(dense_head(OwnHead())) is OwnDenseHead


def test_a_head_of_mmdet_that_only_inherits_from_a_known_one_is_refused():
    """TOOD's puts out decoded boxes, not deltas."""
    from mmdet.models.dense_heads import TOODHead

    head = TOODHead.__new__(TOODHead)
    with pytest.raises(ConfigError, match='TOODHead: how to read this head of mmdet is not known'):
        dense_head(head)


@pytest.mark.parametrize('family', ['retinanet', 'gfl', 'fcos'])
def test_slots_in_what_pads_an_image_to_the_size_of_the_batch_are_told_apart(family):
    """An image of 64x96 in a batch of 96x128; the others are those of a pass over it alone."""
    model = models.build(getattr(detectors, family)(), seed=0).eval()
    head = dense_head(model.bbox_head)
    with torch.no_grad():
        large, small = (model.bbox_head(model.extract_feat(torch.zeros(1, 3, *size))) for size in ((96, 128), (64, 96)))
    metas = [dict(img_shape=(60, 90), pad_shape=(64, 96)), dict(img_shape=(96, 128))]
    found = head.in_image(large, metas)
    assert found[1].all()
    kept = head.priors(large)[found[0]]
    assert torch.equal(kept, head.priors(small))
    assert head.slot_logits(large).shape == (1, found.shape[1], 3)


def test_priors_and_flags_of_the_sizes_of_a_data_set_are_made_once(monkeypatch):
    """As COCO's images are padded to dozens of sizes, which come again and again, and two networks look at each."""
    heads = [models.build(detectors.retinanet()).bbox_head for _ in range(2)]
    made = {'grid_priors': 0, 'valid_flags': 0}
    for head in heads:
        for name in made:
            make = getattr(head.prior_generator, name)

            def counted(*given, name=name, make=make, **options):
                made[name] += 1
                return make(*given, **options)

            monkeypatch.setattr(head.prior_generator, name, counted)
    sizes = [(64, 32 * columns) for columns in range(2, 27)]
    for _ in range(2):
        for height, width in sizes:
            outputs = ([torch.zeros(1, 9, height // stride, width // stride) for stride in (8, 16, 32)],)
            for head in map(dense_head, heads):
                anchors = head.anchors(outputs)
                metas = [dict(img_shape=(height, width - 8), pad_shape=(height, width))]
                assert head.inside(anchors, outputs, metas).sum() <= head.in_image(outputs, metas).sum()
    assert made == dict.fromkeys(made, 2 * len(sizes))
