"""Adversarial terms in one backward pass, with one optimizer; the critic for segmentation, and its losses.

A critic (a discriminator) learns to tell the student's outputs from the teacher's while the student learns to deceive it.
The losses of both are added. The student's sees the critic's weights as constants (:func:`with_constant_weights`), and the
critic's sees the student's outputs as constants (``detach``). Each loss then has a gradient for its own network alone. One
step of one optimizer changes the weights as the usual two steps do, whose gradients are taken at the same weights.

Reversing the gradient between student and critic would save a pass through the critic. It is right only where the student's
loss is the negative of the critic's (WGAN), not for hinge or cross-entropy. ``clip_grad`` of mmengine's optimizer wrapper
takes one norm over both networks, and that of a critic with a gradient penalty can be a thousand times the student's. Set it
to None, as mmseg's configs have it.
"""

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm

from mmkd.errors import ConfigError

MODES = ('wgan-gp', 'hinge')
NORMS = ('batch', 'tanh', None)
SMALLEST = 64
"""Height and width, in positions, that a critic needs at least."""


def with_constant_weights(module: nn.Module) -> Callable[..., torch.Tensor]:
    """``module`` as a function through which gradients flow to its inputs, but not to its weights."""
    weights = {name: weight.detach() for name, weight in module.named_parameters()}
    return lambda *inputs: functional_call(module, weights, inputs)


class Critic(nn.Module):
    """Scores the logits of a whole image: high for the teacher's, low for the student's.

    Normalized logits pass four 4x4 convolutions of stride 2 with LeakyReLU (slope 0.1) and 64, 128, 256 and 512 channels,
    with self-attention after the third and the fourth, and a 4x4 convolution without padding to one channel. The score of
    an image is the mean over the positions that this leaves: one of 64x64 logits, 5 of 64x128. It is the network of SKD's
    public code; ``docs/methods/skd.md`` has the differences.

    Args:
        channels: The channels of the logits, one per class.
        image_channels: Those of the image that the logits belong to, if the score depends on it. Default 0: it does not.
        norm: What normalizes the logits: ``'batch'`` (default), a batch norm over the batch of each process,
            ``'tanh'`` or None.
        spectral: Whether spectral norm bounds the four convolutions. Default True. Its power iterations are kept in
            buffers. They are equal on all processes that start from the same seed, as mmengine's do unless told not to.
    """

    def __init__(self, channels: int, image_channels: int = 0, norm: str | None = 'batch', spectral: bool = True):
        super().__init__()
        if norm not in NORMS:
            raise ConfigError(f"critic_norm={norm!r}: expected 'batch', 'tanh' or None")
        self.norm = BatchNorm(channels) if norm == 'batch' else nn.Tanh() if norm == 'tanh' else nn.Identity()
        widths = (channels + image_channels, 64, 128, 256, 512)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            conv = nn.Conv2d(inputs, outputs, 4, stride=2, padding=1)
            layers += [spectral_norm(conv) if spectral else conv, nn.LeakyReLU(0.1)]
            if outputs >= 256:
                layers.append(SelfAttention(outputs))
        self.layers = nn.Sequential(*layers)
        self.score = nn.Conv2d(widths[-1], 1, 4)

    def forward(self, logits: torch.Tensor, image: torch.Tensor | None = None) -> torch.Tensor:
        """Scores (B,) of logits (B, K, H, W), height and width at least 64, and the image at the same size."""
        logits = self.norm(logits)
        if image is not None:
            logits = torch.cat([logits, image], 1)
        return self.score(self.layers(logits)).mean((1, 2, 3))


