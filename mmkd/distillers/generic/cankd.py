"""Cross-attention based non-local distillation (CanKD).

Sun, Ohyama, "CanKD: Cross-Attention-based Non-local operation for Feature-based Knowledge Distillation", WACV 2026,
arXiv 2511.21503.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from mmkd.distillers.base import FeatureDistiller
from mmkd.distillers.norms import INSTANCE, BatchNorm2d, normalized
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps


def cross_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    r"""What each position of one map takes from all positions of another, without a softmax.

    .. math:: y_i = \frac{1}{N} \sum_{j=1}^N (q_i^\top k_j) v_j

    Computed as :math:`q_i^\top (\sum_j k_j v_j^\top) / N`, which is the same, and whose cost grows with the number of positions
    and not with its square.

    Args:
        query: (B, D, H, W).
        key: (B, D, h, w), of N = h w positions.
        value: The same shape.

    Returns:
        (B, D, H, W).
    """
    shape, query, key, value = query.shape, query.flatten(2), key.flatten(2), value.flatten(2)
    context = value @ key.transpose(1, 2) / key.shape[2]  # (B, D of v, D of k)
    return (context @ query).view(shape)


class NonLocal(nn.Module):
    """Adds to a feature what it attends to in another one, or in itself; the identity at first.

    Args:
        channels: Of both features.
    """

    def __init__(self, channels: int):
        super().__init__()
        inner = max(1, channels // 2)
        self.query, self.key, self.value = (nn.Conv2d(channels, inner, 1) for _ in range(3))
        self.output = nn.Conv2d(inner, channels, 1)
        self.norm = BatchNorm2d(channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, feature: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) of both to the same."""
        # a last odd row or column has a cell of its own, so that a map of one row has one
        key, value = (F.max_pool2d(conv(other), 2, ceil_mode=True) for conv in (self.key, self.value))
        return feature + self.norm(self.output(cross_attention(self.query(feature), key, value)))


def attended_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    r"""Half the mean square of the difference of the features, each channel of each image normalized.

    .. math:: L = \frac{1}{2} \cdot \frac{1}{B C H W} \sum_{b, c, i} (\tilde s_{bci} - \tilde t_{bci})^2

    with :func:`mmkd.distillers.norms.normalized` over the positions. Zero for equal inputs.

    Args:
        student: (B, C, H, W), what :class:`NonLocal` returns.
        teacher: The same shape; no gradient flows into it.

    Returns:
        A scalar.
    """
    return 0.5 * (normalized(student, INSTANCE) - normalized(teacher.detach(), INSTANCE)).square().mean()


@DISTILLERS.register_module()
class CanKD(FeatureDistiller):
    """Lets the student's positions attend to the teacher's before both are compared; ``docs/methods/cankd.md``.

    ``loss = loss_weight * sum over levels of attended_loss(non_local(student, teacher), teacher)``, see :class:`NonLocal` and
    :func:`attended_loss`. There is one :class:`NonLocal` per level, which is trained with the student and not needed
    afterwards. It begins as the identity, so that the loss is 0 for equal networks at first. No ground truth.

    Args:
        layer: The student's layer, or a list.
        loss_weight: A number or a schedule. Default 10.
        teacher_layer: The teacher's layer, where its name differs.
        adapter: ``'auto'`` (1x1 convolution exactly where channels differ), None or a dict; before the attention.
        match: ``'stride'`` or ``'index'``: which levels belong together, see
            :class:`mmkd.distillers.levels.LevelPairs`.

    Example:
        >>> distillers = dict(cankd=dict(type='CanKD', layer='neck'))
    """

    def __init__(
        self,
        layer: str | Sequence[str],
        loss_weight: float | Mapping = 10.0,
        teacher_layer: str | Sequence[str] | None = None,
        adapter: str | Mapping | None = 'auto',
        match: str = 'stride',
    ):
        super().__init__(layer, loss_weight, teacher_layer, adapter, match)

    def setup(self, student: Taps, teacher: Taps) -> None:
        super().setup(student, teacher)
        _, targets = self.levels.unadapted(student, teacher)
        self.blocks = nn.ModuleList(NonLocal(target.shape[1]) for target in targets)

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        pairs = zip(self.levels(student, teacher), self.blocks, strict=True)
        levels = [attended_loss(block(pair.student, pair.teacher.detach()), pair.teacher) for pair, block in pairs]
        return {'loss': self.loss_weight() * sum(levels)}
