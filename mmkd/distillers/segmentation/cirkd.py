"""Cross-image relational knowledge distillation (CIRKD).

Yang, Zhou, An, Jiang, Xu, Zhang, "Cross-Image Relational Knowledge Distillation for Semantic Segmentation", CVPR 2022.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from mmkd.adapters import ConvAdapter
from mmkd.distillers.base import Distiller
from mmkd.distillers.levels import LevelPairs
from mmkd.distillers.memory import ClassMemory
from mmkd.distillers.schedule import Weight
from mmkd.errors import ConfigError
from mmkd.hosts.segmentation.heads import decode_head, feature_layer
from mmkd.hosts.segmentation.labels import class_masks
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps
from mmkd.values import check_temperature, is_whole

ABSENT = -1e9
"""The logit of what is not there: its probability is 0, and what the divergence makes of it is finite."""


def pool_labeled(feature: torch.Tensor, valid: torch.Tensor, max_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Downsample a map to at most ``max_positions`` positions.

    It takes the smallest square windows that suffice; each output is the mean of the valid inputs in its window. A map that
    is small enough is returned unchanged.

    Args:
        feature: (B, C, H, W).
        valid: (B, H, W) bool.
        max_positions: At least 1.

    Returns:
        (B, C, h, w), and where a window has any valid position, (B, h, w) bool.
    """
    height, width = feature.shape[2:]
    window = math.ceil(math.sqrt(height * width / max_positions))
    while math.ceil(height / window) * math.ceil(width / window) > max_positions:
        window += 1
    if window == 1:
        return feature, valid
    weight = valid[:, None].to(feature.dtype)
    part = F.avg_pool2d(weight, window, ceil_mode=True)
    pooled = F.avg_pool2d(feature * weight, window, ceil_mode=True) / part.clamp(min=1 / window**2)
    return pooled, part[:, 0] > 0


def batch_loss(student: torch.Tensor, teacher: torch.Tensor, valid: torch.Tensor, tau: float = 0.1) -> torch.Tensor:
    r"""How differently the two networks see each pixel's similarities to the pixels of each image of the batch.

    .. math::
        L = \frac{1}{N^2} \sum_{i, j} \frac{1}{A_i} \sum_a \operatorname{KL}\big(
        \sigma(S^T_{ij,a}) \,\Vert\, \sigma(S^S_{ij,a}) \big), \qquad S_{ij,ab} = \cos(f_{ia}, f_{jb}) / \tau

    with i, j over the N images that have valid positions, in both orders and an image with itself, a over the A_i valid
    positions of i, and the softmax over the valid positions b of j. Zero for equal inputs.

    Args:
        student: f, (B, C, h, w), any number of channels.
        teacher: (B, C', h, w); no gradient flows into it.
        valid: (B, h, w) bool.
        tau: Temperature.

    Returns:
        A scalar; 0 where nothing is valid.
    """
    valid = valid.flatten(1)
    student, teacher = (F.normalize(each.flatten(2), dim=1).mT for each in (student, teacher.detach()))
    images = valid.any(1).sum().clamp(min=1)
    weights = valid.to(student.dtype) / (valid.sum(1, keepdim=True).clamp(min=1) * images.square())
    return _Relations.apply(student, student, teacher, teacher, valid, weights, tau)


def memory_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    valid: torch.Tensor,
    memory: torch.Tensor,
    there: torch.Tensor,
    tau: float = 0.1,
) -> torch.Tensor:
    r"""How differently the two networks see each pixel's similarities to the teacher's embeddings in a memory.

    .. math::
        L = \frac{1}{A} \sum_a \operatorname{KL}\big( \sigma(v^T_a) \,\Vert\, \sigma(v^S_a) \big), \qquad
        v_{am} = \cos(f_a, m) / \tau

    with a over the A valid positions of all images, and the softmax over the entries m that are there. Zero for equal
    inputs.

    Args:
        student: f, (B, C, h, w), projected.
        teacher: The same shape; no gradient flows into it.
        valid: (B, h, w) bool.
        memory: m, (M, C).
        there: (M,) bool.
        tau: Temperature.

    Returns:
        A scalar; 0 where nothing is valid, or no entry is there.
    """
    valid = valid.flatten(1)
    student, teacher = (F.normalize(each.flatten(2), dim=1).mT for each in (student, teacher.detach()))
    memory = F.normalize(memory, dim=1)[None]
    weights = valid.to(student.dtype) / valid.sum().clamp(min=1)
    return _Relations.apply(student, memory, teacher, memory, there[None], weights, tau)


