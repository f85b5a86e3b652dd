"""Instance-conditional knowledge distillation (ICD).

Kang, Zhang, Zhang, Sun, Zheng, "Instance-Conditional Knowledge Distillation for Object Detection", NeurIPS 2021,
arXiv 2110.12724.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from mmkd.distillers.base import Distiller
from mmkd.distillers.levels import LevelPair, LevelPairs
from mmkd.distillers.schedule import Weight
from mmkd.errors import ConfigError
from mmkd.hosts.detection.ground_truth import ground_truth, ground_truth_labels, padded_shape
from mmkd.hosts.detection.second_pass import classes_of
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps
from mmkd.values import is_whole

# of the authors' code
HEADS = 8
"""Of the attention."""
FAKES = 5
"""Fake instances for each object."""
JITTER = 0.3
"""How far an instance's position is from the center of its box at most, in widths and heights."""
COORDINATE_CHANNELS = 128
"""Of the encoding of x, and of y, of an instance."""
OCTAVES = 5
"""Classes of widths, and of heights: up to 64 pixels, up to 128, and so on."""


class Instances(NamedTuple):
    """What the decoder is asked for: the objects of each image first, then fake instances, T in all."""

    boxes: torch.Tensor
    """(B, T, 4), xyxy in pixels."""
    labels: torch.Tensor
    """(B, T), classes from 0."""
    positions: torch.Tensor
    """(B, T, 2), x and y in pixels, near the center of the box: what is told of its place."""
    real: torch.Tensor
    """(B, T), True for an object."""
    present: torch.Tensor
    """(B, T), False for what is neither."""


def draw_instances(
    boxes: torch.Tensor, labels: torch.Tensor, counts: Sequence[int], sizes: torch.Tensor, classes: int, most: int
) -> Instances:
    """Fake instances beside the objects, and a position for each.

    An image of n objects has 5 n fake ones, at least one in all, and at most ``most`` in all unless there are more objects. A
    fake instance is of any class; its center is uniform, from 0.03 to 0.97 of the image, its width and height are normal with
    mean and deviation 0.2, from 0.002 to 0.6, and its box is clipped to the image. Positions are uniform within 0.3 widths and
    heights around the centers.

    Args:
        boxes: (B, K, 4), xyxy in pixels, of each image its objects first.
        labels: (B, K).
        counts: How many objects each image has, at most K.
        sizes: (B, 2), width and height of each image without its padding.
        classes: How many there are.
        most: How many instances an image has at most.
    """
    totals = [min(max(1, (1 + FAKES) * count), max(most, count)) for count in counts]
    images, slots, device = len(counts), max(totals), boxes.device
    slot = torch.arange(slots, device=device)
    limits = torch.tensor([list(counts), totals]).to(device, non_blocking=True)
    real, present = (slot < limit[:, None] for limit in limits)

    center = torch.rand(images, slots, 2, device=device, dtype=boxes.dtype).clamp(0.03, 0.97)
    extent = (0.2 + 0.2 * torch.randn_like(center)).clamp(0.002, 0.6)
    fakes = torch.cat([center - extent / 2, center + extent / 2], -1).clamp(0, 1) * sizes.repeat(1, 2)[:, None]
    fake_labels = torch.randint(classes, (images, slots), device=device)

    missing = slots - boxes.shape[1]
    boxes = torch.where(real[..., None], F.pad(boxes, (0, 0, 0, missing)), fakes)
    labels = torch.where(real, F.pad(labels, (0, missing)), fake_labels)
    first, last = boxes[..., :2], boxes[..., 2:]
    moved = JITTER * (2 * torch.rand_like(center) - 1)
    return Instances(boxes, labels, (first + last) / 2 + moved * (last - first), real, present)


def sine_encoding(position: torch.Tensor, channels: int) -> torch.Tensor:
    r"""Numbers as waves: :math:`\sin(2 \pi x / 10000^{2j / C})` and the cosines of the same, j from 0 to C/2 - 1.

    Args:
        position: x, (...), 0 to 1.
        channels: C, even.

    Returns:
        (..., C), the sines first.
    """
    exponents = torch.arange(0, channels, 2, device=position.device, dtype=position.dtype) / channels
    angles = 2 * math.pi * position[..., None] / 10000**exponents
    return torch.cat([angles.sin(), angles.cos()], -1)


