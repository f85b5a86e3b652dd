"""Transformer knowledge distillation (TransKD): stages fused by channel attention, and patch embeddings.

Liu, Yang, Roitberg, Zhang, Peng, Liu, Wang, Stiefelhagen, "TransKD: Transformer Knowledge Distillation for Efficient Semantic
Segmentation", IEEE Transactions on Intelligent Transportation Systems, arXiv 2202.13393.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from mmkd.distillers.base import Distiller
from mmkd.distillers.generic.fitnet import hint_loss
from mmkd.distillers.generic.reviewkd import Fusion, Fusions
from mmkd.distillers.levels import LevelPairs, layer_names
from mmkd.distillers.schedule import Weight
from mmkd.errors import ConfigError
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps
from mmkd.values import is_whole

PATCH_EMBEDDINGS = tuple(f'backbone.layers.{stage}.0' for stage in range(4))
"""Those of mmseg's MixVisionTransformer, which SegFormer has, and of mmdet's PyramidVisionTransformer."""
REDUCTION, MIN_HIDDEN = 16, 32
"""The hidden layer of the attention has a sixteenth of the channels, and 32 at least, as in selective kernel networks."""


class ChannelSelection(nn.Module):
    r"""How much of each channel is taken of two maps, as in selective kernel networks.

    .. math::
        z = \operatorname{ReLU}\big( \operatorname{BN}( W \operatorname{mean}_a (x + y) ) \big), \qquad
        (a_c, b_c) = \operatorname{softmax}(u_c z + p_c,\; v_c z + q_c)

    The batch norm is over the images of the process. A single one has no mean and variance, and is scaled and shifted alone.

    Args:
        channels: C, of both maps.
    """

    def __init__(self, channels: int):
        super().__init__()
        hidden = max(channels // REDUCTION, MIN_HIDDEN)
        self.squeeze = nn.Linear(channels, hidden, bias=False)
        self.norm = nn.BatchNorm1d(hidden, track_running_stats=False)
        self.select = nn.Linear(hidden, 2 * channels)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Sequence[torch.Tensor]:
        """a and b, (B, C, 1, 1) each, which sum to 1, of maps (B, C, H, W)."""
        z = self.squeeze((x + y).mean((2, 3)))
        z = self.norm(z) if len(z) > 1 else z * self.norm.weight + self.norm.bias
        return self.select(z.relu()).unflatten(1, (2, -1)).softmax(1)[..., None, None].unbind(1)


class SelectiveFusion(Fusion):
    """Cross selective fusion (CSF) of a level with what comes from the next deeper one.

    :class:`mmkd.distillers.generic.reviewkd.Fusion`, with the a and b of :class:`ChannelSelection`.
    """

    def attention(self, channels: int) -> nn.Module:
        return ChannelSelection(channels)

    def shares(self, x: torch.Tensor, y: torch.Tensor) -> Sequence[torch.Tensor]:
        return self.attend(x, y)


@DISTILLERS.register_module()
class TransKD(Distiller):
    r"""Stages and patch embeddings of hierarchical transformers, TransKD-Base; ``docs/methods/transkd.md``.

    ============================== ================================================================================
    loss_feature                   ``feature_weight`` times the sum over stages of ReviewKD's
                                   :func:`mmkd.distillers.generic.reviewkd.context_loss`, of the student's stages
                                   from the last to the first, see :class:`SelectiveFusion`
    loss_embedding                 the sum over stages of ``embedding_weight`` times the mean square between the
                                   student's patch embeddings, each token projected linearly, and the teacher's
    ============================== ================================================================================

    Fusions and projections are trained with the student and not needed afterwards. No ground truth. The losses are not 0 for
    equal networks.

    Args:
        layer: The student's layer of all stages, or a list of layers, the finest first. Default ``'backbone'``.
        embedding_layer: The student's patch embeddings, which put out tokens, (B, H W, C), and their (H, W), or maps. Default
            those of SegFormer and PVT.
        channels: Of the fused maps. Default 64.
        feature_weight: A number or a schedule. Default 1.
        embedding_weight: A list of numbers or schedules, one for each of ``embedding_layer``. Default 0.1, 0.1, 0.5 and 1.
        teacher_layer: The teacher's layer of all stages, where its name differs.
        teacher_embedding_layer: The teacher's patch embeddings, where their names differ.

    Raises:
        ConfigError: for a single stage, for networks without such patch embeddings, and for other numbers of weights than of
            embeddings.

    Example:
        >>> distillers = dict(transkd=dict(type='TransKD'))
    """

    any_scale = True

    def __init__(
        self,
        layer: str | Sequence[str] = 'backbone',
        embedding_layer: str | Sequence[str] = PATCH_EMBEDDINGS,
        channels: int = 64,
        feature_weight: float | Mapping = 1.0,
        embedding_weight: Sequence[float | Mapping] = (0.1, 0.1, 0.5, 1.0),
        teacher_layer: str | Sequence[str] | None = None,
        teacher_embedding_layer: str | Sequence[str] | None = None,
    ):
        super().__init__()
        if not (is_whole(channels) and channels >= 1):
            raise ConfigError(f'channels={channels!r}: expected a whole number of at least 1')
        self.channels = channels
        if isinstance(embedding_weight, str) or not isinstance(embedding_weight, Sequence):
            raise ConfigError(
                f'embedding_weight={embedding_weight!r}: expected a list of numbers, one for each embedding'
            )
        own = layer_names('embedding_layer', embedding_layer)
        others = own if teacher_embedding_layer is None else teacher_embedding_layer
        self.levels = LevelPairs(layer, teacher_layer, same_channels=False)
        self.embeddings = LevelPairs(own, layer_names('teacher_embedding_layer', others), dict(type='ConvAdapter'))
        self.student_layers = (*self.levels.student_layers, *self.embeddings.student_layers)
        self.teacher_layers = (*self.levels.teacher_layers, *self.embeddings.teacher_layers)
        self.feature_weight = Weight(feature_weight, 'feature_weight')
        self.embedding_weight = nn.ModuleList(Weight(each, 'embedding_weight') for each in embedding_weight)

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        for whose, option, model, layers in (
            ('student', 'embedding_layer', student, self.embeddings.student_layers),
            ('teacher', 'teacher_embedding_layer', teacher, self.embeddings.teacher_layers),
        ):
            there = dict(model.named_modules())
            missing = [each for each in layers if each in PATCH_EMBEDDINGS and each not in there]
            if missing:
                raise ConfigError(
                    f'the {whose}, {type(model).__name__}, has no {missing[0]!r}, a patch embedding of SegFormer and PVT; '
                    f'name its own in {option}, or take ReviewKD'
                )

    def setup(self, student: Taps, teacher: Taps) -> None:
        self.levels.setup(student, teacher)
        self.embeddings.setup(student, teacher)
        if len(self.embeddings.pairs) != len(self.embedding_weight):
            raise ConfigError(
                f'embedding_weight: {len(self.embedding_weight)} weights for {len(self.embeddings.pairs)} patch embeddings '
                f'({", ".join(self.embeddings.student_layers)}); give each its own'
            )
        features, targets = self.levels.unadapted(student, teacher)
        self.fusions = Fusions(SelectiveFusion, features, targets, self.channels, self.levels.student_layers)

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        distances = [
            weight() * hint_loss(pair.student, pair.teacher)
            for weight, pair in zip(self.embedding_weight, self.embeddings(student, teacher), strict=True)
        ]
        return {
            'loss_feature': self.feature_weight() * self.fusions(self.levels(student, teacher)),
            'loss_embedding': sum(distances),
        }
