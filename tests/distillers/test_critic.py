import math

import pytest
import torch
from mmengine.model import convert_sync_batchnorm
from torch import nn

from mmkd.distillers.critic import (
    Critic,
    SelfAttention,
    critic_loss,
    deception_loss,
    enlarge,
    gradient_penalty,
)
from mmkd.errors import ConfigError


class Cubic(nn.Module):
    """A score of known gradient: the sum of w x^3 over an image."""

    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape, dtype=torch.float64))

    def forward(self, logits, image=None):
        return (self.weight * logits**3).flatten(1).sum(1)


def test_the_score_is_that_of_the_network_written_out():
    critic = Critic(5, spectral=False).double()
    convs = [each for each in critic.layers if isinstance(each, nn.Conv2d)]
    attentions = [each for each in critic.layers if isinstance(each, SelfAttention)]
    assert [conv.weight.shape[:2] for conv in convs] == [(64, 5), (128, 64), (256, 128), (512, 256)]
    for attention in attentions:
        nn.init.constant_(attention.gamma, 0.7)
    logits = torch.randn(2, 5, 64, 128, dtype=torch.float64)
    x = (logits - logits.mean((0, 2, 3), True)) / (logits.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
    for index, conv in enumerate(convs):
        x = nn.functional.conv2d(x, conv.weight, conv.bias, stride=2, padding=1)
        x = torch.where(x > 0, x, 0.1 * x)
        if index >= 2:
            x = attentions[index - 2](x)
    assert x.shape == (2, 512, 4, 8)
    scores = nn.functional.conv2d(x, critic.score.weight, critic.score.bias)
    assert scores.shape == (2, 1, 1, 5)
    torch.testing.assert_close(critic(logits), scores.mean((1, 2, 3)))


def test_attention_as_plain_loops():
    attention = SelfAttention(8).double()
    nn.init.constant_(attention.gamma, 0.7)
    feature = torch.randn(1, 8, 2, 3, dtype=torch.float64)
    x = feature[0].flatten(1).T
    q, k, v = (
        [layer.weight[:, :, 0, 0] @ each + (0 if layer.bias is None else layer.bias) for each in x]
        for layer in (attention.query, attention.key, attention.value)
    )
    found = attention(feature)[0].flatten(1).T
    for i in range(6):
        powers = [math.exp(q[i].dot(k[j])) for j in range(6)]
        gathered = sum(power / sum(powers) * v[j] for j, power in enumerate(powers))
        torch.testing.assert_close(found[i], x[i] + 0.7 * gathered)


def test_spectral_norm_bounds_the_four_convolutions():
    """After some power iterations, one per forward pass, their largest singular value is 1."""
    critic = Critic(3).train()
    logits = torch.randn(2, 3, 64, 64)
    for _ in range(30):
        critic(logits)
    convs = [each for each in critic.layers if isinstance(each, nn.Conv2d)]
    assert len(convs) == 4
    for conv in convs:
        assert torch.linalg.matrix_norm(conv.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.05)
    plain = Critic(3, spectral=False)
    assert not any('parametrizations' in name for name in plain.state_dict())


@pytest.mark.parametrize('norm', ['batch', 'tanh', None])
def test_what_normalises_the_logits(norm):
    critic = Critic(3, norm=norm)
    logits = 50 * torch.randn(2, 3, 64, 64) + 20
    expected = {
        'batch': (logits - logits.mean((0, 2, 3), True)) / logits.var((0, 2, 3), unbiased=False, keepdim=True).sqrt(),
        'tanh': logits.tanh(),
        None: logits,
    }[norm]
    torch.testing.assert_close(critic.norm(logits), expected)
    torch.testing.assert_close(critic.eval().norm(logits), expected)


def test_the_image_is_one_more_input_and_is_not_normalised():
    critic = Critic(3, image_channels=2, norm='tanh', spectral=False)
    logits, image = torch.randn(2, 3, 64, 64), 9 * torch.randn(2, 2, 64, 64)
    expected = critic.score(critic.layers(torch.cat([logits.tanh(), image], 1))).flatten()
    torch.testing.assert_close(critic(logits, image), expected)


@pytest.mark.parametrize(
    ('size', 'expected'),
    [((64, 64), (64, 64)), ((65, 80), (65, 80)), ((32, 32), (64, 64)), ((33, 50), (64, 97)), ((100, 1), (6400, 64))],
)
def test_small_logits_are_enlarged_in_proportion(size, expected):
    logits = torch.randn(1, 2, *size)
    enlarged = enlarge(logits)
    assert enlarged.shape[2:] == expected
    assert (enlarged is logits) == (size == expected)
    torch.testing.assert_close(enlarge(torch.full_like(logits, 3.0)), torch.full_like(enlarged, 3.0))


def test_the_penalty_as_plain_loops():
    critic = Cubic(2, 3, 4)
    student, teacher = torch.randn(2, 3, 2, 3, 4, dtype=torch.float64)
    torch.manual_seed(5)
    found = gradient_penalty(critic, student, teacher)
    torch.manual_seed(5)
    shares = torch.rand(3, 1, 1, 1, dtype=torch.float64).flatten().tolist()
    assert len(set(shares)) == 3
    total = 0.0
    for share, s, t in zip(shares, student, teacher):
        squares = 0.0
        for w, a, b in zip(critic.weight.flatten().tolist(), s.flatten().tolist(), t.flatten().tolist()):
            squares += (3 * w * (share * b + (1 - share) * a) ** 2) ** 2
        total += (math.sqrt(squares) - 1) ** 2
    assert found.item() == pytest.approx(total / 3, rel=1e-6)


def test_a_linear_critic_of_slope_one_has_no_penalty():
    class Linear(nn.Module):
        def forward(self, logits, image=None):
            return logits.flatten(1).sum(1) / math.sqrt(logits[0].numel())

    assert gradient_penalty(Linear(), *torch.randn(2, 3, 2, 4, 4)).item() == pytest.approx(0, abs=1e-10)


def test_the_penalty_has_the_gradient_of_finite_differences():
    """Second derivatives through batch norm, convolutions, LeakyReLU and attention; in float64.

    The step is small: where a LeakyReLU changes its side the penalty jumps.
    """
    critic = Critic(2, spectral=False).double()
    nn.init.constant_(critic.layers[-1].gamma, 0.5)
    nn.init.normal_(critic.layers[-1].query.weight)
    nn.init.normal_(critic.score.weight)
    student, teacher = 0.1 * torch.randn(2, 2, 2, 64, 64, dtype=torch.float64)

    def penalty():
        torch.manual_seed(3)
        return gradient_penalty(critic, student, teacher)

    penalty().backward()
    for parameter in (critic.norm.weight, critic.layers[0].weight, critic.layers[-1].query.weight, critic.score.weight):
        steepest = parameter.grad.norm().item()
        direction = parameter.grad / steepest
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * 1e-8)
                values.append(penalty().item())
                parameter.sub_(direction, alpha=sign * 1e-8)
        assert steepest > 0.1
        assert (values[0] - values[1]) / 2e-8 == pytest.approx(steepest, rel=1e-3)


