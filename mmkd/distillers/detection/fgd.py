"""Focal and global distillation (FGD).

Yang et al., "Focal and Global Knowledge Distillation for Detectors", CVPR 2022, arXiv 2111.11837.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from mmkd.distillers.base import Distiller
from mmkd.distillers.generic.fkd import attention
from mmkd.distillers.levels import LevelPairs
from mmkd.distillers.schedule import Weight
from mmkd.hosts.detection.ground_truth import covered_cells, ground_truth, padded_shape
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps
from mmkd.values import check_temperature


def scale_masks(
    boxes: torch.Tensor, valid: torch.Tensor, size: Sequence[int], shape: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """How much each cell of a map counts, so that objects of all sizes and the background weigh alike.

    A cell that objects cover counts 1 / area of the smallest of them, the area in cells. A cell of the background counts
    1 / number of the image's background cells. See :func:`mmkd.hosts.detection.ground_truth.covered_cells`.

    Args:
        boxes: (B, K, 4), xyxy in pixels of the padded input.
        valid: (B, K), False for a box that is not there.
        size: H and W of the map.
        shape: Height and width of the padded input.

    Returns:
        The foreground's mask and the background's, each (B, H, W) and 0 on the other's cells.
    """
    covered = covered_cells(boxes, valid, size, shape)
    areas = covered.sum((2, 3)).clamp(min=1)
    foreground = (covered / areas[:, :, None, None]).amax(1)
    background = (foreground == 0).to(foreground.dtype)
    return foreground, background / background.sum((1, 2), keepdim=True).clamp(min=1)


def focal_losses(
    student: torch.Tensor,
    teacher: torch.Tensor,
    foreground: torch.Tensor,
    background: torch.Tensor,
    tau: float = 0.5,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Squared distances on foreground and background, weighted by the teacher's attention.

    .. math:: L = \frac{1}{B} \sum_b \sum_i M_{bi} A^S_{bi} \sum_c A^C_{bc} (t_{bci} - s_{bci})^2

    Args:
        student: (B, C, H, W), adapted.
        teacher: The same shape; no gradient flows into it.
        foreground: (B, H, W), M of the foreground's loss, see :func:`scale_masks`.
        background: (B, H, W), M of the background's loss.
        tau: Temperature of the :func:`attention`.

    Returns:
        The foreground's loss and the background's, scalars.
    """
    teacher = teacher.detach()
    spatial, channel = attention(teacher, tau)
    distance = spatial * ((teacher - student).square() * channel[:, :, None, None]).sum(1)
    return (distance * foreground).sum() / len(student), (distance * background).sum() / len(student)


def attention_loss(student: torch.Tensor, teacher: torch.Tensor, tau: float = 0.5) -> torch.Tensor:
    r"""Difference of the two networks' attention.

    .. math:: L = \frac{1}{B} \big( \lVert A^S_T - A^S_S \rVert_1 + \lVert A^C_T - A^C_S \rVert_1 \big)

    Args:
        student: (B, C, H, W), adapted.
        teacher: The same shape; no gradient flows into it.
        tau: Temperature of the :func:`attention`.

    Returns:
        A scalar.
    """
    pairs = zip(attention(student, tau), attention(teacher.detach(), tau))
    return sum((t - s).abs().sum() for s, t in pairs) / len(student)


