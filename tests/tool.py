"""Run the command-line tools, each call in a process of its own that need not import the libraries anew.

A server, one beside each test process, imports them once and forks for every call.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
FORKING = multiprocessing.get_context('forkserver')
FORKING.set_forkserver_preload(
    ['mmdet.datasets', 'mmdet.evaluation', 'mmdet.models', 'mmdet.visualization', 'mmdet.engine']
    + ['mmseg.datasets', 'mmseg.evaluation', 'mmseg.models', 'mmseg.visualization', 'mmseg.engine']
    + ['mmkd.checks', 'mmkd.cli', 'mmkd.testing.runs']
)


def tool(name: str, *arguments, expect: int = 0, env: Mapping | None = None, folder: str | Path = '.') -> str:
    """``python tools/NAME.py ARGUMENTS`` in a folder; what it printed."""
    (printed,) = run_together(name, arguments, [env or {}], expect, folder)
    return printed


def train_together(config: str | Path, processes: int, *arguments, expect: int = 0) -> list[str]:
    """``tools/train.py CONFIG --launcher pytorch`` in several processes, as torchrun would; what each printed."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    shared = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=port, WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes)
    environments = [dict(shared, RANK=rank, LOCAL_RANK=rank) for rank in range(processes)]
    return run_together('train', [config, '--launcher', 'pytorch', *arguments], environments, expect)


def run_together(
    name: str, arguments: Sequence, environments: Sequence[Mapping], expect: int = 0, folder: str | Path = '.'
) -> list[str]:
    """A tool in one process for each environment, which is added to the test's own; what each printed."""
    with tempfile.TemporaryDirectory() as temporary:
        paths = [Path(temporary, str(number)) for number in range(len(environments))]
        script, folder = str(ROOT / 'tools' / f'{name}.py'), str(Path(folder).resolve())
        running = []
        for path, changes in zip(paths, environments):
            env = {**os.environ, **{key: str(value) for key, value in changes.items()}}
            running.append(FORKING.Process(target=_run, args=(script, [*map(str, arguments)], folder, env, str(path))))
            running[-1].start()
        for process in running:
            process.join()
        printed = [path.read_text() for path in paths]
    codes = [process.exitcode for process in running]
    assert codes == [expect] * len(codes), '\n'.join(each[-3000:] for each in printed)
    return printed


def _run(script: str, arguments: list[str], folder: str, env: dict[str, str], printed: str) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    with open(printed, 'w') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name='__main__')
