"""Attention-guided feature distillation (AttnFD).

Mansourian et al., "Attention-Guided Feature Distillation for Semantic Segmentation", 2024, arXiv 2403.05451.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from mmkd.adapters import ConvAdapter
from mmkd.distillers.base import FeatureDistiller
from mmkd.errors import ConfigError
from mmkd.registry import ADAPTERS, DISTILLERS
from mmkd.values import is_whole


def attention_gates(feature: torch.Tensor) -> torch.Tensor:
    r"""A feature times the gates of its channels and then of its positions, without parameters.

    .. math::
        g = f \cdot \sigma\big( \operatorname{mean}_a f + \max_a f \big), \qquad
        \operatorname{gates}(f) = g \cdot \sigma\big( \operatorname{mean}_c g + \max_c g \big)

    Args:
        feature: f, (B, C, H, W).

    Returns:
        The same shape.
    """
    feature = feature * (feature.mean((2, 3), keepdim=True) + feature.amax((2, 3), keepdim=True)).sigmoid()
    return feature * (feature.mean(1, keepdim=True) + feature.amax(1, keepdim=True)).sigmoid()


def guided_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    r"""Squared distance of two features, each of an image scaled to length 1.

    .. math::
        L = \frac{1}{B} \sum_b \left\lVert \frac{s_b}{\lVert s_b \rVert} - \frac{t_b}{\lVert t_b \rVert} \right\rVert^2

    Zero for equal inputs and for multiples of each other.

    Args:
        student: (B, C, H, W), refined and adapted.
        teacher: The same shape, refined; no gradient flows into it.

    Returns:
        A scalar from 0 to 4.
    """
    return (F.normalize(student.flatten(1)) - F.normalize(teacher.detach().flatten(1))).square().sum(1).mean()


@ADAPTERS.register_module()
class AttentionAdapter(nn.Module):
    """CBAM, then a 1x1 convolution with batch norm to the teacher's channels.

    The gates are those of :func:`attention_gates` with trained parts: a perceptron of one hidden layer, the same for the
    mean and the maximum of a channel, and a 7x7 convolution with batch norm over the mean and the maximum of a position.
    Batch norms are over the batch of each process.

    Args:
        in_channels: The student's channels; filled in from the probed shapes.
        out_channels: The teacher's channels; filled in from the probed shapes.
        reduction: By how much the hidden layer is narrower. Default 16.

    Raises:
        ConfigError: for a reduction that is no whole number of at least 1.
    """

    def __init__(self, in_channels: int, out_channels: int, reduction: int = 16):
        super().__init__()
        if not (is_whole(reduction) and reduction >= 1):
            raise ConfigError(f'reduction={reduction!r}: expected a whole number of at least 1')
        hidden = max(in_channels // reduction, 1)
        self.channels = nn.Sequential(nn.Conv2d(in_channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, in_channels, 1))
        self.positions = nn.Sequential(
            nn.Conv2d(2, 1, 7, padding=3, bias=False), nn.BatchNorm2d(1, track_running_stats=False)
        )
        self.adapter = ConvAdapter(in_channels, out_channels, bias=False, norm=True)

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        pooled = feature.mean((2, 3), keepdim=True), feature.amax((2, 3), keepdim=True)
        feature = feature * sum(self.channels(each) for each in pooled).sigmoid()
        pooled = torch.cat((feature.amax(1, keepdim=True), feature.mean(1, keepdim=True)), 1)
        return self.adapter(feature * self.positions(pooled).sigmoid())


@DISTILLERS.register_module()
class AttnFD(FeatureDistiller):
    """Features that attention has refined; ``docs/methods/attnfd.md``.

    ``loss = loss_weight * sum over levels of guided_distance(adapter(student), attention_gates(teacher))``, see
    :func:`guided_distance`, :func:`attention_gates` and :class:`AttentionAdapter`, which is trained with the student and not
    needed afterwards. No ground truth. The loss is not 0 for equal networks.

    Args:
        layer: The student's layer, or a list, such as the last stage of its backbone and what its decode head makes of it.
        loss_weight: A number or a schedule. Default 0.33.
        teacher_layer: The teacher's layer, where its name differs.
        match: ``'stride'`` or ``'index'``: which levels belong together, see
            :class:`mmkd.distillers.levels.LevelPairs`.

    Example:
        >>> layers = ['backbone.layer4', 'decode_head.bottleneck', 'decode_head.sep_bottleneck']  # DeepLabV3+
        >>> distillers = dict(attnfd=dict(type='AttnFD', layer=layers))
    """

    def __init__(
        self,
        layer: str | Sequence[str],
        loss_weight: float | Mapping = 0.33,
        teacher_layer: str | Sequence[str] | None = None,
        match: str = 'stride',
    ):
        super().__init__(layer, loss_weight, teacher_layer, dict(type='AttentionAdapter'), match)

    def compare(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return guided_distance(student, attention_gates(teacher))
