"""Loss weights that change with the training iteration."""

import math
from collections.abc import Mapping, Sequence

from torch import nn

from mmkd.errors import ConfigError, nearest
from mmkd.values import is_number

OPTIONS = {
    'constant': {'value', 'begin', 'end'},
    'linear': {'value', 'start', 'begin', 'end'},
    'cosine': {'value', 'start', 'begin', 'end'},
    'step': {'value', 'milestones', 'gamma'},
}


class Weight(nn.Module):
    """A loss weight: a number, or a schedule over the training steps.

    ==========  ==========================================================================================
    type        weight at iteration i
    ==========  ==========================================================================================
    constant    ``value`` where ``begin <= i < end``, else 0 (default: always)
    linear      from ``start`` (default 0) at ``begin`` (default 0) to ``value`` at ``end``, constant outside
    cosine      the same along half a cosine
    step        ``value * gamma ** n`` after n of the ``milestones`` (``gamma`` default 0.1)
    ==========  ==========================================================================================

    Args:
        spec: The number, or a dict with ``type``, ``value`` and the options above.
        option: What it is called in the config, for errors. Default ``'weight'``.

    Raises:
        ConfigError: for an unknown type or option, and for values that are no finite numbers or negative.

    Example:
        >>> Weight(dict(type='linear', value=10.0, begin=0, end=500)).at(250)
        5.0
    """

    def __init__(self, spec: float | Mapping, option: str = 'weight'):
        super().__init__()
        self.iteration = 0
        """The training step, counted from 0; the student sets it before each step."""
        if isinstance(spec, Mapping):
            self.spec = dict(spec)
        else:
            self.spec = {'type': 'constant', 'value': spec}
        kind = self.spec.get('type')
        if kind not in OPTIONS:
            raise ConfigError(f'{option}={spec!r}: type {kind!r} is unknown; expected one of {sorted(OPTIONS)}')
        for key in set(self.spec) - OPTIONS[kind] - {'type'}:
            raise ConfigError(f'{option}={spec!r}: {kind} has no option {key!r}; nearest {nearest(key, OPTIONS[kind])}')
        required = {'value'} | ({'end'} if kind in ('linear', 'cosine') else set())
        required |= {'milestones'} if kind == 'step' else set()
        if required - set(self.spec):
            raise ConfigError(f'{option}={spec!r}: {kind} needs {sorted(required - set(self.spec))}')
        value = self.spec['value']
        if not is_number(value):
            raise ConfigError(f'{option}={spec!r}: expected a finite number, found {value!r}')
        for key in sorted({'start', 'begin', 'end', 'gamma'} & set(self.spec)):
            if not is_number(self.spec[key]):
                raise ConfigError(f'{option}={spec!r}: {key} has to be a number')
        for key in sorted({'value', 'start', 'begin', 'gamma'} & set(self.spec)):
            if self.spec[key] < 0:
                raise ConfigError(f'{option}={spec!r}: {key} is negative; expected at least 0')
        milestones = self.spec.get('milestones', ())
        if isinstance(milestones, str) or not isinstance(milestones, Sequence) or not all(map(is_number, milestones)):
            raise ConfigError(f'{option}={spec!r}: milestones has to be a list of iterations, such as [8000, 11000]')
        if 'end' in self.spec and self.spec['end'] <= self.spec.get('begin', 0):
            raise ConfigError(f'{option}={spec!r}: end has to come after begin')

    @property
    def scheduled(self) -> bool:
        """Whether it changes during the training."""
        return self.spec.keys() - {'type', 'value'} != set()

    def turns(self) -> set[int]:
        """The iterations at which it may begin or cease to be 0, the first among them."""
        points = [
            0,
            *(self.spec[key] for key in ('begin', 'end') if key in self.spec),
            *self.spec.get('milestones', ()),
        ]
        return {*(max(each, 0) for point in points for each in (math.ceil(point), math.floor(point) + 1))}

    def at(self, iteration: int) -> float:
        """The weight at an iteration."""
        spec, value = self.spec, self.spec['value']
        begin, end = spec.get('begin', 0), spec.get('end', math.inf)
        if spec['type'] == 'constant':
            return value if begin <= iteration < end else 0.0
        if spec['type'] == 'step':
            return value * spec.get('gamma', 0.1) ** sum(iteration >= each for each in spec['milestones'])
        progress = min(max((iteration - begin) / (end - begin), 0.0), 1.0)
        if spec['type'] == 'cosine':
            progress = (1 - math.cos(math.pi * progress)) / 2
        start = spec.get('start', 0.0)
        return start + (value - start) * progress

    def forward(self) -> float:
        """The weight in the current training step."""
        return self.at(self.iteration)