def test_a_critic_of_no_slope_has_a_finite_gradient():
    critic = Critic(2, spectral=False)
    nn.init.zeros_(critic.score.weight)
    loss = gradient_penalty(critic, *torch.randn(2, 2, 2, 64, 64))
    assert loss.item() == 1
    loss.backward()
    assert all(torch.isfinite(each.grad).all() for each in critic.parameters() if each.grad is not None)


@pytest.mark.parametrize('mode', ['wgan-gp', 'hinge'])
def test_losses_of_student_and_critic_as_plain_loops(mode):
    critic = Cubic(2, 3, 4)
    with torch.no_grad():
        critic.weight *= 0.1
    student, teacher = torch.randn(2, 6, 2, 3, 4, dtype=torch.float64)
    low, high = critic(student).tolist(), critic(teacher).tolist()
    assert deception_loss(critic, student).item() == pytest.approx(-sum(low) / 6, rel=1e-6)
    torch.manual_seed(5)
    found = critic_loss(critic, student, teacher, mode=mode, penalty_weight=7.0).item()
    torch.manual_seed(5)
    penalty = gradient_penalty(critic, student, teacher).item()
    if mode == 'hinge':
        expected = sum(max(0, 1 + a) + max(0, 1 - b) for a, b in zip(low, high)) / 6
        assert any(1 + a < 0 or 1 - b < 0 for a, b in zip(low, high))
    else:
        expected = sum(a - b for a, b in zip(low, high)) / 6 + 7 * penalty
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize('mode', ['wgan-gp', 'hinge'])
def test_each_loss_teaches_its_own_network_alone(mode):
    critic = Critic(3)
    student, teacher = (each.requires_grad_() for each in torch.randn(2, 2, 3, 64, 64))
    deception_loss(critic, student).backward()
    assert student.grad.any()
    assert all(each.grad is None for each in critic.parameters())
    student.grad = None
    critic_loss(critic, student, teacher, mode=mode).backward()
    assert student.grad is None
    assert teacher.grad is None
    assert all(each.grad is not None for each in critic.parameters())  # DDP waits for each of them


def test_losses_without_gradients():
    critic = Critic(3)
    with torch.no_grad():
        loss = critic_loss(critic, *torch.randn(2, 2, 3, 64, 64))
    assert torch.isfinite(loss)


@pytest.mark.parametrize('mode', ['wgan-gp', 'hinge'])
def test_one_image_channels_last_and_extreme_logits(mode):
    critic = Critic(3)
    student, teacher = torch.randn(2, 1, 3, 64, 64)
    student[0, 0, 5, 5] += 200
    expected = None
    for layout in (torch.contiguous_format, torch.channels_last):
        s, t = (each.clone(memory_format=layout).requires_grad_() for each in (student, teacher))
        torch.manual_seed(0)
        critic.eval()  # no power iteration: the same weights twice
        losses = torch.stack([deception_loss(critic, s), critic_loss(critic, s, t, mode=mode)])
        losses.sum().backward()
        assert torch.isfinite(losses).all()
        assert torch.isfinite(s.grad).all()
        assert all(torch.isfinite(each.grad).all() for each in critic.parameters())
        torch.testing.assert_close(losses, losses if expected is None else expected, rtol=1e-4, atol=1e-5)
        expected = losses


def test_synchronised_batch_norm_leaves_the_critic_alone():
    """It could not be differentiated twice."""
    critic = Critic(3)
    norm = critic.norm
    assert convert_sync_batchnorm(critic).norm is norm


def test_a_normalisation_that_does_not_exist_is_an_error():
    with pytest.raises(ConfigError, match='critic_norm'):
        Critic(3, norm='layer')
