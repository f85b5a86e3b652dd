"""What a person at a terminal sees of a training; mmengine's log file, and a pipe, have all of it."""

import logging
import re
import sys
from collections.abc import Iterable

from mmengine.logging import MMLogger

STEP = re.compile(r'^(?P<loop>Iter|Epoch)\(train\)\s+(?P<place>(?:\[[^]]*\])+)')
VALUE = re.compile(r'(\S+): (\S+)')
LONG = 3
"""Messages of more lines than this, as a config or a list of hooks, are in the file alone."""


class Readable(logging.Formatter):
    """A line for each interval, the student's own losses and each distiller's apart; the first one of long messages.

    Args:
        stock: mmengine's formatter, for warnings and errors.
        names: Of the distillers.
    """

    def __init__(self, stock: logging.Formatter, names: Iterable[str]):
        super().__init__(datefmt='%H:%M:%S')
        self.stock, self.names = stock, tuple(names)

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        step = STEP.match(message)
        if step:
            return f'{self.formatTime(record, self.datefmt)} {self.step(step, message)}'
        if record.levelno != logging.INFO:
            return self.stock.format(record)
        lines = [line for line in message.splitlines() if line.strip(' -')]
        if len(lines) > LONG:
            message = f'{lines[0]} ({len(lines)} lines, in the log file)'
        return f'{self.formatTime(record, self.datefmt)} {message}'

    def step(self, step: re.Match, message: str) -> str:
        """``iter 50/600  loss 3.42 = task 1.60 + gid 1.38 + cwd 0.44  lr 0.0013  0.46 s  eta 0:04:12``."""
        values = dict(VALUE.findall(message[step.end() :]))
        place = step['place'].replace(' ', '').replace('][', ' ').strip('[]')
        sums: dict[str, float] = {'task': 0.0}
        for key, value in values.items():
            if 'loss' in key and key != 'loss':
                entry = key.partition('.')[0]
                name = entry if entry in self.names else 'task'
                sums[name] = sums.get(name, 0.0) + float(value)
        parts = [f'{step["loop"].lower()} {place:>9}']
        if 'loss' in values:
            terms = ' + '.join(f'{name} {value:.4g}' for name, value in sums.items())
            parts.append(f'loss {float(values["loss"]):.4g}' + (f' = {terms}' if len(sums) > 1 else ''))
        if 'lr' in values:
            parts.append(f'lr {float(values["lr"]):.3g}')
        if 'time' in values:
            parts.append(f'{float(values["time"]):.2f} s')
        eta = re.search(r'eta: (.+?)\s{2}', message)
        if eta:
            parts.append(f'eta {eta[1]}')
        return '  '.join(parts)


def readable_terminal(names: Iterable[str]) -> None:
    """Have the loggers that mmengine makes from now on write :class:`Readable` lines to the terminal, if that is one."""
    if not sys.stdout.isatty():
        return
    stock, names = MMLogger.__init__, tuple(names)

    def init(self: MMLogger, *args: object, **options: object) -> None:
        stock(self, *args, **options)
        for handler in self.handlers:
            if type(handler) is logging.StreamHandler:
                handler.setFormatter(Readable(handler.formatter or logging.Formatter(), names))

    MMLogger.__init__ = init
