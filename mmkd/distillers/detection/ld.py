"""Localization Distillation (LD).

Zheng, Ye, Wang, Ren, Zuo, Hou, Cheng, "Localization Distillation for Dense Object Detection", CVPR 2022,
arXiv 2102.12252.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from mmdet.models.task_modules.assigners import ATSSAssigner
from mmdet.utils import reduce_mean
from torch import nn

from mmkd.distillers.base import Distiller
from mmkd.distillers.levels import require_gradient
from mmkd.distillers.schedule import Weight
from mmkd.errors import ConfigError
from mmkd.hosts.detection.assigners import ATSS, atss
from mmkd.hosts.detection.boxes import pairwise_diou
from mmkd.hosts.detection.dense_heads import DistributionDenseHead, dense_head
from mmkd.hosts.detection.ground_truth import ground_truth
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps, find_layer
from mmkd.values import check_temperature, is_number


def distribution_divergence(
    student: torch.Tensor, teacher: torch.Tensor, tau: float, over_bins: str = 'mean'
) -> torch.Tensor:
    r"""Kullback-Leibler divergence of the last dimension's distributions, softened by a temperature.

    .. math::
        L = \frac{\tau^2}{n} \sum_{k=1}^n q^T_k \log \frac{q^T_k}{q^S_k}, \qquad q = \operatorname{softmax}(z / \tau)

    Zero for equal inputs; unchanged by a constant added to all n logits of one.

    Args:
        student: (..., n), logits.
        teacher: The same shape; no gradient flows into it.
        tau: Temperature.
        over_bins: ``'mean'``, or ``'sum'`` for a sum over the n bins without the 1 / n.

    Returns:
        (...).
    """
    student = F.log_softmax(student / tau, dim=-1)
    teacher = F.log_softmax(teacher.detach() / tau, dim=-1)
    divergence = tau**2 * F.kl_div(student, teacher, reduction='none', log_target=True)
    return divergence.mean(-1) if over_bins == 'mean' else divergence.sum(-1)


def valuable_region(
    anchors: torch.Tensor,
    boxes: torch.Tensor,
    valid: torch.Tensor,
    inside: torch.Tensor,
    selection: ATSS,
    gamma: float = 0.25,
) -> torch.Tensor:
    r"""Weights of the valuable localization region: slots near an object that were not near enough to be positive.

    .. math:: w_i = \max_k \mathbf{1}[\gamma t_k \le \operatorname{DIoU}(a_i, b_k) < t_k] \operatorname{IoU}(a_i, b_k)

    Slots of all levels take part, wherever their center is. A slot that is positive for an object may also be in a region:
    in that of another object, or in its own, as the threshold t is one of the IoU and not of the DIoU.

    This is the paper's DIoU. The authors' code divides the intersection by the anchor's area instead of the union, which
    gives another region, see ``docs/methods/ld.md``.

    Args:
        anchors: (N, 4), xyxy in pixels.
        boxes: (B, K, 4), the objects, xyxy in pixels.
        valid: (B, K), False for a box that is not there.
        inside: (B, N), False for anchors that take no part.
        selection: The ATSS selection for these boxes, with each box's threshold t.
        gamma: The least DIoU, as a part of t.

    Returns:
        (B, N), in [0, 1); 0 outside the region.
    """
    diou = pairwise_diou(boxes, anchors.expand(len(boxes), -1, -1))
    threshold = selection.threshold[..., None]
    region = (diou >= gamma * threshold) & (diou < threshold) & valid[..., None] & inside[:, None]
    return torch.where(region, selection.overlaps, 0.0).amax(1)


def region_losses(
    divergence: torch.Tensor, score: torch.Tensor, positive: torch.Tensor, region: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Sums of the edges' divergences over the main and the valuable region.

    .. math::
        L_{main} = \frac{1}{4} \sum_{i \in P} p_i \sum_{e=1}^4 D_{ie}, \qquad
        L_{VLR} = \frac{1}{16} \sum_i w_i \sum_{e=1}^4 D_{ie}

    Args:
        divergence: D, (B, N, 4), of each edge.
        score: p, (B, N), the student's largest class probability; no gradient flows into it.
        positive: P, (B, N), bool, the student's assigned positives.
        region: w, (B, N), see :func:`valuable_region`.

    Returns:
        Two scalars, not divided by any number of slots or images.
    """
    edges = divergence.sum(2)
    return (edges * score.detach() * positive).sum() / 4, (edges * region).sum() / 16


