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
    """

    def __init__(
        self,
        layer: str | Sequence[str],
        weight: float | Mapping = 1.0,
        teacher_layer: str | Sequence[str] | None = None,
        adapter: str | Mapping | None = 'auto',
    ):
        super().__init__()
        self.student_layers = (layer,) if isinstance(layer, str) else tuple(layer)
        other = layer if teacher_layer is None else teacher_layer
        self.teacher_layers = (other,) if isinstance(other, str) else tuple(other)
        self.weight = Weight(weight)
        self.adapter = adapter

    def setup(self, student: Taps, teacher: Taps) -> None:
        names = (', '.join(self.student_layers), ', '.join(self.teacher_layers))
        for layer, other in zip(self.student_layers, self.teacher_layers):
            refuse_other_classes(student, layer, teacher, other)
        self.adapters = Adapters(self.adapter, self._levels(student), self._levels(teacher, of_teacher=True), names)

    def _levels(self, taps: Taps, of_teacher: bool = False) -> list[torch.Tensor]:
        levels = []
        for layer in self.teacher_layers if of_teacher else self.student_layers:
            for level in taps[layer]:
                if not isinstance(level, torch.Tensor):
                    raise ConfigError(
                        f'layer {layer!r} puts out a {type(level).__name__} of several outputs, not a map; name the module '
                        f"that puts out the one to compare, such as 'bbox_head.retina_cls'"
                    )
                levels.append(level)
        return levels

    def compare(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """The loss between one level of both, already of the same shape."""
        raise NotImplementedError(f'{type(self).__name__} has no compare')

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        features, targets = self._levels(student), self._levels(teacher, of_teacher=True)
        require_gradient(', '.join(self.student_layers), features)
        adapted = self.adapters(features, targets)
        return {'loss': self.weight() * sum(self.compare(s, t) for s, t in zip(adapted, targets, strict=True))}


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
        self.student_layers = self._layers('student_layers')
        self.teacher_layers = self._layers('teacher_layers')

    def _layers(self, attribute: str) -> tuple[str, ...]:
        """All distillers' layers, each once."""
        layers: dict[str, None] = {}
        for name, distiller in self.items():
            found = getattr(distiller, attribute, None)
            if found is None:
                raise ConfigError(f'distillers.{name}: {type(distiller).__name__} has no attribute {attribute!r}')
            layers.update(dict.fromkeys((found,) if isinstance(found, str) else found))
        return tuple(layers)

    def setup(self, student: Taps, teacher: Taps) -> None:
        """Let each distiller make its adapters from probed shapes, and check each tapped layer."""
        for taps, layers in ((student, self.student_layers), (teacher, self.teacher_layers)):
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
