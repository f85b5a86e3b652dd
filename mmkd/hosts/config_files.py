"""Read config files, with what is wrong in them as one line."""

import ast
import re
import traceback
from collections.abc import Iterator
from pathlib import Path

from mmengine.config import Config

from mmkd.errors import ConfigError, describe, nearest

SUFFIXES = ('.py', '.json', '.yaml', '.yml')


def read_config_file(path: str | Path, what: str = 'config') -> Config:
    """mmengine's Config of a file, which is run if it is Python.

    Args:
        path: The file.
        what: What it is; errors begin with it.

    Raises:
        ConfigError: naming the file, the line where that is known, and what is wrong.
    """
    path = Path(path).expanduser()
    if path.suffix not in SUFFIXES:
        raise ConfigError(f'{what} {path}: not a config, whose name ends with {", ".join(SUFFIXES)}')
    files: list[Path] = []
    try:
        files += _chain(path, what)
        return Config.fromfile(path)
    except ConfigError:
        raise
    except Exception as error:  # whatever its code raises
        reason = describe(error)
        if isinstance(error, ImportError) and error.__cause__ is not None:  # of custom_imports
            reason = f'{describe(error.__cause__)}, which custom_imports names (is it on PYTHONPATH?)'
        raise ConfigError(f'{what} {_where(error, path, files)}: {reason}') from error


def _where(error: Exception, path: Path, files: list[Path]) -> str:
    """The file and line at which a config failed; the file alone where it was not its code."""
    names = {str(each.absolute()): each for each in files}
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in names]
    return f'{names[frames[-1].filename]}, line {frames[-1].lineno}' if frames else str(path)


def _chain(path: Path, what: str) -> Iterator[Path]:
    """A config's file and those that it is based on by paths, each looked through for what mmengine passes over.

    Raises:
        ConfigError: for what is no Python, a dict that has a key twice, of which the first is lost, and a ``_base_`` that
            is not there.
    """
    yield path
    if path.suffix != '.py':
        return
    text = re.sub(r'\{\{.*?\}\}', '0', path.read_text(encoding='utf-8-sig'))  # what mmengine fills in
    try:
        tree = ast.parse(text)
        compile(text, str(path), 'exec')  # finds more, such as a keyword that is repeated
    except (SyntaxError, ValueError) as error:  # ValueError: binary
        line = getattr(error, 'lineno', None)
        reason = getattr(error, 'msg', None) or describe(error)
        raise ConfigError(f'{what} {path}{f", line {line}" if line else ""}: not Python: {reason}') from error
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            _refuse_repeated_keys(node, path, what)
    for base in _bases(tree):
        file = path.parent / base
        if '::' in base:
            continue
        if not file.is_file():
            found = nearest(Path(base).name, (each.name for each in file.parent.glob('*.py')))
            raise ConfigError(
                f'{what} {path}: _base_ {base!r}: no such file ({file.absolute()}); the nearest are {found}'
            )
        yield from _chain(file, what)


def _refuse_repeated_keys(node: ast.Dict, path: Path, what: str) -> None:
    keys = [each.value for each in node.keys if isinstance(each, ast.Constant)]
    repeated = next((key for index, key in enumerate(keys) if key in keys[:index]), None)
    if repeated is not None:
        raise ConfigError(
            f'{what} {path}, line {node.lineno}: {repeated!r} is twice in one dict, of which the last alone would count'
        )


def _bases(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == '_base_':
            try:
                bases = ast.literal_eval(node.value)
            except ValueError:  # an expression
                return []
            return [each for each in (bases if isinstance(bases, (list, tuple)) else [bases]) if isinstance(each, str)]
    return []
