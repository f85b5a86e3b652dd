"""Structured knowledge distillation (SKD).

Liu, Chen, Liu, Qin, Luo, Wang, "Structured Knowledge Distillation for Semantic Segmentation", CVPR 2019; Liu, Shu, Wang,
Shen, "Structured Knowledge Distillation for Dense Prediction", TPAMI 2020, arXiv 1903.04197.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from mmkd.distillers.base import Distiller
from mmkd.distillers.critic import MODES, Critic, critic_loss, deception_loss, enlarge
from mmkd.distillers.generic.kd import REDUCTIONS, pixel_divergence
from mmkd.distillers.levels import maps, require_gradient
from mmkd.distillers.schedule import Weight
from mmkd.errors import ConfigError
from mmkd.hosts.segmentation import heads
from mmkd.hosts.segmentation.labels import labeled
from mmkd.hosts.segmentation.logits import require_class_logits
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps
from mmkd.values import check_temperature, is_number, is_whole

IMAGE = 'backbone:input'


def pool_nodes(feature: torch.Tensor, kernel: int | None = None, scale: float | None = None) -> torch.Tensor:
    """The nodes of a map: its maximum over windows next to each other, the last ones cut at the edge.

    Args:
        feature: (B, C, H, W).
        kernel: Height and width of a window, in positions. Default None: see ``scale``.
        scale: Height and width of a window as a part of the map's, rounded down to whole positions, at least 1. 0.5 gives
            2x2 nodes of a map of even height and width, and 3x3 of an odd one.

    Returns:
        (B, C, h, w).
    """
    window = (kernel, kernel) if kernel else tuple(max(1, int(scale * side)) for side in feature.shape[2:])
    return F.max_pool2d(feature, window, ceil_mode=True)


def pair_wise_loss(student: torch.Tensor, teacher: torch.Tensor, max_nodes: int = 4096) -> torch.Tensor:
    r"""Squared difference of the two networks' similarities between all pairs of nodes.

    .. math::
        L = \frac{1}{B R^2} \sum_b \sum_{i, j} \left( a^T_{bij} - a^S_{bij} \right)^2, \qquad
        a_{bij} = \frac{f_{bi}^\top f_{bj}}{\lVert f_{bi} \rVert \lVert f_{bj} \rVert}

    with i, j over the R = H*W nodes of an image. The gradient also flows through the norms; SKD's public code takes these
    as constants, at the same value of the loss.

    A matrix of similarities takes B*R*R*4 bytes: 134 MB for two images of 4096 nodes, and several are alive at a time.
    Above ``max_nodes`` none is made: with F the (R, C) matrix of an image's normalized nodes, the same sum is
    :math:`\lVert F_S^\top F_S \rVert^2 - 2 \lVert F_S^\top F_T \rVert^2 + \lVert F_T^\top F_T \rVert^2`, of matrices of C*C
    entries, whatever the size of the image. That is a small difference of large numbers, hence not used for few nodes: in
    float32 the value is right to about 1e-5 where similarities differ by 0.02, to 2e-3 where they differ by 0.002.

    Args:
        student: (B, C, H, W) nodes.
        teacher: (B, C', H, W) nodes; no gradient flows into them.
        max_nodes: The largest R for which matrices of R*R entries are made.

    Returns:
        A scalar.
    """
    student = F.normalize(student.flatten(2), dim=1, eps=1e-8)
    teacher = F.normalize(teacher.detach().flatten(2), dim=1, eps=1e-8)
    batch, _, nodes = student.shape
    if nodes <= max_nodes:
        return (student.mT @ student - teacher.mT @ teacher).square().mean()
    own, cross, other = (
        (a @ b.mT).square().sum() for a, b in ((student, student), (student, teacher), (teacher, teacher))
    )
    return (own - 2 * cross + other).clamp(min=0) / (batch * nodes**2)


@DISTILLERS.register_module()
class SKD(Distiller):
    """Pixel-wise, pair-wise and holistic distillation; ``docs/methods/skd.md``.

    ============= ===================================================================================================
    loss_pixel    ``pixel_weight`` times :func:`mmkd.distillers.generic.kd.pixel_divergence`, ignored pixels left out
    loss_pair     ``pair_weight`` times :func:`pair_wise_loss` of the :func:`pool_nodes` of the features
    loss_holistic ``-holistic_weight * mean D(student's logits)``: the student deceives a critic D
    loss_critic   ``critic_weight`` times :func:`mmkd.distillers.critic.critic_loss`
    ============= ===================================================================================================

    A term whose weight is 0 is left out. Pair-wise and holistic terms see ignored positions too. Where maps differ in
    size the student's are resized to the teacher's (bilinear). The critic is trained by the student's optimizer, in the
    same step, and needs a learning rate of its own: ``optim_wrapper = dict(paramwise_cfg=dict(
    custom_keys={'distillers.skd.critic': dict(lr_mult=0.04)}))``, by the name of the entry. Leave ``clip_grad`` at None.

    Args:
        layer: The student's layer that puts out class logits. Default: its decode head's, ``'decode_head.conv_seg'`` or
            of a cascade ``'decode_head.1.conv_seg'``.
        feature_layer: The student's layer whose positions are compared in pairs. Default: the one before its classifier,
            found by its decode head, see :func:`mmkd.hosts.segmentation.heads.feature_layer`.
        pixel_weight: A number or a schedule, as the next three. Default 10.
        pair_weight: Default 0.5.
        holistic_weight: The student's. Default 0.001.
        critic_weight: The critic's. Default 0.1.
        penalty_weight: Of the gradient penalty in the critic's loss. Default 10.
        tau: Temperature of the pixel-wise term, positive. Default 1.
        pixel_reduction: ``'pixel_mean'`` (default), ``'image_sum'``, ``'element_mean'`` or ``'sum'``.
        use_labels: Whether the pixel-wise term leaves ignored pixels out. Default True. False needs no ground truth.
        kernel: Height and width of the windows that make the nodes, in positions. Default None: see ``scale``.
        scale: Height and width of the windows as a part of the map's. Default, without ``kernel``: 0.5.
        max_nodes: The largest number of nodes per image for which matrices of similarities are made, of its square
            times 4 bytes per image. Beyond, the same loss is computed without them. Default 4096.
        mode: ``'wgan-gp'`` (default) or ``'hinge'``, which has no penalty.
        critic_norm: What normalizes the logits for the critic: ``'batch'`` (default), ``'tanh'`` or None.
        spectral_norm: Whether the critic's convolutions have it. Default True.
        condition_on_image: Whether the critic sees the image, normalized and at the size of the logits, as well. Default
            False.
        teacher_layer: The teacher's logits, where the name differs from ``layer``. Default, without either: as ``layer``.
        teacher_feature_layer: The same of its features.

    Raises:
        ConfigError: for logits of other classes, layers that put out several maps, or weights that teach nothing.

    Example:
        >>> distillers = dict(skd=dict(type='SKD'))
    """

    def __init__(
        self,
        layer: str | None = None,
        feature_layer: str | None = None,
        pixel_weight: float | Mapping = 10.0,
        pair_weight: float | Mapping = 0.5,
        holistic_weight: float | Mapping = 0.001,
        critic_weight: float | Mapping = 0.1,
        penalty_weight: float = 10.0,
        tau: float = 1.0,
        pixel_reduction: str = 'pixel_mean',
        use_labels: bool = True,
        kernel: int | None = None,
        scale: float | None = None,
        max_nodes: int = 4096,
        mode: str = 'wgan-gp',
        critic_norm: str | None = 'batch',
        spectral_norm: bool = True,
        condition_on_image: bool = False,
        teacher_layer: str | None = None,
        teacher_feature_layer: str | None = None,
    ):
        super().__init__()
        check_temperature(tau)
        if not (is_number(penalty_weight) and penalty_weight >= 0):
            raise ConfigError(f'penalty_weight={penalty_weight!r}: expected a number of at least 0')
        if pixel_reduction not in REDUCTIONS:
            raise ConfigError(f'pixel_reduction={pixel_reduction!r}: expected one of {", ".join(REDUCTIONS)}')
        if mode not in MODES:
            raise ConfigError(f'mode={mode!r}: expected one of {", ".join(MODES)}')
        if kernel is not None and scale is not None:
            raise ConfigError(f'kernel={kernel!r} and scale={scale!r}: both say how large a node is; set one of them')
        if kernel is not None and not (is_whole(kernel) and kernel >= 1):
            raise ConfigError(f'kernel={kernel!r}: expected a number of positions of at least 1')
        if scale is not None and not (is_number(scale) and 0 < scale < 1):
            raise ConfigError(f'scale={scale!r}: expected a fraction of the map above 0 and below 1')
        if not (is_whole(max_nodes) and max_nodes >= 1):
            raise ConfigError(f'max_nodes={max_nodes!r}: expected a number of nodes of at least 1')
        self.pixel, self.pair, self.holistic = (each != 0 for each in (pixel_weight, pair_weight, holistic_weight))
        if not (self.pixel or self.pair or self.holistic):
            raise ConfigError('pixel_weight, pair_weight and holistic_weight are all 0: nothing would be learnt')
        if self.holistic and critic_weight == 0:
            raise ConfigError('critic_weight=0 with holistic_weight: the critic would never learn; set both or neither')
        self.named = layer, teacher_layer or layer, feature_layer, teacher_feature_layer or feature_layer
        self.pixel_weight, self.pair_weight = Weight(pixel_weight, 'pixel_weight'), Weight(pair_weight, 'pair_weight')
        self.holistic_weight = Weight(holistic_weight, 'holistic_weight')
        self.critic_weight = Weight(critic_weight, 'critic_weight')
        self.penalty_weight = penalty_weight
        self.tau, self.reduction, self.use_labels = tau, pixel_reduction, use_labels
        self.kernel, self.scale, self.max_nodes = kernel, 0.5 if scale is None else scale, max_nodes
        self.mode, self.critic_norm, self.spectral_norm = mode, critic_norm, spectral_norm
        self.condition_on_image = condition_on_image and self.holistic

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        layer, teacher_layer, feature_layer, teacher_feature_layer = self.named
        self.student_layers = self.teacher_layers = ()
        if self.pixel or self.holistic:
            self.layer = layer or heads.logits_layer(student)
            self.teacher_layer = teacher_layer or heads.logits_layer(teacher)
            self.student_layers, self.teacher_layers = (self.layer,), (self.teacher_layer,)
        if self.pair:
            self.feature_layer = feature_layer or heads.feature_layer(student)
            self.teacher_feature_layer = teacher_feature_layer or heads.feature_layer(teacher)
            self.student_layers += (self.feature_layer,)
            self.teacher_layers += (self.teacher_feature_layer,)
        self.student_layers += (IMAGE,) * self.condition_on_image

    def setup(self, student: Taps, teacher: Taps) -> None:
        for taps, layers in ((student, self.student_layers), (teacher, self.teacher_layers)):
            for layer in layers:
                refuse_other_than_one_map(taps, layer)
        if self.pair:
            nodes = pool_nodes(teacher[self.teacher_feature_layer][0], self.kernel, self.scale)
            if nodes.shape[2:].numel() < 2:
                size = tuple(teacher[self.teacher_feature_layer][0].shape[2:])
                raise ConfigError(
                    f'kernel={self.kernel!r}: leaves one node of a map of {size} positions; use a smaller one'
                )
        if self.pixel or self.holistic:
            require_class_logits(student, self.layer, teacher, self.teacher_layer)
        if self.holistic:
            image_channels = student[IMAGE][0].shape[1] if self.condition_on_image else 0
            classes = student[self.layer][0].shape[1]
            self.critic = Critic(classes, image_channels, self.critic_norm, self.spectral_norm)

    def pictures(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        if not self.pair:
            return {}
        maps_of_both = same_size(student, self.feature_layer, teacher, self.teacher_feature_layer)
        return {
            f'{name} similarity to the center': similarity_to_center(feature)
            for name, feature in zip(('student', 'teacher'), maps_of_both)
        }

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        losses = {}
        if self.pixel or self.holistic:
            s, t = same_size(student, self.layer, teacher, self.teacher_layer)
        if self.pixel:
            valid = labeled(student.model, data_samples, s.shape[2:]) if self.use_labels else None
            losses['loss_pixel'] = self.pixel_weight() * pixel_divergence(s, t, self.tau, self.reduction, valid)
        if self.pair:
            features = same_size(student, self.feature_layer, teacher, self.teacher_feature_layer)
            nodes = (pool_nodes(each, self.kernel, self.scale) for each in features)
            losses['loss_pair'] = self.pair_weight() * pair_wise_loss(*nodes, self.max_nodes)
        if self.holistic:
            s, t = enlarge(s), enlarge(t)
            image = None
            if self.condition_on_image:
                image = F.interpolate(student[IMAGE][0], s.shape[2:], mode='bilinear', align_corners=False)
            losses['loss_holistic'] = self.holistic_weight() * deception_loss(self.critic, s, image)
            own = critic_loss(self.critic, s, t, image, self.mode, self.penalty_weight)
            losses['loss_critic'] = self.critic_weight() * own
        return losses


def similarity_to_center(feature: torch.Tensor) -> torch.Tensor:
    """Of each position the cosine similarity to the one in the middle, (B, H, W), of a map (B, C, H, W)."""
    middle = feature[:, :, feature.shape[2] // 2, feature.shape[3] // 2, None, None]
    return F.cosine_similarity(feature, middle, dim=1)


def refuse_other_than_one_map(taps: Taps, layer: str) -> None:
    """Raise ConfigError unless a layer puts out one map."""
    found = [tuple(level.shape) for level in maps(taps, layer)]
    if len(found) != 1 or len(found[0]) != 4:
        raise ConfigError(
            f'layer {layer!r} puts out tensors of shapes {found}; tap one that puts out one (B, C, H, W) map'
        )


def same_size(student: Taps, layer: str, teacher: Taps, teacher_layer: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A map of both models, the student's resized (bilinear) to the teacher's where they differ.

    Raises:
        ConfigError: if the student's has no gradient.
    """
    (s,), (t,) = student[layer], teacher[teacher_layer]
    require_gradient(layer, [s])
    if s.shape[2:] != t.shape[2:]:
        s = F.interpolate(s, t.shape[2:], mode='bilinear', align_corners=False)
    return s, t
