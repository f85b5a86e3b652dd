"""Augmentation-free dense contrastive distillation (Af-DCD).

Fan, Li, Liu, Song, Yao, "Augmentation-free Dense Contrastive Distillation for Efficient Semantic Segmentation",
NeurIPS 2023.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from mmkd.distillers.base import Distiller
from mmkd.distillers.generic.mgd import generator, random_mask
from mmkd.distillers.levels import LevelPairs
from mmkd.distillers.schedule import Weight
from mmkd.errors import ConfigError
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps
from mmkd.values import check_temperature, is_number, is_whole


def patches(feature: torch.Tensor, groups: int, patch: int) -> torch.Tensor:
    """Each patch of a map as one vector for each of its positions and groups of channels.

    Rows and columns that no whole patch has are left out; a map that is smaller than a patch is one.

    Args:
        feature: (B, C, H, W), C a multiple of ``groups``.
        groups: M, of neighbouring channels.
        patch: Height and width of a patch, in positions.

    Returns:
        (B * number of patches, positions of a patch * M, C / M).
    """
    height, width = (min(patch, side) for side in feature.shape[2:])
    rows, columns = feature.shape[2] // height, feature.shape[3] // width
    feature = feature[:, :, : rows * height, : columns * width]
    feature = feature.unflatten(1, (groups, -1)).unflatten(3, (rows, height)).unflatten(5, (columns, width))
    return feature.permute(0, 3, 5, 4, 6, 1, 2).flatten(3, 5).flatten(0, 2)


def dense_contrastive_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    tau: float = 0.07,
    groups: int = 16,
    pool: int = 4,
    patch: int = 4,
) -> torch.Tensor:
    r"""Contrast of a position's group of channels with the other groups of the teacher's patch around it.

    Both maps are pooled (the maximum of ``pool`` x ``pool`` positions) and cut into patches. With i, j over the positions of
    a patch, m, n over the M groups of channels, and N the number of positions of all patches of the batch,

    .. math::
        L = -\frac{1}{N} \sum_{i, m} \log \frac{e^{-d_{im,im} / \tau}}
        {e^{-d_{im,im} / \tau} + \sum_j \sum_{n \neq m} e^{-d_{im,jn} / \tau}}, \qquad
        d_{im,jn} = \lVert s_{im} - t_{jn} \rVert_1

    The same group at another position of the patch is neither. A sum over groups, so that it is about M times the mean.

    A patch's distances take (positions * M)^2 * 4 bytes: 262 kB by default, 17 MB for two images of 64x128 positions.

    Args:
        student: (B, C, H, W), C a multiple of ``groups``.
        teacher: The same shape; no gradient flows into it.
        tau: Temperature.
        groups: M.
        pool: Height and width of the windows, in positions; of a smaller map its own.
        patch: Height and width of a patch, in pooled positions.

    Returns:
        A scalar, not negative.
    """
    window = tuple(min(pool, side) for side in student.shape[2:])
    s, t = (patches(F.max_pool2d(each, window), groups, patch) for each in (student, teacher.detach()))
    logits = -torch.cdist(s, t, p=1) / tau
    group = torch.arange(s.shape[1], device=s.device) % groups
    other = group[:, None] != group
    positive = logits.diagonal(dim1=1, dim2=2)
    logits = logits.masked_fill(~(other | torch.eye(len(group), dtype=torch.bool, device=s.device)), -torch.inf)
    return (logits.logsumexp(2) - positive).sum() / (logits.shape[0] * logits.shape[1] / groups)


@DISTILLERS.register_module()
class AfDCD(Distiller):
    """Masked generation of the teacher's feature, and dense contrast with it; ``docs/methods/afdcd.md``.

    ============= ===================================================================================================
    loss_feature  ``feature_weight`` times the squared distance of the generated feature from the teacher's, summed
                  over channels and positions, mean over images: that of :class:`mmkd.distillers.generic.mgd.MGD`
    loss_contrast ``contrast_weight`` times :func:`dense_contrastive_loss` of the generated feature and the teacher's
    ============= ===================================================================================================

    Both are summed over layers. The student's feature is adapted, masked and sent through a generator, which is trained
    with the student and not needed afterwards. No augmentation, memory or ground truth. Neither loss is 0 for equal networks.

    Args:
        layer: The student's layer, or a list. The authors' is the last stage of the backbone.
        feature_weight: A number or a schedule, as the next. Default 2e-6; it belongs to a size of the map, 2048 channels of
            64x128 positions.
        contrast_weight: Default 0.005.
        mask_ratio: The probability that a position is masked. Default 0.75.
        tau: Temperature of the contrast, positive. Default 0.07; it belongs to groups of 128 channels.
        groups: Groups of channels that are contrasted; they divide the teacher's channels. Default 16.
        pool: Height and width of what is pooled before the contrast, in positions. Default 4.
        patch: Height and width of a patch, in pooled positions. Default 4.
        teacher_layer: The teacher's layer, where its name differs.
        adapter: ``'auto'`` (1x1 convolution exactly where channels differ), None or a dict; before the mask.
        match: ``'stride'`` or ``'index'``: which levels belong together, see
            :class:`mmkd.distillers.levels.LevelPairs`.

    Raises:
        ConfigError: where the teacher's channels are no multiple of ``groups``.

    Example:
        >>> distillers = dict(kd=dict(type='KD'), afdcd=dict(type='AfDCD', layer='backbone.layer4'))
    """

    any_scale = True

    def __init__(
        self,
        layer: str | Sequence[str],
        feature_weight: float | Mapping = 2e-6,
        contrast_weight: float | Mapping = 0.005,
        mask_ratio: float = 0.75,
        tau: float = 0.07,
        groups: int = 16,
        pool: int = 4,
        patch: int = 4,
        teacher_layer: str | Sequence[str] | None = None,
        adapter: str | Mapping | None = 'auto',
        match: str = 'stride',
    ):
        super().__init__()
        self.levels = LevelPairs(layer, teacher_layer, adapter, match)
        self.student_layers, self.teacher_layers = self.levels.student_layers, self.levels.teacher_layers
        if not (is_number(mask_ratio) and 0 <= mask_ratio < 1):
            raise ConfigError(f'mask_ratio={mask_ratio!r}: expected a probability of at least 0 and below 1')
        check_temperature(tau)
        for name, value, least in (('groups', groups, 2), ('pool', pool, 1), ('patch', patch, 1)):
            if not (is_whole(value) and value >= least):
                raise ConfigError(f'{name}={value!r}: expected a whole number of at least {least}')
        self.feature_weight = Weight(feature_weight, 'feature_weight')
        self.contrast_weight = Weight(contrast_weight, 'contrast_weight')
        self.mask_ratio, self.tau, self.groups, self.pool, self.patch = mask_ratio, tau, groups, pool, patch

    def setup(self, student: Taps, teacher: Taps) -> None:
        self.levels.setup(student, teacher)
        channels = [each.shape[1] for each in self.levels.unadapted(student, teacher)[1]]
        for number in channels:
            if number % self.groups:
                raise ConfigError(
                    f"groups={self.groups}: does not divide the {number} channels of the teacher's feature"
                )
        self.generators = nn.ModuleList(generator(number) for number in channels)

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        feature = contrast = 0.0
        for (s, t, *_), generate in zip(self.levels(student, teacher), self.generators, strict=True):
            generated = generate(s * random_mask(s, self.mask_ratio))
            feature = feature + (generated - t).square().sum() / len(t)
            contrast = contrast + dense_contrastive_loss(generated, t, self.tau, self.groups, self.pool, self.patch)
        return {
            'loss_feature': self.feature_weight() * feature,
            'loss_contrast': self.contrast_weight() * contrast,
        }