def draw_pixels(embedding: torch.Tensor, masks: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A random choice of at most ``number`` positions of each class in each image.

    Args:
        embedding: (B, C, H, W).
        masks: (B, K, H, W) bool, the positions of each class.
        number: At least 1.

    Returns:
        Their embeddings, (B * number, K, C), and whether there is one, (B * number, K) bool.
    """
    masks, embedding = masks.flatten(2), embedding.flatten(2)
    batch, classes, positions = masks.shape
    score = torch.rand(batch, 1, positions, device=masks.device).masked_fill(~masks, -1)
    score = F.pad(score, (0, max(number - positions, 0)), value=-1)
    score, place = score.topk(number, 2)
    there = score >= 0
    place = place.masked_fill(~there, 0).transpose(1, 2).flatten(1)
    rows = embedding.gather(2, place[:, None].expand(-1, embedding.shape[1], -1))
    rows = rows.transpose(1, 2).reshape(batch * number, classes, -1)
    return rows, there.transpose(1, 2).reshape(batch * number, classes)


def class_means(embedding: torch.Tensor, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean embedding of each class in each image, of length 1.

    Args:
        embedding: (B, C, H, W).
        masks: (B, K, H, W) bool, the positions of each class.

    Returns:
        (B, K, C), and whether the image has the class, (B, K) bool.
    """
    sums = torch.einsum('bkhw,bchw->bkc', masks.to(embedding.dtype), embedding)
    return F.normalize(sums, dim=2), masks.flatten(2).any(2)


class _Relations(torch.autograd.Function):
    r"""The weighted sum of the divergences of all rows of cosines, whose gradient is found on the way.

    With rows :math:`z_{ija} = q_{ia} k_j / \tau` of queries q_ia, (B, A, C), and groups of keys k_j, (J, M, C), the gradient of
    the sum with respect to z is :math:`w_{ia} (\sigma(z^S) - \sigma(z^T))`. It is taken image by image, so that no matrix of
    all similarities is there, and none is kept for the backward pass.
    """

    @staticmethod
    def forward(ctx, queries, keys, teacher_queries, teacher_keys, there, weights, tau):
        groups, rows = there.shape[0], len(queries[0])

        def log_softmax(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
            similarity = (queries @ keys.flatten(0, 1).t()).div_(tau).view(rows, groups, -1)
            return similarity.masked_fill_(~there, ABSENT).log_softmax(2)

        total = queries.new_zeros(())
        of_queries, of_keys = torch.zeros_like(queries), torch.zeros_like(keys.flatten(0, 1))
        for image, own in enumerate(queries):
            student = log_softmax(own, keys)
            teacher = log_softmax(teacher_queries[image], teacher_keys)
            weight = weights[image]
            probability = teacher.exp()
            total += weight @ teacher.sub_(student).mul_(probability).sum((1, 2))
            if any(ctx.needs_input_grad[:2]):
                gradient = student.exp_().sub_(probability).mul_((weight / tau)[:, None, None]).flatten(1)
                of_queries[image] = gradient @ keys.flatten(0, 1)
                if ctx.needs_input_grad[1]:
                    of_keys += gradient.t() @ own
                del gradient
            del student, teacher, probability  # before those of the next image
        ctx.save_for_backward(of_queries, of_keys.view_as(keys))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, outer):
        of_queries, of_keys = (outer * each for each in ctx.saved_tensors)
        return of_queries, of_keys if ctx.needs_input_grad[1] else None, None, None, None, None, None


@DISTILLERS.register_module()
class CIRKD(Distiller):
    """Relations of pixels across images: in the batch, and to a memory of the teacher's; ``docs/methods/cirkd.md``.

    =========== ======================================================================================================
    loss_batch  ``batch_weight`` times :func:`batch_loss`: relations to the pixels of all images of a process's batch
    loss_pixel  ``pixel_weight`` times :func:`memory_loss`: relations to pixels of earlier steps
    loss_region ``region_weight`` times :func:`memory_loss`: relations to means of a class in an image, of earlier steps
    =========== ======================================================================================================

    A trained projection maps the student's channels to the teacher's for the memory's terms. The memory has a queue for
    each class, is in each checkpoint and is equal on all processes. Its losses are 0 in the first step. Ignored pixels are
    neither anchors nor what these are compared with.

    Args:
        layer: The student's layer before its classifier. Default: found by its decode head, see
            :func:`mmkd.hosts.segmentation.heads.feature_layer`.
        batch_weight: A number or a schedule, as all weights. Default 1.
        pixel_weight: Default 0.1.
        region_weight: Default 0.1.
        tau: Temperature of all, positive. Default 0.1.
        pixel_contrast_size: Pixels drawn from the memory in a step, of all classes together. Default 4096.
        region_contrast_size: Regions drawn. Default 1024.
        pixel_memory_size: Pixels kept, of each class. Default 2000.
        region_memory_size: Regions kept, of each class. Default 2000.
        pixels_per_image: Pixels added, of each image and class. Default 16.
        max_positions: Positions of the compared maps, of all images of a process's batch together; larger maps are
            pooled. Default 8192.
        teacher_layer: The teacher's layer, where its name differs from ``layer``. Default, without either: as ``layer``.

    Raises:
        ConfigError: for a memory that is smaller than what is drawn of it.

    Example:
        >>> distillers = dict(kd=dict(type='KD'), cirkd=dict(type='CIRKD'))
    """

    renamed = {
        'weight': 'batch_weight',
        'pixels': 'pixel_contrast_size',
        'regions': 'region_contrast_size',
        'pixel_memory': 'pixel_memory_size',
        'region_memory': 'region_memory_size',
    }

    def __init__(
        self,
        layer: str | None = None,
        batch_weight: float | Mapping = 1.0,
        pixel_weight: float | Mapping = 0.1,
        region_weight: float | Mapping = 0.1,
        tau: float = 0.1,
        pixel_contrast_size: int = 4096,
        region_contrast_size: int = 1024,
        pixel_memory_size: int = 2000,
        region_memory_size: int = 2000,
        pixels_per_image: int = 16,
        max_positions: int = 8192,
        teacher_layer: str | None = None,
    ):
        super().__init__()
        self.levels = LevelPairs(layer or feature_layer, teacher_layer, same_channels=False)
        numbers = dict(
            pixel_contrast_size=pixel_contrast_size,
            region_contrast_size=region_contrast_size,
            pixel_memory_size=pixel_memory_size,
            region_memory_size=region_memory_size,
            pixels_per_image=pixels_per_image,
            max_positions=max_positions,
        )
        for name, value in numbers.items():
            if not (is_whole(value) and value >= 1):
                raise ConfigError(f'{name}={value!r}: expected a whole number of at least 1')
        check_temperature(tau)
        self.batch_weight = Weight(batch_weight, 'batch_weight')
        self.pixel_weight = Weight(pixel_weight, 'pixel_weight')
        self.region_weight = Weight(region_weight, 'region_weight')
        self.tau = tau
        self.pixel_contrast_size, self.region_contrast_size = pixel_contrast_size, region_contrast_size
        self.pixel_memory_size, self.region_memory_size = pixel_memory_size, region_memory_size
        self.pixels_per_image = pixels_per_image
        self.max_positions = max_positions

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        self.levels.prepare(student, teacher)
        self.student_layers, self.teacher_layers = self.levels.student_layers, self.levels.teacher_layers

    def setup(self, student: Taps, teacher: Taps) -> None:
        self.levels.setup(student, teacher)
        levels = self.levels.unadapted(student, teacher)
        if len(self.levels.pairs) != 1:
            names = self.levels.student_layers
            raise ConfigError(
                f'layer={", ".join(names)!r} {"puts" if len(names) == 1 else "put"} out {len(self.levels.pairs)} maps; name one '
                f'that puts out one'
            )
        in_channels, channels = (maps[0].shape[1] for maps in levels)
        classes = decode_head(student.model).num_classes
        self.pixels_per_class, self.regions_per_class = (
            each // classes + 1 for each in (self.pixel_contrast_size, self.region_contrast_size)
        )
        for name, kept, drawn in (
            ('pixel_memory_size', self.pixel_memory_size, self.pixels_per_class),
            ('region_memory_size', self.region_memory_size, self.regions_per_class),
        ):
            if kept < drawn:
                raise ConfigError(
                    f'{name}={kept}: {drawn} of each of the {classes} classes are drawn in a step; keep as many, or draw fewer'
                )
        self.projection = nn.Sequential(
            ConvAdapter(in_channels, channels, bias=False, norm=True, relu=True),
            nn.Conv2d(channels, channels, 1, bias=False),
        )
        self.pixel_queues = ClassMemory(classes, self.pixel_memory_size, channels)
        self.region_queues = ClassMemory(classes, self.region_memory_size, channels)

    @torch.no_grad()
    def remember(self, teacher: torch.Tensor, masks: torch.Tensor) -> None:
        """Add the teacher's map, (B, C, H, W), to the memory, by classes, (B, K, H, W) bool."""
        embedding = F.normalize(teacher, dim=1)
        self.pixel_queues.add(*draw_pixels(embedding, masks, self.pixels_per_image))
        self.region_queues.add(*class_means(embedding, masks))

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        ((s, t, *_),) = self.levels(student, teacher)
        masks = class_masks(student.model, data_samples, t.shape[2:])
        most = max(self.max_positions // len(t), 1)
        own, _ = pool_labeled(s, masks.any(1), most)
        other, valid = pool_labeled(t, masks.any(1), most)
        projected = self.projection(own)
        pixels = self.pixel_queues.draw(self.pixels_per_class)
        regions = self.region_queues.draw(self.regions_per_class)
        losses = {
            'loss_batch': self.batch_weight() * batch_loss(own, other, valid, self.tau),
            'loss_pixel': self.pixel_weight() * memory_loss(projected, other, valid, *pixels, self.tau),
            'loss_region': self.region_weight() * memory_loss(projected, other, valid, *regions, self.tau),
        }
        self.remember(t, masks)
        return losses
