"""The interface of a source of knowledge, and the sources that a student has, by name."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from mmengine.model import BaseModel
from torch import nn

from mmkd.classes import ClassMap
from mmkd.errors import ConfigError
from mmkd.hosts.configs import SINGLE
from mmkd.registry import SOURCES, build
from mmkd.taps import Taps
from mmkd.values import is_whole


class Source:
    """Something a student learns from: it is read once per training step and gives taps.

    Args:
        interval: It is read in every ``interval``-th step, counted from ``begin``. Default 1.
        begin: The first step in which it is read. Default 0.
        end: The first step in which it is not read any more. Default None: there is none.

    Attributes:
        model: What is tapped.
        layers: What any distiller reads of it; set by :func:`mmkd.distill`.
        calls: How often a forward pass calls each of these layers, where that is always the same; set alike.
        size: Height and width of an image that the model runs over; set alike.
        view: The name of the image that it sees in place of the student's, see :mod:`mmkd.data.views`; None for the same one.
        classes: Which of the student's classes the model's are, where they are not the same; set by :meth:`name_classes`.
        kept: What is trained or stored with the student, as ``sources.<name>.*``; None for a frozen teacher.
        name: What it is called in the config, for errors; set by :func:`build_sources`.

    Raises:
        ConfigError: for steps that are no whole numbers, or none at all.
    """

    model: BaseModel
    kept: 'Kept | None' = None
    classes: ClassMap | None = None
    scale: float = 1.0
    """The size of the images that the model sees, relative to the student's."""
    frozen: bool = False
    """Whether :meth:`load` reads its weights, which then stay as they are, so that a student can inherit them."""
    loaded_alone: bool = False
    """Whether :meth:`load` was called by itself, so that nothing of the student could start from its weights."""
    view: str | None = None
    labels: bool = False
    """Whether it is asked for pseudo labels; set by :func:`mmkd.distill`."""
    trains_heads: bool = False
    """Whether losses of its own train the student's heads."""
    has_gradient: bool = False
    """Whether its taps carry gradients, which those who learn from it must not follow."""

    def __init__(self, interval: int = 1, begin: int = 0, end: int | None = None):
        for option, value, least in (('interval', interval, 1), ('begin', begin, 0), ('end', end, begin + 1)):
            if value is not None and not (is_whole(value) and value >= least):
                raise ConfigError(f'{option}={value!r}: expected a whole number of at least {least}')
        self.interval, self.begin, self.end = interval, begin, math.inf if end is None else end
        self.layers: tuple[str, ...] = ()
        self.calls: dict[str, int] | None = None
        self.size = (256, 256)
        self.name = 'teacher'

    def due(self, iteration: int) -> bool:
        """Whether it is read in a step at all."""
        return self.begin <= iteration < self.end and (iteration - self.begin) % self.interval == 0

    def start_step(self, student: nn.Module, iteration: int) -> None:
        """Called in each training step, whether it is read or not, with the student as the step before left it."""

    def name_classes(self, student: Sequence[str] | None) -> None:
        """Learn the names of the student's classes, in the order of its head; None where they are not known.

        Raises:
            ConfigError: for a map of classes that cannot be.
        """

    def follow(self, preprocessor: nn.Module) -> None:
        """From now on the inputs are batches that this data preprocessor, the student's, has normalized."""

    def load(self, device: torch.device | str = 'cpu', then: Callable[[nn.Module], None] | None = None) -> None:
        """Get the weights, apart from the student's ``init_weights``; a second call does nothing.

        Args:
            device: Where to.
            then: Called with the model when it has its weights, before it is changed for speed.

        Raises:
            ConfigError: if there are none, or they do not fit.
        """

    def apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Move or convert what is not ``kept``, as ``nn.Module._apply`` does; called with the student's."""

    def seen(self, inputs: torch.Tensor, data_samples: list | None) -> torch.Tensor:
        """A batch that is normalized for the student, (B, 3, H, W), as the model sees it."""
        return inputs

    def predict(self, student: nn.Module, inputs: torch.Tensor, data_samples: list) -> list:
        """What the model says of a batch that is normalized for the student, in the student's pixels, for pseudo labels.

        Returns:
            For each image boxes, scores and labels of a detector, or class logits of a segmentor, (K, H, W) of the input's size.

        Raises:
            ConfigError: if it labels nothing.
        """
        raise ConfigError(f'{self.name}: a {type(self).__name__} labels no images; a Teacher or an Average does')

    def read(
        self, student: nn.Module, inputs: torch.Tensor, data_samples: list | None
    ) -> tuple[Taps | None, dict[str, torch.Tensor]]:
        """What it says of a batch that is normalized for the student, (B, 3, H, W).

        Returns:
            The taps, or None for the student's own ones; and losses of its own, which are logged as ``<name>.<key>``.
        """
        raise NotImplementedError(f'{type(self).__name__} has no read')


