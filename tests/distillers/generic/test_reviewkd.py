import pytest
import torch
import torch.nn.functional as F

from mmkd.distill import distill
from mmkd.distillers.generic.reviewkd import Fusion, ReviewKD, context_loss
from mmkd.errors import ConfigError
from mmkd.testing import detectors, models
from mmkd.testing.batches import random_batch
from mmkd.testing.closed_form import closed_form_inputs


def test_the_value_of_the_authors_code():
    assert context_loss(*closed_form_inputs((2, 3, 8, 8))).item() == pytest.approx(2.3366916, rel=1e-5)


@pytest.mark.parametrize(
    ('size', 'weights'),
    [((8, 12), {4: 0.5, 2: 0.25, 1: 0.125}), ((4, 6), {2: 0.5, 1: 0.25}), ((8, 2), {1: 0.5}), ((1, 5), {})],
)
def test_the_formula(size, weights):
    student, teacher = (torch.randn(2, 3, *size, dtype=torch.float64) for _ in range(2))
    expected = (student - teacher).square().mean()
    for cells, weight in weights.items():
        pooled = [F.adaptive_avg_pool2d(each, cells) for each in (student, teacher)]
        same = size[0] % cells == size[1] % cells == 0  # elsewhere its cells overlap
        if not same:
            pytest.skip('cells of adaptive pooling overlap')
        expected = expected + weight * (pooled[0] - pooled[1]).square().mean()
    torch.testing.assert_close(context_loss(student, teacher), expected / (1 + sum(weights.values())))


def test_zero_for_equal_maps_and_the_gradient_reaches_the_student_alone():
    student, teacher = (torch.randn(2, 3, 8, 8, requires_grad=True) for _ in range(2))
    assert context_loss(student, student) == 0
    context_loss(student, teacher).backward()
    assert student.grad.any()
    assert teacher.grad is None


def norm(feature):
    deviation, mean = torch.var_mean(feature, (0, 2, 3), correction=0, keepdim=True)
    return (feature - mean) / (deviation + 1e-5).sqrt()


def test_a_fusion_step_by_step():
    torch.manual_seed(0)
    fusion = Fusion(5, 7, 4, deepest=False).double()
    level, deeper = torch.randn(2, 5, 6, 8, dtype=torch.float64), torch.randn(2, 4, 3, 4, dtype=torch.float64)
    x = norm(F.conv2d(level, fusion.reduce.conv.weight))
    y = deeper.repeat_interleave(2, 2).repeat_interleave(2, 3)
    scores = F.conv2d(torch.cat([x, y], 1), fusion.attend.weight, fusion.attend.bias)
    attention = 1 / (1 + (-scores).exp())
    mixed = x * attention[:, :1] + y * attention[:, 1:]
    out, passed = fusion(level, deeper)
    torch.testing.assert_close(passed, mixed)
    torch.testing.assert_close(out, norm(F.conv2d(mixed, fusion.put_out.conv.weight, padding=1)))


def test_each_level_learns_from_the_finer_levels_of_the_teacher(tmp_path):
    """The finest level's loss reaches the deepest level of the student; the deepest's no other."""
    teacher = detectors.retinanet(24)
    checkpoint = models.save_weights(teacher, tmp_path / 'teacher.pth')
    entry = dict(type='ReviewKD', layer='neck', channels=8)
    model = distill(
        models.build(detectors.retinanet(), seed=0), dict(config=teacher, checkpoint=checkpoint), dict(it=entry)
    )
    fusions = model.distillers.it.fusions
    assert [fusion.attend is None for fusion in fusions] == [False] * (len(fusions) - 1) + [True]
    assert fusions[0].put_out.conv.weight.shape == (24, 8, 3, 3)
    model.sources['teacher'].load()
    data = model.train().data_preprocessor(random_batch(model, (2, 3, 96, 128)), True)
    model(**data, mode='loss')['it.loss'].backward()
    assert all(each.grad.any() for each in model.distillers.parameters() if each.dim() > 1)
    assert all(conv.conv.weight.grad.any() for conv in model.neck.fpn_convs)


@pytest.mark.parametrize('channels', [0, 2.5, True])
def test_channels_out_of_range_are_an_error(channels):
    with pytest.raises(ConfigError, match='channels='):
        ReviewKD('neck', channels=channels)
