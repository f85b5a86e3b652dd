"""Boundary-privileged knowledge distillation (BPKD).

Liu, Wang, Phan, Zhang, Ge, Liu, "BPKD: Boundary Privileged Knowledge Distillation For Semantic Segmentation", WACV 2024,
arXiv 2306.08075.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from mmkd.distillers.base import Distiller
from mmkd.distillers.generic.kd import pixel_divergence
from mmkd.distillers.levels import LevelPairs
from mmkd.distillers.schedule import Weight
from mmkd.errors import ConfigError
from mmkd.hosts.segmentation.heads import decode_head, logits_layer
from mmkd.hosts.segmentation.labels import ground_truth, ignore_index, labeled, resize_labels
from mmkd.hosts.segmentation.logits import compared_logits, require_class_logits
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps
from mmkd.values import check_temperature, is_whole

ABSENT = -1e9
"""The logit of a position outside the body: its probability is 0, and what the divergence makes of it is finite."""


def edges(labels: torch.Tensor, ignored: int, width: int) -> torch.Tensor:
    """Pixels near which there are several classes: a label is in their window that is not their own.

    That is the union over all classes of the dilated region without the eroded one, less ignored pixels, which make no edge.

    Args:
        labels: (B, H, W) int64.
        ignored: The label that does not count.
        width: Height and width of the window, an odd number of pixels.

    Returns:
        (B, H, W) bool; False for ignored pixels.
    """
    valid = labels != ignored
    highest = labels.masked_fill(~valid, -1).float()
    lowest = -labels.masked_fill(~valid, 1 << 20).float()
    highest, lowest = (F.max_pool2d(each[:, None], width, 1, width // 2)[:, 0] for each in (highest, lowest))
    return valid & (highest != -lowest)


def boundary_losses(
    student: torch.Tensor, teacher: torch.Tensor, edge: torch.Tensor, body: torch.Tensor, tau: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Which class a pixel is of, at edges, and where a class is, in the body.

    .. math::
        L_\text{edge} = \frac{\tau^2}{|E|} \sum_{(b, a) \in E} \operatorname{KL}\big( \sigma_k(z^T_{b \cdot a} / \tau)
        \,\Vert\, \sigma_k(z^S_{b \cdot a} / \tau) \big), \qquad
        L_\text{body} = \frac{\tau^2}{B K} \sum_{b, k} \operatorname{KL}\big( \sigma_{a \in D_b}(z^T_{bk \cdot} / \tau)
        \,\Vert\, \sigma_{a \in D_b}(z^S_{bk \cdot} / \tau) \big)

    E are the edge's positions of all images, D_b the body's of an image. Both are 0 for equal inputs, and where there is
    no such position.

    Args:
        student: z, (B, K, H, W) logits.
        teacher: The same shape; no gradient flows into it.
        edge: (B, H, W) bool.
        body: (B, H, W) bool.
        tau: Temperature.

    Returns:
        L_edge and L_body.
    """
    at_edges = pixel_divergence(student, teacher, tau, valid=edge)
    shapes = (each.masked_fill(~body[:, None], ABSENT).flatten(2).flatten(0, 1) for each in (student, teacher))
    return at_edges, pixel_divergence(*shapes, tau)


@DISTILLERS.register_module()
class BPKD(Distiller):
    """Classes of pixels at edges, shapes of classes elsewhere; ``docs/methods/bpkd.md``.

    ``loss_edge = edge_weight * L_edge`` and ``loss_body = body_weight * L_body``, see :func:`boundary_losses`, between the
    class logits of both networks, summed over layers. A position is of the edge where the pixel that it stands for has
    another class in its window, see :func:`edges`, and of the body otherwise; ignored ones are of neither. Where the logits
    differ in size the student's are resized to the teacher's.

    The masks, normalizations and weights are ours: the paper could not be read and its training code is not public.

    Args:
        layer: The student's layer that puts out class logits, or a list. Default: its decode head's.
        edge_weight: A number or a schedule, as the next. Default 1.
        body_weight: Default 5.
        width: Height and width of the window that says what an edge is, an odd number of pixels. Default 7.
        tau: Temperature of both, positive. Default 1.
        teacher_layer: The teacher's layer, where its name differs from ``layer``. Default, without either: as ``layer``.

    Raises:
        ConfigError: for layers that do not put out logits of the same classes.

    Example:
        >>> distillers = dict(bpkd=dict(type='BPKD'))
    """

    def __init__(
        self,
        layer: str | Sequence[str] | None = None,
        edge_weight: float | Mapping = 1.0,
        body_weight: float | Mapping = 5.0,
        width: int = 7,
        tau: float = 1.0,
        teacher_layer: str | Sequence[str] | None = None,
    ):
        super().__init__()
        self.levels = LevelPairs(layer or logits_layer, teacher_layer)
        if not (is_whole(width) and width >= 3 and width % 2):
            raise ConfigError(f'width={width!r}: expected an odd number of pixels of at least 3')
        check_temperature(tau)
        self.edge_weight, self.body_weight = Weight(edge_weight, 'edge_weight'), Weight(body_weight, 'body_weight')
        self.width, self.tau = width, tau

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        self.levels.prepare(student, teacher)
        self.student_layers, self.teacher_layers = self.levels.student_layers, self.levels.teacher_layers

    def setup(self, student: Taps, teacher: Taps) -> None:
        for layer, other in zip(self.student_layers, self.teacher_layers):
            require_class_logits(student, layer, teacher, other)
        self.levels.setup(student, teacher)

    def edges(self, student: Taps, data_samples: list | None) -> torch.Tensor:
        """The edges of a batch, (B, H, W) bool, of the size of the labels."""
        return edges(ground_truth(data_samples), ignore_index(student.model), self.width)

    def pictures(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        return {'edges': self.edges(student, data_samples).float()}

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        edge = body = 0.0
        everywhere = self.edges(student, data_samples)
        for s, t in compared_logits(self.levels, student, teacher):
            near = resize_labels(everywhere, s.shape[2:], decode_head(student.model).align_corners)
            rest = labeled(student.model, data_samples, s.shape[2:]) & ~near
            losses = boundary_losses(s, t, near, rest, self.tau)
            edge, body = edge + losses[0], body + losses[1]
        return {'loss_edge': self.edge_weight() * edge, 'loss_body': self.body_weight() * body}
