"""Two-stage detectors other than Faster R-CNN: cascades as teachers and students, and what is refused by one line."""

import pytest
import torch
from two_stage import cascade_rcnn, cascade_rpn, double_head_rcnn, grid_rcnn, sparse_rcnn

from mmkd.distill import distill
from mmkd.distillers.detection.mimic import teacher_proposals
from mmkd.errors import ConfigError
from mmkd.testing import detectors, models
from mmkd.testing.batches import random_batch

AGNOSTIC = dict(roi_head=dict(bbox_head=dict(reg_class_agnostic=True)))
GDETKD = dict(type='GDetKD', memory=64, keys_per_step=16)


def pair(student, teacher, **spec):
    model = distill(models.build(student, seed=0), models.build(teacher, seed=1), dict(it=spec))
    model.sources['teacher'].load()
    return model.train()


def step(model):
    """The distiller's losses of a batch, the RoIs of the student's first stage and what its head put out for them."""
    data = random_batch(models.build(detectors.faster_rcnn()), (2, 3, 96, 128))
    batch = model.data_preprocessor(data, True)
    seen = {}
    head = model.roi_head

    def record(module, inputs, output):
        seen['rois'], seen['features'] = inputs[1].detach(), output.detach()

    extractor = head.bbox_roi_extractor
    handle = (extractor[0] if isinstance(extractor, torch.nn.ModuleList) else extractor).register_forward_hook(record)
    torch.manual_seed(0)
    found = {key.removeprefix('it.'): value for key, value in model(**batch, mode='loss').items() if 'it.' in key}
    handle.remove()
    return found, seen, batch


def of_teacher(teacher, batch, rois, stage):
    """What a stage of a cascade says of RoIs, as mmdet runs it."""
    with torch.no_grad():
        features = [level.contiguous() for level in teacher.extract_feat(batch['inputs'])]
        return teacher.roi_head._bbox_forward(stage, features, rois)


@pytest.mark.parametrize('stage', [0, 1])
@pytest.mark.parametrize('student', [detectors.faster_rcnn, cascade_rcnn])
def test_mimic_learns_from_the_named_stage_of_a_cascade(student, stage):
    own = dict(stage=0) if student is cascade_rcnn else {}
    spec = dict(type='Mimic', cls_weight=1.0, teacher_stage=stage, **own)
    model = pair(student(), cascade_rcnn(24), **spec)
    found, seen, batch = step(model)
    target = of_teacher(model.sources['teacher'].model, batch, seen['rois'], stage)
    assert set(found) == {'loss_feature', 'loss_cls'}
    adapted = model.distillers['it'].adapters[0](seen['features'])
    torch.testing.assert_close(found['loss_feature'], 0.5 * (adapted - target['bbox_feats']).square().mean())
    head = model.roi_head.bbox_head
    with torch.no_grad():
        logits, _ = (head[0] if isinstance(head, torch.nn.ModuleList) else head)(seen['features'])
    torch.testing.assert_close(found['loss_cls'].detach(), (logits - target['cls_score']).square().mean())


def test_the_teachers_stage_is_the_students_unless_it_is_named():
    losses = [
        step(pair(cascade_rcnn(), cascade_rcnn(), type='Mimic', cls_weight=1.0, stage=1, **each))[0]['loss_cls'].item()
        for each in (dict(), dict(teacher_stage=1), dict(teacher_stage=0))
    ]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    'spec',
    [
        dict(type='QuantizationMimic', bbox_weight=1.0, teacher_stage=0),
        dict(type='Chen', teacher_stage=0),
        dict(**GDETKD, cls_weight=1.0, bbox_weight=1.0, teacher_stage=0),
        dict(**GDETKD, cls_weight=1.0, teacher_stage=1),
    ],
)
def test_other_methods_learn_from_a_stage_of_a_cascade(spec):
    model = pair(detectors.faster_rcnn(**AGNOSTIC), cascade_rcnn(24), **spec)
    found, _, _ = step(model)
    losses = {key: value for key, value in found.items() if key.startswith('loss')}
    assert all(torch.isfinite(value) and value > 0 for value in losses.values())
    sum(losses.values()).backward()
    gradients = [each.grad for each in model.roi_head.bbox_head.parameters()]
    assert any(each is not None and each.any() for each in gradients)
    assert all(each.grad is not None for each in model.distillers.parameters())


def test_boxes_of_a_stage_are_compared_with_deltas_of_the_same_unit():
    with pytest.raises(ConfigError, match=r'differs in .*\(0.05, 0.05, 0.1, 0.1\).* \(teacher\); Chen compares them'):
        pair(detectors.faster_rcnn(**AGNOSTIC), cascade_rcnn(24), type='Chen', teacher_stage=1)


def test_a_second_stage_on_the_teachers_proposals_runs_the_students_head_on_them():
    model = pair(detectors.faster_rcnn(), detectors.faster_rcnn(24), type='Mimic', proposals='teacher', cls_weight=1.0)
    teacher = model.sources['teacher'].model
    seen = {}
    teacher.roi_head.bbox_roi_extractor.register_forward_hook(
        lambda module, inputs, output: seen.update(rois=inputs[1], features=output)
    )
    found, _, batch = step(model)
    with torch.no_grad():
        own = model.roi_head._bbox_forward(model.extract_feat(batch['inputs']), seen['rois'])
        logits, _ = teacher.roi_head.bbox_head(seen['features'])
        adapted = model.distillers['it'].adapters[0](own['bbox_feats'])
    metas = [sample.metainfo for sample in batch['data_samples']]
    proposals = teacher_proposals(model.sources['teacher'](batch['inputs'], batch['data_samples']), metas)
    assert torch.equal(seen['rois'], proposals)
    torch.testing.assert_close(found['loss_feature'].detach(), 0.5 * (adapted - seen['features']).square().mean())
    torch.testing.assert_close(found['loss_cls'].detach(), (own['cls_score'] - logits).square().mean())
    found['loss_cls'].backward()
    assert model.roi_head.bbox_head.fc_cls.weight.grad.any()


