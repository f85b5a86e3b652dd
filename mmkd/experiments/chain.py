"""Train configs one after the other, each with what the ones before have learnt."""

from collections.abc import Callable, Sequence
from pathlib import Path

from mmengine.config import Config

from mmkd.errors import ConfigError
from mmkd.experiments.configs import read, teachers_of
from mmkd.experiments.discovery import beside
from mmkd.experiments.runs import Run
from mmkd.hosts.configs import described_sources, plain_model, read_teacher, source_kind


def stages(configs: Sequence[str], folder: Path, go_on: bool = False) -> list[Run]:
    """The trainings of a chain, each in a folder of its own.

    A teacher whose model is that of an earlier stage has its weights, the latest of these where there are several, and a frozen
    label encoder those of the latest that was trained; others keep the checkpoints that their configs name.

    Args:
        configs: Files, or configs of mmkd.
        folder: For their work directories, ``1_<name>``, ``2_<name>`` and so on.
        go_on: Whether each student starts from the weights of the one before as well, which must have the same model.

    Raises:
        ConfigError: for less than two configs, and for one that takes nothing from those before.
    """
    if len(configs) < 2:
        raise ConfigError(f'a chain has two configs or more, found {len(configs)}')
    runs: list[Run] = []
    for number, name in enumerate(configs, 1):
        config = read(name)
        run = Run(f'{number}_{Path(name).stem}', name, folder / f'{number}_{Path(name).stem}')
        taught = False
        for option, teacher in teachers_of(config).items():
            if isinstance(teacher['config'], str):  # the stage's config is written to its work directory
                teacher['config'] = run.options[f'{option}.config'] = beside(teacher['config'], Path(name).parent)
            earlier = [each for each in runs if plain_model(each.read()) == read_teacher(teacher).model]
            if earlier:
                run.options[f'{option}.checkpoint'] = str(earlier[-1].checkpoint)
                taught = True
        for option, encoder in described_sources(config):
            earlier = [each for each in runs if _encodes_labels(each.read())]
            if source_kind(encoder) == 'LabelEncoder' and encoder.get('checkpoint') and earlier:
                run.options[f'{option}.checkpoint'] = str(earlier[-1].checkpoint)
                taught = True
        if go_on and runs:
            if plain_model(config) != plain_model(runs[-1].read()):
                raise ConfigError(
                    f'{name}: --go-on: its student is another model than that of {configs[number - 2]}, from whose weights it '
                    f'would start'
                )
            run.options['load_from'] = str(runs[-1].checkpoint)
        elif runs and not taught:
            raise ConfigError(
                f'{name}: none of its teachers is the student of an earlier config of the chain, and it does not start from one '
                f'(--go-on)'
            )
        runs.append(run)
    return runs


def _encodes_labels(config: Config) -> bool:
    """Whether a training has a label encoder of its own."""
    found = [each for _, each in described_sources(config) if source_kind(each) == 'LabelEncoder']
    return any(not each.get('checkpoint') for each in found)


def train_chain(
    runs: Sequence[Run], threads: int | None = None, done: Callable[[Run], object] = lambda run: None
) -> None:
    """Train a chain; stages that have ended are reused, one that was interrupted goes on.

    Raises:
        ConfigError: for a stage that was begun with another config.
        RunFailed: if one fails; the later ones are not begun.
    """
    for number, run in enumerate(runs, 1):
        run.train(f'[{number}/{len(runs)}]', threads)
        done(run)
