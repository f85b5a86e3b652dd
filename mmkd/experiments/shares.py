"""One rule for the loss weights of all methods of a comparison: the factor with which each has the same share of the gradient."""

import json
import math
import sys
from dataclasses import dataclass

from mmengine.config import Config
from tqdm import tqdm

from mmkd.errors import ConfigError
from mmkd.experiments.runs import Run, RunFailed

CHECK = (sys.executable, '-m', 'mmkd', 'check')
BATCHES = 5
WARM_UP = 50
"""Iterations, where the config's learning rate has no warm-up."""


@dataclass
class Share(Run):
    r"""A run of ``mmkd check``: how strongly a method pulls at the student's backbone, and the factor that changes that.

    After the warm-up of the student, by its own losses alone, the gradient :math:`g_D` of all its distillers' losses together
    is measured, and that of the task, :math:`g_T`; the factor of all its losses is

    .. math:: f = \frac{s}{1 - s} \cdot \frac{\lVert g_T \rVert}{\lVert g_D \rVert}, \quad
        \text{so that} \quad \frac{f \lVert g_D \rVert}{f \lVert g_D \rVert + \lVert g_T \rVert} = s.

    Args:
        share: s, between 0 and 1.
    """

    share: float = 0.5

    @property
    def finished(self) -> bool:
        return (self.folder / 'check.json').is_file()

    @property
    def factor(self) -> float:
        """With three digits.

        Raises:
            RunFailed: where no factor gives this share.
        """
        together = json.loads((self.folder / 'check.json').read_text())['together']
        if not (0 < together < math.inf):
            raise RunFailed(
                f"{self.name}: after the warm-up its gradient is {together} times the task's, and no factor makes its share "
                f'{self.share:g}; compare it with its own weights'
            )
        return float(f'{self.share / (1 - self.share) / together:.3g}')

    def changes(self) -> dict[str, object]:
        """What the factor changes in the config."""
        return {
            f'model.distillers.{name}.factor': times(spec.get('factor', 1.0), self.factor)
            for name, spec in self.read().model.distillers.items()
        }

    def train(self, position: str, threads: int | None = None) -> None:
        """Measure it, unless that is done; see :meth:`Run.train`."""
        file = self.begin()
        if not self.finished:
            steps = str(warm_up(self.read()))
            options = ['--images', '0', '--warm-up', steps, '--batches', str(BATCHES), '--work-dir', str(self.folder)]
            self.call([*CHECK, str(file), *options], threads, 'not measured')
        tqdm.write(f'{position} {self.name}: factor {self.factor:g}')


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
