"""Prediction-guided distillation (PGD).

Yang, Ochal, Storkey, Crowley, "Prediction-Guided Distillation for Dense Object Detection", ECCV 2022, arXiv 2203.05469.
"""

from collections.abc import Mapping

import torch
from torch import nn

from mmkd.distillers.base import Distiller
from mmkd.distillers.generic.fkd import attention
from mmkd.distillers.levels import LevelPairs
from mmkd.distillers.schedule import Weight
from mmkd.errors import ConfigError
from mmkd.hosts.detection.boxes import pairwise_iou
from mmkd.hosts.detection.dense_heads import TOWERS, DenseHead, DistanceDenseHead, check_towers, dense_head
from mmkd.hosts.detection.ground_truth import GroundTruth, ground_truth, ground_truth_labels
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps, find_layer
from mmkd.values import check_temperature, is_number, is_whole

GROWTH = 0.25
"""How much more the features of classes count on each level than on the one before."""
JITTER = 0.1**2 / 12
"""Variance, in pixels squared, that keeps a covariance of few centers regular: of a uniform noise of 0.1 pixels."""


def quality(scores: torch.Tensor, overlaps: torch.Tensor, share: float) -> torch.Tensor:
    r"""How good a slot is for an object: :math:`p^{1 - \alpha} \operatorname{IoU}^{\alpha}`.

    Args:
        scores: p, (B, K, slots), the probability of the object's class.
        overlaps: (B, K, slots), IoU of the slot's box and the object.
        share: alpha, from 0 to 1.

    Returns:
        (B, K, slots).
    """
    return scores ** (1 - share) * overlaps**share


@torch.no_grad()
def gaussian_weights(
    qualities: torch.Tensor, centers: torch.Tensor, boxes: torch.Tensor, valid: torch.Tensor, topk: int = 30
) -> torch.Tensor:
    r"""Where the best slots of each object are, by a Gaussian fitted to their centers; the largest of all objects'.

    .. math:: w_r = \max_g [r \in T_g] \, [x_r \in g] \exp\Big(-\frac{1}{2} (x_r - \mu_g)^\top \Sigma_g^{-1} (x_r - \mu_g)\Big)

    with T the ``topk`` slots of the best quality for object g, mu and Sigma the mean and the covariance of their centers x.

    Args:
        qualities: (B, K, slots).
        centers: (slots, 2), x and y in pixels.
        boxes: (B, K, 4), the objects, xyxy in pixels.
        valid: (B, K), False for an object that is not there.
        topk: Slots of each object, of all levels together.

    Returns:
        (B, slots), from 0 to 1.
    """
    chosen = qualities.topk(min(topk, qualities.shape[2]), dim=2)[1]
    points = centers[chosen]  # (B, K, topk, 2)
    away = points - points.mean(2, keepdim=True)
    x, y = away.unbind(3)
    xx, yy, xy = (each.mean(2, keepdim=True) for each in (x * x + JITTER, y * y + JITTER, x * y))
    distance = (yy * x * x - 2 * xy * x * y + xx * y * y) / (xx * yy - xy * xy)
    inside = ((points > boxes[:, :, None, :2]) & (points < boxes[:, :, None, 2:])).all(3)
    weights = torch.exp(-0.5 * distance) * inside * valid[..., None]
    return torch.zeros_like(qualities).scatter(2, chosen, weights).amax(1)


def channel_attention(feature: torch.Tensor, tau: float = 0.8) -> torch.Tensor:
    """At each position the softmax over channels of ``abs(feature) / tau``, times their number: (B, C, H, W) to the same."""
    return feature.shape[1] * (feature.abs() / tau).softmax(1)


