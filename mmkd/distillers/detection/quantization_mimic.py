"""Quantization Mimic: quantized features of proposals.

Wei, Pan, Qin, Ouyang, Yan, "Quantization Mimic: Towards Very Tiny CNN for Object Detection", ECCV 2018,
arXiv 1805.02152.
"""

import inspect
from typing import Any

import torch

from mmkd.distillers.detection.mimic import Mimic, half_mean_square
from mmkd.errors import ConfigError, nearest
from mmkd.registry import DISTILLERS
from mmkd.values import is_number, is_whole


def quantize(feature: torch.Tensor, step: float | torch.Tensor, signed: bool = True) -> torch.Tensor:
    r"""The nearest entry of a uniform dictionary; the gradient passes as if it had not happened.

    .. math::
        Q(f) = b \quad\text{if}\quad \frac{a + b}{2} < f \le \frac{b + c}{2}, \qquad
        \frac{\partial Q}{\partial f} := 1

    for neighboring entries a < b < c, so that a value halfway between two entries becomes the smaller one.

    Args:
        feature: Of any shape.
        step: s > 0, the distance of neighboring entries.
        signed: Whether the dictionary is {..., -2s, -s, 0, s, 2s, ...} or {0, s, 2s, ...}, as in the paper, whose
            features are those after a ReLU; negative values then become 0.

    Returns:
        The same shape, multiples of ``step``.
    """
    return _Quantize.apply(feature, step, signed)


class _Quantize(torch.autograd.Function):
    """Rounding whose gradient passes straight through."""

    @staticmethod
    def forward(ctx, feature: torch.Tensor, step: float | torch.Tensor, signed: bool) -> torch.Tensor:
        code = (feature / step).sub_(0.5).ceil_()
        return (code if signed else code.clamp_(min=0)).mul_(step)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient, None, None


def derived_step(teacher: torch.Tensor, entries: int) -> torch.Tensor:
    """The step with which the largest magnitude of the teacher's features is entry number ``entries``; a scalar tensor."""
    largest = teacher.detach().abs().amax() if teacher.numel() else teacher.new_zeros(())
    return (largest / entries).clamp(min=1e-12)


@DISTILLERS.register_module()
class QuantizationMimic(Mimic):
    """:class:`mmkd.distillers.detection.mimic.Mimic` of quantized features.

    Both networks' features of the proposals, the student's after its adapter, are rounded by :func:`quantize`. Then they are
    compared as Mimic compares them, as ``loss_feature``. Where both round to the same entry nothing is left to learn.
    With a ``step`` towards 0 this is Mimic.

    By default the step is derived in every iteration from the range of the teacher's features, max |T| divided by
    ``quantization_levels``, in every process for itself. Where this differs from the paper, and what works:
    ``docs/methods/quantization_mimic.md``.

    Args:
        step: The distance of neighboring entries of the dictionary, in units of the teacher's features. None (default)
            derives it.
        quantization_levels: Entries from 0 to the largest magnitude, where the step is derived. Default 16.
        signed: Whether the dictionary has negative entries. Default True.
        mimic: The options of :class:`mmkd.distillers.detection.mimic.Mimic`. Its ``cls_weight`` and ``bbox_weight`` compare
            what the heads predict without rounding it.

    Example:
        >>> distillers = dict(quantization_mimic=dict(type='QuantizationMimic'))
    """

    renamed = {**Mimic.renamed, 'levels': 'quantization_levels'}

    def __init__(self, step: float | None = None, quantization_levels: int = 16, signed: bool = True, **mimic: Any):
        known = inspect.signature(Mimic).parameters
        for option in mimic:
            if option not in known:
                known = [*known, 'step', 'quantization_levels', 'signed']
                raise ConfigError(
                    f'QuantizationMimic has no option {option!r}; the nearest are {nearest(option, known)}'
                )
        super().__init__(**mimic)
        if step is not None and not (is_number(step) and step > 0):
            raise ConfigError(f'step={step!r}: expected a positive number, or None to derive it')
        if not (is_whole(quantization_levels) and quantization_levels >= 1):
            raise ConfigError(f'quantization_levels={quantization_levels!r}: expected a whole number of at least 1')
        self.step, self.quantization_levels, self.signed = step, quantization_levels, signed

    def compare(self, features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        step = derived_step(targets, self.quantization_levels) if self.step is None else self.step
        return half_mean_square(quantize(features, step, self.signed), quantize(targets, step, self.signed))
