"""Domain-adaptive knowledge distillation (DAKD).

Kothandaraman, Nambiar, Mittal, "Domain Adaptive Knowledge Distillation for Driving Scene Semantic Segmentation", WACV
Workshops 2021, arXiv 2011.08007.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from mmkd.data.domains import split_domains
from mmkd.distillers.base import Distiller
from mmkd.distillers.critic import with_constant_weights
from mmkd.distillers.generic.kd import REDUCTIONS, pixel_divergence
from mmkd.distillers.levels import LevelPairs, maps
from mmkd.distillers.schedule import Weight
from mmkd.errors import ConfigError
from mmkd.hosts.segmentation import heads
from mmkd.hosts.segmentation.labels import ground_truth, pixels_of, resize_labels
from mmkd.hosts.segmentation.logits import compared_logits, require_class_logits, resize_logits
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps
from mmkd.values import is_number, is_whole

SOURCE, TARGET = 0, 1
CRITIC_STRIDE = 32


def valid_mean(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """The mean of the values at valid positions, both (B, H, W); 0 if there are none."""
    return (values * valid).sum() / valid.sum().clamp(min=1)


def log_probability_distance(student: torch.Tensor, teacher: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    r"""Mean squared difference between the two networks' log-probabilities.

    .. math::
        L = \frac{1}{K \sum_{b, a} v_{ba}} \sum_{b, a} v_{ba} \sum_k (\log p^S_{bka} - \log p^T_{bka})^2, \qquad
        p_{bka} = \operatorname{softmax}_k(z_{bka})

    a runs over positions, k over the K classes, v is 1 for valid positions; 0 if none is.

    Args:
        student: (B, K, H, W) logits.
        teacher: The same shape; no gradient flows into it.
        valid: (B, H, W) bool.

    Returns:
        A scalar.
    """
    difference = F.log_softmax(student, dim=1) - F.log_softmax(teacher.detach(), dim=1)
    return valid_mean(difference.square().mean(1), valid)


def pseudo_label_loss(
    student: torch.Tensor, teacher: torch.Tensor, valid: torch.Tensor, threshold: float | None = None
) -> torch.Tensor:
    r"""Cross-entropy of the student with the class that the teacher finds most probable at each position.

    .. math::
        L = -\frac{1}{|V|} \sum_{(b, a) \in V} \log p^S_{b \hat{y}_{ba} a}, \qquad
        \hat{y}_{ba} = \operatorname{argmax}_k p^T_{bka}

    V holds the valid positions, with a threshold those of them where the teacher's probability of the class is at
    least that. 0 if there are none.

    Args:
        student: (B, K, H, W) logits.
        teacher: The same shape; no gradient flows into it.
        valid: (B, H, W) bool.
        threshold: A probability; None for all valid positions.

    Returns:
        A scalar.
    """
    probability, label = teacher.detach().softmax(1).max(1)
    if threshold is not None:
        valid = valid & (probability >= threshold)
    return valid_mean(F.cross_entropy(student, label, reduction='none'), valid)


def domain_loss(decisions: torch.Tensor, domain: int, valid: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy between a critic's decisions and one domain; mean over valid positions.

    Args:
        decisions: (B, 1, H, W), logits of being of the target.
        domain: ``SOURCE``, 0, or ``TARGET``, 1.
        valid: (B, H, W) bool.

    Returns:
        A scalar.
    """
    return valid_mean(F.softplus(-decisions if domain == TARGET else decisions)[:, 0], valid)


