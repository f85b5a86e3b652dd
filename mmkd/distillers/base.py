"""What a distiller is, the common case of comparing two features, and the collection that a student trains with."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from mmkd.adapters import Adapters
from mmkd.distillers.schedule import Weight
from mmkd.errors import ConfigError
from mmkd.registry import DISTILLERS, build
from mmkd.taps import Taps


class Distiller(nn.Module):
    """One method: reads the taps of both models and returns named losses.

    A subclass sets ``student_layers`` and ``teacher_layers``, the layers it reads, and writes :meth:`forward`. Any
    ``nn.Module`` with these three works in a config by its dotted path; inheriting is not needed.
    """

    student_layers: Sequence[str] = ()
    teacher_layers: Sequence[str] = ()
    training_layers: Sequence[str] = ()
    """The student's layers that are called in its ``loss`` alone, such as ``'rpn_head.loss_cls:input'``; they are tapped
    as well, but not probed."""

    def setup(self, student: Taps, teacher: Taps) -> None:
        """Called once at build time with the taps of a (1, 3, 256, 256) image: make adapters, refuse what cannot work.

        Raises:
            ConfigError: naming the option and what to do.
        """

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        """Losses by name. A key that starts with ``loss`` is optimised; a statistic must not contain that word.

        The student's tensors carry gradients, the teacher's do not; both are float32.
        """
        raise NotImplementedError(f'{type(self).__name__} has no forward')


class FeatureDistiller(Distiller):
    """Compares the levels of one layer (or several) of both models, level by level.

    ``loss = weight * sum over levels of compare(adapter(student level), teacher level)``

    Args:
        layer: The student's layer, a dotted name, or a list of them.
        weight: A number or a schedule, see :class:`mmkd.distillers.schedule.Weight`.
        teacher_layer: The teacher's, where its name differs.
        adapter: ``'auto'``, None or a dict, see :class:`mmkd.adapters.Adapters`.
        match: Which levels belong together. ``'stride'`` (default): those of equal size for the same image; levels
            that only one model has are left out (P2 and P7, for a P2-P6 and a P3-P7 pyramid), and two single levels always
            belong together. ``'index'``: the first with the first and so on.
    """

    same_channels = True
    """False for a method that compares relations within each network: then both may have any number of channels."""

    def __init__(
        self,
        layer: str | Sequence[str],
        weight: float | Mapping = 1.0,
        teacher_layer: str | Sequence[str] | None = None,
        adapter: str | Mapping | None = 'auto',
        match: str = 'stride',
    ):
        super().__init__()
        if match not in ('stride', 'index'):
            raise ConfigError(f"match={match!r}: expected 'stride' or 'index'")
        self.match = match
        self.student_layers = (layer,) if isinstance(layer, str) else tuple(layer)
        other = layer if teacher_layer is None else teacher_layer
        self.teacher_layers = (other,) if isinstance(other, str) else tuple(other)
        self.weight = Weight(weight)
        self.adapter = adapter

    def setup(self, student: Taps, teacher: Taps) -> None:
        names = (', '.join(self.student_layers), ', '.join(self.teacher_layers))
        if len(self.student_layers) != len(self.teacher_layers):
            raise ConfigError(
                f'{len(self.student_layers)} student and {len(self.teacher_layers)} teacher layers: {names}'
            )
        self.pairs: list[tuple[int, int]] = []
        s_start = t_start = 0
        for layer, other in zip(self.student_layers, self.teacher_layers):
            refuse_other_classes(student, layer, teacher, other)
            s_levels, t_levels = maps(student, layer), maps(teacher, other)
            found = match_levels(s_levels, t_levels, self.match, (layer, other))
            self.pairs += [(s_start + i, t_start + j) for i, j in found]
            s_start, t_start = s_start + len(s_levels), t_start + len(t_levels)
        self.adapters = Adapters(self.adapter, *self._levels(student, teacher), names, self.same_channels)

    def _levels(self, student: Taps, teacher: Taps) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The levels that belong together, of both."""
        features = [level for layer in self.student_layers for level in maps(student, layer)]
        targets = [level for layer in self.teacher_layers for level in maps(teacher, layer)]
        return [features[i] for i, _ in self.pairs], [targets[j] for _, j in self.pairs]

    def adapted(self, student: Taps, teacher: Taps) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The levels that belong together, the student's in the teacher's shape.

        Raises:
            ConfigError: if the student's have no gradient.
        """
        features, targets = self._levels(student, teacher)
        require_gradient(', '.join(self.student_layers), features)
        return list(zip(self.adapters(features, targets), targets, strict=True))

    def compare(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """The loss between one level of both, already of the same shape."""
        raise NotImplementedError(f'{type(self).__name__} has no compare')

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        return {'loss': self.weight() * sum(self.compare(s, t) for s, t in self.adapted(student, teacher))}


def maps(taps: Taps, layer: str) -> tuple[torch.Tensor, ...]:
    """A layer's levels.

    Raises:
        ConfigError: if it puts out something else.
    """
    for level in taps[layer]:
        if not isinstance(level, torch.Tensor):
            raise ConfigError(
                f'layer {layer!r} puts out a {type(level).__name__} of several outputs, not a map; name the module '
                f"that puts out the one to compare, such as 'bbox_head.retina_cls'"
            )
    return taps[layer]


def match_levels(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], match: str, names: tuple[str, str]
) -> list[tuple[int, int]]:
    """Indices of the levels that belong together, see :class:`FeatureDistiller`, from both models' maps of one image.

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

    Layers do so where their head has ``num_classes`` and as many channels per class in both models.
    """
    found = []
    for taps, layer in ((student, student_layer), (teacher, teacher_layer)):
        head = taps.model.get_submodule(layer.partition('.')[0])
        found.append((getattr(head, 'num_classes', None), getattr(taps[layer][0], 'shape', (0, 0))[1]))
    (s_classes, s_channels), (t_classes, t_channels) = found
    if not s_classes or not t_classes or s_classes == t_classes:
        return
    if s_channels % s_classes == 0 and s_channels * t_classes == t_channels * s_classes:
        raise ConfigError(
            f'{student_layer!r} puts out logits of {s_classes} classes, {teacher_layer!r} of the teacher of {t_classes}; use '
            f'a teacher that was trained on the same classes, or a layer before the classifier'
        )


class Distillers(nn.ModuleDict):
    """The distillers of one student, by name.

    Args:
        specs: Name to config dict, as in a config file.

    Raises:
        ConfigError: for a name that cannot be logged, a distiller that does not exist, or an option it does not have.
    """

    def __init__(self, specs: Mapping[str, Mapping]):
        super().__init__()
        if not isinstance(specs, Mapping) or not specs:
            raise ConfigError(f"distillers={specs!r}: expected a dict such as dict(gid=dict(type='GID'))")
        for name, spec in specs.items():
            if 'loss' in name or '.' in name or hasattr(self, name):
                raise ConfigError(
                    f"distillers.{name}: a name starts the log keys and must not contain 'loss' or a dot, nor be a method of "
                    f'nn.ModuleDict; choose another'
                )
            self[name] = build(DISTILLERS, f'distillers.{name}', spec)
        self.probed_layers = self._layers('student_layers')
        self.student_layers = tuple(dict.fromkeys(self.probed_layers + self._layers('training_layers', ())))
        self.teacher_layers = self._layers('teacher_layers')

    def _layers(self, attribute: str, default: tuple[str, ...] | None = None) -> tuple[str, ...]:
        """All distillers' layers, each once."""
        layers: dict[str, None] = {}
        for name, distiller in self.items():
            found = getattr(distiller, attribute, default)
            if found is None:
                raise ConfigError(f'distillers.{name}: {type(distiller).__name__} has no attribute {attribute!r}')
            layers.update(dict.fromkeys((found,) if isinstance(found, str) else found))
        return tuple(layers)

    def setup(self, student: Taps, teacher: Taps) -> None:
        """Let each distiller make its adapters from probed shapes, and check each tapped layer."""
        for taps, layers in ((student, self.probed_layers), (teacher, self.teacher_layers)):
            for layer in layers:
                taps[layer]  # raises if it was never called or changed in place
        for name, distiller in self.items():
            try:
                getattr(distiller, 'setup', lambda *_: None)(student, teacher)
            except ConfigError as error:
                raise ConfigError(f'distillers.{name}: {error}') from None

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        """All losses, each under ``<name>.<key>``, computed in float32."""
        results = {}
        device = next(student.model.parameters()).device
        with torch.autocast(device.type, enabled=False):
            for name, distiller in self.items():
                for key, value in distiller(student, teacher, data_samples).items():
                    if 'loss' in key and not key.startswith('loss'):
                        raise ConfigError(f"distillers.{name}: key {key!r} contains 'loss' but does not start with it")
                    results[f'{name}.{key}'] = value
        return results


def require_gradient(layer: str, tensors: Iterable[torch.Tensor]) -> None:
    """Raise ConfigError if the student could learn nothing from a layer."""
    if torch.is_grad_enabled() and not all(tensor.requires_grad for tensor in tensors):
        raise ConfigError(
            f'student layer {layer!r}: its output has no gradient, so nothing would be learnt from it (is it frozen, or '
            f'inside a checkpointed module?)'
        )
