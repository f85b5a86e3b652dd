"""A second model that is trained along as a source: mutual learning."""

import copy
from collections.abc import Callable, Mapping

import torch
from torch import nn

from mmkd.errors import ConfigError
from mmkd.hosts.configs import build_model, read_teacher
from mmkd.hosts.partial_labels import partly_labelled
from mmkd.hosts.running import without_labels
from mmkd.normalize import Renormalize
from mmkd.registry import SOURCES
from mmkd.sources.source import Kept, Source
from mmkd.taps import Taps
from mmkd.weights import load_weights


@SOURCES.register_module()
class Peer(Source):
    """A model that is trained beside the student, by its own losses and by the distillers whose ``learner`` it is.

    Its own losses are logged as ``<name>.loss_*``. What the student reads of it has no gradient. It is trained by the same
    optimizer, is in the checkpoint as ``sources.<name>.*``, and ``mmkd export`` leaves it out unless told to
    write it.

    Args:
        config: A config's name or path, or a model's config, as for a teacher.
        checkpoint: Weights to start from. Default None: those of its config's ``init_cfg``.
        interval: See :class:`mmkd.sources.source.Source`, as ``begin`` and ``end``.
        begin: Default 0.
        end: Default None.

    Example:
        Deep mutual learning, Zhang et al., CVPR 2018, arXiv 1706.00384:

        >>> teacher = dict(peer=dict(type='Peer', config=...), own=dict(type='Own'))
        >>> distillers = dict(
        ...     down=dict(type='KD', teacher='peer'),
        ...     up=dict(type='KD', learner='peer', teacher='own'))
    """

    has_gradient = True

    def __init__(
        self,
        config: str | Mapping,
        checkpoint: str | None = None,
        interval: int = 1,
        begin: int = 0,
        end: int | None = None,
    ):
        super().__init__(interval, begin, end)
        read = read_teacher(dict(config=config))
        self.model = build_model(read.model, read.scope, 'config')
        self.checkpoint = checkpoint
        self.kept = Kept(self.model, trained=True)
        self._renormalize: Renormalize | None = None
        self._loaded = False

    def follow(self, preprocessor: nn.Module) -> None:
        self._renormalize = Renormalize.between(preprocessor, self.model.data_preprocessor)

    def load(self, device: torch.device | str = 'cpu', then: Callable[[nn.Module], None] | None = None) -> None:
        if self._loaded:
            return
        self._loaded = True
        self.model.init_weights()
        if self.checkpoint is not None:
            load_weights(self.model, self.checkpoint, f'{self.name}.checkpoint')
        if then is not None:
            then(self.model)
        self.model.to(device)

    def apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self._renormalize is not None:
            self._renormalize.apply(function)

    def read(self, student: nn.Module, inputs: torch.Tensor, data_samples: list | None) -> tuple[Taps, dict]:
        if without_labels(self.model, data_samples) or partly_labelled(data_samples):
            raise ConfigError(
                f'{self.name}: a batch has images without labels, or with labels for some classes alone, of which a peer would '
                f'learn the rest as background; train it on labelled images'
            )
        if self._renormalize is not None:
            inputs = self._renormalize(inputs, data_samples)
        with Taps(self.model, self.layers, images=len(inputs)) as taps:
            losses = self.model(inputs, copy.deepcopy(data_samples), mode='loss')
        return taps, losses
