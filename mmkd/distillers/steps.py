"""In which steps an entry of the distillers is read, and whether these are the ones that it needs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmkd.distillers.schedule import Weight
from mmkd.errors import ConfigError
from mmkd.sources.source import Source


def check_together(name: str, teachers: Mapping[str, Source]) -> None:
    """Raise ConfigError unless all teachers of an entry are read in the same steps, without which it learns nothing."""
    if len({(each.interval, each.begin, each.end) for each in teachers.values()}) > 1:
        raise ConfigError(
            f'distillers.{name}: its teachers {", ".join(teachers)} have other interval, begin or end, and it learns from '
            f'all at once; make them equal, or give each an entry of its own'
        )


def check_first_steps(
    name: str, method: Any, factor: Weight, shares: Sequence[Weight], teachers: Mapping[str, Source]
) -> None:
    """Raise ConfigError if a method that has to learn in the first steps is read in none of them.

    Args:
        name: The entry's.
        method: The distiller, of several teachers the first one's.
        factor: The entry's.
        shares: How much is learnt from each of several teachers, where that is given.
        teachers: Its teachers.
    """
    steps = getattr(method, 'first_steps', 0)
    if not steps or factor.spec['value'] == 0:
        return
    read = [step for step in range(steps) if factor.at(step) and all(each.due(step) for each in teachers.values())]
    used = [share for share in shares if share.spec['value']]
    if not read or not all(any(map(share.at, read)) for share in used):
        raise ConfigError(
            f'distillers.{name}: {type(method).__name__} learns in the first {steps} steps what it teaches by afterwards, and '
            f'factor, combine, or begin of its teacher, leaves these out; let all begin at 0, and give loss_weight the schedule'
        )


def check_task(
    name: str,
    method: Any,
    layers: Sequence[str],
    task: Weight,
    weights: Sequence[Weight],
    active: Callable[[], bool],
    teachers: Mapping[str, Source],
) -> None:
    """Raise ConfigError if an entry reads the student's own losses in a step in which ``task_weight`` leaves them out.

    Args:
        name: The entry's.
        method: The distiller, of several teachers the first one's.
        layers: Those that are called in the student's losses alone, which it reads.
        task: ``task_weight``.
        weights: The entry's factor, and all weights of its method.
        active: Whether its loss can be anything but 0 at the iteration of these weights.
        teachers: Its teachers.
    """
    turns = set().union(*(each.turns() for each in (task, *weights)), (each.begin for each in teachers.values()))
    for step in sorted(turns):
        for weight in weights:
            weight.iteration = step
        read = active() and all(each.begin <= step < each.end for each in teachers.values())
        if read and not task.at(step):
            raise ConfigError(
                f"distillers.{name}: {type(method).__name__} reads {layers[0]!r}, which is called in the student's own losses "
                f'alone, and task_weight is 0 in step {step}, in which these are not run; give it a value above 0 there, or the '
                f'entry a factor that is 0 there'
            )
    for weight in weights:
        weight.iteration = 0
