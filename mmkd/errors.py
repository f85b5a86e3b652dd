"""The error types of mmkd."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A config, or a file it names, cannot be used.

    Its message is one line: the option, what was found, what to do. The tools print that line and stop; it is always
    raised before the first training iteration.
    """


class Stopped(RuntimeError):
    """A training that ran cannot go on; as with :class:`ConfigError` its message is one line, and the tools print it alone."""


def nearest(name: str, names: Iterable[str]) -> str:
    """The existing names most like ``name``, whatever their case, best first, for an error message."""
    existing = {each.lower(): each for each in names}
    close = difflib.get_close_matches(name.lower(), list(existing), n=10, cutoff=0.3)
    letters = sorted(name.lower())
    # of names as close, those come first that differ by the order of letters alone
    found = [existing[each] for each in sorted(close, key=lambda each: sorted(each) != letters)[:3]]
    return ', '.join(repr(each) for each in found) or 'none'


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind; of one in a data worker, whose traceback comes first, the last."""
    said = error.args[0] if isinstance(error, KeyError) and len(error.args) == 1 else error  # whose str() is quoted
    lines = [line.strip() for line in str(said).splitlines() if line.strip()]
    if lines and lines[0].startswith('Caught '):
        return lines[-1].partition(': ')[2] or lines[-1]
    return lines[0] if lines else type(error).__name__


def describe(error: BaseException) -> str:
    """An error of other code in one line: its kind, and :func:`first_line`."""
    kind, line = type(error).__name__, first_line(error)
    return line if line == kind else f'{kind}: {line}'
