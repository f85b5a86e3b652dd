import pytest
import torch

from mmkd.distillers.generic import mgd
from mmkd.distillers.generic.mgd import MGD, generation_loss, random_mask
from mmkd.errors import ConfigError
from mmkd.hosts.running import probe
from mmkd.taps import Taps
from mmkd.testing import detectors, models


def convolution(feature, weight, bias):
    """3x3 with a border of zeros, value by value."""
    _, height, width = len(feature), len(feature[0]), len(feature[0][0])
    out = []
    for kernel, offset in zip(weight.tolist(), bias.tolist()):
        rows = [[offset] * width for _ in range(height)]
        for y in range(height):
            for x in range(width):
                for plane, part in zip(feature, kernel):
                    for dy in range(3):
                        for dx in range(3):
                            if 0 <= y + dy - 1 < height and 0 <= x + dx - 1 < width:
                                rows[y][x] += part[dy][dx] * plane[y + dy - 1][x + dx - 1]
        out.append(rows)
    return out


def plain_loops(student, teacher, mask, generator):
    """The formula, value by value, in float64."""
    first, _, last = generator
    total = 0.0
    for s, t, m in zip(student.tolist(), teacher.tolist(), mask[:, 0].tolist()):
        masked = [[[v * k for v, k in zip(*rows)] for rows in zip(plane, m)] for plane in s]
        hidden = convolution(masked, first.weight, first.bias)
        hidden = [[[max(v, 0.0) for v in row] for row in plane] for plane in hidden]
        for plane, target in zip(convolution(hidden, last.weight, last.bias), t):
            total += sum((v - w) ** 2 for row, other in zip(plane, target) for v, w in zip(row, other))
    return total / len(student)


@pytest.mark.parametrize('ratio', [0.0, 0.45])
def test_the_formula_as_plain_loops(ratio):
    student, teacher = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    generator = mgd.generator(3).double()
    mask = random_mask(student, ratio)
    found = generation_loss(student, teacher, mask, generator).item()
    assert found == pytest.approx(plain_loops(student, teacher, mask, generator), rel=1e-6)


def test_the_mask_is_shared_by_channels_and_drops_its_ratio():
    mask = random_mask(torch.zeros(4, 7, 50, 50), 0.65)
    assert mask.shape == (4, 1, 50, 50)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert mask.mean().item() == pytest.approx(0.35, abs=0.03)
    assert (mask[0] != mask[1]).any()
    assert (random_mask(torch.zeros(1, 2, 9, 9), 0.0) == 1).all()


def test_what_is_masked_gets_no_gradient():
    student = torch.randn(2, 3, 6, 6, requires_grad=True)
    mask = random_mask(student, 0.5)
    generation_loss(student, torch.randn(2, 3, 6, 6), mask, mgd.generator(3)).backward()
    assert (student.grad * (1 - mask)).abs().sum() == 0
    assert (student.grad * mask).abs().sum((2, 3)).min() > 0


def tapped(student, teacher, distiller, images=None):
    distiller.setup(probe(student, distiller.student_layers), probe(teacher, distiller.teacher_layers))
    images = torch.randn(2, 3, 96, 128) if images is None else images
    taps = []
    for model, layers in ((student, distiller.student_layers), (teacher, distiller.teacher_layers)):
        with Taps(model, layers) as read:
            model.extract_feat(images)
        taps.append(read)
    return taps


@pytest.mark.parametrize('channels', [16, 24])
def test_gradients_reach_student_adapters_and_generators_and_never_the_teacher(channels):
    student = models.build(detectors.retinanet(), seed=0)
    teacher = models.build(detectors.retinanet(channels=channels), seed=1)
    distiller = MGD('neck')
    distiller(*tapped(student, teacher, distiller), None)['loss'].backward()
    assert len(list(distiller.parameters())) == 3 * (4 if channels == 16 else 6)
    assert all(each.grad.abs().sum() > 0 for each in distiller.parameters())
    assert student.neck.lateral_convs[0].conv.weight.grad.abs().sum() > 0
    assert all(each.grad is None for each in teacher.parameters())


def test_each_step_draws_a_new_mask_unless_nothing_is_masked():
    student, teacher = (models.build(detectors.retinanet(), seed=seed) for seed in (0, 1))
    for ratio in (0.65, 0.0):
        distiller = MGD('neck', mask_ratio=ratio)
        taps = tapped(student, teacher, distiller)
        first, second = (distiller(*taps, None)['loss'].item() for _ in range(2))
        assert (first == second) == (ratio == 0.0)


def test_levels_are_summed_and_weighed_alike_for_any_number_of_images():
    student, teacher = (models.build(detectors.retinanet(), seed=seed) for seed in (0, 1))
    image = torch.randn(1, 3, 96, 128)
    distiller = MGD('neck', mask_ratio=0.0, loss_weight=3.0)
    s, t = tapped(student, teacher, distiller, image)
    expected = sum(
        (generate(a) - b).square().sum() for a, b, generate in zip(s['neck'], t['neck'], distiller.generators)
    )
    torch.testing.assert_close(distiller(s, t, None)['loss'], 3 * expected)
    generators = distiller.generators
    more = tapped(student, teacher, distiller, image.repeat(3, 1, 1, 1))
    distiller.generators = generators
    torch.testing.assert_close(distiller(*more, None)['loss'], 3 * expected, rtol=1e-4, atol=0)


def test_the_generators_learn():
    """Out of a part of the same feature, the loss falls."""
    torch.manual_seed(0)
    feature = torch.randn(2, 4, 8, 8)
    generator = mgd.generator(4)
    optimizer = torch.optim.Adam(generator.parameters(), lr=1e-2)
    losses = []
    for _ in range(100):
        loss = generation_loss(feature, feature, random_mask(feature, 0.2), generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    'options', [dict(mask_ratio=1.0), dict(mask_ratio=-0.1), dict(match='size'), dict(loss_weight='2')]
)
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ConfigError, match=next(iter(options)).removeprefix('loss_')):
        MGD('neck', **options)
