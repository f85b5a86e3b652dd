"""Common feature learning (CFL): features of several teachers and the student in one space.

Luo, Wang, Fang, Hu, Tao, Song, "Knowledge Amalgamation from Heterogeneous Networks by Common Feature Learning", IJCAI 2019,
arXiv 1906.10546.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from mmkd.distillers.base import Distiller
from mmkd.distillers.generic.nst import squared_mmd
from mmkd.distillers.levels import LevelPairs
from mmkd.distillers.schedule import Weight
from mmkd.errors import ConfigError
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps
from mmkd.values import is_whole

WIDTHS = (0.001, 0.01, 0.05, 0.1, 0.2, 1.0, 2.0)


def gaussians(first: torch.Tensor, second: torch.Tensor, widths: Sequence[float] = WIDTHS) -> torch.Tensor:
    r"""A sum of Gaussian kernels of several widths, for samples of length 1.

    .. math:: k(x, y) = \sum_\sigma \exp \Big( - \frac{\lVert x - y \rVert^2}{2 \sigma^2} \Big), \qquad
        \lVert x - y \rVert^2 = 2 - 2 x^T y

    Args:
        first: (..., n, d), each of length 1.
        second: (..., m, d), alike.
        widths: The sigmas.

    Returns:
        (..., n, m).
    """
    return _SumOfGaussians.apply((2 - 2 * first @ second.transpose(-2, -1)).clamp(min=0), tuple(widths))


class _SumOfGaussians(torch.autograd.Function):
    """Of squared distances; one matrix is kept for the backward pass, not one for each width."""

    @staticmethod
    def forward(ctx, squared: torch.Tensor, widths: tuple[float, ...]) -> torch.Tensor:
        total, slope = torch.zeros_like(squared), torch.zeros_like(squared)
        for factor in (1 / (2 * width**2) for width in widths):
            each = (-factor * squared).exp_()
            total.add_(each)
            slope.sub_(each, alpha=factor)
        ctx.save_for_backward(slope)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (slope,) = ctx.saved_tensors
        return gradient * slope, None


class Residual(nn.Module):
    """x + W2 ReLU(W1 x), which all networks share; W2 starts at 0."""

    def __init__(self, channels: int):
        super().__init__()
        self.first, self.second = nn.Linear(channels, channels), nn.Linear(channels, channels)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        return feature + self.second(self.first(feature).relu())


@DISTILLERS.register_module()
class CFL(Distiller):
    r"""Common feature learning: a student whose features are distributed as those of each of its teachers, in a space that is
    learnt as well; ``docs/methods/cfl.md``.

    A linear map for each network and level, and a residual block that all share, lead into the common space. There, for a
    level k, teacher m and positions that are drawn at random, with codes h of length 1 and the teacher's features f:

    .. math::
        L_{mmd} = \frac{1}{M} \sum_{m, k} \operatorname{MMD}^2(h^S_k, h^m_k), \qquad
        L_{reconstruction} = \frac{1}{M} \sum_{m, k} \operatorname{mean} (g^m_k(h'^m_k) - f^m_k)^2

    with the :func:`mmkd.distillers.generic.nst.squared_mmd` of :func:`gaussians` over the positions of all images of a process.
    The second, of the codes h' before they are scaled to length 1, keeps the space from shrinking to a point. Maps, block and the
    linear g are trained with the student. No ground truth; the teachers may know other classes than the student.

    Args:
        layer: The student's layer, or a list.
        mmd_weight: Weight of ``loss_mmd``, a number or a schedule, as all weights. Default 1.
        reconstruction_weight: Weight of ``loss_reconstruction``. Default 1.
        common_channels: Of the common space. Default None: a quarter of the student's.
        positions: How many are drawn of each level and image, the same for all networks. Default 256.
        teacher_layer: The teachers' layer, where its name differs, or a dict of teachers to names.
        match: ``'stride'`` or ``'index'``: which levels belong together, see
            :class:`mmkd.distillers.levels.LevelPairs`.

    Raises:
        ConfigError: for numbers out of range, and levels that do not belong together.

    Example:
        >>> distillers = dict(cfl=dict(type='CFL', layer='neck', teacher=['a', 'b']))
    """

    several_teachers = True
    any_scale = True

    def __init__(
        self,
        layer: str | Sequence[str],
        mmd_weight: float | Mapping = 1.0,
        reconstruction_weight: float | Mapping = 1.0,
        common_channels: int | None = None,
        positions: int = 256,
        teacher_layer: str | Sequence[str] | Mapping | None = None,
        match: str = 'stride',
    ):
        super().__init__()
        for name, value in (('common_channels', common_channels), ('positions', positions)):
            if not (is_whole(value) and value >= 1) and (name, value) != ('common_channels', None):
                raise ConfigError(f'{name}={value!r}: expected a whole number of at least 1')
        self.layer, self.match = layer, match
        self.teacher_layer = layer if teacher_layer is None else teacher_layer
        of_names = dict(self.teacher_layer) if isinstance(self.teacher_layer, Mapping) else {'': self.teacher_layer}
        checked = [LevelPairs(layer, each, match=match) for each in of_names.values()]  # raises for what is no name
        self.student_layers = checked[0].student_layers
        layers = {name: each.teacher_layers for name, each in zip(of_names, checked)}
        self.teacher_layers = layers if isinstance(self.teacher_layer, Mapping) else layers['']
        self.common_channels, self.positions = common_channels, positions
        self.mmd_weight = Weight(mmd_weight, 'mmd_weight')
        self.reconstruction_weight = Weight(reconstruction_weight, 'reconstruction_weight')

    def setup(self, student: Taps, teacher: Mapping[str, Taps]) -> None:
        own: dict[str, nn.Module] = {}
        self.levels, self.others, self.decoders = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        channels = self.common_channels
        for name, taps in teacher.items():
            layer = self.teacher_layer
            if isinstance(layer, Mapping):
                if name not in layer:
                    raise ConfigError(f'teacher_layer={dict(layer)!r}: names none of teacher {name!r}')
                layer = layer[name]
            levels = LevelPairs(self.layer, layer, match=self.match, same_channels=False)
            levels.setup(student, taps)
            features, targets = levels.unadapted(student, taps)
            channels = channels or max(features[0].shape[1] // 4, 1)
            for key, feature in zip(_keys(levels), features):
                own.setdefault(key, nn.Linear(feature.shape[1], channels))
            self.levels[name] = levels
            self.others[name] = nn.ModuleList(nn.Linear(target.shape[1], channels) for target in targets)
            self.decoders[name] = nn.ModuleList(nn.Linear(channels, target.shape[1]) for target in targets)
        self.own, self.shared = nn.ModuleDict(own), Residual(channels)

    def _drawn(self, *maps: torch.Tensor) -> list[torch.Tensor]:
        """The features at positions that are drawn, of each map (B, C, H, W) the same, as (B * positions, C)."""
        number = maps[0][0, 0].numel()
        chosen = torch.randperm(number, device=maps[0].device)[: self.positions]
        return [each.flatten(2).index_select(2, chosen).transpose(1, 2).flatten(0, 1) for each in maps]

    def forward(self, student: Taps, teacher: Mapping[str, Taps], data_samples: list | None) -> dict[str, torch.Tensor]:
        mmd, reconstruction = [], []
        for name, taps in teacher.items():
            levels = self.levels[name]
            parts = zip(_keys(levels), levels(student, taps), self.others[name], self.decoders[name], strict=True)
            for key, pair, align, decode in parts:
                s, t = self._drawn(pair.student, pair.teacher)
                own, other = self.shared(self.own[key](s)), self.shared(align(t))
                mmd.append(squared_mmd(F.normalize(own, dim=1), F.normalize(other, dim=1), gaussians))
                reconstruction.append(F.mse_loss(decode(other), t))
        return {
            'loss_mmd': self.mmd_weight() * sum(mmd) / len(teacher),
            'loss_reconstruction': self.reconstruction_weight() * sum(reconstruction) / len(teacher),
        }


def _keys(levels: LevelPairs) -> list[str]:
    """A name for each of the student's levels that are compared."""
    return [f'{layer}_{level}' for layer, level, _ in levels.pairs]
