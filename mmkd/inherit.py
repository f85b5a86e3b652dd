"""The inheriting strategy: parts of the student start from a teacher's weights."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from mmkd.classes import ClassMap
from mmkd.distillers.levels import head_around
from mmkd.errors import ConfigError
from mmkd.sources import Source
from mmkd.taps import find_layer


def parts_by_teacher(
    inherit: Sequence[str] | Mapping[str, Sequence[str]], sources: Mapping[str, Source]
) -> dict[str, Sequence[str]]:
    """Which parts come from which source: a list is of the one frozen teacher.

    Raises:
        ConfigError: for a name that no frozen teacher has, or a list where there are several.
    """
    frozen = [name for name, source in sources.items() if source.frozen]
    if isinstance(inherit, Mapping):
        for name in inherit:
            if name not in frozen:
                raise ConfigError(
                    f'inherit.{name}: there is no such frozen teacher; there are {", ".join(frozen) or "none"}'
                )
        return dict(inherit)
    if not inherit:
        return {}
    if not isinstance(inherit, Sequence):
        raise ConfigError(f"inherit={inherit!r}: expected a list of parts, such as ['neck']")
    if len(frozen) != 1:
        raise ConfigError(
            f'inherit={inherit!r}: there are {len(frozen)} frozen teachers; name one, as in inherit=dict(large={list(inherit)})'
        )
    return {frozen[0]: inherit}


def check_inheritance(
    student: nn.Module, teacher: nn.Module, parts: Sequence[str], classes: ClassMap | None = None
) -> None:
    """Raise ConfigError unless each of the student's parts can take the teacher's weights, of classifiers the shared classes'."""
    if isinstance(parts, str):
        raise ConfigError(f'inherit={parts!r}: expected a list of parts, such as [{parts!r}]')
    for part in parts:
        try:
            shapes = [
                {name: tuple(value.shape) for name, value in find_layer(model, part).state_dict().items()}
                for model in (student, teacher)
            ]
        except ConfigError as error:
            raise ConfigError(f'inherit: {error}') from None
        for name in [*shapes[0], *shapes[1]]:
            own, other = (each.get(name, 'not there') for each in shapes)
            if classes is not None and 'not there' not in (own, other) and _by_class(student, part, name):
                _shared(student, teacher, part, name, classes)  # raises where they are of another form
            elif own != other:
                raise ConfigError(
                    f'inherit: {part}.{name} is {own} in the student and {other} in the teacher; give both the same shapes, or '
                    f'inherit other parts'
                )


@torch.no_grad()
def inherit_weights(
    student: nn.Module, teacher: nn.Module, parts: Sequence[str], classes: ClassMap | None = None
) -> None:
    """Copy the teacher's weights into the student's parts; of its classifiers the rows of the shared classes."""
    for part in parts:
        state = teacher.get_submodule(part).state_dict()
        if classes is not None:
            for name in state:
                if _by_class(student, part, name):
                    state[name] = _shared(student, teacher, part, name, classes)
        student.get_submodule(part).load_state_dict(state)


def _by_class(model: nn.Module, part: str, name: str) -> bool:
    """Whether a parameter of a part has rows for each class: of the layer that predicts classes, or boxes for each of them."""
    if name not in dict(model.get_submodule(part).named_parameters()):
        return False
    layer, _, _ = f'{part}.{name}'.rpartition('.')
    head, kind = head_around(model, layer), layer.rpartition('.')[2]
    if head is None:
        return False
    if kind == 'fc_reg':
        return len(model.get_parameter(f'{part}.{name}')) == 4 * head.num_classes
    return kind == 'conv_seg' or kind.endswith('_cls')


def _shared(student: nn.Module, teacher: nn.Module, part: str, name: str, classes: ClassMap) -> torch.Tensor:
    """A classifier's parameter of the student, with the teacher's rows for the classes that both have, and the background."""
    layer = f'{part}.{name}'.rpartition('.')[0]
    own, other = (model.get_parameter(f'{part}.{name}').detach() for model in (student, teacher))
    numbers = [getattr(head_around(model, layer), 'num_classes', 1) for model in (student, teacher)]
    kind = layer.rpartition('.')[2]
    background = int(kind == 'fc_cls' and len(own) == numbers[0] + 1)
    each = 4 if kind == 'fc_reg' else 1  # rows of a class that stand together
    groups = [(len(value) - background) // (number * each) for value, number in zip((own, other), numbers)]
    fits = [groups[0] * number * each + background == len(value) for value, number in zip((own, other), numbers)]
    if groups[0] != groups[1] or not all(fits) or own.shape[1:] != other.shape[1:]:
        raise ConfigError(
            f'inherit: {part}.{name} is {tuple(own.shape)} in the student and {tuple(other.shape)} in the teacher, not as many '
            f'rows for each of {numbers[0]} and {numbers[1]} classes; inherit other parts'
        )
    new = own.clone()
    rows, taken = new[: len(new) - background], other[: len(other) - background]
    rows, taken = (value.unflatten(0, (groups[0], -1, each)) for value in (rows, taken))
    for one, of in zip(classes.student, classes.teacher):
        rows[:, one] = taken[:, of]
    if background:
        new[-1] = other[-1]
    return new
