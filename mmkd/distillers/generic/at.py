"""Attention transfer (AT).

Zagoruyko, Komodakis, "Paying More Attention to Attention", ICLR 2017, arXiv 1612.03928.
"""

import functools
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from mmkd.distillers.base import FeatureDistiller
from mmkd.errors import ConfigError
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps
from mmkd.values import is_number

FORMS = ('mean', 'sum', 'norm')


def attention_map(feature: torch.Tensor, power: float = 2.0) -> torch.Tensor:
    """How strong a feature is at each position: the mean over channels of ``abs(feature) ** power``.

    Args:
        feature: (B, C, H, W).
        power: p in the paper, at least 1.

    Returns:
        (B, 1, H, W), not negative.
    """
    return feature.abs().pow(power).mean(1, keepdim=True)


def attention_distance(student: torch.Tensor, teacher: torch.Tensor, form: str = 'mean') -> torch.Tensor:
    r"""Distance between two attention maps, each scaled to length 1.

    .. math:: d_b = \frac{v^S_b}{\lVert v^S_b \rVert_2} - \frac{v^T_b}{\lVert v^T_b \rVert_2}

    v is the map of image b as a vector of its A positions. Over B images,

    ==== ============================================= ================================================
    form value                                         who has it so
    ==== ============================================= ================================================
    mean sum of squares of all d, divided by B and A   the authors' code, torchdistill, CIRKD
    sum  sum of squares of all d, divided by B
    norm mean over images of the length of d_b         the paper [from memory, unverified]
    ==== ============================================= ================================================

    A weight w of ``mean`` is the weight w/A of ``sum``. Zero for equal inputs and for multiples of each other; a map of
    zeros stays one of zeros.

    Args:
        student: (B, 1, H, W), not negative, see :func:`attention_map`.
        teacher: The same shape; no gradient flows into it.
        form: One of the names above.

    Returns:
        A scalar.
    """
    difference = F.normalize(student.flatten(1)) - F.normalize(teacher.detach().flatten(1))
    if form == 'mean':
        return difference.square().mean()
    if form == 'sum':
        return difference.square().sum(1).mean()
    return torch.linalg.vector_norm(difference, dim=1).mean()


@DISTILLERS.register_module()
class AT(FeatureDistiller):
    """Attention transfer: where a feature is strong, whatever its channels; ``docs/methods/at.md``.

    ``loss = loss_weight * sum over levels of attention_distance(attention_map(student), attention_map(teacher))``, see
    :func:`attention_map` and :func:`attention_distance`. Numbers of channels may differ, nothing is trained beside the
    student, and no ground truth is needed. A map of another size is resized (bilinear) to the teacher's.

    ``'mean'`` divides by the number of positions of the map, so large maps need large weights: 1000 is the authors' for
    classification, 10000 CIRKD's for segmentation, of a single map. A map that is the same at all positions, such as that
    of a layer norm over channels, teaches nothing.

    Args:
        layer: The student's layer, or a list, such as the stages of a backbone.
        form: ``'mean'`` (default), ``'sum'`` or ``'norm'``.
        power: p, at least 1. Default 2.
        loss_weight: A number or a schedule. Default 1000, for ``'mean'``.
        teacher_layer: The teacher's layer, where its name differs.
        match: ``'stride'`` or ``'index'``: which levels belong together, see
            :class:`mmkd.distillers.levels.LevelPairs`.

    Example:
        >>> distillers = dict(at=dict(type='AT', layer=['backbone.layer3', 'backbone.layer4'], loss_weight=10000.0))
    """

    def __init__(
        self,
        layer: str | Sequence[str],
        form: str = 'mean',
        power: float = 2.0,
        loss_weight: float | Mapping = 1000.0,
        teacher_layer: str | Sequence[str] | None = None,
        match: str = 'stride',
    ):
        super().__init__(layer, loss_weight, teacher_layer, match=match)
        if form not in FORMS:
            raise ConfigError(f'form={form!r}: expected one of {", ".join(FORMS)}')
        if not (is_number(power) and power >= 1):
            raise ConfigError(f'power={power!r}: expected a number of at least 1')
        self.form = form
        self.power = power
        # maps of one channel, so that no adapter is made and they are what is resized
        self.levels.reduce = functools.partial(attention_map, power=power)

    def pictures(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        return {
            f'{name} attention, level {pair.student_level}': attention_map(feature)[:, 0]
            for pair in self.levels(student, teacher)
            for name, feature in (('student', pair.student), ('teacher', pair.teacher))
        }

    def compare(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return attention_distance(student, teacher, self.form)
