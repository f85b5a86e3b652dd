"""More decode heads on a segmentor's backbone, which learn beside its own and are left out when it is trained."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from mmengine.model import BaseModule
from torch import nn

from mmkd.errors import ConfigError, describe
from mmkd.hosts.partial_labels import partly_labelled
from mmkd.hosts.running import modes_kept
from mmkd.hosts.segmentation.heads import feature_layer, inputs_layer, logits_layer
from mmkd.hosts.segmentation.logits import require_class_logits
from mmkd.taps import Taps


class Branch(NamedTuple):
    """What one of :class:`Branches` makes of a batch."""

    logits: torch.Tensor
    """(B, K, h, w)."""
    feature: torch.Tensor
    """(B, C, h, w), what is classified, before dropout."""
    losses: dict[str, torch.Tensor]
    """The head's own, and its statistics, as mmseg names them."""


class Branches(nn.ModuleList):
    """Decode heads beside a segmentor's own: of its kind, with other weights, over the same features.

    They are copies of ``decode_head`` that are initialized anew, each by itself, and compute in float32.

    Args:
        student: The segmentor.
        number: How many.

    Raises:
        ConfigError: for a model whose decode head cannot be repeated.
    """

    def __init__(self, student: nn.Module, number: int):
        head = _head(student)
        super().__init__(_anew(head) for _ in range(number))
        self._features = inputs_layer(student)
        self._layers = tuple(layer(student).removeprefix('decode_head.') for layer in (logits_layer, feature_layer))

    @staticmethod
    def layers(student: nn.Module, teacher: nn.Module) -> tuple[str, str]:
        """The student's layer whose maps its decode head takes in, and the one that puts out its class logits.

        Raises:
            ConfigError: for a model whose decode head cannot be repeated, or another model as its teacher.
        """
        _head(student)
        if teacher is not student:
            raise ConfigError("learns from heads of its own and from no other model; its source is dict(type='Own')")
        return inputs_layer(student), logits_layer(student)

    def check(self, student: Taps) -> None:
        """Raise ConfigError unless they put out, of the same image, logits like the student's."""
        features, logits = self._features, logits_layer(student.model)
        require_class_logits(student, logits, student, logits)
        try:
            with modes_kept(self), torch.no_grad():
                self.eval()
                shapes = {tuple(logits.shape) for logits, _, _ in self._run(student[features])}
        except ConfigError:
            raise
        except Exception as error:  # whatever a head of somebody else's raises
            kind = type(student.model.decode_head).__name__
            raise ConfigError(
                f'decode_head: a second {kind} cannot be run over what {features!r} puts out; {describe(error)}'
            ) from error
        expected = tuple(student[logits][0].shape)
        if shapes != {expected}:
            raise ConfigError(
                f'decode_head: puts out logits of {expected}, and a second one over what {features!r} puts out {shapes}; it '
                f'cannot be repeated'
            )

    def _run(self, features: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor, object]]:
        """Of each the logits, the feature, and what its forward returns."""
        found = []
        for head in self:
            with Taps(head, self._layers, images=len(features[0])) as taps:
                output = head.forward(features)
            found.append((*(taps[layer][0] for layer in self._layers), output))
        return found

    def forward(self, student: Taps, data_samples: list | None) -> list[Branch]:
        """What each makes of a batch.

        Raises:
            ConfigError: for images that are labelled for some classes alone.
        """
        if partly_labelled(data_samples):
            raise ConfigError(
                'a batch has images that are labelled for some classes alone, of which more decode heads would learn the rest as '
                'background; train them on images that are labelled for all'
            )
        features = student[self._features]
        return [
            Branch(logits, feature, head.loss_by_feat(output, data_samples))
            for head, (logits, feature, output) in zip(self, self._run(features), strict=True)
        ]


def task_losses(model: nn.Module, logits: torch.Tensor, data_samples: list | None) -> dict[str, torch.Tensor]:
    """The losses and statistics that mmseg's decode heads have of class logits, (B, K, h, w), by those of a segmentor's."""
    base = _base(model.decode_head)
    return base.loss_by_feat(model.decode_head, logits, data_samples)


def _base(head: object) -> Any:
    """mmseg's ``BaseDecodeHead``, where a head is one."""
    return next((each for each in type(head).__mro__ if each.__name__ == 'BaseDecodeHead'), None)


def _head(student: nn.Module) -> nn.Module:
    """Raise ConfigError for a decode head that is none of mmseg's usual kind."""
    head = getattr(student, 'decode_head', None)
    if _base(head) is None:
        raise ConfigError(
            f"{type(student).__name__} has no single decode_head of mmseg's usual kind (BaseDecodeHead), which is repeated; "
            f'take a segmentor with one'
        )
    return head


def _anew(head: nn.Module) -> nn.Module:
    """A copy with weights as if it were built anew."""
    made = copy.deepcopy(head).requires_grad_(True)
    for module in made.modules():
        if hasattr(module, 'reset_parameters'):
            module.reset_parameters()
    for module in made.modules():
        if isinstance(module, BaseModule):
            module.is_init = False
        elif hasattr(module, 'init_weights'):
            module.init_weights()  # ConvModule, which does so when it is built
    made.init_weights()
    return made
