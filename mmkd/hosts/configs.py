"""Read the configs of mmengine, mmdet and mmseg: which model one trains, its teachers, and what is left without them."""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from mmengine.config import Config, ConfigDict
from mmengine.dist import is_distributed
from mmengine.hub import get_config
from mmengine.model import BaseModel
from mmengine.registry import MODELS, DefaultScope
from mmengine.utils import is_installed

from mmkd.errors import ConfigError, describe
from mmkd.hosts.config_files import read_config_file
from mmkd.hosts.datasets import class_names, datasets, type_name
from mmkd.hosts.mmengine import config_path

FILES = ('config', 'checkpoint')  # what of a teacher may be a path
COPIES = ('Average', 'Snapshot')  # sources that are copies of the student
SINGLE = {'config', 'type', 'checkpoint', 'dtype'}  # keys by which one teacher is told from several by name


class TeacherConfig(NamedTuple):
    """What a config says of its teacher."""

    model: ConfigDict
    checkpoint: str | None
    dtype: str | None
    scope: str | None


def read_teacher(teacher: str | Mapping) -> TeacherConfig:
    """Read a teacher's config, without building it.

    Args:
        teacher: The name of a config whose metafile lists weights (``'mmdet::...'``), or a dict with ``config`` (a
            name, a path or a model dict), ``checkpoint`` (path or URL) and, if wanted, ``dtype``.
    """
    options = {'config': teacher} if isinstance(teacher, str) else dict(teacher)
    if 'config' not in options:
        raise ConfigError(f"teacher={options!r}: expected a config's name, or a dict with config and checkpoint")
    config, published = _read_config(options['config'])
    return TeacherConfig(
        plain_model(config), options.get('checkpoint') or published, options.get('dtype'), config.get('default_scope')
    )


def described_sources(config: Config) -> Iterator[tuple[str, Any]]:
    """What a distilled config says of each thing that the student learns from, with its option's name."""
    found = (config.get('model') or {}).get('teacher')
    if isinstance(found, Mapping) and not SINGLE & set(found):
        yield from ((f'model.teacher.{name}', each) for name, each in found.items())
    elif found is not None:
        yield 'model.teacher', found


def source_kind(source: object) -> str:
    """The name of a source's class; '' of what is no config."""
    if isinstance(source, str):
        return 'Teacher'
    return type_name({'type': 'Teacher', **source}) if isinstance(source, Mapping) else ''


def teachers(config: Config) -> Iterator[tuple[str, str | Mapping]]:
    """The frozen teachers of a distilled config, each with its option's name."""
    for option, spec in described_sources(config):
        if source_kind(spec) == 'Teacher' and (isinstance(spec, str) or 'config' in spec):
            yield option, spec


def fill_in_class_names(config: Config) -> None:
    """Give a distilled student the names of its classes, those of the training data, where something names them."""
    loader = config.get('train_dataloader')
    if not loader or 'student' not in config.model or 'class_names' in config.model:
        return
    if not isinstance(loader.get('dataset'), Mapping):  # which is checked, and said, later
        return
    parts = list(datasets(loader.dataset, 'train_dataloader.dataset'))
    mapped = any(isinstance(spec, Mapping) and spec.get('classes') for _, spec in described_sources(config))
    steps = [step for _, dataset in parts for step in dataset.get('pipeline') or () if isinstance(step, Mapping)]
    if mapped or any(type_name(step) == 'LabelledFor' for step in steps):
        option, dataset = parts[0]
        config.model.class_names = class_names(dataset, option, config.get('default_scope'))


def trained_models(config: Config) -> Iterator[tuple[str, Mapping]]:
    """The models that a training initializes, each with its option's name: the student, or a plain model, and peers."""
    yield ('model.student' if 'student' in config.model else 'model'), plain_model(config)
    for option, spec in described_sources(config):
        if source_kind(spec) == 'Peer' and 'config' in spec:
            yield f'{option}.config', read_teacher(dict(config=spec['config'])).model