def domain_critic(classes: int, channels: int = 64) -> nn.Sequential:
    """A network that tells the domain from class probabilities.

    Five 4x4 convolutions of stride 2, to 1, 2, 4 and 8 times ``channels`` and to 1, with LeakyReLU of slope 0.2 between
    them: (B, classes, H, W) to (B, 1, H // 32, W // 32), logits of being of the target.

    Weights start as He et al. have them for that slope, biases at 0, so that plain SGD trains it: with torch's own
    initial weights, the small slopes of the first layers leave no learning rate between one too low and one too high.
    """
    widths = [classes, channels, 2 * channels, 4 * channels, 8 * channels]
    layers: list[nn.Module] = []
    for width, wider in itertools.pairwise(widths):
        layers += [nn.Conv2d(width, wider, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
    layers.append(nn.Conv2d(widths[-1], 1, 4, stride=2, padding=1))
    for convolution in layers[::2]:
        nn.init.kaiming_normal_(convolution.weight, a=0.2)
        nn.init.zeros_(convolution.bias)
    return nn.Sequential(*layers)


def adversarial_losses(
    critic: nn.Module,
    source: torch.Tensor,
    target: torch.Tensor,
    valid: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""What the student and the critic D pay in their game; one backward pass of the sum serves both.

    .. math::
        L_{student} = \operatorname{bce}(D(p_{target}), source), \qquad
        L_D = \tfrac{1}{2} \left(
            \operatorname{bce}(D(p_{source}), source) + \operatorname{bce}(D(p_{target}), target) \right)

    Args:
        critic: D.
        source: (B, K, H, W), the student's class probabilities of source images; no gradient flows into them.
        target: Those of target images, into which the student's loss alone has a gradient.
        valid: For either domain, which of the critic's decisions count, (B, H // 32, W // 32) bool.

    Returns:
        Two scalars: the student's loss, which the critic's weights have no gradient of, and the critic's.
    """
    in_source, in_target = valid
    deceive = domain_loss(with_constant_weights(critic)(target), SOURCE, in_target)
    told_source = domain_loss(critic(source.detach()), SOURCE, in_source)
    told_target = domain_loss(critic(target.detach()), TARGET, in_target)
    return deceive, (told_source + told_target) / 2


class Domains(NamedTuple):
    """The two domains of a batch, on its device."""

    source: torch.Tensor
    """Indices of the source's images."""
    target: torch.Tensor
    """Indices of the target's images."""
    labels: torch.Tensor
    """(B, H, W)."""
    extents: torch.Tensor
    """Height and width of each image before padding, which is below and on the right, (B, 2)."""

    @classmethod
    def of(cls, data_samples: Sequence | None) -> 'Domains':
        """Those of a batch; an image without ``img_shape`` in its meta data has no padding.

        Raises:
            ConfigError: if one of the domains has no image, or an image no label map.
        """
        domains = split_domains(data_samples)
        labels = ground_truth(data_samples)
        extents = [tuple(sample.metainfo.get('img_shape', labels.shape[1:])[:2]) for sample in data_samples]
        source, target, extents = (
            torch.tensor(each).to(labels.device, non_blocking=True) for each in (*domains, extents)
        )
        return cls(source, target, labels, extents)

    def split(self, each: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The source's and the target's part of something that has an entry for each image."""
        return each.index_select(0, self.source), each.index_select(0, self.target)

    def on_images(self, size: Sequence[int], align_corners: bool = False) -> torch.Tensor:
        """Which positions of a (h, w) map lie on images and not on padding, (B, h, w) bool."""
        rows, columns = (
            pixels_of(number, side, align_corners, self.labels.device)
            for number, side in zip(size, self.labels.shape[1:])
        )
        return (rows < self.extents[:, :1])[:, :, None] & (columns < self.extents[:, 1:])[:, None]

    def valid(self, size: Sequence[int], ignored: int, align_corners: bool = False) -> torch.Tensor:
        """Which positions of a (h, w) map count: the source's labeled ones and all on the target's images."""
        unlabeled = torch.zeros_like(self.extents[:, 0], dtype=torch.bool).index_fill_(0, self.target, True)
        labeled = resize_labels(self.labels, size, align_corners) != ignored
        return self.on_images(size, align_corners) & (labeled | unlabeled[:, None, None])


@DISTILLERS.register_module()
class DAKD(Distiller):
    """Distils a segmentor for a target domain without labels, aligning its outputs; ``docs/methods/dakd.md``.

    ========================== ====================================================================================
    loss_kl                    ``kl_weight`` times the divergence of the decode heads' pixels
    loss_auxiliary_kl          ``auxiliary_kl_weight`` times that of the auxiliary heads
    loss_mse                   ``mse_weight`` times :func:`log_probability_distance` of the auxiliary heads
    loss_pseudo                ``pseudo_weight`` times :func:`pseudo_label_loss` of the decode heads
    loss_adversarial           ``adversarial_weight`` times the student's :func:`adversarial_losses`
    loss_auxiliary_adversarial ``auxiliary_adversarial_weight`` times the same of the auxiliary head
    loss_critic                both critics' :func:`adversarial_losses`
    ========================== ====================================================================================

    The first four are sums of the source's labeled pixels' mean and ``target_weight`` times that of all pixels on the
    target's images. Each batch needs images of both domains, see :mod:`mmkd.data.domains`. The critics are trained by the
    student's optimizer and need a learning rate of their own, by the name of the entry, see ``configs/dakd_deeplabv3.py``.

    Args:
        layer: The student's layer that puts out class logits. Default: its decode head's, ``'decode_head.conv_seg'`` or
            of a cascade ``'decode_head.1.conv_seg'``.
        auxiliary_layer: The one of its auxiliary head. Default ``'auxiliary_head.conv_seg'``, where it has one such head.
        kl_weight: A number or a schedule, as all weights are. Default 0.1.
        auxiliary_kl_weight: Default 0.01.
        mse_weight: Default 0.01.
        pseudo_weight: Default 1.
        adversarial_weight: Default 1e-3.
        auxiliary_adversarial_weight: Default 2e-4.
        target_weight: Of the target in the first four losses. Default 1.
        reduction: Of the divergence: ``'element_mean'`` (default), ``'pixel_mean'``, ``'image_sum'`` or ``'sum'``.
        threshold: The teacher's least probability for a pseudo label. Default None: every one counts.
        label_size: Whether the logits of both are first resized to the size of the labels. Default False.
        upsample: Whether the student's logits are resized to the size of the images before the critics see them. Default
            True. False takes the size of the logits, 32 at least.
        critic_channels: Of the critics' first layer. Default 64.
        teacher_layer: The teacher's layer, where its name differs from ``layer``. Default, without either: as ``layer``.
        teacher_auxiliary_layer: The same of its auxiliary layer.

    Raises:
        ConfigError: in training, if a batch has no image of one of the domains.

    Example:
        >>> distillers = dict(dakd=dict(type='DAKD'))
    """

    renamed = {
        'auxiliary_weight': 'auxiliary_kl_weight = auxiliary_weight * kl_weight',
        'auxiliary_teacher_layer': 'teacher_auxiliary_layer',
    }

    def __init__(
        self,
        layer: str | None = None,
        auxiliary_layer: str | None = None,
        kl_weight: float | Mapping = 0.1,
        auxiliary_kl_weight: float | Mapping = 0.01,
        mse_weight: float | Mapping = 0.01,
        pseudo_weight: float | Mapping = 1.0,
        adversarial_weight: float | Mapping = 1e-3,
        auxiliary_adversarial_weight: float | Mapping = 2e-4,
        target_weight: float | Mapping = 1.0,
        reduction: str = 'element_mean',
        threshold: float | None = None,
        label_size: bool = False,
        upsample: bool = True,
        critic_channels: int = 64,
        teacher_layer: str | None = None,
        teacher_auxiliary_layer: str | None = None,
    ):
        super().__init__()
        layer, auxiliary_layer = layer or heads.logits_layer, auxiliary_layer or heads.auxiliary_layer
        self.levels = LevelPairs(
            (layer, auxiliary_layer), (teacher_layer or layer, teacher_auxiliary_layer or auxiliary_layer)
        )
        if reduction not in REDUCTIONS:
            raise ConfigError(f'reduction={reduction!r}: expected one of {", ".join(REDUCTIONS)}')
        if threshold is not None and not (is_number(threshold) and 0 <= threshold <= 1):
            raise ConfigError(f'threshold={threshold!r}: expected a probability, or None')
        if not (is_whole(critic_channels) and critic_channels >= 1):
            raise ConfigError(f'critic_channels={critic_channels!r}: expected a positive number of channels')
        self.kl_weight = Weight(kl_weight, 'kl_weight')
        self.auxiliary_kl_weight = Weight(auxiliary_kl_weight, 'auxiliary_kl_weight')
        self.mse_weight = Weight(mse_weight, 'mse_weight')
        self.pseudo_weight = Weight(pseudo_weight, 'pseudo_weight')
        self.adversarial_weight = Weight(adversarial_weight, 'adversarial_weight')
        self.auxiliary_adversarial_weight = Weight(auxiliary_adversarial_weight, 'auxiliary_adversarial_weight')
        self.target_weight = Weight(target_weight, 'target_weight')
        self.reduction = reduction
        self.threshold = threshold
        self.label_size = label_size
        self.upsample = upsample
        self.critic_channels = critic_channels

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        self.levels.prepare(student, teacher)
        self.student_layers, self.teacher_layers = self.levels.student_layers, self.levels.teacher_layers

    def setup(self, student: Taps, teacher: Taps) -> None:
        for layer, other in zip(self.student_layers, self.teacher_layers):
            require_class_logits(student, layer, teacher, other)
        self.levels.setup(student, teacher)
        self.critics = nn.ModuleDict(
            {
                name: domain_critic(maps(student, layer)[0].shape[1], self.critic_channels)
                for name, layer in zip(('main', 'auxiliary'), self.student_layers)
            }
        )

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        domains = Domains.of(data_samples)
        return self.distillation(student, teacher, domains) | self.adversarial(student, domains)

    def distillation(self, student: Taps, teacher: Taps, domains: Domains) -> dict[str, torch.Tensor]:
        """What the student learns from the teacher."""
        size = domains.labels.shape[1:] if self.label_size else None
        logits = compared_logits(self.levels, student, teacher, size)
        sizes = {s.shape[2:] for s, _ in logits}  # one, but for heads of different strides
        head = heads.decode_head(student.model)
        valid = {size: domains.split(domains.valid(size, head.ignore_index, head.align_corners)) for size in sizes}
        main, auxiliary = (zip(domains.split(s), domains.split(t), valid[s.shape[2:]]) for s, t in logits)
        kl = auxiliary_kl = mse = pseudo = 0.0
        for gamma, (s, t, v), (s_aux, t_aux, v_aux) in zip((1.0, self.target_weight()), main, auxiliary):
            kl = kl + gamma * pixel_divergence(s, t, 1.0, self.reduction, v)
            auxiliary_kl = auxiliary_kl + gamma * pixel_divergence(s_aux, t_aux, 1.0, self.reduction, v_aux)
            mse = mse + gamma * log_probability_distance(s_aux, t_aux, v_aux)
            pseudo = pseudo + gamma * pseudo_label_loss(s, t, v, self.threshold)
        return {
            'loss_kl': self.kl_weight() * kl,
            'loss_auxiliary_kl': self.auxiliary_kl_weight() * auxiliary_kl,
            'loss_mse': self.mse_weight() * mse,
            'loss_pseudo': self.pseudo_weight() * pseudo,
        }

    def adversarial(self, student: Taps, domains: Domains) -> dict[str, torch.Tensor]:
        """What the student pays for being found out, and the critics for not finding it out."""
        tell, losses = 0.0, {}
        weights = dict(
            loss_adversarial=self.adversarial_weight(), loss_auxiliary_adversarial=self.auxiliary_adversarial_weight()
        )
        for layer, critic, (key, weight) in zip(self.student_layers, self.critics.values(), weights.items()):
            (logits,) = maps(student, layer)
            size = domains.labels.shape[1:] if self.upsample else logits.shape[2:]
            size = [max(side, CRITIC_STRIDE) for side in size]
            source, target = (resize_logits(each, size, student.model).softmax(1) for each in domains.split(logits))
            valid = domains.split(domains.on_images([side // CRITIC_STRIDE for side in size]))
            deceives, tells = adversarial_losses(critic, source, target, valid)
            losses[key], tell = weight * deceives, tell + tells
        return losses | {'loss_critic': tell}
