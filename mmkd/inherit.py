"""The inheriting strategy: parts of the student start from a teacher's weights."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from mmkd.errors import ConfigError
from mmkd.sources import Source, Teacher
from mmkd.taps import find_layer


def parts_by_teacher(
    inherit: Sequence[str] | Mapping[str, Sequence[str]], sources: Mapping[str, Source]
) -> dict[str, Sequence[str]]:
    """Which parts come from which source: a list is of the one frozen teacher.

    Raises:
        ConfigError: for a name that no frozen teacher has, or a list where there are several.
    """
    frozen = [name for name, source in sources.items() if isinstance(source, Teacher)]
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


def check_inheritance(student: nn.Module, teacher: nn.Module, parts: Sequence[str]) -> None:
    """Raise ConfigError unless each of the student's parts can take the teacher's weights."""
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
            if own != other:
                raise ConfigError(
                    f'inherit: {part}.{name} is {own} in the student and {other} in the teacher; give both the same shapes, or '
                    f'inherit other parts'
                )


@torch.no_grad()
def inherit_weights(student: nn.Module, teacher: nn.Module, parts: Sequence[str]) -> None:
    """Copy the teacher's weights into the student's parts."""
    for part in parts:
        student.get_submodule(part).load_state_dict(teacher.get_submodule(part).state_dict())
