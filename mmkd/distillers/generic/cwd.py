"""Channel-wise distillation (CWD).

Shu, Liu, Gao, Yan, Shen, "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021, arXiv 2011.13256.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from mmkd.distillers.base import FeatureDistiller
from mmkd.distillers.norms import BATCH, normalized
from mmkd.errors import ConfigError
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps
from mmkd.values import check_temperature


def channel_wise_divergence(student: torch.Tensor, teacher: torch.Tensor, tau: float = 1.0) -> torch.Tensor:
    r"""Kullback-Leibler divergence between the two networks' spatial distributions of each channel.

    .. math::
        L = \frac{\tau^2}{B C} \sum_{b, c} \sum_i p^T_{bci} \log \frac{p^T_{bci}}{p^S_{bci}}, \qquad
        p_{bci} = \operatorname{softmax}_i(y_{bci} / \tau)

    with i over the H*W positions, padded ones included. Zero for equal inputs; unchanged by a constant added to a
    channel of either input.

    Args:
        student: (B, C, H, W), features or logits.
        teacher: The same shape; no gradient flows into it.
        tau: Temperature.

    Returns:
        A scalar.
    """
    student = F.log_softmax(student.flatten(2) / tau, dim=2)
    teacher = F.log_softmax(teacher.detach().flatten(2) / tau, dim=2)
    divergence = F.kl_div(student, teacher, reduction='sum', log_target=True)
    return divergence * tau**2 / (student.shape[0] * student.shape[1])


def channel_maps(feature: torch.Tensor, tau: float = 1.0) -> torch.Tensor:
    """Each channel's distribution over the positions, softmax of ``feature / tau``: (B, C, H, W), its sums are 1."""
    return (feature.flatten(2) / tau).softmax(2).view_as(feature)


@DISTILLERS.register_module()
class CWD(FeatureDistiller):
    """Channel-wise distillation on any tapped layer; ``docs/methods/cwd.md``.

    ``loss = loss_weight * sum over levels of channel_wise_divergence``, see :func:`channel_wise_divergence`. It needs no
    ground truth. The defaults suit the neck of a detector. For the class logits of a dense head it is tau 1 and weight
    5, for those of a segmentor tau 4 and weight 3; the page has what is published for other layers.

    Args:
        layer: The student's layer, or a list.
        tau: Temperature, positive. Default 1.
        loss_weight: A number or a schedule. Default 10.
        teacher_layer: The teacher's layer, where its name differs.
        adapter: ``'auto'`` (1x1 convolution exactly where channels differ), None or a dict.
        match: ``'stride'`` or ``'index'``: which levels belong together, see
            :class:`mmkd.distillers.levels.LevelPairs`.
        standardize: Whether each channel of both, the student's adapted, is first brought to mean 0 and variance 1 over the
            batch (:func:`mmkd.distillers.norms.normalized`): for features of unlike scale, as RTMDet and DAMO-YOLO are
            published. Default False.

    Example:
        >>> distillers = dict(cwd=dict(type='CWD', layer='neck'))
    """

    def __init__(
        self,
        layer: str | Sequence[str],
        tau: float = 1.0,
        loss_weight: float | Mapping = 10.0,
        teacher_layer: str | Sequence[str] | None = None,
        adapter: str | Mapping | None = 'auto',
        match: str = 'stride',
        standardize: bool = False,
    ):
        super().__init__(layer, loss_weight, teacher_layer, adapter, match)
        check_temperature(tau)
        if not isinstance(standardize, bool):
            raise ConfigError(f'standardize={standardize!r}: expected True or False')
        self.tau, self.standardize = tau, standardize

    def pictures(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        return {
            f'{name} channels, level {pair.student_level}': channel_maps(self._scaled(feature), self.tau).amax(1)
            for pair in self.levels(student, teacher)
            for name, feature in (('student', pair.student), ('teacher', pair.teacher))
        }

    def _scaled(self, feature: torch.Tensor) -> torch.Tensor:
        return normalized(feature, BATCH) if self.standardize else feature

    def compare(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return channel_wise_divergence(self._scaled(student), self._scaled(teacher), self.tau)