def source_model(config: Config, name: str) -> ConfigDict:
    """The plain model of a source that is stored with a distilled student: a peer's, or the student's of its copies.

    Raises:
        ConfigError: for a source that is not there, or of which the student's checkpoint has nothing.
    """
    sources = {
        option.removeprefix('model.').removeprefix('teacher.'): each for option, each in described_sources(config)
    }
    kind = source_kind(sources.get(name))
    if kind == 'Peer':
        model = read_teacher(dict(config=sources[name]['config'])).model
        model.setdefault('data_preprocessor', plain_model(config).get('data_preprocessor'))
        return model
    if kind in COPIES:
        return plain_model(config)
    stored = [each for each in sources if source_kind(sources[each]) in ('Peer', *COPIES)]
    raise ConfigError(
        f'source {name!r}: a checkpoint holds a Peer, an Average or a Snapshot beside the student; in this config there is '
        f'{", ".join(map(repr, stored)) or "none"}'
    )


def teacher_classes(teacher: str | Mapping) -> tuple[str, ...] | None:
    """The classes of the data that a teacher's config trains on, as the config names them; None where it does not."""
    config, _ = _read_config(teacher if isinstance(teacher, str) else teacher['config'])
    loader = config.get('train_dataloader')
    if not loader:
        return None
    option, dataset = next(datasets(loader.dataset, 'train_dataloader.dataset'))
    return class_names(dataset, f'teacher config: {option}', config.get('default_scope'))


def config_folder(config: Config) -> list[Path]:
    """The folder of a config's file; none for a config without one."""
    return [Path(config.filename).parent] if config.filename else []


def numbered(key: str, value: object) -> Iterator[tuple[str, Any]]:
    """The entries of a list in a config, each with its option's name; none of what is no list."""
    for index, each in enumerate(value if isinstance(value, (list, tuple)) else ()):
        yield f'{key}.{index}', each


def name_classes(value: object) -> object:
    """Write classes in a config as dotted paths, in place, which is what mmengine can print of a config with ``_base_``.

    New-style configs stay as they are: what they import is no class yet.
    """
    if isinstance(value, type):
        return f'{value.__module__}.{value.__qualname__}'
    if isinstance(value, dict):
        for key, each in dict.items(value):  # a ConfigDict's own would import
            dict.__setitem__(value, key, name_classes(each))
    elif isinstance(value, (list, tuple)):
        return type(value)(name_classes(each) for each in value)
    return value


def _local_file(value: object) -> TypeGuard[str]:
    """Whether a teacher's config or checkpoint is named by a path."""
    return isinstance(value, str) and '::' not in value and '://' not in value


class NamedFile(NamedTuple):
    """A path in a config."""

    option: str
    holder: Any
    """The dict that has it."""
    key: str

    @property
    def path(self) -> Any:
        return self.holder.get(self.key)


def _named_files(config: Config) -> Iterator[NamedFile]:
    """The options of a distilled config that name configs and checkpoints by paths."""
    found = [NamedFile('model.student', config.get('model') or {}, 'student')]
    for option, spec in described_sources(config):
        if isinstance(spec, Mapping):
            found += [NamedFile(f'{option}.{key}', spec, key) for key in FILES]
        else:
            above, _, name = option.rpartition('.')
            found.append(NamedFile(option, config.model if above == 'model' else config.model.teacher, name))
    yield from (each for each in found if _local_file(each.path))


def resolve_files(config: Config) -> None:
    """Let relative paths of teachers begin at the folder of the config's file, where they are there.

    What is not there stays as it is, and begins at the current folder. The same goes for a student that is named.
    """
    for named in list(_named_files(config)):
        for folder in config_folder(config):
            if (folder / named.path).is_file():
                named.holder[named.key] = str(folder / named.path)