class Kept(nn.Module):
    """A model that is stored with the student, ``sources.<name>.model.*``.

    Args:
        model: The model.
        trained: Whether it is trained as well; if not it stays in eval mode and has no gradients.
    """

    def __init__(self, model: nn.Module, trained: bool):
        super().__init__()
        self.model, self.trained = model, trained
        if not trained:
            self.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> 'Kept':
        return super().train(mode and self.trained)


class Sources(nn.Module):
    """The sources of one student, by name: ``model.sources['large']``.

    As a module it has the kept ones alone, so that nothing that walks over the student's modules finds a frozen teacher.
    """

    def __init__(self, sources: Mapping[str, Source]):
        super().__init__()
        self._sources = dict(sources)
        for name, source in self._sources.items():
            if source.kept is not None:
                self.add_module(name, source.kept)

    def __getitem__(self, name: str) -> Source:
        return self._sources[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def items(self) -> Iterator[tuple[str, Source]]:
        return iter(self._sources.items())

    def values(self) -> Iterator[Source]:
        return iter(self._sources.values())

    def load(self, device: torch.device | str, then: Callable[[str, nn.Module], None]) -> None:
        """Load all; ``then`` is called with the name and the model of each, see :meth:`Source.load`."""
        for name, source in self.items():
            source.load(device, functools.partial(then, name))

    def _apply(self, fn: Callable, *args, **kwargs):
        for source in self.values():  # `.to()`, `.cuda()`, `.half()` take them along
            source.apply(fn)
        return super()._apply(fn, *args, **kwargs)


def build_sources(teacher: object, student: nn.Module) -> dict[str, Source]:
    """What a config's ``teacher`` describes, by name; one alone is called ``'teacher'``.

    Args:
        teacher: See :func:`mmkd.distill`.
        student: The student, for sources that are made of it.

    Raises:
        ConfigError: for a name that cannot be logged, a source that does not exist, or an option that it does not have.
    """
    specs: Mapping[str, Any] = {'teacher': teacher}
    several = isinstance(teacher, Mapping) and not SINGLE & set(teacher)
    if isinstance(teacher, Mapping) and several:
        specs = teacher
    if not specs:
        raise ConfigError("teacher={}: expected a config's name, a dict with config, or several of these by name")
    sources: dict[str, Source] = {}
    for name, spec in specs.items():
        if 'loss' in name or '.' in name or hasattr(Sources, name):
            raise ConfigError(
                f"teacher.{name}: a name starts the log keys and must not contain 'loss' or a dot, nor be a method of "
                f'nn.Module; choose another'
            )
        option = f'teacher.{name}' if several else 'teacher'
        if isinstance(spec, (str, nn.Module)):
            spec = dict(config=spec)
        if isinstance(spec, Mapping):
            spec = build(SOURCES, option, {'type': 'Teacher', **spec}, student=student)
        if not isinstance(spec, Source):
            raise ConfigError(
                f"{option}={spec!r}: expected a config's name, a dict with config, a built model, or a subclass of "
                f'mmkd.sources.Source'
            )
        for attribute, advice in (('begin', 'has to call super().__init__()'), ('model', 'has to set self.model')):
            if not hasattr(spec, attribute):
                raise ConfigError(f'{option}: {type(spec).__name__}.__init__ {advice}')
        spec.name = option
        sources[name] = spec
    return sources