FASTER = detectors.faster_rcnn
NO_STAGE = r"^distillers.it: 'roi_head' of the student \(CascadeRCNN\) is a cascade, .*stage=0 to 1$"
TWO_INPUTS = r"'roi_head.bbox_head' of the {} \(DoubleConvFCBBoxHead of FasterRCNN\) takes x_cls and x_reg; a head that"
UNKNOWN = r'^distillers.it: {}: how to read this head is not known; .*dense_head.register$'
REFUSED = [
    *((cascade_rcnn, cascade_rcnn, dict(type=name), NO_STAGE) for name in ('Mimic', 'QuantizationMimic', 'Chen')),
    (cascade_rcnn, cascade_rcnn, GDETKD, NO_STAGE),
    (
        cascade_rcnn,
        cascade_rcnn,
        dict(type='Mimic', stage=2),
        'found stage=2; name the stage that learns, stage=0 to 1',
    ),
    (FASTER, FASTER, dict(type='Mimic', stage=0), 'stage=0: .* is no cascade; leave it out'),
    (FASTER, FASTER, dict(type='Mimic', teacher_stage=0), 'teacher_stage=0: .* is no cascade; leave it out'),
    *(
        (FASTER, cascade_rcnn, spec, r'of the teacher \(CascadeRCNN\) is a cascade, .*teacher_stage=0 to 1$')
        for spec in (dict(type='Mimic'), dict(type='QuantizationMimic'), dict(type='Chen'), GDETKD)
    ),
    *(
        (double_head_rcnn, double_head_rcnn, spec, TWO_INPUTS.format('student'))
        for spec in (dict(type='Mimic'), dict(type='QuantizationMimic'), dict(type='Chen'), GDETKD)
    ),
    (FASTER, double_head_rcnn, GDETKD, TWO_INPUTS.format('teacher')),
    (FASTER, double_head_rcnn, dict(type='Mimic', cls_weight=1.0), TWO_INPUTS.format('teacher')),
    (grid_rcnn, grid_rcnn, dict(type='Chen'), 'does not predict classes and boxes as a BBoxHead does; Chen compares'),
    (grid_rcnn, grid_rcnn, dict(type='Mimic', bbox_weight=1.0), 'does not predict classes and boxes'),
    (sparse_rcnn, sparse_rcnn, dict(type='Mimic'), 'DIIHead of SparseRCNN. takes roi_feat and proposal_feat'),
    (sparse_rcnn, sparse_rcnn, GDETKD, 'DIIHead of SparseRCNN. takes roi_feat and proposal_feat'),
    *(
        (family, family, spec, UNKNOWN.format(head))
        for family, head in ((sparse_rcnn, 'EmbeddingRPNHead'), (cascade_rpn, 'CascadeRPNHead'))
        for spec in (
            dict(type='GID', head='rpn_head'),
            dict(type='FRS', head='rpn_head'),
            dict(type='FGFI'),
            dict(type='Chen'),
        )
    ),
    (
        detectors.retinanet,
        FASTER,
        dict(type='Mimic'),
        "the student .RetinaNet. has no 'roi_head' with boxes; name its he",
    ),
    (FASTER, detectors.retinanet, dict(type='Mimic'), 'a two-stage teacher is needed'),
    *(
        (
            student,
            teacher,
            dict(type=name),
            rf'roi_head. of the {whose} .CascadeRCNN. is a cascade, whose stages {name} does .* {stage}$',
        )
        for student, teacher, whose, stage in (
            (cascade_rcnn, FASTER, 'student', 'stage'),
            (FASTER, cascade_rcnn, 'teacher', 'teacher_stage'),
        )
        for name in ('KD', 'DKD', 'DeFeat')
    ),
    (sparse_rcnn, sparse_rcnn, dict(type='KD'), 'DIIHead of SparseRCNN. takes roi_feat and proposal_feat'),
    (
        FASTER,
        lambda: detectors.faster_rcnn(classes=5),
        dict(type='DeFeat'),
        'differs in classes: .*; DeFeat compares them',
    ),
]


@pytest.mark.parametrize(('student', 'teacher', 'spec', 'message'), REFUSED)
def test_what_cannot_be_compared_is_one_line(student, teacher, spec, message):
    with pytest.raises(ConfigError, match=message) as error:
        pair(student(), teacher(), **spec)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('family', 'spec'),
    [
        (grid_rcnn, dict(type='Mimic', cls_weight=1.0)),
        (grid_rcnn, GDETKD),
        (cascade_rpn, dict(type='Mimic', cls_weight=1.0, bbox_weight=1.0)),
        (cascade_rpn, dict(type='QuantizationMimic')),
        (double_head_rcnn, dict(type='GID', head='rpn_head')),
        (double_head_rcnn, dict(type='FGFI', loss_weight=1.0)),
        (cascade_rcnn, dict(type='FRS', head='rpn_head', feature_weight=1.0)),
        (cascade_rcnn, dict(type='Chen', stage=0)),
        (cascade_rcnn, dict(**GDETKD, cls_weight=1.0, stage=1)),
    ],
)
def test_what_works_learns(family, spec):
    found, _, _ = step(pair(family(), family(24), **spec))
    losses = [value for key, value in found.items() if key.startswith('loss')]
    assert all(torch.isfinite(value) for value in losses)
    assert sum(losses) > 0