def class_divergence(
    student: torch.Tensor, teacher: torch.Tensor, positive: torch.Tensor, tau: float, sizes: Sequence[int]
) -> torch.Tensor:
    r"""Mean divergence of the class distributions of the positives, added over groups of slots.

    .. math:: L = \sum_g \frac{1}{N_g} \sum_{i \in P_g} D_\tau(z^T_i, z^S_i)

    with :func:`distribution_divergence`; the softmax is over the classes.

    Args:
        student: (B, N, C), class logits.
        teacher: The same shape.
        positive: (B, N), bool; N_g counts it over the batch.
        tau: Temperature.
        sizes: Slots of each group: of each level, or [N] for a mean over all.
    """
    divergence = distribution_divergence(student, teacher, tau) * positive
    return sum(
        group.sum() / chosen.sum().clamp(min=1)
        for group, chosen in zip(divergence.split(list(sizes), 1), positive.split(list(sizes), 1))
    )


@DISTILLERS.register_module()
class LD(Distiller):
    """Localization Distillation for heads that predict a distribution of each side's distance: GFL and its kin.

    Positives and regions come from the student's own ATSS assigner and the ground truth.

    - ``loss_ld`` and ``loss_ld_vlr``: :func:`region_losses` of these distributions, in the main region of the positives and
      in the valuable localization region around them.
    - ``loss_kd``: :func:`class_divergence` of the class logits of the positives.

    Also logs, per image, the number of ``positives`` and of slots in the ``valuable`` region.

    The paper does not say what the first two are divided by. ``normalize`` chooses:

    =============  ==========================================================================================
    ``'images'``   (default) Twice the mean over images. This is the authors' value with 2 images per process.
    ``'weights'``  The sum, divided by the sum of the region's weights, as GFL divides its own box losses.
    ``'none'``     The plain sum over the batch, as in the authors' code.
    =============  ==========================================================================================

    Origin of the defaults and differences from the authors' code: ``docs/methods/ld.md``.

    Args:
        head: The student's dense head.
        tau: Temperature of the distances' distributions. Default 10.
        kd_tau: Temperature of the class logits. Default 2.
        ld_weight: Weight of ``loss_ld``, a number or a schedule, as all weights. Default 0.25.
        ld_vlr_weight: Weight of ``loss_ld_vlr``. Default 0.25, which was published with another region, that of the authors'
            code. The sum of its weights is about 0.7 of that of :func:`valuable_region`.
        kd_weight: Weight of ``loss_kd``. Default 10.
        gamma: The valuable region's least DIoU, as a part of the ATSS threshold. Default 0.25.
        normalize: ``'images'``, ``'weights'`` or ``'none'``.
        kd_mean: Whether ``loss_kd`` is a mean over ``'all'`` positives (default) or each ``'level'``, whose means are added.
        over_bins: Whether the divergence of a distance's distribution is a ``'mean'`` (default) over its bins or a ``'sum'``.
        teacher_head: The teacher's head, where its name differs.

    Example:
        >>> distillers = dict(ld=dict(type='LD'))
    """

    renamed = {
        'weight': 'ld_weight',
        'valuable_weight': 'ld_vlr_weight',
        'class_weight': 'kd_weight',
        'class_tau': 'kd_tau',
        'class_mean': 'kd_mean',
        'normalise': 'normalize',
    }

    def __init__(
        self,
        head: str = 'bbox_head',
        tau: float = 10.0,
        kd_tau: float = 2.0,
        ld_weight: float | Mapping = 0.25,
        ld_vlr_weight: float | Mapping = 0.25,
        kd_weight: float | Mapping = 10.0,
        gamma: float = 0.25,
        normalize: str = 'images',
        kd_mean: str = 'all',
        over_bins: str = 'mean',
        teacher_head: str | None = None,
    ):
        super().__init__()
        for name, value in (('tau', tau), ('kd_tau', kd_tau)):
            check_temperature(value, name)
        if not (is_number(gamma) and 0 <= gamma < 1):
            raise ConfigError(f'gamma={gamma!r}: expected a number of at least 0 and below 1')
        if normalize not in ('images', 'weights', 'none'):
            raise ConfigError(f"normalize={normalize!r}: expected 'images', 'weights' or 'none'")
        if kd_mean not in ('all', 'level'):
            raise ConfigError(f"kd_mean={kd_mean!r}: expected 'all' or 'level'")
        if over_bins not in ('mean', 'sum'):
            raise ConfigError(f"over_bins={over_bins!r}: expected 'mean' or 'sum'")
        self.head, self.teacher_head = head, teacher_head or head
        self.student_layers, self.teacher_layers = (self.head,), (self.teacher_head,)
        self.tau, self.kd_tau, self.gamma = tau, kd_tau, gamma
        self.ld_weight, self.ld_vlr_weight = Weight(ld_weight, 'ld_weight'), Weight(ld_vlr_weight, 'ld_vlr_weight')
        self.kd_weight = Weight(kd_weight, 'kd_weight')
        self.normalize, self.kd_mean, self.over_bins = normalize, kd_mean, over_bins

    def _heads(self, student: Taps, teacher: Taps) -> tuple[DistributionDenseHead, DistributionDenseHead]:
        return (
            dense_head(student.model.get_submodule(self.head)),
            dense_head(teacher.model.get_submodule(self.teacher_head)),
        )

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        named = (student, self.head), (teacher, self.teacher_head)
        heads = s, _ = [dense_head(find_layer(model, name)) for model, name in named]
        for head, whose in zip(heads, ('student', 'teacher')):
            if not isinstance(head, DistributionDenseHead):
                raise ConfigError(
                    f'{type(head.head).__name__} ({whose}) does not predict distributions of distances, which LD compares; a '
                    f'GFLHead is needed in both models'
                )
        s.check_assigner()
        if not isinstance(s.head.assigner, ATSSAssigner):
            raise ConfigError(
                f'{type(s.head).__name__} assigns boxes to slots with {type(s.head.assigner).__name__}; LD needs the thresholds '
                f'of ATSSAssigner'
            )
        for what, values in (
            ('reg_max', [each.head.reg_max for each in heads]),
            ('classes', [each.classes for each in heads]),
        ):
            if values[0] != values[1]:
                raise ConfigError(
                    f'the heads have {what} {values[0]} (student) and {values[1]} (teacher), and LD compares their '
                    f'distributions bin by bin; give both the same'
                )

    def setup(self, student: Taps, teacher: Taps) -> None:
        s, t = self._heads(student, teacher)
        priors = [s.priors(student[self.head]), t.priors(teacher[self.teacher_head])]
        if not torch.equal(*priors):
            raise ConfigError(
                f'the heads predict at different places ({len(priors[0])} slots of strides {s.strides} for the student, '
                f'{len(priors[1])} of strides {t.strides} for the teacher); give both the same anchor_generator'
            )

    @torch.no_grad()
    def assign(
        self, student: Taps, data_samples: Sequence, head: DistributionDenseHead
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The student's positives, (B, slots), bool, and the weights of the valuable region, (B, slots)."""
        outputs, metas = student[self.head], [sample.metainfo for sample in data_samples]
        boxes, valid = ground_truth(data_samples)
        anchors = head.anchors(outputs)
        inside = head.inside(anchors, outputs, metas)
        selection = atss(head.head.assigner.topk, anchors, head.sizes(outputs), boxes, valid, inside)
        return selection.positive.any(1), valuable_region(anchors, boxes, valid, inside, selection, self.gamma)

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        s, t = self._heads(student, teacher)
        s_out, t_out = student[self.head], teacher[self.teacher_head]
        require_gradient(self.head, [*s_out[0], *s_out[1]])
        positive, region = self.assign(student, data_samples, s)
        s_classes, t_classes = s.slot_logits(s_out), t.slot_logits(t_out)
        score = s_classes.amax(2).sigmoid()
        divergence = distribution_divergence(s.distributions(s_out), t.distributions(t_out), self.tau, self.over_bins)
        main, valuable = region_losses(divergence, score, positive, region)
        if self.normalize == 'images':
            main, valuable = (each * 2 / len(positive) for each in (main, valuable))
        elif self.normalize == 'weights':
            main = main / reduce_mean((score * positive).sum()).clamp(min=1e-6)
            valuable = valuable / reduce_mean(region.sum()).clamp(min=1e-6)
        sizes = s.sizes(s_out) if self.kd_mean == 'level' else [positive.shape[1]]
        return {
            'loss_ld': self.ld_weight() * main,
            'loss_ld_vlr': self.ld_vlr_weight() * valuable,
            'loss_kd': self.kd_weight() * class_divergence(s_classes, t_classes, positive, self.kd_tau, sizes),
            'positives': positive.sum(1).float().mean(),
            'valuable': (region > 0).sum(1).float().mean(),
        }
