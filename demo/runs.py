"""Train configs one after another: finished runs are reused, interrupted ones resumed, progress is shown."""

import contextlib
import hashlib
import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from mmengine.config import Config
from tqdm import tqdm

from mmkd.errors import ConfigError
from mmkd.host import config_path

ROOT = Path(__file__).resolve().parents[1]
PROGRESS = re.compile(r'Iter\((train|val)\) +\[ *(\d+)/(\d+)\]')


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

    def read(self) -> Config:
        config = Config.fromfile(config_path(self.config))
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
        return (
            self.checkpoint.is_file() and bool(self.evaluations()) and self.evaluations()[-1]['step'] == self.iterations
        )

    def history(self) -> list[dict]:
        """What mmengine logged, later runs of the same iterations replacing earlier ones."""
        entries = {}
        for file in sorted(self.folder.glob('*/vis_data/scalars.json')):
            for line in file.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # the last line of a run that was interrupted
                    entry = json.loads(line)
                    entries[entry['step'], 'coco/bbox_mAP' in entry] = entry
        return [entries[key] for key in sorted(entries)]

    def losses(self) -> list[dict]:
        return [entry for entry in self.history() if 'loss' in entry]

    def evaluations(self) -> list[dict]:
        return [entry for entry in self.history() if 'coco/bbox_mAP' in entry]

    def parameters(self) -> int:
        """Parameters of the model that is deployed, without adapters."""
        weights = torch.load(self.checkpoint, map_location='cpu', weights_only=True)['state_dict']
        buffers = ('running_mean', 'running_var', 'num_batches_tracked')
        return sum(
            value.numel()
            for name, value in weights.items()
            if not name.startswith('distillers.') and not name.endswith(buffers)
        )

    def _check_unchanged(self) -> None:
        """Finished or interrupted work is only continued with the config it was begun with."""
        config = self.read()
        text = config.pretty_text
        teacher = config.model.get('teacher')
        if teacher is not None:
            text += Config.fromfile(config_path(teacher.config)).pretty_text
        fingerprint = hashlib.sha256(text.encode()).hexdigest()
        record = self.folder / 'fingerprint'
        if record.is_file() and record.read_text() != fingerprint:
            raise ConfigError(
                f'{self.folder}: begun with another version of {self.config}; remove {self.folder} to run it anew'
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        record.write_text(fingerprint)

    def train(self, position: str) -> None:
        """Train to the end, unless that is done."""
        self._check_unchanged()
        title = f'{position} {self.name}'
        if self.finished:
            print(f'{title}: finished before, reused ({self.folder})')
            return
        if self.checkpoint.is_file():  # stopped between its last checkpoint and the evaluation: nothing to resume
            self.checkpoint.unlink()
            (self.folder / 'last_checkpoint').unlink()
        options = [f'{key}={value}' for key, value in self.options.items()]
        command = [
            sys.executable,
            str(ROOT / 'tools' / 'train.py'),
            self.config,
            '--work-dir',
            str(self.folder),
            '--resume',
        ]
        command += ['--cfg-options', *options] if options else []
        log = self.folder / 'output.log'
        with (
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,
            log.open('a') as output,
            tqdm(total=self.iterations, desc=title, unit='it', dynamic_ncols=True, mininterval=1) as bar,
        ):
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
            reason = [line for line in log.read_text().splitlines() if line.startswith('error: ')]
            reason = reason[-1] if reason else f'the end of {log}:\n' + '\n'.join(log.read_text().splitlines()[-15:])
            sys.exit(f'{title} failed: {reason}')