def class_feature_losses(
    student: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor, background: torch.Tensor, tau: float = 0.8
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    r"""Squared distances where objects and where background are, weighted by the teacher's attention, and that of attention.

    .. math::
        L = \frac{1}{B} \sum_b \frac{1}{N_b} \sum_i M_{bi} A^S_{bi} \sum_c A^C_{bci} (s_{bci} - t_{bci})^2

    with M the weights, or the background, and N how many of them are not 0; :math:`A^S` is
    :func:`mmkd.distillers.generic.fkd.attention` and :math:`A^C` :func:`channel_attention` of the teacher. The third is
    the L1 distance of both networks' :math:`A^S`, over B, and of :math:`A^C`, over B H W.

    Args:
        student: (B, C, H, W).
        teacher: The same shape; no gradient flows into it.
        weights: (B, H, W), not negative.
        background: (B, H, W), 0 or 1.
        tau: Temperature.

    Returns:
        Three scalars: foreground, background, attention.
    """
    teacher = teacher.detach()
    spatial, channel = attention(teacher, tau)[0], channel_attention(teacher, tau)
    distance = spatial * (channel * (student - teacher).square()).sum(1)
    counts = ((mask > 0).sum((1, 2), keepdim=True).clamp(min=1) for mask in (weights, background))
    near, far = ((distance * mask / count).sum() / len(student) for mask, count in zip((weights, background), counts))
    attended = (attention(student, tau)[0] - spatial).abs().sum() / len(student)
    return near, far, attended + (channel_attention(student, tau) - channel).abs().sum(1).mean()


def box_feature_losses(
    student: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor, tau: float = 0.8
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Squared distances where objects are, and the distance of the attention there.

    .. math::
        L = \frac{1}{N} \sum_{b, i} w_{bi} \frac{1}{C} \sum_c A^C_{bci} (s_{bci} - t_{bci})^2, \qquad
        N = |\{(b, i): w_{bi} > 0\}|

    The second is the L1 distance of both networks' :func:`channel_attention`, a mean over the same N positions.

    Args:
        student: (B, C, H, W).
        teacher: The same shape; no gradient flows into it.
        weights: (B, H, W), not negative; where all are 0, so are the losses.
        tau: Temperature.

    Returns:
        Two scalars.
    """
    teacher = teacher.detach()
    channel, counted = channel_attention(teacher, tau), weights > 0
    number = counted.sum().clamp(min=1)
    near = ((channel * (student - teacher).square()).mean(1) * weights).sum() / number
    apart = (channel_attention(student, tau) - channel).abs().sum(1)
    return near, (apart * counted).sum() / number


@DISTILLERS.register_module()
class PGD(Distiller):
    """Prediction-guided distillation: the head's features where the teacher predicts each object best.

    For each object the slots are found whose prediction by the teacher has the best :func:`quality`; a Gaussian over their
    centers, :func:`gaussian_weights`, says how much a position counts. What both towers of the head have after their first
    convolution is compared:

    - ``loss_foreground`` and ``loss_background``: :func:`class_feature_losses` of the classification tower, on each level a
      quarter more than on the one before. Background is where no object is.
    - ``loss_bbox``: :func:`box_feature_losses` of the regression tower.
    - ``loss_attention``: the third of the former and the second of the latter.

    Each is a sum over levels. Defaults for other heads, and differences from the authors' code: ``docs/methods/pgd.md``.

    Args:
        head: The dense head.
        foreground_weight: Weight of ``loss_foreground``, a number or a schedule, as all weights. Default 0.04.
        background_weight: Weight of ``loss_background``. Default 0.02.
        bbox_weight: Weight of ``loss_bbox``. Default 0.064.
        attention_weight: Weight of ``loss_attention``. Default 8e-4.
        topk: Slots of each object. Default 30.
        cls_share: alpha of the quality for the classification tower, from 0 to 1. Default 0.8.
        bbox_share: alpha for the regression tower. Default 0.6.
        tau: Temperature of the attention, positive. Default 0.8.
        adapter: ``'auto'`` (1x1 convolution exactly where channels differ), None or a dict.
        teacher_head: The teacher's head, where its name differs.

    Example:
        >>> distillers = dict(pgd=dict(type='PGD'))
    """

    compares_classes = True

    def __init__(
        self,
        head: str = 'bbox_head',
        foreground_weight: float | Mapping = 0.04,
        background_weight: float | Mapping = 0.02,
        bbox_weight: float | Mapping = 0.064,
        attention_weight: float | Mapping = 8e-4,
        topk: int = 30,
        cls_share: float = 0.8,
        bbox_share: float = 0.6,
        tau: float = 0.8,
        adapter: str | Mapping | None = 'auto',
        teacher_head: str | None = None,
    ):
        super().__init__()
        check_temperature(tau)
        if not (is_whole(topk) and topk >= 1):
            raise ConfigError(f'topk={topk!r}: expected a whole number of at least 1')
        for name, value in (('cls_share', cls_share), ('bbox_share', bbox_share)):
            if not (is_number(value) and 0 <= value <= 1):
                raise ConfigError(f'{name}={value!r}: expected a number from 0 to 1')
        self.head, self.teacher_head = head, teacher_head or head
        self.topk, self.tau, self.shares = topk, tau, (cls_share, bbox_share)
        self.towers = nn.ModuleList(
            LevelPairs(f'{self.head}.{tower}.0', f'{self.teacher_head}.{tower}.0', adapter) for tower in TOWERS
        )
        self.student_layers = tuple(f'{self.head}.{tower}.0' for tower in TOWERS)
        self.teacher_layers = (self.teacher_head, *(f'{self.teacher_head}.{tower}.0' for tower in TOWERS))
        self.foreground_weight = Weight(foreground_weight, 'foreground_weight')
        self.background_weight = Weight(background_weight, 'background_weight')
        self.bbox_weight = Weight(bbox_weight, 'bbox_weight')
        self.attention_weight = Weight(attention_weight, 'attention_weight')

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        for model, name in ((student, self.head), (teacher, self.teacher_head)):
            check_towers(find_layer(model, name), name, 1)
        heads = find_layer(student, self.head), find_layer(teacher, self.teacher_head)
        dense_head(heads[1])
        if heads[0].num_classes != heads[1].num_classes:
            raise ConfigError(
                f'the heads predict {heads[0].num_classes} (student) and {heads[1].num_classes} (teacher) classes; PGD reads the '
                f"teacher's score of each object's class; use a teacher that was trained on the same classes"
            )

    def setup(self, student: Taps, teacher: Taps) -> None:
        for levels in self.towers:
            levels.setup(student, teacher)
            if any(levels.adapters.resize):
                raise ConfigError(f'{self.head!r}: student and teacher have different strides; PGD needs the same')

    @torch.no_grad()
    def weights(
        self, teacher: Taps, data_samples: list
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """Per level of the teacher's head how much each position counts, (B, H, W): for classes, for boxes, as background."""
        head, outputs = dense_head(teacher.model.get_submodule(self.teacher_head)), teacher[self.teacher_head]
        truth, labels = ground_truth(data_samples), ground_truth_labels(data_samples)
        boxes, centers = truth.boxes.to(outputs[0][0].dtype), centers_of(head, outputs)
        logits = head.slot_logits(outputs).transpose(1, 2)  # (B, C, slots)
        scores = logits.gather(1, labels[..., None].expand(-1, -1, logits.shape[2])).sigmoid()
        overlaps = pairwise_iou(boxes, head.decode(head.priors(outputs), head.regression(outputs)))
        counted = head.in_image(outputs, [sample.metainfo for sample in data_samples])
        scores, overlaps = scores * counted[:, None], overlaps * counted[:, None]
        found = [
            gaussian_weights(quality(scores, overlaps, share), centers, boxes, truth.valid, self.topk) * counted
            for share in self.shares
        ]
        found.append(background_of(centers, truth) * counted)
        sizes = [(level.shape[1], *level.shape[3:]) for level in head.class_logits(outputs)]
        return tuple([each.amax(3) for each in by_level(slots, sizes)] for slots in found)

    def pictures(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        classes, boxes, _ = self.weights(teacher, data_samples or [])
        maps = {'classes': classes, 'boxes': boxes}
        return {f'{name}, level {level}': each for name, levels in maps.items() for level, each in enumerate(levels)}

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        of_classes, of_boxes, background = self.weights(teacher, data_samples or [])
        near = far = boxes = attended = 0.0
        classes, regression = (levels(student, teacher) for levels in self.towers)
        for pair in classes:
            level = pair.teacher_level
            found = class_feature_losses(pair.student, pair.teacher, of_classes[level], background[level], self.tau)
            growth = 1 + GROWTH * level
            near, far, attended = near + growth * found[0], far + growth * found[1], attended + found[2]
        for pair in regression:
            found = box_feature_losses(pair.student, pair.teacher, of_boxes[pair.teacher_level], self.tau)
            boxes, attended = boxes + found[0], attended + found[1]
        return {
            'loss_foreground': self.foreground_weight() * near,
            'loss_background': self.background_weight() * far,
            'loss_bbox': self.bbox_weight() * boxes,
            'loss_attention': self.attention_weight() * attended,
        }


def centers_of(head: DenseHead, outputs: tuple) -> torch.Tensor:
    """(slots, 2), x and y in pixels."""
    priors = head.priors(outputs)
    return priors[:, :2] if isinstance(head, DistanceDenseHead) else (priors[:, :2] + priors[:, 2:]) / 2


def background_of(centers: torch.Tensor, truth: GroundTruth) -> torch.Tensor:
    """(B, slots), bool: those whose center, (slots, 2), lies in no object."""
    boxes = truth.boxes[:, :, None]
    inside = ((centers > boxes[..., :2]) & (centers < boxes[..., 2:])).all(3) & truth.valid[..., None]
    return ~inside.any(1)


def by_level(slots: torch.Tensor, sizes: list[tuple[int, ...]]) -> list[torch.Tensor]:
    """(B, slots) as a map for each level, (B, H, W, A), of sizes (A, H, W)."""
    parts = slots.split([anchors * height * width for anchors, height, width in sizes], 1)
    return [
        part.unflatten(1, (height, width, anchors)) for part, (anchors, height, width) in zip(parts, sizes, strict=True)
    ]
