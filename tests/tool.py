"""Run the command-line tools, each call in a process of its own that need not import the libraries anew.

A server, one beside each test process, imports them once and forks for every call.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
UNSCORED = ('--no-check',)
FORKING = multiprocessing.get_context('forkserver')
FORKING.set_forkserver_preload(
    ['mmdet.datasets', 'mmdet.evaluation', 'mmdet.models', 'mmdet.visualization', 'mmdet.engine']
    + ['mmseg.datasets', 'mmseg.evaluation', 'mmseg.models', 'mmseg.visualization', 'mmseg.engine']
    + ['mmkd.checks', 'mmkd.cli', 'mmkd.testing.runs']
)


def tool(
    name: str,
    *arguments,
    expect: int = 0,
    env: Mapping | None = None,
    folder: str | Path = '.',
    scored: bool = False,
) -> str:
    """``mmkd NAME ARGUMENTS`` in a folder, by ``tools/NAME.py`` where that is there; what it printed.

    Teachers of tests have random weights, and are not evaluated before a training, unless ``scored``.
    """
    (printed,) = run_together(name, arguments, [env or {}], expect, folder, scored)
    return printed


def train_together(config: str | Path, processes: int, *arguments, expect: int = 0, scored: bool = False) -> list[str]:
    """``tools/train.py CONFIG --launcher pytorch`` in several processes, as torchrun would; what each printed."""
    shared = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=free_port(), WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes)
    environments = [dict(shared, RANK=rank, LOCAL_RANK=rank) for rank in range(processes)]
    return run_together('train', [config, '--launcher', 'pytorch', *arguments], environments, expect, scored=scored)


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return free.getsockname()[1]


def launch(script: str, *arguments, env: Mapping | None = None) -> str:
    """``tools/SCRIPT ARGUMENTS`` on a free port, to its end; what it printed."""
    with tempfile.TemporaryDirectory() as temporary:
        log = Path(temporary, 'log')
        started = start(log, script, *arguments, env=env)
        assert started.wait(timeout=600) == 0, log.read_text()[-3000:]
        return log.read_text()


def start(
    log: Path, script: str, *arguments, env: Mapping | None = None, inside: Sequence[str] = ()
) -> subprocess.Popen:
    """``tools/SCRIPT ARGUMENTS``, printing to a file, on a free port unless ``env`` has one.

    Args:
        log: The file, which is appended to.
        script: Its name.
        arguments: Its arguments.
        env: Added to the environment.
        inside: A command that runs it, such as ``ip netns exec NAME``.
    """
    env = {'PYTHON': sys.executable, 'PORT': free_port(), 'OMP_NUM_THREADS': 1, **(env or {})}
    arguments = (*arguments, *UNSCORED) if 'train' in script else arguments
    command = [*inside, 'bash', str(ROOT / 'tools' / script), *map(str, arguments)]
    with log.open('a') as file:
        return subprocess.Popen(
            command, stdout=file, stderr=file, env={**os.environ, **{key: str(value) for key, value in env.items()}}
        )


def wait_until(happened: Callable[[], object], logs: Sequence[Path] = (), seconds: float = 120) -> None:
    """Wait until it has happened; otherwise fail with the ends of the logs."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, '\n'.join(log.read_text()[-3000:] for log in logs)
        time.sleep(0.1)


def kill(*processes: int) -> None:
    """``kill -9``."""
    for process in processes:
        os.kill(process, signal.SIGKILL)


def run_together(
    name: str,
    arguments: Sequence,
    environments: Sequence[Mapping],
    expect: int = 0,
    folder: str | Path = '.',
    scored: bool = False,
) -> list[str]:
    """A tool in one process for each environment, which is added to the test's own; what each printed."""
    if name == 'train' and not scored:
        arguments = (*arguments, *UNSCORED)
    with tempfile.TemporaryDirectory() as temporary:
        paths = [Path(temporary, str(number)) for number in range(len(environments))]
        folder = str(Path(folder).resolve())
        running = []
        for path, changes in zip(paths, environments):
            env = {**os.environ, **{key: str(value) for key, value in changes.items()}}
            running.append(FORKING.Process(target=_run, args=(name, [*map(str, arguments)], folder, env, str(path))))
            running[-1].start()
        for process in running:
            process.join()
        printed = [path.read_text() for path in paths]
    codes = [process.exitcode for process in running]
    assert codes == [expect] * len(codes), '\n'.join(each[-3000:] for each in printed)
    return printed


def _run(name: str, arguments: list[str], folder: str, env: dict[str, str], printed: str) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    with open(printed, 'w') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    script = ROOT / 'tools' / f'{name}.py'
    if script.is_file():
        sys.argv = [str(script), *arguments]
        runpy.run_path(str(script), run_name='__main__')
    else:
        sys.argv = ['mmkd', name, *arguments]
        runpy.run_module('mmkd', run_name='__main__')
