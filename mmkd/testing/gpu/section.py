"""A section: cases, each a name and a function that returns what it found; its docstring stands above its table.

A section is a generator function of a :class:`Setting`.
"""

import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mmkd.errors import describe, first_line


class Finding(NamedTuple):
    """What a case found."""

    found: str
    bound: str = ''
    passed: bool | None = True
    """None for a figure that nothing is asked of."""
    figures: dict[str, Any] = {}


class Skip(Exception):
    """A case that this machine, or mmdet itself, cannot run; with the reason."""


class Setting(NamedTuple):
    """Where and how a section runs."""

    device: Any
    quick: bool
    folder: Path
    end: float

    def left(self) -> float:
        """Seconds of the section's time that are left."""
        return self.end - time.monotonic()


Cases = Iterator[tuple[str, Callable[[], Finding]]]


def run_section(name: str, section: Callable[[Setting], Cases], setting: Setting, emit: Callable[..., None]) -> None:
    """Run a section's cases, each of which becomes a row whatever happens in it."""
    cases, first = section(setting), True
    while True:
        case, start = 'all', time.monotonic()
        try:
            if not first or setting.left() > 0:  # the first one takes the section's preparation
                case, check = next(cases)
            if setting.left() > 0:
                finding = check()
                status = {None: 'figure', True: 'passed', False: 'failed'}[finding.passed]
            else:
                finding, status = Finding('the time was over'), 'not run'
        except StopIteration:
            return
        except Skip as reason:
            finding, status = Finding(str(reason)), 'skipped'
        except Exception as error:  # whatever it is: it is what the report is for
            traceback.print_exc()
            finding, status = Finding(describe(error)), 'failed'
        finding = finding._replace(found=finding.found.replace('|', '/'))  # in a table
        seconds = round(time.monotonic() - start, 2)
        emit(event='row', section=name, case=case, status=status, seconds=seconds, **finding._asdict())
        if status == 'failed':
            require_device(setting.device)
        if case == 'all':
            return
        first = False


def require_device(device: torch.device) -> None:
    """Exit if an error took the device with it, so that the rest is run in another process."""
    if device.type == 'cuda':
        try:
            torch.cuda.set_sync_debug_mode('default')
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f'the device is lost: {first_line(error)}', file=sys.stderr)
            sys.exit(3)
