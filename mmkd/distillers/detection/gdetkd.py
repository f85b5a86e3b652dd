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
from mmkd.distillers.levels import maps, require_gradient
from mmkd.distillers.memory import Memory
from mmkd.distillers.schedule import Weight
from mmkd.errors import ConfigError
from mmkd.hosts.detection.boxes import pairwise_iou
from mmkd.hosts.detection.dense_heads import dense_head
from mmkd.hosts.detection.ground_truth import ground_truth
from mmkd.hosts.detection.roi_pool import pool_boxes
from mmkd.hosts.detection.rois import RoIHead, best_predictions, to_rois
from mmkd.registry import DISTILLERS
from mmkd.taps import INPUT, Taps


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


def imitation_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean square of the difference, over regions, channels and cells; 0 for no region at all."""
    return (student - teacher).square().sum() / max(student.numel(), 1)


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
    """G-DetKD, with a two-stage teacher.

    Regions are the student's. **Two-stage students** (homogeneous pair): the RoIs that their own sampler drew. **One-stage
    students** (heterogeneous pair; name their ``head``): of the ``candidates`` best predictions of each image
    ``regions`` are drawn at random, at most a quarter of which overlap an object by more than 0.5. The teacher's RoI modules
    are run on them. Two losses compare the regions:

    * *Semantic-guided feature imitation* (SGFI): the student's features are pooled from all its levels, those of
      its RoI extractor or all of a one-stage student's neck, and mixed by :func:`aggregate_levels`, then compared
      with what the teacher pools from the one level that the region's size gives (:func:`imitation_loss`). Keys are two
      convolutions of stride 2, each with a ReLU, over the pooled cells, flattened; the same for student and
      teacher. Adapter, keys and temperature are trained.
    * *Contrastive distillation* (CKD): :func:`contrastive_loss` of linear projections, one for each network, of embeddings:
      what the classifier of a RoI head takes in, or, of a one-stage student, ``tower`` (the neck where it is None)
      averaged over the region, from the level that its size gives. Negatives are the other regions of the
      process's batch but those that overlap by more than 0.5 (:func:`negatives`), and a :class:`Memory`.

    Homogeneous pairs can also compare the heads' outputs for the same RoIs: ``class_weight`` (:func:`class_loss`) and
    ``box_weight`` (:func:`class_aware_box_loss`). The paper has both on, and starts the student's head from the teacher's
    weights (``inherit`` of :func:`mmkd.distill.distill`); they are off by default. Logs ``loss_sgfi``, ``loss_ckd``,
    where they are on ``loss_class`` and ``loss_box``, and SGFI's ``temperature``.

    The paper has no public code. Its loss weights, the first temperature of SGFI and its numbers of candidates and keys are
    not known: 1 and 0.5 for the weights, 128 and 64 channels, temperature 0.07 and a memory of ten batches are those of an
    independent port; the temperature of SGFI (16, the square root of a key's length for 7x7 cells), kernels of 3x3, 1000
    candidates, the pooling of embeddings of a one-stage student, weights of 1 where class and box terms are wanted and
    512 keys a step are choices of this class. A step adds ``keys_per_step`` entries for each process, so that on 8
    processes ``memory`` holds the last 2.5 steps; a key of 1024 numbers takes 4 KB of the checkpoint (42 MB for
    10240).

    On the generated data set (``tools/compare.py``) a RetinaNet gains little from a Faster R-CNN (+0.037 AP over three
    seeds, standard error 0.021), while a Faster R-CNN with class and box terms gains most of all methods (+0.272);
    which part does it was not taken apart. All levels' regions go through the keys' convolutions: at 256x320 pixels a
    step of a one-stage student takes six times that of student and teacher alone; fewer ``regions`` cost less in
    proportion.

    Args:
        neck: The layer whose levels are pooled.
        head: A one-stage student's dense head. None (default) for a two-stage student.
        roi_head: A two-stage student's RoI head, and the teacher's.
        stage: The stage, where ``roi_head`` is a cascade.
        tower: A one-stage student's layer that its embeddings are taken from, such as ``'bbox_head.cls_convs.3'``, the
            last of its classification tower, as in the paper. None for the neck.
        weight: Of SGFI; a number or a schedule, as all weights. Default 1.
        contrast_weight: Of CKD. Default 0.5.
        class_weight: Default 0, two-stage students only.
        box_weight: Default 0, two-stage students only.
        tau: SGFI's temperature at the start. Default 16.
        hidden_channels: Between the two convolutions of the keys. Default 128.
        key_channels: Of a key's cells. Default 64.
        contrast_tau: CKD's temperature. Default 0.07.
        projection_channels: Of the projected embeddings. None (default): as many as the teacher's embeddings.
        memory: Entries. Default 10240.
        keys_per_step: Entries that each process adds in a step. Default 512.
        max_overlap: The largest IoU of a negative in the same image. Default 0.5.
        regions: Regions per image of a one-stage student. Default 512.
        candidates: Best predictions per image of a one-stage student. Default 1000.
        positive_fraction: The part of the regions that overlaps an object, at most. Default 0.25.
        positive_iou: From which IoU on. Default 0.5.
        adapter: ``'auto'`` (1x1 convolution exactly where channels differ), None or a dict. One for all levels.
        teacher_neck: The teacher's layer, where its name differs.

    Example:
        >>> distillers = dict(gdetkd=dict(type='GDetKD', class_weight=1.0, box_weight=1.0))   # Faster R-CNN
        >>> distillers = dict(gdetkd=dict(type='GDetKD', head='bbox_head', tower='bbox_head.cls_convs.3'))  # RetinaNet
    """

    def __init__(
        self,
        neck: str = 'neck',
        head: str | None = None,
        roi_head: str = 'roi_head',
        stage: int | None = None,
        tower: str | None = None,
        weight: float | Mapping = 1.0,
        contrast_weight: float | Mapping = 0.5,
        class_weight: float | Mapping = 0.0,
        box_weight: float | Mapping = 0.0,
        tau: float = 16.0,
        hidden_channels: int = 128,
        key_channels: int = 64,
        contrast_tau: float = 0.07,
        projection_channels: int | None = None,
        memory: int = 10240,
        keys_per_step: int = 512,
        max_overlap: float = 0.5,
        regions: int = 512,
        candidates: int = 1000,
        positive_fraction: float = 0.25,
        positive_iou: float = 0.5,
        adapter: str | Mapping | None = 'auto',
        teacher_neck: str | None = None,
    ):
        super().__init__()
        numbers = dict(
            hidden_channels=hidden_channels,
            key_channels=key_channels,
            projection_channels=1 if projection_channels is None else projection_channels,
            memory=memory,
            keys_per_step=keys_per_step,
            regions=regions,
            candidates=candidates,
        )
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f'{name}={value!r}: expected a whole number of at least 1')
        for name, value in (('tau', tau), ('contrast_tau', contrast_tau)):
            if not isinstance(value, (int, float)) or value <= 0:
                raise ConfigError(f'{name}={value!r}: expected a positive temperature')
        for name, value in (
            ('max_overlap', max_overlap),
            ('positive_fraction', positive_fraction),
            ('positive_iou', positive_iou),
        ):
            if not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ConfigError(f'{name}={value!r}: expected a number from 0 to 1')
        self.compare_heads = bool(class_weight or box_weight)
        if head is not None and self.compare_heads:
            raise ConfigError(f'head={head!r}: class_weight and box_weight are for two-stage students')
        if head is None and tower is not None:
            raise ConfigError(f'tower={tower!r} is for one-stage students; name their head as well')
        self.neck, self.teacher_neck, self.head = neck, teacher_neck or neck, head
        self.roi_head = RoIHead(roi_head, stage)
        self.embedding = (tower or neck) if head else self.roi_head.embedding
        self.weight, self.contrast_weight = Weight(weight), Weight(contrast_weight)
        self.class_weight, self.box_weight = Weight(class_weight), Weight(box_weight)
        self.tau, self.contrast_tau, self.max_overlap = tau, contrast_tau, max_overlap
        self.hidden_channels, self.key_channels = hidden_channels, key_channels
        self.projection_channels = projection_channels
        self.memory_size, self.keys_per_step = memory, keys_per_step
        self.regions, self.candidates = regions, candidates
        self.positive_fraction, self.positive_iou = positive_fraction, positive_iou
        self.adapter = adapter
        self.student_layers = (neck, head) if head else (neck, self.roi_head.extractor + INPUT)
        self.student_layers = tuple(dict.fromkeys((*self.student_layers, self.embedding)))
        if self.compare_heads:
            self.student_layers += (self.roi_head.bbox_head,)
        self.teacher_layers = (self.teacher_neck,)

    def setup(self, student: Taps, teacher: Taps) -> None:
        self.roi_head.check_teacher(teacher)
        if self.compare_heads:
            self.roi_head.check_predictions(student, teacher, 'GDetKD')
        extractor = teacher.model.get_submodule(self.roi_head.extractor)
        layer = extractor.roi_layers[0]
        if not isinstance(layer, RoIAlign):
            raise ConfigError(
                f"the teacher's {self.roi_head.extractor!r} pools with {type(layer).__name__}, not RoIAlign"
            )
        levels = self._levels(student)
        pixels = maps(teacher, self.teacher_neck)[0].shape[-1] * extractor.featmap_strides[0]
        # mmcv's RoIAlign, as the teacher's
        self.poolers = [
            RoIAlign(layer.output_size, level.shape[-1] / pixels, layer.sampling_ratio, aligned=layer.aligned)
            for level in levels
        ]
        pooled = [
            levels[0].new_zeros(1, each, *layer.output_size) for each in (levels[0].shape[1], extractor.out_channels)
        ]
        self.adapters = Adapters(self.adapter, pooled[:1], pooled[1:], (self.neck, self.teacher_neck))
        convolutions = dict(kernel_size=3, stride=2, padding=1)
        self.keys = nn.Sequential(
            nn.Conv2d(extractor.out_channels, self.hidden_channels, **convolutions),
            nn.ReLU(),
            nn.Conv2d(self.hidden_channels, self.key_channels, **convolutions),
            nn.ReLU(),
        )
        self.log_tau = nn.Parameter(torch.tensor(math.log(self.tau)))

        channels = self._embedding_channels(student)
        embedding, _, _ = self.roi_head.embed_teacher(teacher, pooled[1].to(next(teacher.model.parameters()).device))
        projected = self.projection_channels or embedding.shape[1]
        self.projection = nn.Linear(channels, projected, bias=False)
        self.teacher_projection = nn.Linear(embedding.shape[1], projected, bias=False)
        self.memory = Memory(self.memory_size, embedding.shape[1], self.keys_per_step)

    def _levels(self, student: Taps) -> Sequence[torch.Tensor]:
        """The student's levels that regions are pooled from."""
        levels = maps(student, self.neck)
        if self.head:
            return levels
        return levels[: student.model.get_submodule(self.roi_head.extractor).num_inputs]

    def _embedding_channels(self, student: Taps) -> int:
        if not self.head:
            return student[self.embedding][0].shape[1]
        levels = maps(student, self.embedding)
        strides = dense_head(student.model.get_submodule(self.head)).strides
        if len(levels) != len(strides):
            raise ConfigError(f'{self.embedding!r} has {len(levels)} levels, {self.head!r} {len(strides)} strides')
        return levels[0].shape[1]

    @torch.no_grad()
    def draw(self, student: Taps, data_samples: Sequence) -> torch.Tensor:
        """Regions of a one-stage student, (B, K, 4), xyxy in pixels."""
        head = dense_head(student.model.get_submodule(self.head))
        metas = [sample.metainfo for sample in data_samples]
        boxes = best_predictions(head, student[self.head], self.candidates, metas)
        objects = ground_truth(data_samples)
        overlaps = pairwise_iou(boxes, objects.boxes.to(boxes.dtype)) * objects.valid[:, None]
        chosen = draw_regions(overlaps.amax(2) > self.positive_iou, self.regions, self.positive_fraction)
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
        require_gradient(self.neck, student[self.neck])
        boxes = self.draw(student, data_samples) if self.head else None
        rois = self.roi_head.rois(student) if boxes is None else to_rois(boxes)
        target = self.roi_head.pool_teacher(teacher, self.teacher_neck, rois)
        embedding, t_logits, t_deltas = self.roi_head.embed_teacher(teacher, target)

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
            self.contrast_tau,
        )
        self.memory.add(embedding)

        losses = {
            'loss_sgfi': self.weight() * imitation_loss(mixed, target),
            'loss_ckd': self.contrast_weight() * contrast,
            'temperature': tau.detach(),
        }
        if self.compare_heads:
            logits, deltas = student[self.roi_head.bbox_head]
            losses['loss_class'] = self.class_weight() * class_loss(logits, t_logits)
            losses['loss_box'] = self.box_weight() * class_aware_box_loss(deltas, t_deltas, t_logits)
        return losses