def describe(instances: Instances, sizes: torch.Tensor, classes: int) -> torch.Tensor:
    """What is told of each instance: its class, its position, and roughly how large it is.

    One number per class; the :func:`sine_encoding` of the position's x and y over the image's width and height; and one number
    per octave of the width and of the height in pixels, floor(log2 - 5) from 0 to 4.

    Args:
        instances: Of the batch.
        sizes: (B, 2), width and height of each image in pixels.
        classes: How many there are.

    Returns:
        (B, T, classes + 256 + 10).
    """
    place = sine_encoding(instances.positions / sizes[:, None], COORDINATE_CHANNELS).flatten(2)
    of_class = instances.labels[..., None] == torch.arange(classes, device=place.device)
    extent = instances.boxes[..., 2:] - instances.boxes[..., :2]
    octave = (extent.clamp(min=1).log2() - 5).clamp(0, OCTAVES - 1).floor()
    of_extent = (octave[..., None] == torch.arange(OCTAVES, device=place.device)).flatten(2)
    return torch.cat([of_class.to(place.dtype), place, of_extent.to(place.dtype)], -1)


def encode_cells(
    size: Sequence[int], extents: torch.Tensor, channels: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the cells of a level are in their image, and which are in its padding.

    The :func:`sine_encoding` of a cell's row, counted from 1, over the image's rows, and the same of its column.

    Args:
        size: H and W of the level.
        extents: (B, 2), rows and columns that an image has without its padding.
        channels: C, a multiple of 4, a half each.
        dtype: Of the encoding.

    Returns:
        (B, H * W, C), and (B, H * W) bool, False in the padding.
    """
    encoded, inside = [], []
    for cells, extent in zip(size, extents.unbind(1), strict=True):
        index = torch.arange(cells, device=extents.device)
        inside.append(index < extent[:, None])
        encoded.append(sine_encoding((index + 1).to(dtype) / extent[:, None], channels // 2))
    rows, columns = encoded[0][:, :, None], encoded[1][:, None]
    cells = torch.cat([rows.expand(-1, -1, size[1], -1), columns.expand(-1, size[0], -1, -1)], -1)
    return cells.flatten(1, 2), (inside[0][:, :, None] & inside[1][:, None]).flatten(1)


def auxiliary_losses(
    predicted: torch.Tensor, instances: Instances, sizes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""How well it is told which instances are real, and where these end.

    .. math::
        L_\text{identification} = \operatorname{mean}_\text{present} \operatorname{BCE}(z, [\text{real}]), \qquad
        L_\text{localization} = \operatorname{mean}_\text{real} \sum_{i=1}^4 \frac{| a_i \sigma(p_i) - d_i |}{e_i}

    with the distances d in pixels from the instance's position to the left, upper, right and lower side of its box, the image's
    width or height a, and the box's width or height e, at least one pixel. Means are over the batch of a process.

    Args:
        predicted: (B, T, 5), z and the four p.
        instances: Of the batch.
        sizes: (B, 2), width and height of each image in pixels.

    Returns:
        Two scalars; the second is 0 without objects.
    """
    real, present = (each.to(predicted.dtype) for each in (instances.real, instances.present))
    told = F.binary_cross_entropy_with_logits(predicted[..., 0], real, reduction='none')
    identification = (told * present).sum() / present.sum().clamp(min=1)
    first, last = instances.boxes[..., :2], instances.boxes[..., 2:]
    sides = torch.cat([instances.positions - first, last - instances.positions], -1)
    found = predicted[..., 1:].sigmoid() * sizes.repeat(1, 2)[:, None]
    extent = (last - first).clamp(min=1).repeat(1, 1, 2)
    off = ((found - sides).abs() / extent).sum(-1)
    return identification, (off * real).sum() / real.sum().clamp(min=1)


def conditional_distance(student: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    r"""The difference of values where the objects of an image are looked for.

    .. math::
        L = \frac{1}{B H} \sum_{b, h} \frac{\sum_i m_{bhi} \frac{1}{D} \lVert N(v^S_{bih}) - N(v^T_{bih}) \rVert_2^2}
        {\sum_i m_{bhi}}

    N is a layer norm without affine. An image whose weights are all 0 adds 0.

    Args:
        student: (B, S, H, D): S positions, H heads.
        teacher: The same shape; no gradient flows into it.
        weights: m, (B, H, S).

    Returns:
        A scalar, 0 for equal values.
    """
    student, teacher = (F.layer_norm(each, each.shape[-1:]) for each in (student, teacher.detach()))
    squared = (student - teacher).square().mean(-1).transpose(1, 2)
    return ((weights * squared).sum(-1) / weights.sum(-1).clamp(min=1e-6)).mean()


def layers(*widths: int) -> nn.Sequential:
    """Linear layers with ReLUs between, from He's initialization: from torch's SGD hardly learns what tells instances apart."""
    made: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        linear = nn.Linear(inputs, outputs)
        nn.init.kaiming_normal_(linear.weight, nonlinearity='relu')
        nn.init.zeros_(linear.bias)
        made += [linear, nn.ReLU()]
    return nn.Sequential(*made[:-1])


def predictor(channels: int) -> nn.Sequential:
    """From what is found of an instance, C, to whether it is real, and four distances, which begin at 5 % of the image.

    Those of small objects would otherwise begin so far off that a first step of SGD leaves the sigmoid at 0 for good.
    """
    last = nn.Linear(channels, 5)
    nn.init.constant_(last.bias[1:], -3.0)
    return nn.Sequential(*layers(channels, channels, channels), nn.ReLU(), last)


class InstanceDecoder(nn.Module):
    """A layer of a transformer's decoder, without self-attention: each instance looks for itself in the features.

    Args:
        channels: C, a multiple of 8.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.position = nn.Linear(channels, channels)
        self.attention = nn.MultiheadAttention(channels, HEADS, batch_first=True)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))
        self.hidden = layers(channels, 4 * channels, channels)

    def forward(
        self, queries: torch.Tensor, features: torch.Tensor, cells: torch.Tensor, inside: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is found of each instance, (B, T, C), and where each head looks, (B, 8, T, S), adding up to 1.

        Args:
            queries: (B, T, C).
            features: (B, S, C), values, and with ``cells`` the keys.
            cells: (B, S, C), see :func:`encode_cells`.
            inside: (B, S), False where nobody looks.
        """
        keys = features + self.position(cells)
        found, shares = self.attention(queries, keys, features, key_padding_mask=~inside, average_attn_weights=False)
        found = self.norms[0](queries + found)
        return self.norms[1](found + self.hidden(found)), shares

    @torch.no_grad()
    def values(self, features: torch.Tensor) -> torch.Tensor:
        """The values of the attention, (B, S, C), as constants."""
        weight, bias = (each.chunk(3)[2] for each in (self.attention.in_proj_weight, self.attention.in_proj_bias))
        return F.linear(features, weight, bias)


def tokens(levels: Sequence[torch.Tensor]) -> torch.Tensor:
    """All positions of all levels (B, C, H, W), as (B, S, C)."""
    return torch.cat([level.flatten(2) for level in levels], 2).transpose(1, 2)


@DISTILLERS.register_module()
class ICD(Distiller):
    """Instance-conditional distillation: features where a decoder looks for each object; ``docs/methods/icd.md``.

    A decoder is told of objects and fake instances, :func:`describe`, and looks for them in the teacher's features, all levels
    together. Each loss trains its own part:

    - ``loss_aux``: the sum of both :func:`auxiliary_losses`, logged as ``identification`` and ``localization``. It trains
      encoder, decoder and predictor.
    - ``loss``: :func:`conditional_distance` of linear values of the student's features to the values of the decoder's attention,
      weighted by where it looks for the objects. It trains the student and the linear layer.

    In steps in which ``loss_weight`` is 0 the linear layer alone learns ``loss``, at the schedule's ``value``. The authors begin
    so, ``dict(type='constant', value=8.0, begin=1000)``.

    Args:
        layer: The student's layer, or a list of layers. Default ``'neck'``.
        loss_weight: Weight of ``loss``, a number or a schedule. Default 8, for one-stage detectors.
        aux_weight: Weight of ``loss_aux``, a number or a schedule. Default 1.
        max_instances: Objects and fake instances of an image, at most. Default 300.
        teacher_layer: The teacher's layer, where its name differs.

    Raises:
        ConfigError: for networks without boxes, and layers of channels that the attention cannot have.

    Example:
        >>> distillers = dict(icd=dict(type='ICD', loss_weight=dict(type='constant', value=8.0, begin=1000)))
    """

    def __init__(
        self,
        layer: str | Sequence[str] = 'neck',
        loss_weight: float | Mapping = 8.0,
        aux_weight: float | Mapping = 1.0,
        max_instances: int = 300,
        teacher_layer: str | Sequence[str] | None = None,
    ):
        super().__init__()
        if not (is_whole(max_instances) and max_instances >= 1):
            raise ConfigError(f'max_instances={max_instances!r}: expected a whole number of at least 1')
        self.levels = LevelPairs(layer, teacher_layer, same_channels=False)
        self.student_layers, self.teacher_layers = self.levels.student_layers, self.levels.teacher_layers
        self.loss_weight, self.aux_weight = Weight(loss_weight, 'loss_weight'), Weight(aux_weight, 'aux_weight')
        self.max_instances = max_instances

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        if not (hasattr(student, 'bbox_head') or hasattr(student, 'roi_head')):
            raise ConfigError(
                f'{type(student).__name__} predicts no boxes of classes, and ICD learns by these; use a detector'
            )

    def setup(self, student: Taps, teacher: Taps) -> None:
        self.levels.setup(student, teacher)
        both = self.levels.unadapted(student, teacher)
        widths = [sorted({level.shape[1] for level in levels}) for levels in both]
        for whose, found in zip(('student', 'teacher'), widths, strict=True):
            if len(found) > 1:
                raise ConfigError(f"the {whose}'s levels have {found} channels; ICD needs as many on all levels")
        (own,), (channels,) = widths
        if channels % HEADS:
            raise ConfigError(f"the teacher's levels have {channels} channels; ICD needs a multiple of {HEADS}")
        self.classes = classes_of(student.model)
        self.encoder = layers(self.classes + 2 * COORDINATE_CHANNELS + 2 * OCTAVES, channels, channels, channels)
        self.decoder = InstanceDecoder(channels)
        self.predictor = predictor(channels)
        self.value = nn.Linear(own, channels)

    def look(
        self, pairs: Sequence[LevelPair], features: torch.Tensor, data_samples: list
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """The :func:`auxiliary_losses`, and how much all objects of an image are looked for at each position, (B, 8, S)."""
        boxes, _ = ground_truth(data_samples)
        labels = ground_truth_labels(data_samples)
        counts = [len(sample.gt_instances.labels) for sample in data_samples]
        shapes, padded = [sample.metainfo['img_shape'][:2] for sample in data_samples], padded_shape(data_samples)
        maps = [pair.teacher.shape[2:] for pair in pairs]
        # the cells that an image reaches into
        extents = [
            [[-(-side * cells // whole) for side, cells, whole in zip(shape, size, padded)] for shape in shapes]
            for size in maps
        ]
        sizes = torch.tensor([shape[::-1] for shape in shapes]).to(boxes, non_blocking=True)
        instances = draw_instances(boxes, labels, counts, sizes, self.classes, self.max_instances)
        cells, inside = zip(
            *(
                encode_cells(size, extent, features.shape[2], features.dtype)
                for size, extent in zip(maps, torch.tensor(extents).to(boxes.device, non_blocking=True), strict=True)
            )
        )
        queries = self.encoder(describe(instances, sizes, self.classes))
        found, shares = self.decoder(queries, features, torch.cat(cells, 1), torch.cat(inside, 1))
        weights = torch.einsum('bhts,bt->bhs', shares.detach(), instances.real.to(shares.dtype))
        return auxiliary_losses(self.predictor(found), instances, sizes), weights

    def pictures(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        pairs = self.levels(student, teacher)
        _, weights = self.look(pairs, tokens([pair.teacher for pair in pairs]), data_samples or [])
        sizes = [pair.teacher.shape[2:] for pair in pairs]
        parts = weights.mean(1).split([size.numel() for size in sizes], 1)
        return {
            f'where objects are looked for, level {pair.teacher_level}': part.unflatten(1, size)
            for pair, part, size in zip(pairs, parts, sizes, strict=True)
        }

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        pairs = self.levels(student, teacher)
        own, features = tokens([pair.student for pair in pairs]), tokens([pair.teacher.detach() for pair in pairs])
        (identification, localization), weights = self.look(pairs, features, data_samples or [])
        weight = self.loss_weight()
        values = self.value(own if weight else own.detach())
        s, t = (each.unflatten(2, (HEADS, -1)) for each in (values, self.decoder.values(features)))
        return {
            'loss': (weight or self.loss_weight.spec['value']) * conditional_distance(s, t, weights),
            'loss_aux': self.aux_weight() * (identification + localization),
            'identification': identification.detach(),
            'localization': localization.detach(),
        }
