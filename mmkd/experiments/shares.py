"""One rule for the loss weights of all methods of a comparison: the factor with which each has the same share of the gradient."""

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from mmengine.config import Config

from mmkd.errors import ConfigError
from mmkd.experiments.configs import text_of
from mmkd.experiments.runs import Run, RunFailed, environment, reason_of_failure

CHECK = (sys.executable, '-m', 'mmkd', 'check')
BATCHES = 5
WARM_UP = 50
"""Iterations, where the config's learning rate has no warm-up."""


@dataclass
class Share:
    r"""How strongly a method pulls at the student's backbone as its config is, and the factor that changes that.

    After the warm-up of the student, by its own losses alone, ``mmkd check`` measures the gradient :math:`g_D` of all its
    distillers' losses together and that of the task, :math:`g_T`; the factor of all its losses is

    .. math:: f = \frac{s}{1 - s} \cdot \frac{\lVert g_T \rVert}{\lVert g_D \rVert}, \quad
        \text{so that} \quad \frac{f \lVert g_D \rVert}{f \lVert g_D \rVert + \lVert g_T \rVert} = s.

    Args:
        run: A run of the method; what is measured lies in its folder, which is not that of a training.
        share: s, between 0 and 1.
    """

    run: Run
    share: float

    @property
    def known(self) -> bool:
        return (self.run.folder / 'check.json').is_file()

    @property
    def factor(self) -> float:
        """With three digits.

        Raises:
            RunFailed: where no factor gives this share.
        """
        together = json.loads((self.run.folder / 'check.json').read_text())['together']
        if not (0 < together < math.inf):
            raise RunFailed(
                f"{self.run.name}: after the warm-up its gradient is {together} times the task's, and no factor makes its share "
                f'{self.share:g}; compare it with its own weights'
            )
        return float(f'{self.share / (1 - self.share) / together:.3g}')

    def changes(self) -> dict[str, object]:
        """What the factor changes in the config."""
        return {
            f'model.distillers.{name}.factor': times(spec.get('factor', 1.0), self.factor)
            for name, spec in self.run.read().model.distillers.items()
        }

    def measure(self, threads: int | None = None) -> None:
        """Measure it, unless that is done.

        Raises:
            ConfigError: if it was done with another config.
            RunFailed: if the check fails, with its error line.
        """
        fingerprint = self.run.check_unchanged()
        if self.known:
            return
        config = self.run.read()
        folder = self.run.folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / 'fingerprint').write_text(fingerprint)
        file = folder / Path(self.run.config.rpartition('::')[2]).name
        file.write_text(text_of(config))
        options = ['--images', '0', '--warm-up', str(warm_up(config)), '--batches', str(BATCHES)]
        command = [*CHECK, str(file), *options, '--work-dir', str(folder)]
        ended = subprocess.run(command, capture_output=True, text=True, env=environment(threads))
        (folder / 'output.log').write_text(ended.stdout + ended.stderr)
        if ended.returncode or not self.known:
            reason = reason_of_failure(ended.returncode, ended.stdout + ended.stderr)
            raise RunFailed(f'{self.run.name} not measured: {reason} (see {folder / "output.log"})')


def warm_up(config: Config) -> int:
    """The iterations in which the learning rate of a config rises; :data:`WARM_UP` where it does not."""
    schedulers = config.get('param_scheduler') or []
    schedulers = schedulers if isinstance(schedulers, list | tuple) else [schedulers]
    ends = [each.get('end') for each in schedulers if each['type'] == 'LinearLR' and not each.get('by_epoch', True)]
    return next((end for end in ends if end), WARM_UP)


def times(factor: object, by: float) -> object:
    """A factor of a config, a number or a schedule, multiplied."""
    if isinstance(factor, dict):
        return {**factor, **{key: by * factor[key] for key in ('value', 'start') if key in factor}}
    if not isinstance(factor, int | float):
        raise ConfigError(f'factor={factor!r}: expected a number or a schedule')
    return by * factor
