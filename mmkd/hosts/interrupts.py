"""A training that is told to stop saves a checkpoint first, on all processes after the same iteration."""

import os
import signal
import threading
from types import FrameType

import torch
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, Runner

from mmkd.hosts.checkpoints import INTERRUPTED, SafeCheckpointHook

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h


def heed_parent_alone() -> None:
    """Have this process, a data worker, pass over the signals that end a training unless its parent sends them.

    A cluster sends them to all processes of a job, and torch sends one to each data worker that it has no more use for.
    """
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def wait() -> None:
        while signal.sigwaitinfo(SIGNALS).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


class Interrupted(SystemExit):
    """A training was stopped by a signal after its state was saved; it ends with status 75, "try again"."""

    def __init__(self) -> None:
        super().__init__(TRY_AGAIN)


class StopOnSignal(Hook):
    """On SIGTERM, or SIGUSR1 as ``--signal`` of Slurm sends it, save a checkpoint and end the training.

    Each process tells the others after each iteration whether it was told to stop, without waiting for them: they agree
    an iteration later. The checkpoint is called ``interrupted.pth``; the next regular one replaces it.

    Raises:
        Interrupted: on all processes.
    """

    priority = 'LOWEST'  # after the schedulers and the regular checkpoint

    def __init__(self) -> None:
        self.received: int | None = None
        self._group: torch.distributed.ProcessGroup | None = None
        self._asked: tuple[torch.Tensor, torch.distributed.Work] | None = None
        self._before: dict = {}

    def listen(self) -> None:
        """Take note of the signals from now on; also while data are read and models built, long before the training."""
        for number in SIGNALS:
            self._before.setdefault(number, signal.signal(number, self._receive))

    def before_train(self, runner: Runner) -> None:
        self.listen()
        if runner.world_size > 1:
            # whose results are read without waiting for a GPU
            self._group = torch.distributed.new_group(backend='gloo')

    def after_train(self, runner: Runner) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        loop = runner.train_loop
        last_of_epoch = isinstance(loop, EpochBasedTrainLoop) and (runner.iter + 1) % len(loop.dataloader) == 0
        # what an epoch ends with, and accumulated gradients, no checkpoint of an iteration holds
        # DeepSpeed counts itself what it accumulates
        updated = getattr(runner.optim_wrapper, 'should_update', lambda: True)()
        whole = not last_of_epoch and runner.iter + 1 < loop.max_iters and updated
        if self._agreed() and whole:
            self._stop(runner)

    def _agreed(self) -> bool:
        """Whether, an iteration ago, one of the processes had been told to stop."""
        if self._group is None:
            return self.received is not None
        asked = self._asked
        told = torch.tensor(int(self.received is not None))
        work = torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX, self._group, async_op=True)
        self._asked = told, work
        if asked is None:
            return False
        asked[1].wait()
        return bool(asked[0])

    def _stop(self, runner: Runner) -> None:
        saved = next((hook for hook in runner.hooks if isinstance(hook, SafeCheckpointHook)), None)
        if saved is None:
            runner.logger.warning(
                'The training was told to stop, and has no checkpoint hook that could save its state.'
            )
        else:
            saved.save(runner, INTERRUPTED, dict(epoch=runner.epoch, iter=runner.iter + 1))
            runner.logger.warning(
                f'The training was told to stop after iteration {runner.iter + 1}; its state is in {saved.last_ckpt}: '
                f'go on with --resume.'
            )
        if self._group is not None:
            self._asked[1].wait()
            torch.distributed.barrier(self._group)  # the first process has written its file
        self.after_train(runner)
        raise Interrupted
