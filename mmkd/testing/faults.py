"""What befalls a training on a cluster, for tests: a process that is killed at a chosen moment."""

import os
import signal
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmkd.hosts import checkpoints

MOMENTS = ('before step', 'after step', 'in write', 'before rename', 'before record', 'before removal')


class Kill(Hook):
    """End the process with SIGKILL in an iteration, at one of :data:`MOMENTS`.

    The last four are of the first checkpoint that is written in that iteration or later: half its bytes are written, all of
    them but under the temporary name, before ``last_checkpoint`` names it, before older ones are removed.
    """

    priority = 'VERY_LOW'

    def __init__(self, iteration: int, moment: str = 'after step'):
        self.iteration, self.moment = iteration, moment

    def before_train(self, runner: Runner) -> None:
        stock = os.replace, open, checkpoints.SafeCheckpointHook._remove

        def due(moment: str) -> bool:
            return self.moment == moment and runner.iter + 1 >= self.iteration

        def replace(source: str, target: Any) -> None:
            record = str(target).endswith('last_checkpoint')
            if (due('before record') and record) or (due('before rename') and not record):
                _kill()
            stock[0](source, target)

        def half(path: Any, mode: str) -> Any:
            file = stock[1](path, mode)
            return _Half(file) if due('in write') else file

        def remove(hook: checkpoints.SafeCheckpointHook, path: str) -> None:
            if due('before removal'):
                _kill()
            stock[2](hook, path)

        checkpoints.os, checkpoints.open = _Patched(os, replace=replace), half
        checkpoints.SafeCheckpointHook._remove = remove

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        if self.moment == 'before step' and runner.iter + 1 == self.iteration:
            _kill()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        if self.moment == 'after step' and runner.iter + 1 == self.iteration:
            _kill()


class _Half:
    """A file that takes half of what is written, and then the process is gone."""

    def __init__(self, file: Any):
        self.file = file

    def __enter__(self) -> '_Half':
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def write(self, content: bytes) -> None:
        self.file.write(content[: len(content) // 2])
        self.file.flush()
        _kill()


class _Patched:
    """A module with some functions replaced."""

    def __init__(self, module: Any, **functions: Any):
        self.__dict__.update(vars(module), **functions)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
