"""Train a queue of configs: finished runs are reused, interrupted ones resumed, progress is shown."""

import contextlib
import copy
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from tqdm import tqdm

from mmkd.errors import ConfigError
from mmkd.hosts.configs import plain_model
from mmkd.hosts.mmengine import config_path
from mmkd.weights import load_weights

TRAIN = Path(__file__).resolve().with_name('train.py')
SCORES = ('coco/bbox_mAP', 'mIoU')  # of an evaluation, as the logs have it
PROGRESS = re.compile(r'Iter\((train|val)\) +\[ *(\d+)/(\d+)\]')
ERROR = re.compile(r'error: |[\w.]+(Error|Exception)\b')


class RunFailed(Exception):
    """A run did not get to its end; the message is one line."""


def read(name: str) -> Config:
    """A config file, or a config of mmkd (``mmkd::...``); parsed anew if a config beside it has changed."""
    path = config_path(name) if name.startswith('mmkd::') else name
    stamp = max(each.stat().st_mtime_ns for each in Path(path).parent.rglob('*.py'))
    return copy.deepcopy(_parse(path, stamp))


@functools.lru_cache
def _parse(path: str, stamp: int) -> Config:
    return Config.fromfile(path)


_TEXTS: dict[str, str] = {}


def text_of(config: Config) -> str:
    """``config.pretty_text``, whose formatting takes long, kept for the next call."""
    key = repr(config.to_dict())
    if key not in _TEXTS:
        _TEXTS[key] = config.pretty_text
    return _TEXTS[key]


def is_evaluation(entry: dict) -> bool:
    return any(score in entry for score in SCORES)


@dataclass
class Run:
    """One training run.

    Args:
        name: What the report calls it.
        config: A config of mmkd, ``mmkd::...``.
        folder: Its work directory.
        options: Changes to the config, as ``--cfg-options`` takes them.
    """

    name: str
    config: str
    folder: Path
    options: dict[str, object] = field(default_factory=dict)
    _process: subprocess.Popen | None = field(default=None, init=False, repr=False, compare=False)

    def read(self) -> Config:
        config = read(self.config)
        config.merge_from_dict(self.options)
        return config

    @property
    def iterations(self) -> int:
        return self.read().train_cfg.max_iters

    @property
    def checkpoint(self) -> Path:
        return self.folder / f'iter_{self.iterations}.pth'

    @property
    def finished(self) -> bool:
        iterations = self.iterations
        if not (self.folder / f'iter_{iterations}.pth').is_file():
            return False
        evaluations = self.evaluations()
        return bool(evaluations) and evaluations[-1]['step'] == iterations

    def history(self) -> list[dict]:
        """What mmengine logged, later runs of the same iterations replacing earlier ones."""
        entries = {}
        for file in sorted(self.folder.glob('*/vis_data/scalars.json')):
            for line in file.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # the last line of a run that was interrupted
                    entry = json.loads(line)
                    entries[entry['step'], is_evaluation(entry)] = entry
        return [entries[key] for key in sorted(entries)]

    def losses(self) -> list[dict]:
        return [entry for entry in self.history() if 'loss' in entry]

    def evaluations(self) -> list[dict]:
        return [entry for entry in self.history() if is_evaluation(entry)]

    def parameters(self) -> int:
        """Parameters of the model that is deployed, without adapters."""
        weights = torch.load(self.checkpoint, map_location='cpu', weights_only=True)['state_dict']
        buffers = ('running_mean', 'running_var', 'num_batches_tracked')
        return sum(
            value.numel()
            for name, value in weights.items()
            if not name.startswith('distillers.') and not name.endswith(buffers)
        )

    def check_unchanged(self) -> str:
        """Finished or interrupted work is only used with the config it was begun with; that config's fingerprint."""
        config = self.read()
        text = text_of(config)
        teacher = config.model.get('teacher')
        if teacher is not None:
            text += text_of(read(teacher.config))
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
        fingerprint = self.check_unchanged()
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / 'fingerprint').write_text(fingerprint)
        title = f'{position} {self.name}'
        if self.finished:
            tqdm.write(f'{title}: finished before, reused ({self.folder})')
            return
        if self.checkpoint.is_file():  # stopped between its last checkpoint and the evaluation: nothing to resume
            self.checkpoint.unlink()
            (self.folder / 'last_checkpoint').unlink()
        options = [f'{key}={value}' for key, value in self.options.items()]
        command = [sys.executable, str(TRAIN), self.config, '--work-dir', str(self.folder), '--resume']
        command += ['--cfg-options', *options] if options else []
        log = self.folder / 'output.log'
        begin = log.stat().st_size if log.is_file() else 0
        env = os.environ if threads is None else {**os.environ, 'OMP_NUM_THREADS': str(threads)}
        with (
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) as process,
            log.open('a') as output,
            tqdm(total=self.iterations, desc=title, unit='it', dynamic_ncols=True, mininterval=1) as bar,
        ):
            self._process = process
            try:
                for line in process.stdout:
                    output.write(line)
                    found = PROGRESS.search(line)
                    if found and found[1] == 'train':
                        bar.set_postfix_str('')
                        bar.update(int(found[2]) - bar.n)
                    elif found:
                        bar.set_postfix_str(f'evaluating {found[2]}/{found[3]}')
            except BaseException:
                process.terminate()
                raise
        if process.returncode or not self.finished:
            said = log.read_bytes()[begin:].decode(errors='replace')
            raise RunFailed(f'{self.name} failed: {reason_of_failure(process.returncode, said)} (see {log})')

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


def train_all(runs: Sequence[Run], jobs: int = 1, threads: int | None = None) -> dict[str, str]:
    """Train runs in their order, ``jobs`` at the same time; one that fails does not stop the others.

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
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    try:
                        future.result()
                    except (RunFailed, ConfigError) as error:
                        failed[str(futures[future].folder)] = str(error)
                        tqdm.write(f'error: {error}')
        except BaseException:  # interrupted: end what runs, begin nothing more
            for future in futures:
                future.cancel()
            while waiting:
                for run in runs:
                    run.stop()
                _, waiting = wait(waiting, timeout=0.5)
            raise
    return failed


def trained_model(of: Run) -> torch.nn.Module:
    """The model that a run trained, as plain mmdet or mmseg builds it."""
    config = of.read()
    config.model = plain_model(config)
    model = MODELS.build(config.model)
    load_weights(model, str(of.checkpoint), 'checkpoint')
    model.cfg = config
    return model.eval()
