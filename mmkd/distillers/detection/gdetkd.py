"""G-DetKD: semantic-guided feature imitation and contrastive distillation of regions.

Yao, Pi, Xu, Zhang, Li, Zhang, "G-DetKD: Towards General Distillation Framework for Object Detectors via Contrastive and
Semantic-guided Feature Imitation", ICCV 2021, arXiv 2108.07482.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from mmcv.ops import RoIAlign
from torch import nn

from mmkd.adapters import Adapters
from mmkd.distillers.base import Distiller
from mmkd.distillers.detection.mimic import mean_square
from mmkd.distillers.levels import maps, require_gradient
from mmkd.distillers.memory import Memory
from mmkd.distillers.schedule import Weight
from mmkd.errors import ConfigError
from mmkd.hosts.detection.boxes import pairwise_iou
from mmkd.hosts.detection.dense_heads import check_levels, dense_head
from mmkd.hosts.detection.ground_truth import ground_truth
from mmkd.hosts.detection.roi_pool import pool_boxes
from mmkd.hosts.detection.rois import RoIHead, best_predictions, check_same_predictions, to_rois
from mmkd.registry import DISTILLERS
from mmkd.taps import INPUT, Taps, find_layer
from mmkd.values import check_temperature, is_number, is_whole


def aggregate_levels(
    student: torch.Tensor, student_keys: torch.Tensor, teacher_keys: torch.Tensor, tau: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""The student's features of each region, mixed from all levels by how much their keys agree with the teacher's.

    .. math::
        a_{il} = \operatorname{softmax}_l(\langle k^S_{il}, k^T_i \rangle / \tau), \qquad
        S_i = \sum_l a_{il} S_{il}

    Args:
        student: (n, L, C, h, w), adapted, region i pooled from every level l.
        student_keys: (n, L, D).
        teacher_keys: (n, D).
        tau: Temperature.

    Returns:
        S, (n, C, h, w), and a, (n, L), which sums to 1 over the levels.
    """
    attention = (torch.einsum('nld,nd->nl', student_keys, teacher_keys) / tau).softmax(1)
    return torch.einsum('nl,nlchw->nchw', attention, student), attention


def negatives(rois: torch.Tensor, max_overlap: float = 0.5) -> torch.Tensor:
    """Which regions are another one's negatives: those of other images, and those that overlap it little.

    Args:
        rois: (n, 5), index of the image, then xyxy in pixels.
        max_overlap: The largest IoU of a negative in the same image.

    Returns:
        (n, n), bool; False for a region and itself.
    """
    same_image = rois[:, None, 0] == rois[None, :, 0]
    near = pairwise_iou(rois[:, 1:], rois[:, 1:]) > max_overlap
    itself = torch.eye(len(rois), dtype=torch.bool, device=rois.device)
    return ~(same_image & near) & ~itself


def contrastive_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    negative: torch.Tensor,
    memory: torch.Tensor,
    filled: torch.Tensor,
    tau: float = 0.07,
) -> torch.Tensor:
    r"""InfoNCE: of all the teacher's regions, the student's is to be like the same one.

    .. math::
        L = -\frac{1}{n} \sum_i \log \frac{g(s_i, t_i)}{g(s_i, t_i) + \sum_{j \in N_i} g(s_i, t_j) + \sum_m g(s_i, m)},
        \qquad g(s, t) = \exp(\cos(s, t) / \tau)

    Args:
        student: (n, D), projected embeddings.
        teacher: (n, D).
        negative: N, (n, n), bool, see :func:`negatives`.
        memory: m, (Q, D), of other images.
        filled: (Q,), bool, False for an entry that is not there.
        tau: Temperature.

    Returns:
        A scalar; 0 for no region at all.
    """
    student, teacher, memory = (F.normalize(each, dim=1) for each in (student, teacher, memory))
    batch = student @ teacher.t() / tau
    itself = torch.eye(len(student), dtype=torch.bool, device=student.device)
    batch = batch.masked_fill(~(negative | itself), -torch.inf)
    others = (student @ memory.t() / tau).masked_fill(~filled, -torch.inf)
    total = torch.cat([batch, others], 1).logsumexp(1)
    return (total - batch.diagonal()).sum() / max(len(student), 1)


