"""Trainings that ended, whoever ran them: config, scores and weights of a work directory."""

import copy
import os
import re
from collections.abc import Mapping
from pathlib import Path

from mmengine.config import Config

from mmkd.errors import ConfigError
from mmkd.experiments.runs import Run
from mmkd.experiments.suites import Score, evaluators, named, score_key
from mmkd.hosts.config_files import read_config_file
from mmkd.hosts.configs import read_teacher
from mmkd.hosts.datasets import annotation_path, class_names, datasets
from mmkd.weights import fetch

WEIGHTS = re.compile(r'(?:epoch|iter)_(\d+)\.pth$')


class Finished(Run):
    """The training of a work directory, with what mmengine left there: its config, ``scalars.json`` and checkpoints.

    Args:
        name: What a report calls it.
        folder: The work directory.
        option: What named it; errors begin with it.

    Raises:
        ConfigError: if there is no such folder, no config in it, or no evaluation in its log.
    """

    def __init__(self, name: str, folder: str | Path, option: str):
        folder = Path(folder)
        if not folder.is_dir():
            raise ConfigError(f'{option} {folder}: no such folder (looked in {Path.cwd()})')
        dumped = sorted(folder.glob('*/vis_data/config.py')) or sorted(
            folder.glob('*.py'), key=lambda path: path.stat().st_mtime
        )
        if not dumped:
            raise ConfigError(
                f'{option} {folder}: no config in it (looked for {folder}/*/vis_data/config.py and {folder}/*.py); expected '
                f'the work directory of a training'
            )
        super().__init__(name, str(dumped[-1]), folder)
        self.option = option
        self._config = read_config_file(dumped[-1])
        self._entries = super().history()
        if not self.evaluations():
            raise ConfigError(
                f'{option} {folder}: no evaluation in its log ({folder}/*/vis_data/scalars.json); mmkd test gives a '
                f"checkpoint's scores"
            )

    def read(self) -> Config:
        return copy.deepcopy(self._config)

    def history(self) -> list[dict]:
        return self._entries

    def scores(self) -> dict[str, float]:
        return {key: value for key, value in super().scores().items() if isinstance(value, (int, float))}

    @property
    def unit(self) -> str:
        """What the steps of its evaluations count; mmengine's log counts epochs unless it is told otherwise."""
        training = self._config.get('train_cfg') or {}
        return 'epoch' if 'max_epochs' in training or training.get('by_epoch') else 'iter'

    @property
    def length(self) -> int:
        return self.evaluations()[-1]['step']

    @property
    def checkpoint(self) -> Path:
        """The weights that were evaluated last, or if they were not kept the last ones of those that are there.

        Raises:
            ConfigError: if there are none.
        """
        there = {path: WEIGHTS.search(path.name) for path in self.folder.glob('*.pth')}
        steps = {path: int(found[1]) for path, found in there.items() if found}
        if not steps:
            raise ConfigError(
                f'{self.option} {self.folder}: no checkpoint in it (expected {self.unit}_{self.length}.pth); '
                f'--no-pictures reports what needs none'
            )
        # best_*_iter_400.pth has the same weights as iter_400.pth
        return max(
            steps, key=lambda path: (steps[path] == self.length, steps[path], path.name.startswith(f'{self.unit}_'))
        )

    @property
    def of_last_evaluation(self) -> bool:
        """Whether the weights are those of the last evaluation."""
        found = WEIGHTS.search(self.checkpoint.name)
        return bool(found) and int(found[1]) == self.length

    @property
    def distills(self) -> bool:
        return 'distillers' in self._config.model

    def seconds(self) -> float:
        """What its training iterations took, evaluations left out, as far as the log has times."""
        total, before = 0.0, 0
        for entry in self.losses():
            total += entry.get('time', 0.0) * (entry['step'] - before)
            before = entry['step']
        return total

    def memory(self) -> int | None:
        """The most MiB of a GPU's memory that the log has; None without."""
        return max((entry['memory'] for entry in self.losses() if 'memory' in entry), default=None)


class Given(Finished):
    """A model by its config and checkpoint, which is evaluated as ``like`` was; it has no log.

    Raises:
        ConfigError: if one of them is not there.
    """

    distills = False
    of_last_evaluation = True

    def __init__(self, name: str, config: str, checkpoint: str, like: Finished, option: str):
        Run.__init__(self, name, config, like.folder)
        self.option = option
        self._config = like.read()
        self._config.model = read_teacher(dict(config=config)).model
        self._entries = []
        self._weights = fetch(checkpoint, f'{option} checkpoint', missing='')
        self.measured: dict[str, float] = {}

    @property
    def checkpoint(self) -> Path:
        return self._weights

    def scores(self) -> dict[str, float]:
        return self.measured


def score_of(run: Finished, key: str | None = None) -> Score:
    """What ranks a run's model: the score that is asked for, or else its config's.

    Raises:
        ConfigError: if its evaluations have no such score, or several and none was asked for.
    """
    logged = run.scores()
    if key is not None and key not in logged:
        raise ConfigError(f'--score {key}: the evaluations of {run.folder} logged {", ".join(logged)}')
    if key is None:
        try:
            key = score_key(run.read())
            several = len(evaluators(run.read())) > 1
        except ConfigError:
            key, several = next(iter(logged)), len(logged) > 1
        if several or key not in logged:
            raise ConfigError(f'{run.folder}: it has several scores; choose one with --score: {", ".join(logged)}')
    score = named(key)
    return Score(score.key, score.name, 3 if abs(logged[key]) <= 1 else 2)


def check_comparable(run: Finished, other: Finished, score: Score) -> None:
    """Check that another run was evaluated on the same data, and has the score.

    Raises:
        ConfigError: with the first difference.
    """
    if score.key not in other.scores():
        raise ConfigError(
            f'{other.option} {other.folder}: its evaluations have no {score.key}, only {", ".join(other.scores())}; '
            f'choose another with --score, or evaluate it alike'
        )
    own, its = _data(run.read()), _data(other.read())
    for key in own:
        if own[key] != its.get(key):
            raise ConfigError(
                f'{other.option} {other.folder}: it was evaluated on other data; {key} is {its.get(key)!r} there and '
                f'{own[key]!r} in {run.folder}'
            )


def _data(config: Config) -> Mapping[str, object]:
    """What tells validation data apart, by option; paths as absolute ones."""
    found: dict[str, object] = {}
    for option, dataset in datasets(config.val_dataloader.dataset, 'val_dataloader.dataset'):
        root = dataset.get('data_root') or ''
        if dataset.get('ann_file'):
            found[f'{option}.ann_file'] = os.path.abspath(annotation_path(dataset))
        for key, folder in (dataset.get('data_prefix') or {}).items():
            found[f'{option}.data_prefix.{key}'] = os.path.abspath(os.path.join(root, folder or ''))
        found[f'{option}.indices'] = dataset.get('indices')
        found[f'classes of {option}'] = class_names(dataset, option, config.get('default_scope'))
    return found
