"""Train a queue of configs: finished runs are reused, interrupted ones resumed, progress is shown."""

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from tqdm import tqdm

from mmkd.errors import ConfigError
from mmkd.experiments.configs import changed, read, recordable, teachers_of, text_of
from mmkd.hosts.configs import build_model, plain_model
from mmkd.weights import load_weights

TRAIN = (sys.executable, '-m', 'mmkd', 'train')
PROGRESS = re.compile(r'(?:Iter|Epoch)\((train|val)\) +(?:\[ *(\d+)\])?\[ *(\d+)/(\d+)\]')
ERROR = re.compile(r'error: |[\w.]+(Error|Exception)\b')
COUNTERS = {'step', 'iter', 'epoch', 'time', 'data_time', 'memory'}  # what mmengine logs beside losses and scores
WARM_UP = 0.1  # of a run's iterations, left out of its step times


class RunFailed(Exception):
    """A run did not get to its end; the message is one line."""


@dataclass
class Run:
    """One training run.

    Args:
        name: What the report calls it.
        config: A file, or a config of mmkd, ``mmkd::...``.
        folder: Its work directory.
        options: Changes to the config, as ``--cfg-options`` takes them.
    """

    name: str
    config: str
    folder: Path
    options: dict[str, object] = field(default_factory=dict)
    _process: subprocess.Popen | None = field(default=None, init=False, repr=False, compare=False)

    def read(self) -> Config:
        """The config with its changes, and with those of :func:`recordable`."""
        config = changed(read(self.config), self.options)
        try:
            config.merge_from_dict(recordable(config))
        except ConfigError as error:
            raise ConfigError(f'{self.config}: {error}') from None
        return config

    @property
    def unit(self) -> str:
        """What its training loop counts: ``'iter'`` or ``'epoch'``."""
        return 'epoch' if 'max_epochs' in self.read().train_cfg else 'iter'

    @property
    def length(self) -> int:
        """In iterations or epochs."""
        return self.read().train_cfg[f'max_{self.unit}s']

    @property
    def checkpoint(self) -> Path:
        return self.folder / f'{self.unit}_{self.length}.pth'

    @property
    def finished(self) -> bool:
        if not self.checkpoint.is_file():
            return False
        evaluations = self.evaluations()
        return bool(evaluations) and evaluations[-1]['step'] == self.length

    def history(self) -> list[dict]:
        """What mmengine logged, later runs of the same iterations replacing earlier ones."""
        entries = {}
        for file in sorted(self.folder.glob('*/vis_data/scalars.json')):
            for line in file.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # the last line of a run that was interrupted
                    entry = json.loads(line)
                    entries[entry['step'], 'loss' in entry] = entry
        return [entries[key] for key in sorted(entries)]

    def losses(self) -> list[dict]:
        """The entries of training; ``step`` is in iterations."""
        return [entry for entry in self.history() if 'loss' in entry]

    def evaluations(self) -> list[dict]:
        """The entries of evaluations that gave a score; ``step`` is in iterations or epochs."""
        return [entry for entry in self.history() if 'loss' not in entry and entry.keys() - COUNTERS]

    def scores(self) -> dict[str, float]:
        """What the last evaluation gave."""
        return {key: value for key, value in self.evaluations()[-1].items() if key not in COUNTERS}

    def step_times(self) -> list[float]:
        """Seconds of a training iteration, one per entry of the log; the first tenth of the run is left out."""
        entries = self.losses()
        return [each['time'] for each in entries if 'time' in each and each['step'] > WARM_UP * entries[-1]['step']]

    def parameters(self) -> int:
        """Parameters of the model that is deployed, without adapters."""
        weights = torch.load(self.checkpoint, map_location='cpu', weights_only=True)['state_dict']
        buffers = ('running_mean', 'running_var', 'num_batches_tracked')
        return sum(
            value.numel()
            for name, value in weights.items()
            if not name.startswith(('distillers.', 'sources.')) and not name.endswith(buffers)
        )

    def check_unchanged(self) -> str:
        """Finished or interrupted work is only used with the config it was begun with; that config's fingerprint."""
        config = self.read()
        text = text_of(config)
        for teacher in teachers_of(config).values():
            kept = teacher['config']
            if isinstance(kept, str) and (kept.startswith('mmkd::') or Path(kept).is_file()):
                text += text_of(read(kept))
        fingerprint = hashlib.sha256(text.encode()).hexdigest()
        record = self.folder / 'fingerprint'
        if record.is_file() and record.read_text() != fingerprint:
            raise ConfigError(
                f'{self.folder}: begun with another version of {self.config}; remove {self.folder} to run it anew'
            )
        return fingerprint

    def train(self, position: str, threads: int | None = None) -> None:
        """Train to the end, unless that is done.

        Args:
            position: What the progress bar says before the name, such as ``[1/4]``.
            threads: Of the training process, as ``OMP_NUM_THREADS``; ``None`` leaves that alone.

        Raises:
            ConfigError: if the run was begun with another config.
            RunFailed: if the training fails, with its error line.
        """
        file = self.begin()
        title = f'{position} {self.name}'
        if self.finished:
            tqdm.write(f'{title}: finished before, reused ({self.folder})')
            return
        self._step_back()
        command = [*TRAIN, str(file), '--work-dir', str(self.folder), '--no-check']
        if (self.folder / 'last_checkpoint').is_file():  # else it would forget the config's load_from
            command += ['--resume']
        total = self.length if self.unit == 'iter' else None  # of epochs, when their length is known
        with tqdm(total=total, desc=title, unit='it', dynamic_ncols=True, mininterval=1) as bar:
            self.call(command, threads, 'failed', lambda line: self._show(line, bar))

    def begin(self) -> Path:
        """Write the config with its changes, and its fingerprint, into the folder; the config's file.

        Raises:
            ConfigError: if the run was begun with another config.
        """
        fingerprint = self.check_unchanged()
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / 'fingerprint').write_text(fingerprint)
        file = self.folder / Path(self.config.rpartition('::')[2]).name  # where mmengine will put it as well
        file.write_text(text_of(self.read()))
        return file

    def call(
        self,
        command: Sequence[str],
        threads: int | None,
        failed: str,
        show: Callable[[str], object] = lambda line: None,
    ) -> None:
        """Run a process until the run is finished; what it says is added to ``output.log``.

        Args:
            command: The process.
            threads: Its ``OMP_NUM_THREADS``; ``None`` leaves that alone.
            failed: What the run did otherwise, for the error.
            show: Called with each line.

        Raises:
            RunFailed: if it fails, or leaves the run unfinished, with its error line.
        """
        log = self.folder / 'output.log'
        begin = log.stat().st_size if log.is_file() else 0
        env = os.environ if threads is None else {**os.environ, 'OMP_NUM_THREADS': str(threads)}
        with (
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) as process,
            log.open('a') as output,
        ):
            self._process = process
            try:
                for line in process.stdout or ():
                    output.write(line)
                    show(line)
            except BaseException:
                process.terminate()
                raise
        if process.returncode or not self.finished:
            said = log.read_bytes()[begin:].decode(errors='replace')
            raise RunFailed(f'{self.name} {failed}: {reason_of_failure(process.returncode, said)} (see {log})')

    def _step_back(self) -> None:
        """Forget a last checkpoint that was not evaluated: mmengine would find nothing left to train, and end."""
        if not self.checkpoint.is_file():
            return
        self.checkpoint.unlink()
        last = self.folder / 'last_checkpoint'
        before = [(int(each.stem.rpartition('_')[2]), each) for each in self.folder.glob(f'{self.unit}_[0-9]*.pth')]
        if before:
            last.write_text(str(max(before)[1]))
        else:
            last.unlink(missing_ok=True)

    def _show(self, line: str, bar: tqdm) -> None:
        """Move the progress bar on, if this line of mmengine's log says so."""
        found = PROGRESS.search(line)
        if not found:
            return
        part, epoch, done, of = found[1], found[2], int(found[3]), int(found[4])
        if part == 'val':
            bar.set_postfix_str(f'evaluating {done}/{of}')
            return
        bar.total = self.length * (of if self.unit == 'epoch' else 1)
        bar.set_postfix_str('')
        bar.update((int(epoch or 1) - 1) * of + done - bar.n)

    def stop(self) -> None:
        """End the training process, if there is one; the run can be resumed."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()


def reason_of_failure(status: int, output: str) -> str:
    """One line on why a training ended, from its exit status and what it printed."""
    if not status:
        return 'it ended without a score after its last iteration; a model that detects nothing at all has no AP'
    if status < 0:
        return f'ended by signal {-status}'
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if ERROR.match(line)]
    return (errors or lines or [f'exit status {status}'])[-1]


def train_all(
    runs: Sequence[Run], jobs: int = 1, threads: int | None = None, done: Callable[[Run], object] = lambda run: None
) -> dict[str, str]:
    """Train runs in their order, ``jobs`` at the same time; one that fails does not stop the others.

    Args:
        runs: What to train.
        jobs: How many at the same time.
        threads: Of each training process.
        done: Called with each run that has finished; an exception of its ends the queue.

    Returns:
        The failed ones: folder to error line.
    """
    failed = {}
    with ThreadPoolExecutor(jobs) as pool:
        futures = {
            pool.submit(run.train, f'[{number}/{len(runs)}]', threads): run for number, run in enumerate(runs, 1)
        }
        waiting = set(futures)
        try:
            while waiting:
                ended, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in ended:
                    run = futures[future]
                    error = future.exception()
                    if error is None:
                        done(run)
                    elif isinstance(error, RunFailed | ConfigError):
                        failed[str(run.folder)] = str(error)
                        tqdm.write(f'error: {error}')
                    else:
                        raise error
        except BaseException:  # interrupted: end what runs, begin nothing more
            for future in futures:
                future.cancel()
            while waiting:
                for run in runs:
                    run.stop()
                _, waiting = wait(waiting, timeout=0.5)
            raise
    return failed


def fastest() -> str:
    """The device on which models are run: a GPU if there is one."""
    return 'cuda' if torch.cuda.is_available() else 'cpu'


def trained_model(of: Run, device: str = 'cpu') -> BaseModel:
    """The model that a run trained, as plain mmdet or mmseg builds it."""
    config = of.read()
    config.model = plain_model(config)
    model = build_model(config.model)
    load_weights(model, str(of.checkpoint), 'checkpoint')
    model.cfg = config
    return model.eval().to(device)