def class_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean over regions of the Kullback-Leibler divergence of the class distributions, from logits of (n, classes + 1)."""
    divergence = F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction='sum', log_target=True)
    return divergence / max(len(student), 1)


def class_aware_box_loss(student: torch.Tensor, teacher: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    r"""Difference of the deltas that the teacher expects, given its classes.

    .. math:: L = \frac{1}{n} \sum_i \Big\lVert \sum_c p^T_{ic} (r^T_{ic} - r^S_{ic}) \Big\rVert_1

    with c over the foreground classes.

    Args:
        student: (n, 4 * classes), deltas of each class, or (n, 4) for a class-agnostic head.
        teacher: The same shape.
        teacher_logits: (n, classes + 1), the background last.
    """
    probability = teacher_logits.softmax(1)[:, :-1]
    difference = (teacher - student).unflatten(1, (-1, 4))
    if difference.shape[1] == 1:
        probability = probability.sum(1, keepdim=True)
    return (probability[..., None] * difference).sum(1).abs().sum() / max(len(student), 1)


def draw_regions(positive: torch.Tensor, number: int, fraction: float) -> torch.Tensor:
    """A random choice of candidates, as many for each image, at most a part of them positive.

    Where positives are few, negatives take their place, and the other way round.

    Args:
        positive: (B, N), bool.
        number: To choose for each image; N if that is less.
        fraction: The part that positives take at most, while there are negatives.

    Returns:
        Indices into N, (B, number).
    """
    total = positive.shape[1]
    order = (positive + torch.rand(positive.shape, device=positive.device)).argsort(1, descending=True)
    place = torch.arange(total, device=positive.device)
    # positives come first; those beyond their part go behind the negatives
    surplus = positive.gather(1, order) & (place >= int(number * fraction))
    return order.gather(1, (place + total * surplus).argsort(1)[:, :number])


@DISTILLERS.register_module()
class GDetKD(Distiller):
    """G-DetKD: what a two-stage teacher sees in the student's regions, for two-stage and one-stage students.

    Two-stage students: the regions are the RoIs that their own sampler drew. One-stage students, which name their
    ``head``: ``regions_per_image`` of their ``candidates`` best predictions, drawn by :func:`draw_regions`.

    - ``loss_sgfi``, semantic-guided feature imitation: each region is pooled from all of the student's levels, these are
      mixed by :func:`aggregate_levels`, and compared with the teacher's by a mean square.
    - ``loss_ckd``, contrastive distillation: :func:`contrastive_loss` of the projected embeddings of both networks, with
      the regions of :func:`negatives` and those of a :class:`mmkd.distillers.memory.Memory`.
    - ``loss_cls`` and ``loss_bbox``, for two-stage students and off by default: :func:`class_loss` and
      :func:`class_aware_box_loss` of what both heads predict.

    Also logs ``tau``, the temperature of SGFI, which is trained like the adapter, the keys and the projections.
    Formulas, origin of the defaults, cost and results: ``docs/methods/gdetkd.md``.

    Args:
        layer: The layer whose levels are pooled.
        head: A one-stage student's dense head. None (default) for a two-stage student.
        roi_head: The RoI head, of the teacher and of a two-stage student.
        stage: The student's stage, where its RoI head is a cascade.
        embedding_layer: The layer that a one-stage student's embeddings are averaged from, such as
            ``'bbox_head.cls_convs.3'``, the last of its classification tower. Default: ``layer``.
        sgfi_weight: Weight of ``loss_sgfi``, a number or a schedule, as all weights. Default 1.
        ckd_weight: Weight of ``loss_ckd``. Default 0.5.
        cls_weight: Weight of ``loss_cls``. Default 0; for two-stage students.
        bbox_weight: Weight of ``loss_bbox``. Default 0; for two-stage students.
        tau: Temperature of SGFI at the start. Default 16.
        hidden_channels: Channels between the two convolutions of the keys. Default 128.
        key_channels: Channels of a key. Default 64.
        ckd_tau: Temperature of the contrastive loss. Default 0.07.
        projection_channels: Length of a projected embedding. None (default): that of the teacher's embeddings.
        memory: Entries of the memory. Default 10240.
        keys_per_step: Entries that each process adds in a step. Default 512.
        max_overlap: The largest IoU of two negatives in one image. Default 0.5.
        regions_per_image: Regions per image of a one-stage student. Default 512.
        candidates: Predictions per image that a one-stage student's regions are drawn from, the best. Default 1000.
        positive_fraction: The largest part of the drawn regions that overlap an object. Default 0.25.
        positive_iou: The IoU above which a region overlaps an object. Default 0.5.
        adapter: ``'auto'`` (1x1 convolution exactly where channels differ), None or a dict. One serves all levels.
        teacher_layer: The teacher's layer, where its name differs.
        teacher_stage: The teacher's stage, where its RoI head is a cascade. Default: ``stage``.

    Example:
        >>> distillers = dict(gdetkd=dict(type='GDetKD', cls_weight=1.0, bbox_weight=1.0))  # Faster R-CNN
        >>> distillers = dict(gdetkd=dict(type='GDetKD', head='bbox_head', embedding_layer='bbox_head.cls_convs.3'))
    """

    renamed = {
        'neck': 'layer',
        'teacher_neck': 'teacher_layer',
        'tower': 'embedding_layer',
        'weight': 'sgfi_weight',
        'contrast_weight': 'ckd_weight',
        'class_weight': 'cls_weight',
        'box_weight': 'bbox_weight',
        'contrast_tau': 'ckd_tau',
        'regions': 'regions_per_image',
    }

    def __init__(
        self,
        layer: str = 'neck',
        head: str | None = None,
        roi_head: str = 'roi_head',
        stage: int | None = None,
        embedding_layer: str | None = None,
        sgfi_weight: float | Mapping = 1.0,
        ckd_weight: float | Mapping = 0.5,
        cls_weight: float | Mapping = 0.0,
        bbox_weight: float | Mapping = 0.0,
        tau: float = 16.0,
        hidden_channels: int = 128,
        key_channels: int = 64,
        ckd_tau: float = 0.07,
        projection_channels: int | None = None,
        memory: int = 10240,
        keys_per_step: int = 512,
        max_overlap: float = 0.5,
        regions_per_image: int = 512,
        candidates: int = 1000,
        positive_fraction: float = 0.25,
        positive_iou: float = 0.5,
        adapter: str | Mapping | None = 'auto',
        teacher_layer: str | None = None,
        teacher_stage: int | None = None,
    ):
        super().__init__()
        numbers = dict(
            hidden_channels=hidden_channels,
            key_channels=key_channels,
            projection_channels=1 if projection_channels is None else projection_channels,
            memory=memory,
            keys_per_step=keys_per_step,
            regions_per_image=regions_per_image,
            candidates=candidates,
        )
        for name, value in numbers.items():
            if not (is_whole(value) and value >= 1):
                raise ConfigError(f'{name}={value!r}: expected a whole number of at least 1')
        for name, value in (('tau', tau), ('ckd_tau', ckd_tau)):
            check_temperature(value, name)
        for name, value in (
            ('max_overlap', max_overlap),
            ('positive_fraction', positive_fraction),
            ('positive_iou', positive_iou),
        ):
            if not (is_number(value) and 0 <= value <= 1):
                raise ConfigError(f'{name}={value!r}: expected a number from 0 to 1')
        self.compares_classes, self.compares_boxes = bool(cls_weight), bool(bbox_weight)
        compares_heads = self.compares_classes or self.compares_boxes
        if head is not None and compares_heads:
            raise ConfigError(f'head={head!r}: cls_weight and bbox_weight are for two-stage students')
        if head is None and embedding_layer is not None:
            raise ConfigError(f'embedding_layer={embedding_layer!r} is for one-stage students; name their head as well')
        self.layer, self.teacher_layer, self.head = layer, teacher_layer or layer, head
        self.roi_head, self.teacher_stage = RoIHead(roi_head, stage), teacher_stage
        self.embedding = (embedding_layer or layer) if head else self.roi_head.embedding
        self.sgfi_weight, self.ckd_weight = Weight(sgfi_weight, 'sgfi_weight'), Weight(ckd_weight, 'ckd_weight')
        self.cls_weight, self.bbox_weight = Weight(cls_weight, 'cls_weight'), Weight(bbox_weight, 'bbox_weight')
        self.tau, self.ckd_tau, self.max_overlap = tau, ckd_tau, max_overlap
        self.hidden_channels, self.key_channels = hidden_channels, key_channels
        self.projection_channels = projection_channels
        self.memory_size, self.keys_per_step = memory, keys_per_step
        self.regions_per_image, self.candidates = regions_per_image, candidates
        self.positive_fraction, self.positive_iou = positive_fraction, positive_iou
        self.adapter = adapter
        self.student_layers = (layer, head) if head else (layer, self.roi_head.extractor + INPUT)
        self.student_layers = tuple(dict.fromkeys((*self.student_layers, self.embedding)))
        if compares_heads:
            self.student_layers += (self.roi_head.bbox_head,)
        self.teacher_layers = (self.teacher_layer,)

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        if self.head:
            dense_head(find_layer(student, self.head))
        else:
            self.roi_head.check(student)
        teacher_roi_head = self.roi_head.of_teacher(teacher, self.teacher_stage)
        teacher_roi_head.check_input(teacher, 'teacher')
        if self.compares_classes or self.compares_boxes:
            heads = (self.roi_head, student), (teacher_roi_head, teacher)
            check_same_predictions(*heads, 'GDetKD', self.compares_boxes)
        layer = teacher.get_submodule(teacher_roi_head.extractor).roi_layers[0]
        if not isinstance(layer, RoIAlign):
            raise ConfigError(
                f"the teacher's {teacher_roi_head.extractor!r} pools with {type(layer).__name__}, not RoIAlign"
            )

    def setup(self, student: Taps, teacher: Taps) -> None:
        self.teacher_roi_head = self.roi_head.of_teacher(teacher.model, self.teacher_stage)
        extractor = teacher.model.get_submodule(self.teacher_roi_head.extractor)
        layer = extractor.roi_layers[0]
        levels = self._levels(student)
        pixels = maps(teacher, self.teacher_layer)[0].shape[-1] * extractor.featmap_strides[0]
        # mmcv's RoIAlign, as the teacher's
        self.poolers = [
            RoIAlign(layer.output_size, level.shape[-1] / pixels, layer.sampling_ratio, aligned=layer.aligned)
            for level in levels
        ]
        channels, target_channels = levels[0].shape[1], extractor.out_channels
        self.adapters = Adapters.of_regions(self.adapter, channels, target_channels, (self.layer, self.teacher_layer))
        convolutions = dict(kernel_size=3, stride=2, padding=1)
        self.keys = nn.Sequential(
            nn.Conv2d(target_channels, self.hidden_channels, **convolutions),
            nn.ReLU(),
            nn.Conv2d(self.hidden_channels, self.key_channels, **convolutions),
            nn.ReLU(),
        )
        self.log_tau = nn.Parameter(torch.tensor(math.log(self.tau)))

        own = self._embedding_channels(student)
        device = next(teacher.model.parameters()).device
        with torch.no_grad():
            region = torch.zeros(1, target_channels, *layer.output_size, device=device)
            embedding, _, _ = self.teacher_roi_head.embed(teacher, region)
        projected = self.projection_channels or embedding.shape[1]
        self.projection = nn.Linear(own, projected, bias=False)
        self.teacher_projection = nn.Linear(embedding.shape[1], projected, bias=False)
        self.memory = Memory(self.memory_size, embedding.shape[1], self.keys_per_step)

    def _levels(self, student: Taps) -> Sequence[torch.Tensor]:
        """The student's levels that regions are pooled from."""
        levels = maps(student, self.layer)
        if self.head:
            return levels
        return levels[: student.model.get_submodule(self.roi_head.extractor).num_inputs]

    def _embedding_channels(self, student: Taps) -> int:
        if not self.head:
            return student[self.embedding][0].shape[1]
        levels = maps(student, self.embedding)
        check_levels(self.embedding, levels, self.head, dense_head(student.model.get_submodule(self.head)))
        return levels[0].shape[1]

    @torch.no_grad()
    def draw(self, student: Taps, data_samples: Sequence) -> torch.Tensor:
        """Regions of a one-stage student, (B, K, 4), xyxy in pixels."""
        head = dense_head(student.model.get_submodule(self.head))
        metas = [sample.metainfo for sample in data_samples]
        boxes = best_predictions(head, student[self.head], self.candidates, metas)
        objects = ground_truth(data_samples)
        overlaps = pairwise_iou(boxes, objects.boxes.to(boxes.dtype)) * objects.valid[:, None]
        chosen = draw_regions(overlaps.amax(2) > self.positive_iou, self.regions_per_image, self.positive_fraction)
        return boxes.gather(1, chosen[..., None].expand(-1, -1, 4))

    def _embeddings(self, student: Taps, boxes: torch.Tensor | None) -> torch.Tensor:
        """(n, C): the student's embeddings of its regions."""
        if boxes is None:
            return student[self.embedding][0]
        strides = dense_head(student.model.get_submodule(self.head)).strides
        # the mean of 7x7 cells of 2x2 samples
        pooled = pool_boxes(student[self.embedding], boxes, strides, output_size=1, sampling_ratio=14)
        return pooled.flatten(0, 1).flatten(1)

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        require_gradient(self.layer, student[self.layer])
        boxes = self.draw(student, data_samples) if self.head else None
        rois = self.roi_head.rois(student) if boxes is None else to_rois(boxes)
        with torch.no_grad():
            target = self.teacher_roi_head.pool(teacher, self.teacher_layer, rois)
            embedding, t_logits, t_deltas = self.teacher_roi_head.embed(teacher, target)

        # mmcv's RoIAlign reads memory in the order of NCHW, whatever the strides say
        pooled = [
            pool(level.contiguous(), rois) for pool, level in zip(self.poolers, self._levels(student), strict=True)
        ]
        levels = torch.stack(pooled, 1)
        (adapted,) = self.adapters([levels.flatten(0, 1)], [target])
        keys = self.keys(adapted).flatten(1)
        tau = self.log_tau.exp()
        each = (len(rois), len(pooled))
        mixed, _ = aggregate_levels(
            adapted.unflatten(0, each), keys.unflatten(0, each), self.keys(target).flatten(1), tau
        )

        with torch.no_grad():
            memory = self.teacher_projection(self.memory.keys)
        contrast = contrastive_loss(
            self.projection(self._embeddings(student, boxes)),
            self.teacher_projection(embedding),
            negatives(rois, self.max_overlap),
            memory,
            self.memory.filled,
            self.ckd_tau,
        )
        self.memory.add(embedding)

        losses = {
            'loss_sgfi': self.sgfi_weight() * mean_square(mixed, target),
            'loss_ckd': self.ckd_weight() * contrast,
            'tau': tau.detach(),
        }
        if self.compares_classes:
            losses['loss_cls'] = self.cls_weight() * class_loss(student[self.roi_head.bbox_head][0], t_logits)
        if self.compares_boxes:
            deltas = student[self.roi_head.bbox_head][1]
            losses['loss_bbox'] = self.bbox_weight() * class_aware_box_loss(deltas, t_deltas, t_logits)
        return losses
