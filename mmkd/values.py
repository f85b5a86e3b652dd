"""Whether the value of an option is what its kind of option takes."""

import inspect
import math
import types
import typing
from collections.abc import Callable
from typing import Any, TypeGuard

from mmkd.errors import ConfigError

# what a plain annotation is called in an error; others, such as Sequence[str], are left to who reads the option
PLAIN = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'a string', type(None): 'None'}


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number; ``True`` is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number, an ``int``; ``True`` is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_temperature(value: object, option: str = 'tau') -> None:
    """Raise ConfigError for what is no positive number."""
    if not (is_number(value) and value > 0):
        raise ConfigError(f'{option}={value!r}: expected a positive temperature')


def expected(kind: Callable, option: str, value: object) -> str | None:
    """What ``kind`` expects of an option by its annotation, where that is plain and the value is something else.

    A whole number is a number as well. None where the value fits, or the annotation does not say.
    """
    annotation = _annotations(kind).get(option)
    union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    allowed = typing.get_args(annotation) if union else (annotation,)
    if not set(allowed) <= PLAIN.keys():
        return None
    if float in allowed and (is_whole(value) or (isinstance(value, float) and not math.isnan(value))):
        return None
    if any(type(value) is each for each in allowed if each is not float):
        return None
    return ' or '.join(PLAIN[each] for each in allowed)


def _annotations(kind: Callable) -> dict[str, Any]:
    function = kind.__init__ if inspect.isclass(kind) else kind
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):  # of a user's: for type checkers alone, or none at all
        return {}
