"""Find out from a folder of configs what is compared with what."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmengine.config import Config

from mmkd.errors import ConfigError, nearest
from mmkd.experiments.configs import read, teachers_of
from mmkd.hosts.configs import plain_model
from mmkd.hosts.mmengine import config_path


@dataclass(frozen=True)
class Method:
    """A config that distills, and what it is compared with.

    Args:
        name: Of its file, without ``.py``.
        student: The config of its student alone.
        teachers: Option, such as ``model.teacher``, to a config of the same folder, which is trained first; one that
            distills as well is a teacher's assistant.
        given: Option to the name of a teacher from elsewhere, whose checkpoint is used as it is.
    """

    name: str
    student: str
    teachers: Mapping[str, str] = field(default_factory=dict)
    given: Mapping[str, str] = field(default_factory=dict)


def discover(folder: Path, only: Sequence[str] = ()) -> list[Method]:
    """The methods in a folder of configs: every config with ``model.distillers``; ``only`` restricts them by name.

    A method's student alone is the config without distillers that has the same model, the same validation data and the
    same schedule. Its teachers are the configs that ``model.teacher.config`` names. Files that train
    nothing, such as bases, are passed over.

    Raises:
        ConfigError: for a name that is not there, for a folder without methods, and for a method that cannot be
            compared.
    """
    configs = {path.stem: read(str(path)) for path in sorted(folder.glob('*.py'))}
    distilled = {name: config for name, config in configs.items() if 'distillers' in (config.get('model') or {})}
    needed = ('model', 'train_cfg', 'train_dataloader', 'val_dataloader', 'val_evaluator')
    plain = {
        name: config
        for name, config in configs.items()
        if name not in distilled and all(config.get(key) for key in needed)
    }
    for name in only:
        if name not in distilled:
            raise ConfigError(f'{name}: no such method in {folder}; the nearest are {nearest(name, distilled)}')
    if not distilled:
        raise ConfigError(
            f'{folder}: none of its configs has model.distillers, so there is no method to compare (found '
            f'{", ".join(configs) or "no config"})'
        )
    for name in only or distilled:
        missing = [key for key in needed if not distilled[name].get(key)]
        if missing:
            raise ConfigError(f'{name}: it has no {missing[0]}, and cannot be trained and scored')
    methods = [_method(name, distilled[name], plain, folder) for name in dict.fromkeys(only or distilled)]
    for method in methods:
        for option, teacher in method.teachers.items():
            missing = [key for key in needed if not configs[teacher].get(key)]
            if missing:
                raise ConfigError(
                    f'{method.name}: {option}.config is {teacher}, which has no {missing[0]} to be trained'
                )
            stages_before(teacher, folder)
    return sorted(methods, key=lambda method: (method.student, method.name))


def teachers_there(config: Config, folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The frozen teachers of a config: option to the name of a config in ``folder``, and to that of one from elsewhere."""
    teachers, given = {}, {}
    for option, teacher in teachers_of(config).items():
        file = _file_of(teacher['config'], folder)
        if file is not None and file.parent.resolve() == folder.resolve():
            teachers[option] = file.stem
        else:
            given[option] = teacher['config'] if isinstance(teacher['config'], str) else str(teacher['config']['type'])
    return teachers, given


def stages_before(name: str, folder: Path, learners: Sequence[str] = ()) -> int:
    """How many trainings must have ended, one after the other, before that of a config in ``folder`` can begin.

    Args:
        name: The config's, without ``.py``.
        folder: Where it lies.
        learners: Those that wait for it.

    Raises:
        ConfigError: for a config that waits for itself.
    """
    if name in learners:
        raise ConfigError(
            f'{name}: it is taught by itself, {" <- ".join([*learners, name])}; one of them must come first'
        )
    teachers, _ = teachers_there(read(str(folder / f'{name}.py')), folder)
    return max((1 + stages_before(each, folder, (*learners, name)) for each in teachers.values()), default=0)


def _method(name: str, config: Config, plain: Mapping[str, Config], folder: Path) -> Method:
    teachers, given = teachers_there(config, folder)
    student = plain_model(config)
    same = [each for each, other in plain.items() if plain_model(other) == student]
    alone = [each for each in same if plain[each].val_dataloader == config.val_dataloader]
    if len(alone) > 1:  # one of them may be its teacher: born again
        alone = [each for each in alone if each not in teachers.values()] or alone
        alone = [each for each in alone if plain[each].train_cfg == config.train_cfg] or alone
    if not alone:
        why = f'; with another val_dataloader there is {", ".join(same)}' if same else ''
        raise ConfigError(
            f'{name}: no config in {folder} is its student alone, which is the same model on the same validation data, '
            f'without distillers{why}'
        )
    if len(alone) > 1:
        raise ConfigError(
            f'{name}: {len(alone)} configs in {folder} are its student alone, {", ".join(alone)}; leave one there'
        )
    other = plain[alone[0]]
    for key in ('train_cfg', 'val_evaluator'):
        if config[key] != other[key]:
            raise ConfigError(f'{name}: its {key} is not that of {alone[0]}; both must have the same budget and score')
    batches = [each.train_dataloader.get('batch_size') for each in (config, other)]
    if batches[0] != batches[1]:
        raise ConfigError(
            f'{name}: its train_dataloader.batch_size is {batches[0]}, and that of {alone[0]} is {batches[1]}; both '
            f'must have the same budget'
        )
    return Method(name, alone[0], teachers, given)


def _file_of(config: object, folder: Path) -> Path | None:
    """The file of a teacher's config; ``None`` if it is a model dict, of another package, or not there."""
    if not isinstance(config, str):
        return None
    if config.startswith('mmkd::'):
        return Path(config_path(config))
    path = Path(beside(config, folder))
    return path if path.is_file() else None


def beside(path: str, folder: Path) -> str:
    """A path that a config in ``folder`` names: in that folder if it is there, else as it is, from where one works."""
    if '::' in path or '://' in path:
        return path
    there = os.path.abspath(folder / Path(path).expanduser())
    return there if os.path.isfile(there) else path
