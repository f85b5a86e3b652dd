"""Label-guided self-distillation (LGD).

Zhang et al., "LGD: Label-Guided Self-Distillation for Object Detection", AAAI 2022, arXiv 2109.11496.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from mmkd.distillers.base import Distiller
from mmkd.distillers.levels import maps, require_gradient
from mmkd.distillers.norms import normalized
from mmkd.distillers.schedule import Weight
from mmkd.errors import ConfigError
from mmkd.hosts.detection.ground_truth import covered_cells, ground_truth, ground_truth_labels, padded_shape
from mmkd.hosts.detection.second_pass import check_heads, classes_of, losses_of_maps
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps

HEADS = 8
"""Of the attention, as in the authors' code."""


def label_tokens(
    boxes: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor, sizes: torch.Tensor, classes: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What is written of each object, and one token more for the whole image, the context.

    A token is x1, y1, x2, y2 over the image's width and height, and one number per class, all from 0 to 1 and then
    stretched to -1 to 1. The context is the box of the image, and of no class.

    Args:
        boxes: (B, K, 4), xyxy in pixels.
        labels: (B, K), classes from 0.
        valid: (B, K), False for a box that is not there.
        sizes: (B, 2), width and height of each image without its padding.
        classes: How many there are.

    Returns:
        The tokens, (B, K + 1, 4 + classes), their boxes, (B, K + 1, 4), and which are there, (B, K + 1); the context is the
        last one.
    """
    whole = torch.cat([torch.zeros_like(sizes), sizes], 1)[:, None]
    boxes = torch.cat([boxes, whole], 1)
    of_class = F.pad(labels[..., None] == torch.arange(classes, device=labels.device), (0, 0, 0, 1))
    place = (boxes / sizes.repeat(1, 2)[:, None]).clamp(0, 1)
    tokens = 2 * torch.cat([place, of_class.to(place.dtype)], -1) - 1
    return tokens, boxes, F.pad(valid, (0, 1), value=True)


def pool(feature: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """The mean of a feature over each token's cells.

    Args:
        feature: (B, C, H, W).
        cells: (B, K, H, W), bool.

    Returns:
        (B, K, C); 0 for a token without cells.
    """
    weights = cells.to(feature.dtype)
    return torch.einsum('bkhw,bchw->bkc', weights, feature) / weights.sum((2, 3)).clamp(min=1)[..., None]


def paint(tokens: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """A map with each token in its cells, added where they overlap: (B, K, C) and (B, K, H, W) to (B, C, H, W)."""
    return torch.einsum('bkc,bkhw->bchw', tokens, cells.to(tokens.dtype))


def normalized_distance(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], dims: tuple[int, ...], eps: float = 1e-5
) -> torch.Tensor:
    r"""Mean squared difference of normalized maps, one mean over all levels.

    .. math::
        L = \frac{\sum_l \lVert N(s_l) - N(t_l) \rVert_2^2}{\sum_l B C H_l W_l}, \qquad
        N(x) = (x - \operatorname{mean}_D x) / \sqrt{\operatorname{var}_D x + \epsilon}

    Args:
        student: Per level (B, C, H, W), adapted.
        teacher: The same shapes; no gradient flows into them.
        dims: D, over which each map is normalized: (2, 3) for an instance norm, (1, 2, 3) for a layer norm.
        eps: epsilon.

    Returns:
        A scalar.
    """

    pairs = zip(student, teacher, strict=True)
    squared = [(normalized(s, dims, eps) - normalized(t.detach(), dims, eps)).square().sum() for s, t in pairs]
    return torch.stack(squared).sum() / sum(level.numel() for level in student)


def adapted_distance(
    adapter: nn.Module,
    student: Sequence[torch.Tensor],
    teacher: Sequence[torch.Tensor],
    dims: tuple[int, ...],
    weight: float,
) -> torch.Tensor:
    """The :func:`normalized_distance` of the student's levels after an adapter, weighted; with a weight of 0 the adapter alone
    learns, at weight 1."""
    own = student if weight else [level.detach() for level in student]
    return (weight or 1.0) * normalized_distance([adapter(level) for level in own], teacher, dims)


def layers(*widths: int) -> nn.Sequential:
    """Linear layers, each with a layer norm without affine and a ReLU, on the last dimension."""
    return nn.Sequential(
        *(
            nn.Sequential(nn.Linear(a, b), nn.LayerNorm(b, elementwise_affine=False), nn.ReLU())
            for a, b in pairwise(widths)
        )
    )


def normed_convolution(channels: int) -> list[nn.Module]:
    """A 3x3 convolution and the norm of each image over all its channels and positions, without affine."""
    return [nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(1, channels, affine=False)]


def three_convolutions(channels: int) -> nn.Sequential:
    """The adapter of the authors: three 3x3 convolutions with ReLUs between."""
    first, second, third = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3))
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)


class Transform(nn.Module):
    """A token times a matrix that is made of it, the "T-net" of PointNet: (..., C) to (..., C)."""

    def __init__(self, channels: int):
        super().__init__()
        self.matrix = nn.Sequential(layers(channels, 64, 128, 1024, 512, 256), nn.Linear(256, channels**2))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        channels = tokens.shape[-1]
        return torch.einsum('...i,...ij->...j', tokens, self.matrix(tokens).unflatten(-1, (channels, channels)))


class LabelEmbedding(nn.Module):
    """Tokens as vectors that know the other tokens of their image, as in PointNet: (B, K, I) to (B, K, C).

    Args:
        inputs: I.
        channels: C.
    """

    def __init__(self, inputs: int, channels: int):
        super().__init__()
        self.each = nn.Sequential(Transform(inputs), layers(inputs, 64), Transform(64))
        self.image = layers(64, 128, 1024)
        self.both = layers(64 + 1024, channels, channels)

    def forward(self, tokens: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        each = self.each(tokens)
        # after a ReLU 0 is the least that there can be
        image = (self.image(each) * valid[..., None]).amax(1, keepdim=True)
        return self.both(torch.cat([each, image.expand(-1, each.shape[1], -1)], -1))


class LabelGuidedMaps(nn.Module):
    """A teacher's pyramid, made of the labels and of the student's own.

    On each level the appearance of a token, the mean of the student's projected map in its box, asks the tokens of its
    image (attention: query = appearance, key = value = embedded labels). What it is told is painted into the box, the
    context's answer added everywhere, and three convolutions make the map of it. All weights are shared by the levels.

    Args:
        classes: How many there are.
        channels: Of the pyramid, a multiple of 8.
    """

    def __init__(self, classes: int, channels: int):
        super().__init__()
        self.classes = classes
        self.labels = LabelEmbedding(4 + classes, channels)
        self.appearance = nn.Sequential(*normed_convolution(channels), nn.ReLU())
        self.attention = nn.MultiheadAttention(channels, HEADS, batch_first=True)
        self.objects = nn.Linear(channels, channels)
        self.painted = nn.Conv2d(channels, channels, 3, padding=1)
        self.context = nn.Linear(channels, channels)
        self.refine = nn.Sequential(
            *normed_convolution(channels),
            nn.ReLU(),
            *normed_convolution(channels),
            nn.ReLU(),
            *normed_convolution(channels),
        )

    def forward(
        self,
        student: Sequence[torch.Tensor],
        boxes: torch.Tensor,
        labels: torch.Tensor,
        valid: torch.Tensor,
        sizes: torch.Tensor,
        shape: Sequence[int],
    ) -> list[torch.Tensor]:
        """Per level the map, in the shape of the student's; ``shape`` is that of the padded input, see :func:`label_tokens`."""
        tokens, boxes, valid = label_tokens(boxes, labels, valid, sizes, self.classes)
        told = self.labels(tokens, valid)
        made = []
        for level in student:
            cells = covered_cells(boxes, valid, level.shape[2:], shape)
            asks = pool(self.appearance(level), cells)
            answers, _ = self.attention(asks, told, told, key_padding_mask=~valid)
            objects = self.painted(paint(self.objects(answers[:, :-1]), cells[:, :-1]))
            made.append(self.refine((objects + self.context(answers[:, -1])[..., None, None]).relu()))
        return made


@DISTILLERS.register_module()
class LGD(Distiller):
    """Label-guided self-distillation: the teacher is made of the labels and of the student's own pyramid.

    There is no other network: its ``teacher`` is ``dict(type='Own')``. What makes the teacher's maps is trained along and
    left out by ``mmkd export``.

    - ``loss_teacher``: the student's own losses, with its own heads, over the teacher's maps (:class:`LabelGuidedMaps`). It
      trains these, the heads, and the student by its appearance. It has no weight, and is there in every step.
    - ``loss``: :func:`normalized_distance` of the neck's maps, after three 3x3 convolutions, to the teacher's, by instance norm.

    In steps in which ``loss_weight`` is 0, the convolutions alone learn the distance, at weight 1, and the student does not:
    the authors begin so, ``dict(type='constant', value=1.0, begin=30000)`` of 180000 steps. A batch without a box has losses
    of 0. Differences from paper and code: ``docs/methods/lgd.md``.

    Args:
        loss_weight: Weight of ``loss``, lambda in the paper; a number or a schedule. Default 1.

    Example:
        >>> teacher = dict(type='Own')
        >>> distillers = dict(lgd=dict(type='LGD', loss_weight=dict(type='constant', value=1.0, begin=30000)))
    """

    student_layers = ('neck',)
    unweighted = trains_heads = True

    def __init__(self, loss_weight: float | Mapping = 1.0):
        super().__init__()
        self.loss_weight = Weight(loss_weight, 'loss_weight')

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        if teacher is not student:
            raise ConfigError(
                f'LGD learns from labels and from the student itself, found a {type(teacher).__name__} as its teacher; use '
                f"teacher=dict(type='Own')"
            )
        check_heads(student, 'LGD')

    def setup(self, student: Taps, teacher: Taps) -> None:
        channels = sorted({level.shape[1] for level in maps(student, 'neck')})
        if len(channels) > 1 or channels[0] % HEADS:
            raise ConfigError(
                f'the neck puts out {", ".join(map(str, channels))} channels; LGD needs as many on all levels, and a multiple of '
                f'{HEADS}'
            )
        self.teacher = LabelGuidedMaps(classes_of(student.model), channels[0])
        self.adapter = three_convolutions(channels[0])

    def teacher_maps(
        self, student: Sequence[torch.Tensor], data_samples: list
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The teacher's pyramid, and which boxes there are, (B, K)."""
        boxes, valid = ground_truth(data_samples)
        sizes = torch.tensor([sample.metainfo['img_shape'][1::-1] for sample in data_samples])
        sizes = sizes.to(boxes, non_blocking=True)
        labels = ground_truth_labels(data_samples)
        return self.teacher(student, boxes, labels, valid, sizes, padded_shape(data_samples)), valid

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        features, samples = maps(student, 'neck'), data_samples or []
        require_gradient('neck', features)
        targets, valid = self.teacher_maps(features, samples)
        any_object = valid.any()
        return {
            'loss': any_object * adapted_distance(self.adapter, features, targets, (2, 3), self.loss_weight()),
            'loss_teacher': any_object * losses_of_maps(student.model, targets, samples),
        }