class GlobalContext(nn.Module):
    r"""A feature with what the whole image says of it added, the block of GCNet.

    .. math:: R(F)_i = F_i + W_2 \operatorname{ReLU}(\operatorname{LN}(W_1 \sum_j \operatorname{softmax}_j(W_k F_j) F_j))

    W2 starts at 0, and R as the identity. W1 halves the channels. W_k has no bias, which the softmax would cancel.

    Args:
        channels: C of the feature, (B, C, H, W).
    """

    def __init__(self, channels: int):
        super().__init__()
        hidden = max(channels // 2, 1)
        self.key = nn.Conv2d(channels, 1, 1, bias=False)
        self.transform = nn.Sequential(
            nn.Linear(channels, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, channels)
        )
        nn.init.kaiming_normal_(self.key.weight, nonlinearity='relu')
        nn.init.zeros_(self.transform[-1].weight)
        nn.init.zeros_(self.transform[-1].bias)

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        share = self.key(feature).flatten(1).softmax(1)
        context = torch.einsum('bcn,bn->bc', feature.flatten(2), share)
        return feature + self.transform(context)[:, :, None, None]


def global_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    r"""Squared distance of the two networks' features in their global context.

    .. math:: L = \frac{1}{B} \sum_b \lVert R_T(t_b) - R_S(s_b) \rVert_2^2

    A sum over channels and positions: its weight belongs to a size of the map.

    Args:
        student: (B, C, H, W), out of the student's :class:`GlobalContext`.
        teacher: The same shape, out of the teacher's; the gradient flows into it, as its block is trained.

    Returns:
        A scalar.
    """
    return (teacher - student).square().sum() / len(student)


@DISTILLERS.register_module()
class FGD(Distiller):
    """Focal and global distillation: the feature where the teacher looks, and the relation of all its positions.

    Four terms, each added over levels; all are 0 at first for equal networks:

    - ``loss_foreground`` and ``loss_background``: :func:`focal_losses` with the :func:`scale_masks` of the ground truth.
    - ``loss_attention``: :func:`attention_loss`.
    - ``loss_global``: :func:`global_loss` between two :class:`GlobalContext` blocks per level, one of the student and one of
      the teacher. Both are trained.

    The defaults are the paper's for RetinaNet and images of 800x1333. The losses are sums, so the weights have to follow the
    size of images and features. Weights for other detectors, and differences from the authors' code:
    ``docs/methods/fgd.md``.

    Args:
        layer: The student's layer, or a list of layers. Default ``'neck'``.
        foreground_weight: Weight of ``loss_foreground``, alpha in the paper; a number or a schedule, as all
            weights. Default 1e-3.
        background_weight: Weight of ``loss_background``, beta. Default 5e-4.
        attention_weight: Weight of ``loss_attention``, gamma. Default 1e-3.
        global_weight: Weight of ``loss_global``, lambda. Default 5e-6.
        tau: Temperature of the attention, T in the paper, positive. Default 0.5.
        teacher_layer: The teacher's layer, where its name differs.
        adapter: ``'auto'`` (1x1 convolution exactly where channels differ), None or a dict.
        match: ``'stride'`` or ``'index'``: which levels belong together, see
            :class:`mmkd.distillers.levels.LevelPairs`.

    Example:
        >>> distillers = dict(fgd=dict(type='FGD'))
    """

    renamed = {'temperature': 'tau'}
    any_scale = True

    def __init__(
        self,
        layer: str | Sequence[str] = 'neck',
        foreground_weight: float | Mapping = 1e-3,
        background_weight: float | Mapping = 5e-4,
        attention_weight: float | Mapping = 1e-3,
        global_weight: float | Mapping = 5e-6,
        tau: float = 0.5,
        teacher_layer: str | Sequence[str] | None = None,
        adapter: str | Mapping | None = 'auto',
        match: str = 'stride',
    ):
        super().__init__()
        self.levels = LevelPairs(layer, teacher_layer, adapter, match)
        self.student_layers, self.teacher_layers = self.levels.student_layers, self.levels.teacher_layers
        check_temperature(tau)
        self.tau = tau
        self.foreground_weight = Weight(foreground_weight, 'foreground_weight')
        self.background_weight = Weight(background_weight, 'background_weight')
        self.attention_weight = Weight(attention_weight, 'attention_weight')
        self.global_weight = Weight(global_weight, 'global_weight')

    def setup(self, student: Taps, teacher: Taps) -> None:
        self.levels.setup(student, teacher)
        channels = [level.shape[1] for level in self.levels.unadapted(student, teacher)[1]]
        self.student_contexts = nn.ModuleList(GlobalContext(each) for each in channels)
        self.teacher_contexts = nn.ModuleList(GlobalContext(each) for each in channels)

    def pictures(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        return {
            f'{name} attention, level {level}': attention(feature, self.tau)[0]
            for pair in self.levels(student, teacher)
            for name, feature, level in (
                ('student', pair.student, pair.student_level),
                ('teacher', pair.teacher, pair.teacher_level),
            )
        }

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        boxes, valid = ground_truth(data_samples)
        shape = padded_shape(data_samples)
        levels = []
        pairs = self.levels(student, teacher)
        for (s, t, *_), s_context, t_context in zip(pairs, self.student_contexts, self.teacher_contexts, strict=True):
            masks = scale_masks(boxes, valid, s.shape[2:], shape)
            levels.append(
                (
                    *focal_losses(s, t, *masks, self.tau),
                    attention_loss(s, t, self.tau),
                    global_loss(s_context(s), t_context(t.detach())),
                )
            )
        foreground, background, attended, related = (sum(each) for each in zip(*levels))
        return {
            'loss_foreground': self.foreground_weight() * foreground,
            'loss_background': self.background_weight() * background,
            'loss_attention': self.attention_weight() * attended,
            'loss_global': self.global_weight() * related,
        }
