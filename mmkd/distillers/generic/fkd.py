"""Feature-based knowledge distillation by attention and non-local relations (FKD).

Zhang, Ma, "Improve Object Detection with Feature-based Knowledge Distillation: Towards Accurate and Efficient Detectors",
ICLR 2021.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from mmkd.distillers.base import Distiller
from mmkd.distillers.generic.cankd import NonLocal
from mmkd.distillers.levels import Layer, LevelPairs
from mmkd.distillers.schedule import Weight
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps
from mmkd.values import check_temperature


def attention(feature: torch.Tensor, tau: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Where, and in which channels, a feature is large.

    .. math::
        A^S_i = H W \operatorname{softmax}_i \Big( \frac{1}{C} \sum_c |F_{ci}| / T \Big), \qquad
        A^C_c = C \operatorname{softmax}_c \Big( \frac{1}{H W} \sum_i |F_{ci}| / T \Big)

    Args:
        feature: (B, C, H, W).
        tau: Temperature, T.

    Returns:
        The spatial attention, (B, H, W), and that of the channels, (B, C); the mean of both is 1 in each image.
    """
    size = feature.abs()
    channels, positions = size.shape[1], size[0, 0].numel()
    spatial = positions * (size.mean(1).flatten(1) / tau).softmax(1)
    channel = channels * (size.mean((2, 3)) / tau).softmax(1)
    return spatial.view_as(size[:, 0]), channel


def common_attention(student: torch.Tensor, teacher: torch.Tensor, tau: float = 0.5) -> torch.Tensor:
    """The mean of both networks' spatial :func:`attention`, (B, H, W), without gradient; their channels may differ in number."""
    with torch.no_grad():
        return 0.5 * (attention(student, tau)[0] + attention(teacher, tau)[0])


def distance(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    r"""Euclidean distance of all of a batch, not its square.

    .. math:: L = \sqrt{\sum_{b, c, i} M_{bi} (t_{bci} - s_{bci})^2}

    It grows with the root of the number of images, channels and positions. 0 for equal inputs, with the gradient 0 there.

    Args:
        student: (B, ...).
        teacher: The same shape. The gradient flows into it, as it may be of a part that is trained.
        mask: (B, H, W) for maps of (B, C, H, W), not negative; None for 1.

    Returns:
        A scalar.
    """
    difference = teacher - student
    if mask is not None:
        difference = difference * mask[:, None].sqrt()
    return torch.linalg.vector_norm(difference)


class FKDLevel(nn.Module):
    """What is trained for one level: the student's feature, means and relations in the teacher's shape.

    Args:
        channels: The student's.
        teacher_channels: The teacher's.
    """

    def __init__(self, channels: int, teacher_channels: int):
        super().__init__()
        self.feature = nn.Conv2d(channels, teacher_channels, 1)
        self.channel = nn.Linear(channels, teacher_channels)
        self.spatial = nn.Conv2d(1, 1, 3, padding=1)
        self.non_local = NonLocal(channels)
        self.relation = nn.Conv2d(channels, teacher_channels, 1)
        self.teacher_non_local = NonLocal(teacher_channels)

    def forward(self, student: torch.Tensor, teacher: torch.Tensor, tau: float) -> tuple[torch.Tensor, ...]:
        """The four distances of two maps of one size, (B, C, H, W) and (B, C', H, W): feature, channel, spatial, relation."""
        teacher = teacher.detach()
        relation = self.relation(self.non_local(student, student))
        return (
            distance(self.feature(student), teacher, common_attention(student, teacher, tau)),
            distance(self.channel(student.mean((2, 3))), teacher.mean((2, 3))),
            distance(self.spatial(student.mean(1, keepdim=True)), teacher.mean(1, keepdim=True)),
            distance(relation, self.teacher_non_local(teacher, teacher)),
        )


@DISTILLERS.register_module()
class FKD(Distiller):
    """Features where both networks look, their means, and what each position takes from all others; ``docs/methods/fkd.md``.

    Four terms, each a sum over levels of a :func:`distance`, between what one :class:`FKDLevel` per level makes of the student's
    map and the teacher's:

    ============= =====================================================================================================
    loss_feature  the maps, the student's after a 1x1 convolution, within the :func:`common_attention`
    loss_channel  the means over positions, the student's after a linear layer
    loss_spatial  the means over channels, the student's after a 3x3 convolution
    loss_relation both maps with what a non-local block of each finds, the student's after a 1x1 convolution
    ============= =====================================================================================================

    The blocks are :class:`mmkd.distillers.generic.cankd.NonLocal`, each of one map with itself. Without a softmax no matrix of
    all pairs of positions is made. The defaults are for images of 800x1333, two of them on each process.

    Args:
        layer: The student's layer, or a list.
        feature_weight: Weight of ``loss_feature``, a number or a schedule, as all weights. Default 7e-5.
        channel_weight: Weight of ``loss_channel``. Default 4e-3.
        spatial_weight: Weight of ``loss_spatial``. Default 4e-3.
        relation_weight: Weight of ``loss_relation``. Default 7e-5.
        tau: Temperature of the attention, positive. Default 0.5.
        teacher_layer: The teacher's layer, where its name differs.
        match: ``'stride'`` or ``'index'``: which levels belong together, see
            :class:`mmkd.distillers.levels.LevelPairs`.

    Example:
        >>> distillers = dict(fkd=dict(type='FKD', layer='neck'))
    """

    any_scale = True

    def __init__(
        self,
        layer: Layer | Sequence[Layer],
        feature_weight: float | Mapping = 7e-5,
        channel_weight: float | Mapping = 4e-3,
        spatial_weight: float | Mapping = 4e-3,
        relation_weight: float | Mapping = 7e-5,
        tau: float = 0.5,
        teacher_layer: Layer | Sequence[Layer] | None = None,
        match: str = 'stride',
    ):
        super().__init__()
        check_temperature(tau)
        self.tau = tau
        self.levels = LevelPairs(layer, teacher_layer, match=match, same_channels=False)
        self.student_layers, self.teacher_layers = self.levels.student_layers, self.levels.teacher_layers
        self.feature_weight = Weight(feature_weight, 'feature_weight')
        self.channel_weight = Weight(channel_weight, 'channel_weight')
        self.spatial_weight = Weight(spatial_weight, 'spatial_weight')
        self.relation_weight = Weight(relation_weight, 'relation_weight')

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        if self.levels.prepare(student, teacher):
            self.student_layers, self.teacher_layers = self.levels.student_layers, self.levels.teacher_layers

    def setup(self, student: Taps, teacher: Taps) -> None:
        self.levels.setup(student, teacher)
        pairs = zip(*self.levels.unadapted(student, teacher), strict=True)
        self.blocks = nn.ModuleList(FKDLevel(s.shape[1], t.shape[1]) for s, t in pairs)

    def pictures(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        return {
            f'attention, level {pair.student_level}': common_attention(pair.student, pair.teacher, self.tau)
            for pair in self.levels(student, teacher)
        }

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        pairs = zip(self.levels(student, teacher), self.blocks, strict=True)
        levels = [block(pair.student, pair.teacher, self.tau) for pair, block in pairs]
        feature, channel, spatial, relation = (sum(each) for each in zip(*levels))
        return {
            'loss_feature': self.feature_weight() * feature,
            'loss_channel': self.channel_weight() * channel,
            'loss_spatial': self.spatial_weight() * spatial,
            'loss_relation': self.relation_weight() * relation,
        }
