import math

import pytest
import torch

import mmkd
from mmkd.distillers.generic.ofd import OFD, Margin, partial_loss
from mmkd.errors import ConfigError
from mmkd.testing import models, segmentors
from mmkd.testing.batches import random_batch
from mmkd.testing.closed_form import closed_form_inputs


def test_the_loss_as_plain_loops():
    torch.manual_seed(0)
    student, teacher = (torch.randn(2, 3, 4, 5, dtype=torch.float64) for _ in range(2))
    margin = torch.tensor([-0.8, -0.1, 0.0], dtype=torch.float64)
    expected = 0.0
    for b in range(2):
        for c in range(3):
            for s, t in zip(student[b, c].flatten().tolist(), teacher[b, c].flatten().tolist()):
                target = max(t, margin[c].item())
                if s > target or target > 0:
                    expected += (s - target) ** 2 / 2
    assert partial_loss(student, teacher, margin).item() == pytest.approx(expected, rel=1e-12)


def test_the_value_of_the_authors_code():
    """clovaai/overhaul-distillation at 5f0b177, Segmentation/distiller.py, a sum over two images."""
    margin = torch.tensor([-0.7978845608, -0.3075129, -0.6])
    assert 2 * partial_loss(*closed_form_inputs((2, 3, 4, 4)), margin).item() == pytest.approx(262.2244873, rel=1e-6)


@pytest.mark.parametrize(
    ('student', 'teacher', 'loss'),
    [
        (3.0, 1.0, 4.0),  # a positive target is followed from both sides
        (-2.0, 1.0, 9.0),
        (0.5, -0.25, 0.5625),  # a negative one from above
        (-0.5, -0.25, 0.0),
        (0.5, -7.0, 2.25),  # no further than the margin, -1
        (-0.5, -7.0, 0.25),
        (-3.0, -7.0, 0.0),
    ],
)
def test_what_counts(student, teacher, loss):
    found = partial_loss(torch.full((1, 1, 1, 1), student), torch.full((1, 1, 1, 1), teacher), torch.tensor([-1.0]))
    assert found.item() == pytest.approx(loss)


def test_zero_for_equal_features_whatever_the_margin():
    feature = torch.randn(2, 3, 4, 5)
    assert partial_loss(feature, feature, torch.tensor([-10.0, -0.5, 0.0])) == 0


@pytest.mark.parametrize(('scale', 'shift'), [(1.0, 0.0), (0.5, 0.3), (2.0, -1.0)])
def test_the_margin_is_the_authors_for_what_a_batch_norm_puts_out(scale, shift):
    """Theirs is E[x | x < 0] of a normal distribution with the batch norm's scale and shift."""
    torch.manual_seed(0)
    ratio = shift / scale
    below = 0.5 * (1 + math.erf(-ratio / math.sqrt(2)))
    expected = shift - scale * math.exp(-(ratio**2) / 2) / math.sqrt(2 * math.pi) / below
    margin = Margin(1)
    for _ in range(4):
        found = margin(scale * torch.randn(8, 1, 128, 128) + shift)
    assert found.item() == pytest.approx(expected, rel=1e-2)


def test_the_margin_is_of_all_steps_and_each_channel():
    margin = Margin(3)
    margin(torch.tensor([-1.0, 2.0, 1.0]).reshape(1, 3, 1, 1))
    found = margin(torch.tensor([[-2.0, -4.0], [2.0, -3.0], [5.0, 0.0]]).reshape(1, 3, 1, 2))
    assert found.tolist() == pytest.approx([-7 / 3, -3.0, 0.0])
    margin.eval()
    assert margin(-torch.ones(1, 3, 1, 1)).tolist() == found.tolist()


def model_of(tmp_path, **options):
    torch.manual_seed(0)
    teacher = segmentors.pspnet(24)
    checkpoint = models.save_weights(teacher, tmp_path / 'teacher.pth')
    student = models.build(segmentors.pspnet(), seed=0)
    spec = dict(type='OFD', layer=['backbone.layer3', 'decode_head.bottleneck'], **options)
    model = mmkd.distill(student, dict(config=teacher, checkpoint=checkpoint), dict(it=spec))
    model.init_weights()
    return model.train()


def test_layers_are_read_before_their_activation_and_deeper_ones_weigh_more(tmp_path):
    model = model_of(tmp_path, loss_weight=2.0)
    before = ('backbone.layer3.1.relu:last_input', 'decode_head.bottleneck.activate:input')
    assert model.distillers.student_layers == before
    teacher = model.sources['teacher']
    assert teacher.layers == before
    assert any(isinstance(each, torch.nn.Identity) for each in teacher.model.modules())  # its norms are folded
    data = model.data_preprocessor(random_batch(model, (2, 3, 64, 64)), True)
    found = model(**data, mode='loss')['it.loss']
    own = model.distillers['it']
    taps = teacher(data['inputs'], data['data_samples'])
    targets = [taps[layer][0] for layer in before]
    assert all((each < 0).any() for each in targets)
    bounds = [(each.clamp(max=0).sum((0, 2, 3)) / (each < 0).sum((0, 2, 3)).clamp(min=1)) for each in targets]
    with mmkd.taps.Taps(model, before) as taps:
        model.decode_head.loss(model.extract_feat(data['inputs']), data['data_samples'], model.train_cfg)
    adapted = own.levels.adapters([taps[layer][0] for layer in before], targets)
    parts = [partial_loss(*each) for each in zip(adapted, targets, bounds, strict=True)]
    assert found.item() == pytest.approx(2 * (parts[0] / 2 + parts[1]).item(), rel=1e-4)


def test_the_margin_is_in_the_checkpoint_and_not_in_what_is_exported(tmp_path):
    model = model_of(tmp_path)
    data = model.data_preprocessor(random_batch(model, (2, 3, 64, 64)), True)
    model(**data, mode='loss')
    state = model.state_dict()
    assert state['distillers.it.margins.0.count'].any()
    other = model_of(tmp_path)
    other.load_state_dict(state)
    assert torch.equal(other.distillers['it'].margins[1].total, model.distillers['it'].margins[1].total)
    assert not [key for key in model.plain().state_dict() if 'margin' in key]


def test_an_unknown_layer_is_that_of_the_student(tmp_path):
    with pytest.raises(ConfigError, match=r"student layer 'backbone.layer9': EncoderDecoder has no such module"):
        mmkd.distill(
            models.build(segmentors.pspnet()),
            models.build(segmentors.pspnet()),
            dict(it=dict(type='OFD', layer='backbone.layer9')),
        )


def test_options_out_of_range_are_errors():
    with pytest.raises(ConfigError, match='teacher_layer=3'):
        OFD('neck', teacher_layer=3)
