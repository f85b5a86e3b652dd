"""On-the-fly native ensemble (ONE): several decode heads learn from their own gated ensemble.

Lan, Zhu, Gong, "Knowledge Distillation by On-the-Fly Native Ensemble", NeurIPS 2018, arXiv 1806.04606.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from mmkd.distillers.base import Distiller
from mmkd.distillers.generic.kd import pixel_divergence
from mmkd.distillers.levels import maps
from mmkd.distillers.schedule import Weight
from mmkd.errors import ConfigError
from mmkd.hosts.segmentation.branches import Branches, task_losses
from mmkd.hosts.segmentation.labels import labeled
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps
from mmkd.values import check_temperature, is_whole


def native_ensemble(logits: Sequence[torch.Tensor], gate: torch.Tensor) -> torch.Tensor:
    r"""The logits of all branches, gated at each position.

    .. math:: z_{ka} = \sum_i g_{ia} z_{ika}, \qquad g_{ia} = \operatorname{softmax}_i(e_{ia})

    Args:
        logits: Of each of m branches, (B, K, h, w).
        gate: e, (B, m, H, W), before the softmax; resized (bilinear) to h, w where it is of another size.

    Returns:
        (B, K, h, w), with gradient for all.
    """
    if gate.shape[2:] != logits[0].shape[2:]:
        gate = F.interpolate(gate, logits[0].shape[2:], mode='bilinear', align_corners=False)
    return (gate.softmax(1)[:, :, None] * torch.stack(list(logits), 1)).sum(1)


@DISTILLERS.register_module()
class ONE(Distiller):
    r"""Several decode heads on one backbone, and a gate; their ensemble teaches each, see ``docs/methods/one.md``.

    ============================== ================================================================================
    loss_<term>_1, _2, ...         the task losses of the branches beside the decode head
    loss_<term>_ensemble           those of the ensemble, :func:`native_ensemble`
    loss_kl                        ``loss_weight`` times the sum over all branches, the decode head among them, of
                                   :func:`mmkd.distillers.generic.kd.pixel_divergence` from the ensemble to it
    ============================== ================================================================================

    The gate is a 1x1 convolution of the last map that the decode heads take in, batch norm and ReLU; its softmax over the
    branches is taken at each position. No gradient flows from ``loss_kl`` into the ensemble. Pixels whose label is ignored
    do not count. Its source is the student itself, ``teacher=dict(type='Own')``; the branches are gone where the
    student is plain again.

    Args:
        branches: How many, the decode head among them; at least 2. Default 3.
        tau: Temperature, positive. Default 3.
        loss_weight: Of ``loss_kl``, a number or a schedule. Default 1.

    Example:
        >>> teacher = dict(type='Own')
        >>> distillers = dict(one=dict(type='ONE', loss_weight=dict(type='linear', value=1.0, end=20000)))
    """

    unweighted = True

    def __init__(self, branches: int = 3, tau: float = 3.0, loss_weight: float | Mapping = 1.0):
        super().__init__()
        if not (is_whole(branches) and branches >= 2):
            raise ConfigError(
                f'branches={branches!r}: expected a whole number of at least 2, the decode head among them'
            )
        check_temperature(tau)
        self.number, self.tau = branches, tau
        self.loss_weight = Weight(loss_weight, 'loss_weight')

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        self.student_layers = Branches.layers(student, teacher)

    def setup(self, student: Taps, teacher: Taps) -> None:
        self.decode_heads = Branches(student.model, self.number - 1)
        self.decode_heads.check(student)
        channels = maps(student, self.student_layers[0])[-1].shape[1]
        self.gate = nn.Sequential(
            nn.Conv2d(channels, self.number, 1, bias=False),
            nn.BatchNorm2d(self.number, track_running_stats=False),
            nn.ReLU(inplace=True),
        )

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        features, own = (maps(student, layer) for layer in self.student_layers)
        branches = self.decode_heads(student, data_samples)
        logits = [own[0], *(branch.logits for branch in branches)]
        ensemble = native_ensemble(logits, self.gate(features[-1]))
        valid = labeled(student.model, data_samples, ensemble.shape[2:])
        kl = sum(pixel_divergence(each, ensemble, self.tau, valid=valid) for each in logits)
        losses = {f'{key}_{i}': value for i, each in enumerate(branches, 1) for key, value in each.losses.items()}
        of_ensemble = task_losses(student.model, ensemble, data_samples)
        losses |= {f'{key}_ensemble': value for key, value in of_ensemble.items()}
        return losses | {'loss_kl': self.loss_weight() * kl}