def check_named_configs(config: Config) -> None:
    """Check that the configs that a distilled config names are there; weights are needed for training alone.

    Raises:
        ConfigError: naming the folders in which one was looked for.
    """
    for option, path in ((each.option, each.path) for each in _named_files(config)):
        if not option.endswith('.checkpoint') and not Path(path).expanduser().is_file():
            places = ' and '.join(str(folder.absolute()) for folder in [*config_folder(config), Path.cwd()])
            what = 'student' if option == 'model.student' else 'teacher config'
            raise ConfigError(f'{what} {path}: no such file (looked in {places})')


def plain_model(config: Config) -> ConfigDict:
    """The model that a config trains, without what distills it: of a distilled model, its student."""
    whole = config.get('model')
    model = whole.get('student', whole) if isinstance(whole, Mapping) else whole
    if not isinstance(model, (str, Mapping)) or not model:
        where = f' of {config.filename}' if getattr(config, 'filename', None) else ''
        option = 'model.student' if isinstance(whole, Mapping) and 'student' in whole else 'model'
        raise ConfigError(f"{option}{where}: expected a model's config, found {model!r}")
    if isinstance(model, str) or 'model' in model:  # a config's name, or a whole config
        model = read_model(model, 'student')
    if config.get('data_preprocessor') and 'data_preprocessor' not in model:  # where mmseg has it, as Runner does
        model.data_preprocessor = config.data_preprocessor
    return model


def _read_config(config: str | Mapping, what: str = 'teacher config') -> tuple[Config, str | None]:
    """The config and the URL of the weights that its metafile lists, if any."""
    if isinstance(config, Mapping):
        return Config(dict(model=ConfigDict(config))), None
    if not isinstance(config, str):
        raise ConfigError(f"{what}={config!r}: expected a config's name, its path or a model's config")
    package, found, _ = config.partition('::')
    if found and package == 'mmkd':
        return read_config_file(config_path(config), what), None
    if found:
        if not is_installed(package):
            raise ConfigError(f'{what} {config}: package {package!r} is not installed')
        try:
            read = get_config(config, pretrained=True)
        except (AssertionError, FileNotFoundError, ValueError):  # no weights in its metafile, or no such config
            try:
                read = get_config(config)
            except (FileNotFoundError, ValueError):  # ValueError: without a folder
                raise ConfigError(f'{what} {config}: {package} has no such config') from None
        return read, read.get('model_path')
    if not Path(config).expanduser().is_file():
        raise ConfigError(f'{what} {config}: no such file (looked in {Path.cwd()})')
    return read_config_file(config, what), None


def read_model(config: str | Mapping, what: str = 'config') -> ConfigDict:
    """The plain model of a config: its name, its path, or a whole config."""
    if isinstance(config, str):
        config, _ = _read_config(config, what)
    return plain_model(config)


def build_model(config: Mapping, scope: str | None = None, what: str = 'model') -> BaseModel:
    """Build a model from a copy of its config, as some models change what they are built from.

    Without a process group mmcv's synchronized batch norm (``MMSyncBN``) cannot be built. In one process it computes what
    a batch norm does, and has the same weights: that takes its place.

    Args:
        config: The model's config.
        scope: The default scope of its types; None for the current one.
        what: What it is, for errors.

    Raises:
        ConfigError: with what its class says, where it cannot be built.
    """
    config = copy.deepcopy(config)
    if not is_distributed():
        _without_synchronization(config)
    try:
        with DefaultScope.overwrite_default_scope(scope):
            return MODELS.build(config)
    except ConfigError:
        raise
    except Exception as error:  # whatever a model's class raises
        raise ConfigError(f'{what}: {type_name(config) or config} cannot be built; {describe(error)}') from error


def _without_synchronization(node: Any) -> None:
    if isinstance(node, dict):
        kind = node.get('type')
        if kind == 'MMSyncBN' or getattr(kind, '__module__', None) == 'mmcv.ops.sync_bn':
            node['type'] = 'BN'
    if isinstance(node, (dict, list, tuple)):
        for each in node.values() if isinstance(node, dict) else node:
            _without_synchronization(each)
