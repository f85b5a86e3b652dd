"""Labels that are believed as far as the teacher believes them, for data whose labels are noisy."""

import torch
from torch import nn

from mmkd.distillers.generic.kd import KD
from mmkd.errors import ConfigError
from mmkd.hosts.class_logits import ClassLogits
from mmkd.hosts.segmentation.label_weights import check_label_weights
from mmkd.hosts.segmentation.labels import ground_truth, ignore_index
from mmkd.hosts.segmentation.logits import resize_logits
from mmkd.registry import DISTILLERS
from mmkd.taps import Taps


@torch.no_grad()
def trust(teacher: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The teacher's probability of each label; 1 where there is none.

    Args:
        teacher: (B, K, H, W), logits.
        labels: (B, H, W) int64, 0 to K - 1, or -1 for none.

    Returns:
        (B, H, W), in [0, 1].
    """
    probability = teacher.softmax(1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return probability.where(labels >= 0, 1.0)


@DISTILLERS.register_module()
class Trust(KD):
    """Soft targets, and labels that count as far as the teacher agrees, for segmentors; ``docs/methods/trust.md``.

    ``loss`` is that of :class:`mmkd.distillers.KD`, whose options it has. Beside it the student's own losses, of decode and
    auxiliary heads, count each pixel times :func:`trust`, with the teacher's logits of the (first) layer at the size of the
    labels; what they divide by is as ever. In steps in which the teacher is not read, or the weight is 0, they count fully.

    Raises:
        ConfigError: for a detector, for several teachers or the student itself, for losses that take no weights of pixels, and
            as KD.

    Example:
        >>> distillers = dict(trust=dict(type='Trust'))
    """

    renamed = {}

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        if not hasattr(student, 'decode_head'):
            raise ConfigError(
                f'{type(student).__name__} is no segmentor, and Trust weighs the label of each pixel; use KD for a detector'
            )
        check_label_weights(student)
        self.ignored = ignore_index(student)
        super().prepare(student, teacher)

    def label_weights(self, teacher: Taps, data_samples: list | None) -> torch.Tensor:
        """How much the student's own losses count at each pixel of the labels, (B, H, W); asked before its pass."""
        labels = ground_truth(data_samples)
        labels = labels.masked_fill(labels == self.ignored, -1)
        logits = teacher[self.teacher_layers[0]][0]
        logits = resize_logits(logits.float(), labels.shape[1:], teacher.model)
        if teacher.classes is not None:
            logits = teacher.classes.of_teacher(logits)
        return trust(logits, ClassLogits(logits, logits, False, None, teacher.classes).positions_of(labels))
