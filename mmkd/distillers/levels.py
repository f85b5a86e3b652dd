"""Which levels of two networks' layers belong together, and the student's in the teacher's shape."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from mmkd.adapters import Adapters
from mmkd.distillers.uncertainty import Uncertainty
from mmkd.errors import ConfigError
from mmkd.taps import Taps, find_layer

Layer = str | Callable[[nn.Module], str | Sequence[str]]
"""A layer's name, or what gives it, or several, for a model."""


class LevelPair(NamedTuple):
    """Two maps of one stride, (B, C, H, W) each."""

    student: torch.Tensor
    """Adapted to the teacher's shape; with gradient."""
    teacher: torch.Tensor
    student_level: int
    """Which level of the student's layer this is, counted from 0."""
    teacher_level: int


class LevelPairs(nn.Module):
    """The levels of one layer (or several) of both networks that belong together.

    Calling it with both networks' taps gives a list of :class:`LevelPair`. :meth:`setup` finds the pairs and makes the
    adapters from probed shapes.

    Args:
        layer: The student's layer, a dotted name, or a list of them. In place of a name there may be a function that gives
            it, or several, for a model: :meth:`prepare` calls it for each network.
        teacher_layer: The teacher's, where its name differs.
        adapter: ``'auto'``, None or a dict, see :class:`mmkd.adapters.Adapters`.
        match: Which levels belong together. ``'stride'`` (default): those of equal size for the same image; levels
            that only one network has are left out (P2 and P7, for a P2-P6 and a P3-P7 pyramid), and two single levels
            always belong together. ``'index'``: the first with the first and so on.
        same_channels: False for a method that compares relations within each network: then both may have any number
            of channels.
        reduce: Applied to each level of both networks before the student's is adapted.

    Attributes:
        uncertainty: What is made of each of the teacher's levels before anything else, as the option ``uncertainty`` of the
            method's entry says; None: nothing.

    Raises:
        ConfigError: where the layers cannot be compared; when called, where a layer puts out another number of levels
            than it did when it was probed, or the student's have no gradient.

    Example:
        >>> self.levels = LevelPairs('neck')              # in the method's __init__
        >>> self.levels.setup(student, teacher)           # in its setup
        >>> for pair in self.levels(student, teacher):    # in its forward
        ...     loss = loss + (pair.student - pair.teacher).abs().mean()
    """

    adapters: Adapters
    uncertainty: Uncertainty | None

    def __init__(
        self,
        layer: Layer | Sequence[Layer],
        teacher_layer: Layer | Sequence[Layer] | None = None,
        adapter: str | Mapping | None = 'auto',
        match: str = 'stride',
        same_channels: bool = True,
        reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        super().__init__()
        if match not in ('stride', 'index'):
            raise ConfigError(f"match={match!r}: expected 'stride' or 'index'")
        other = layer if teacher_layer is None else teacher_layer
        self._named = layer_names('layer', layer), layer_names('teacher_layer', other)
        self.student_layers, self.teacher_layers = (
            tuple(each for each in names if isinstance(each, str)) for names in self._named
        )
        self.adapter, self.match = adapter, match
        self.same_channels, self.reduce = same_channels, reduce
        self.uncertainty = None
        self.pairs: list[tuple[int, int, int]] = []
        """For each pair which of the layers it is of, the student's level and the teacher's."""
        self._probed: dict[str, int] = {}
        self._sizes: list[str] = []

    def prepare(self, student: nn.Module, teacher: nn.Module) -> bool:
        """Name the layers that depend on the models; whether there are any."""
        self.student_layers, self.teacher_layers = (
            tuple(found for each in names for found in _names_for(each, model))
            for names, model in zip(self._named, (student, teacher), strict=True)
        )
        return not all(isinstance(each, str) for names in self._named for each in names)

    def setup(self, student: Taps, teacher: Taps) -> None:
        """Find the pairs and make the adapters, from the taps of an image."""
        self.prepare(student.model, teacher.model)
        names = (', '.join(self.student_layers), ', '.join(self.teacher_layers))
        if len(self.student_layers) != len(self.teacher_layers):
            raise ConfigError(
                f'{len(self.student_layers)} student and {len(self.teacher_layers)} teacher layers, {names[0]} and {names[1]}; '
                f'name as many of both'
            )
        self.pairs, self._sizes = [], []
        for index, (layer, other) in enumerate(zip(self.student_layers, self.teacher_layers, strict=True)):
            refuse_other_classes(student, layer, teacher, other)
            s_levels, t_levels = maps(student, layer), maps(teacher, other)
            self.pairs += [(index, i, j) for i, j in match_levels(s_levels, t_levels, self.match, (layer, other))]
            self._probed['student ' + layer], self._probed['teacher ' + other] = len(s_levels), len(t_levels)
        features, targets = self.unadapted(student, teacher)
        self.adapters = Adapters(self.adapter, features, targets, names, self.same_channels)
        self._sizes = [f'{tuple(s.shape[1:])}' for s in features]

    def describe(self) -> str:
        """What was paired with what, in one line.

        Raises:
            ConfigError: before :meth:`setup`.
        """
        if not self.pairs:
            raise ConfigError('LevelPairs: its setup has to be called in the setup of the method that has it')
        made = [type(each).__name__ for each in self.adapters if not isinstance(each, nn.Identity)]
        parts = []
        for index, (layer, other) in enumerate(zip(self.student_layers, self.teacher_layers, strict=True)):
            own = [(i, j) for of, i, j in self.pairs if of == index]
            counts = self._probed['student ' + layer], self._probed['teacher ' + other]
            if counts == (1, 1):
                parts.append(f'{layer} with {other}')
            else:
                s, t = ([str(pair[side]) for pair in own] for side in (0, 1))
                parts.append(
                    f'levels {" ".join(s)} of {counts[0]} of {layer} with levels {" ".join(t)} of {counts[1]} of {other}'
                )
        adapters = f'{len(made)} adapters ({", ".join(dict.fromkeys(made))})' if made else 'no adapter'
        drawn = self.uncertainty
        dropout = '' if drawn is None else f", the teacher's of {drawn.passes} dropouts with p={drawn.p}"
        resized = f', {sum(self.adapters.resize)} resized' if any(self.adapters.resize) else ''
        return f'{"; ".join(parts)}: (C, H, W) of {" ".join(self._sizes)}, {adapters}{resized}{dropout}'

    def unadapted(self, student: Taps, teacher: Taps) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The levels that belong together, of both, as the networks put them out, but for ``uncertainty`` and ``reduce``."""
        own = [self._levels(student, layer, 'student') for layer in self.student_layers]
        others = [self._levels(teacher, layer, 'teacher') for layer in self.teacher_layers]
        features = [own[index][i] for index, i, _ in self.pairs]
        targets = [others[index][j] for index, _, j in self.pairs]
        if self.uncertainty is not None:
            targets = [self.uncertainty(each) for each in targets]
        if self.reduce is not None:
            features, targets = [self.reduce(each) for each in features], [self.reduce(each) for each in targets]
        return features, targets

    def _levels(self, taps: Taps, layer: str, whose: str) -> tuple[torch.Tensor, ...]:
        found = maps(taps, layer)
        if len(found) != self._probed[f'{whose} {layer}']:
            raise ConfigError(
                f'{whose} layer {layer!r} puts out {len(found)} maps in training and {self._probed[f"{whose} {layer}"]} '
                f'when probed, so it is not known which belong together; tap a layer that is called as often in both'
            )
        return found

    def forward(self, student: Taps, teacher: Taps) -> list[LevelPair]:
        """The pairs of a training step."""
        features, targets = self.unadapted(student, teacher)
        require_gradient(', '.join(self.student_layers), features)
        adapted = self.adapters(features, targets)
        return [LevelPair(s, t, i, j) for s, t, (_, i, j) in zip(adapted, targets, self.pairs, strict=True)]


def _names_for(layer: Layer, model: nn.Module) -> tuple[str, ...]:
    found = layer if isinstance(layer, str) else layer(model)
    return (found,) if isinstance(found, str) else tuple(found)


def layer_names(option: str, layer: Layer | Sequence[Layer]) -> tuple[Layer, ...]:
    """One name, or what gives it for a model, or a list of them as a tuple.

    Raises:
        ConfigError: for anything else, and for an empty list.
    """
    names = (layer,) if isinstance(layer, str) or callable(layer) else layer
    if (
        not isinstance(names, Sequence)
        or not names
        or not all(callable(each) or (isinstance(each, str) and each) for each in names)
    ):
        raise ConfigError(f"{option}={layer!r}: expected a layer's name, such as 'neck', or a list of names")
    return tuple(names)


def maps(taps: Taps, layer: str) -> tuple[torch.Tensor, ...]:
    """A layer's levels, each (B, C, H, W); tokens, (B, H W, C), that come with their (H, W) are one level.

    Raises:
        ConfigError: if it puts out something else, or rows that are not the images of the batch.
    """
    levels = _map_of_tokens(taps[layer])
    for level in levels:
        if not isinstance(level, torch.Tensor):
            raise ConfigError(
                f'layer {layer!r} puts out a {type(level).__name__} of several outputs, not a map; name the module '
                f"that puts out the one to compare, such as 'bbox_head.retina_cls'"
            )
        images = getattr(taps, 'images', None)
        if images is not None and level.dim() == 4 and len(level) != images:
            raise ConfigError(
                f'layer {layer!r} of {type(taps.model).__name__} puts out {len(level)} rows for {images} images (regions '
                f'or queries, which are others in each network); name a layer that puts out a map of each image'
            )
    return levels


def _map_of_tokens(output: tuple) -> tuple:
    """Of tokens and their size, as patch embeddings of mmseg and mmdet put them out, the map; anything else as it is."""
    if len(output) == 2 and isinstance(output[0], torch.Tensor) and output[0].dim() == 3:
        tokens, size = output
        if isinstance(size, tuple) and len(size) == 2 and math.prod(size) == tokens.shape[1]:
            return (tokens.transpose(1, 2).unflatten(2, size),)
    return output


def match_levels(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], match: str, names: tuple[str, str]
) -> list[tuple[int, int]]:
    """Indices of the levels that belong together, see :class:`LevelPairs`, from both networks' maps of one image.

    Raises:
        ConfigError: if no levels do, or the numbers differ with ``'index'``.
    """
    both = f'student {names[0]!r} and teacher {names[1]!r}'
    if match == 'index':
        if len(student) != len(teacher):
            raise ConfigError(f"{both} have {len(student)} and {len(teacher)} levels; use match='stride'")
        return [(i, i) for i in range(len(student))]
    if len(student) == len(teacher) == 1:
        return [(0, 0)]
    free = list(range(len(teacher)))
    pairs = []
    for i, level in enumerate(student):
        j = next((j for j in free if teacher[j].shape[2:] == level.shape[2:]), None)
        if j is not None:
            free.remove(j)
            pairs.append((i, j))
    if not pairs:
        sizes = [[tuple(level.shape[2:]) for level in levels] for levels in (student, teacher)]
        raise ConfigError(
            f'{both} have no level of the same stride (sizes for one image: {sizes[0]} and {sizes[1]}); tap other layers, or '
            f"use match='index'"
        )
    return pairs


def refuse_other_classes(student: Taps, student_layer: str, teacher: Taps, teacher_layer: str) -> None:
    """Raise ConfigError if both layers put out class logits, of different numbers of classes.

    Layers do so where the nearest module around them has ``num_classes`` and as many channels per class in both networks.
    """
    heads: list[Any] = []
    channels: list[int] = []
    for taps, layer in ((student, student_layer), (teacher, teacher_layer)):
        heads.append(head_around(taps.model, layer))
        channels.append(getattr(taps[layer][0], 'shape', (0, 0))[1])
    if None in heads or teacher.classes is not None:  # which say what is compared
        return
    classes = [each.num_classes for each in heads]
    if classes[0] != classes[1]:
        if channels[0] % classes[0] == 0 and channels[0] * classes[1] == channels[1] * classes[0]:
            raise ConfigError(
                f'{student_layer!r} puts out logits of {classes[0]} classes, {teacher_layer!r} of the teacher of {classes[1]}; '
                f'use a teacher that was trained on the same classes, or a layer before the classifier'
            )
    elif channels == [getattr(each, 'out_channels', 0) for each in heads] and channels[0] != channels[1]:
        # mmseg's two classes: of one channel, a sigmoid's logit, or of two
        raise ConfigError(
            f'{student_layer!r} puts out {channels[0]} channels for {classes[0]} classes, {teacher_layer!r} of the teacher '
            f'{channels[1]}; use decode heads with the same out_channels, or a layer before the classifier'
        )


def head_around(model: nn.Module, layer: str) -> nn.Module | None:
    """The innermost module around a layer that has ``num_classes``; a head may be one of a list."""
    parts = layer.partition(':')[0].split('.')
    for length in range(len(parts), 0, -1):
        module = find_layer(model, '.'.join(parts[:length]))
        if isinstance(getattr(module, 'num_classes', None), int):
            return module
    return None


def require_gradient(layer: str, tensors: Iterable[torch.Tensor]) -> None:
    """Raise ConfigError if the student could learn nothing from a layer."""
    if torch.is_grad_enabled() and not all(tensor.requires_grad for tensor in tensors):
        raise ConfigError(
            f'student layer {layer!r}: its output has no gradient, so nothing would be learnt from it (is it frozen, or '
            f'inside a checkpointed module?)'
        )
