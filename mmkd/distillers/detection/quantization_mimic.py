"""Quantization Mimic: quantised features of proposals.

Wei, Pan, Qin, Ouyang, Yan, "Quantization Mimic: Towards Very Tiny CNN for Object Detection", ECCV 2018,
arXiv 1805.02152.
"""

import inspect
import math
from typing import Any

import torch

from mmkd.distillers.detection.mimic import Mimic, half_mean_square
from mmkd.errors import ConfigError, nearest
from mmkd.registry import DISTILLERS


def quantise(feature: torch.Tensor, step: float | torch.Tensor, signed: bool = True) -> torch.Tensor:
    r"""The nearest entry of a uniform dictionary; the gradient passes as if it had not happened.

    .. math::
        Q(f) = b \quad\text{if}\quad \frac{a + b}{2} < f \le \frac{b + c}{2}, \qquad
        \frac{\partial Q}{\partial f} := 1

    for neighbouring entries a < b < c, so that a value halfway between two entries becomes the smaller one.

    Args:
        feature: Of any shape.
        step: s > 0, the distance of neighbouring entries.
        signed: Whether the dictionary is {..., -2s, -s, 0, s, 2s, ...} or {0, s, 2s, ...}, as in the paper, whose
            features are those after a ReLU; negative values then become 0.

    Returns:
        The same shape, multiples of ``step``.
    """
    return _Quantise.apply(feature, step, signed)


class _Quantise(torch.autograd.Function):
    """Rounding whose gradient passes straight through."""

    @staticmethod
    def forward(ctx, feature: torch.Tensor, step: float | torch.Tensor, signed: bool) -> torch.Tensor:
        code = (feature / step).sub_(0.5).ceil_()
        return (code if signed else code.clamp_(min=0)).mul_(step)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient, None, None


def derived_step(teacher: torch.Tensor, levels: int) -> torch.Tensor:
    """The step with which the largest magnitude of the teacher's features is the entry ``levels``; a scalar tensor."""
    largest = teacher.detach().abs().amax() if teacher.numel() else teacher.new_zeros(())
    return (largest / levels).clamp(min=1e-12)


@DISTILLERS.register_module()
class QuantizationMimic(Mimic):
    """:class:`mmkd.distillers.detection.mimic.Mimic` of quantised features.

    Both networks' features of the proposals, the student's after its adapter, are rounded by :func:`quantise` and then
    compared as Mimic does, by :func:`mmkd.distillers.detection.mimic.half_mean_square`. Where both round to the same
    entry nothing is left to learn; with a ``step`` towards 0 this is Mimic.

    The paper's step is not known. By default it is derived in every iteration, and in every process for itself, from the
    range of the teacher's features: max |T| / ``levels``; both this rule and 16 levels are choices of this
    class. Its loss does not divide by the number of elements of a region as Mimic's does (a factor of 256 * 7 * 7
    for usual FPNs, to be had with ``weight``); its weight of 1 is kept with Mimic's normalisation. The outputs of an
    FPN are signed, so the dictionary is; ``signed=False`` is the paper's, for features after a ReLU. The paper also
    fine-tunes the teacher with the quantiser on its last map before it freezes it: that is up to the teacher's training,
    and not done here.

    Args:
        step: The distance of neighbouring entries of the dictionary, in units of the teacher's features, or None to
            derive it.
        levels: Entries from 0 to the largest magnitude, where the step is derived. Default 16.
        signed: Whether the dictionary has negative entries. Default True.
        mimic: The options of :class:`mmkd.distillers.detection.mimic.Mimic`; ``class_weight`` and ``box_weight``
            compare what the heads say as it is.

    Example:
        >>> distillers = dict(quantization_mimic=dict(type='QuantizationMimic'))
    """

    def __init__(self, step: float | None = None, levels: int = 16, signed: bool = True, **mimic: Any):
        known = inspect.signature(Mimic).parameters
        for option in mimic:
            if option not in known:
                known = [*known, 'step', 'levels', 'signed']
                raise ConfigError(
                    f'QuantizationMimic has no option {option!r}; the nearest are {nearest(option, known)}'
                )
        super().__init__(**mimic)
        number = isinstance(step, (int, float)) and not isinstance(step, bool)
        if step is not None and not (number and math.isfinite(step) and step > 0):
            raise ConfigError(f'step={step!r}: expected a positive number, or None to derive it')
        if isinstance(levels, bool) or not isinstance(levels, int) or levels < 1:
            raise ConfigError(f'levels={levels!r}: expected a whole number of at least 1')
        self.step, self.levels, self.signed = step, levels, signed

    def compare(self, features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        step = derived_step(targets, self.levels) if self.step is None else self.step
        return half_mean_square(quantise(features, step, self.signed), quantise(targets, step, self.signed))
