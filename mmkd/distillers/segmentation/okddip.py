"""Online distillation with diverse peers (OKDDip): decode heads learn from each other, and the model's own from them.

Chen, Mei, Wang, Feng, Chen, "Online Knowledge Distillation with Diverse Peers", AAAI 2020, arXiv 1912.00350.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from mmkd.distillers.base import Distiller
from mmkd.distillers.generic.kd import pixel_divergence
from mmkd.distillers.levels import maps
from mmkd.distillers.schedule import Weight
from mmkd.errors import ConfigError
from mmkd.hosts.segmentation.branches import Branches
from mmkd.hosts.segmentation.labels import labeled
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps
from mmkd.values import check_temperature, is_whole

REDUCTION = 8
"""How many times fewer channels queries and keys have than features, as in the authors' code."""


def attention(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    r"""How much each peer learns from each, at each position, itself among them.

    .. math:: a_{ij} = \operatorname{softmax}_j \langle q_i, k_j \rangle

    Args:
        queries: q, (m, B, D, h, w), of m peers.
        keys: k, of the same shape.

    Returns:
        (m, m, B, h, w), which sum to 1 over the second.
    """
    return torch.einsum('ibdhw,jbdhw->ijbhw', queries, keys).softmax(1)


def peer_divergence(
    logits: torch.Tensor, weights: torch.Tensor, tau: float, valid: torch.Tensor | None = None
) -> torch.Tensor:
    r"""Kullback-Leibler divergence from each peer's own target to the peer, summed over peers.

    .. math::
        L = \frac{\tau^2}{\sum_{b, a} v_{ba}} \sum_i \sum_{b, a} v_{ba} \sum_k \tilde{p}_{ik} \log \frac{\tilde{p}_{ik}}{p_{ik}},
        \qquad \tilde{z}_i = \sum_j a_{ij} z_j, \qquad p = \operatorname{softmax}(z / \tau)

    Args:
        logits: z, (m, B, K, h, w), of m peers. As part of a target they have no gradient.
        weights: a, (m, m, B, h, w), which have one: that is all they learn from.
        tau: Temperature.
        valid: v, (B, h, w) bool; None for all.

    Returns:
        A scalar, 0 if nothing is valid.
    """
    targets = torch.einsum('ijbhw,jbkhw->ibkhw', weights, logits.detach())
    s, t = (F.log_softmax(each / tau, 2) for each in (logits, targets))
    each = (t.exp() * (t - s)).sum(2)
    if valid is None:
        return tau**2 * each.sum(0).mean()
    return tau**2 * (each * valid).sum() / valid.sum().clamp(min=1)


@DISTILLERS.register_module()
class OKDDip(Distiller):
    r"""Peers beside the decode head that learn from each other, and it from their mean, see ``docs/methods/okddip.md``.

    ============================== ================================================================================
    loss_<term>_1, _2, ...         the task losses of the peers
    loss_peers                     ``loss_weight`` times :func:`peer_divergence`
    loss_leader                    ``loss_weight`` times :func:`mmkd.distillers.generic.kd.pixel_divergence` from the mean
                                   of the peers' logits to the decode head, their leader
    ============================== ================================================================================

    Queries and keys are 1x1 convolutions, to an eighth of the channels, of the features that the peers classify; no gradient
    flows into the features. Pixels whose label is ignored do not count. Its source is the student itself,
    ``teacher=dict(type='Own')``; the peers are gone where the student is plain again.

    Args:
        branches: How many heads, the decode head among them; at least 3. Default 4: three peers and the leader.
        tau: Temperature, positive. Default 3.
        loss_weight: A number or a schedule. Default 1.

    Example:
        >>> teacher = dict(type='Own')
        >>> distillers = dict(okddip=dict(type='OKDDip', loss_weight=dict(type='linear', value=1.0, end=20000)))
    """

    unweighted = True

    def __init__(self, branches: int = 4, tau: float = 3.0, loss_weight: float | Mapping = 1.0):
        super().__init__()
        if not (is_whole(branches) and branches >= 3):
            raise ConfigError(
                f'branches={branches!r}: expected a whole number of at least 3, two peers and the decode head'
            )
        check_temperature(tau)
        self.number, self.tau = branches, tau
        self.loss_weight = Weight(loss_weight, 'loss_weight')

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        self.student_layers = Branches.layers(student, teacher)

    def setup(self, student: Taps, teacher: Taps) -> None:
        self.decode_heads = Branches(student.model, self.number - 1)
        self.decode_heads.check(student)
        channels = student.model.decode_head.conv_seg.in_channels
        self.query, self.key = (nn.Conv2d(channels, max(1, channels // REDUCTION), 1, bias=False) for _ in range(2))

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        (leader,) = maps(student, self.student_layers[1])
        peers = self.decode_heads(student, data_samples)
        logits = torch.stack([peer.logits for peer in peers])
        features = [peer.feature.detach() for peer in peers]
        queries, keys = (torch.stack([project(each) for each in features]) for project in (self.query, self.key))
        valid = labeled(student.model, data_samples, leader.shape[2:])
        among_peers = peer_divergence(logits, attention(queries, keys), self.tau, valid)
        to_leader = pixel_divergence(leader, logits.mean(0), self.tau, valid=valid)
        losses = {f'{key}_{i}': value for i, each in enumerate(peers, 1) for key, value in each.losses.items()}
        weight = self.loss_weight()
        return losses | {'loss_peers': weight * among_peers, 'loss_leader': weight * to_leader}