class BatchNorm(nn.Module):
    """Batch norm over the batch of each process, without running statistics.

    No ``nn.BatchNorm2d``, which mmengine's ``sync_bn`` would replace by one that cannot be differentiated twice, as the
    gradient penalty needs.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(feature, None, None, self.weight, self.bias, training=True)


class SelfAttention(nn.Module):
    r"""Adds to each position what it gathers from all others.

    .. math:: y_i = x_i + \gamma \sum_j \operatorname{softmax}_j(q_i^\top k_j) v_j

    q, k and v are 1x1 convolutions of x, q and k to an eighth of its channels; gamma is learnt and starts at 0.

    Zhang et al., "Self-Attention Generative Adversarial Networks", ICML 2019, arXiv 1805.08318.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.query = nn.Conv2d(channels, channels // 8, 1)
        self.key = nn.Conv2d(channels, channels // 8, 1, bias=False)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        query, key, value = (layer(feature).flatten(2) for layer in (self.query, self.key, self.value))
        attention = (query.mT @ key).softmax(2)
        return feature + self.gamma * (value @ attention.mT).reshape(feature.shape)


def enlarge(maps: torch.Tensor, shortest: int = SMALLEST) -> torch.Tensor:
    """Maps (B, C, H, W), resized in their proportions where the shorter side is below ``shortest`` (bilinear)."""
    short = min(maps.shape[2:])
    if short >= shortest:
        return maps
    size = tuple(-(-side * shortest // short) for side in maps.shape[2:])
    return F.interpolate(maps, size, mode='bilinear', align_corners=False)


def gradient_penalty(
    critic: nn.Module, student: torch.Tensor, teacher: torch.Tensor, image: torch.Tensor | None = None
) -> torch.Tensor:
    r"""Keeps the slope of the critic near 1 between the student's outputs and the teacher's.

    .. math::
        P = \frac{1}{B} \sum_b \left( \lVert g_b \rVert_2 - 1 \right)^2, \qquad
        g = \nabla_{\hat x} \sum_b D(\hat x)_b, \qquad \hat x_b = a_b t_b + (1 - a_b) s_b

    with a drawn from [0, 1) for each image. The norm is that over all channels and positions of an image; the image that
    the score may depend on is left as it is.

    Gulrajani et al., "Improved Training of Wasserstein GANs", NeurIPS 2017, arXiv 1704.00028.

    Args:
        critic: D, from (B, K, H, W) and the image to (B,).
        student: (B, K, H, W); no gradient flows into it.
        teacher: The same shape; no gradient flows into it.
        image: (B, 3, H, W), or None.

    Returns:
        A scalar, with a gradient for the critic.
    """
    share = torch.rand(len(student), 1, 1, 1, device=student.device, dtype=student.dtype)
    between = torch.lerp(student.detach(), teacher.detach(), share)
    with torch.enable_grad():  # a loss may be asked for without gradients
        between.requires_grad_()
        (slope,) = torch.autograd.grad(critic(between, image).sum(), between, create_graph=True)
    return (slope.flatten(1).norm(dim=1) - 1).square().mean()


def deception_loss(critic: nn.Module, student: torch.Tensor, image: torch.Tensor | None = None) -> torch.Tensor:
    r"""The student's loss against the critic D, whose weights are constants here.

    .. math:: L = -\frac{1}{B} \sum_b D(s_b)

    Args:
        critic: D, from (B, K, H, W) and the image to (B,).
        student: (B, K, H, W).
        image: (B, 3, H, W), or None.

    Returns:
        A scalar, of either sign.
    """
    return -with_constant_weights(critic)(student, image).mean()


def critic_loss(
    critic: nn.Module,
    student: torch.Tensor,
    teacher: torch.Tensor,
    image: torch.Tensor | None = None,
    mode: str = 'wgan-gp',
    penalty_weight: float = 10.0,
) -> torch.Tensor:
    r"""The critic's own loss.

    .. math::
        L_\text{wgan-gp} = \frac{1}{B} \sum_b \left( D(s_b) - D(t_b) \right) + \lambda P, \qquad
        L_\text{hinge} = \frac{1}{B} \sum_b \left( \max(0, 1 + D(s_b)) + \max(0, 1 - D(t_b)) \right)

    with P the :func:`gradient_penalty`.

    Args:
        critic: D, from (B, K, H, W) and the image to (B,).
        student: (B, K, H, W); no gradient flows into it.
        teacher: The same shape; no gradient flows into it.
        image: (B, 3, H, W), or None.
        mode: ``'wgan-gp'`` or ``'hinge'``.
        penalty_weight: lambda, of ``'wgan-gp'`` alone.

    Returns:
        A scalar, of either sign for ``'wgan-gp'``.
    """
    student, teacher = student.detach(), teacher.detach()
    low, high = critic(student, image), critic(teacher, image)
    if mode == 'hinge':
        return (1 + low).relu().mean() + (1 - high).relu().mean()
    return (low - high).mean() + penalty_weight * gradient_penalty(critic, student, teacher, image)
