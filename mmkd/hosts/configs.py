"""Read the configs of mmengine, mmdet and mmseg: which model one trains, and the weights that its metafile lists."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from mmengine.config import Config, ConfigDict
from mmengine.hub import get_config
from mmengine.utils import is_installed

from mmkd.errors import ConfigError
from mmkd.hosts.mmengine import config_path


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
    unknown = set(options) - {'config', 'checkpoint', 'dtype'}
    if unknown or 'config' not in options:
        raise ConfigError(
            f"teacher={options!r}: expected a config's name, or a dict with config, checkpoint and, if wanted, dtype"
        )
    config, published = _read_config(options['config'])
    return TeacherConfig(
        plain_model(config), options.get('checkpoint') or published, options.get('dtype'), config.get('default_scope')
    )


def plain_model(config: Config) -> ConfigDict:
    """The model that a config trains, without what distills it: of a distilled model, its student."""
    model = config.model.get('student', config.model)
    if config.get('data_preprocessor') and 'data_preprocessor' not in model:  # where mmseg has it, as Runner does
        model.data_preprocessor = config.data_preprocessor
    return model


def _read_config(config: str | Mapping) -> tuple[Config, str | None]:
    """The config and the URL of the weights that its metafile lists, if any."""
    if isinstance(config, Mapping):
        return Config(dict(model=ConfigDict(config))), None
    package, found, _ = config.partition('::')
    if found and package == 'mmkd':
        return Config.fromfile(config_path(config)), None
    if found:
        if not is_installed({'mmseg': 'mmsegmentation'}.get(package, package)) and not is_installed(package):
            raise ConfigError(f'teacher config {config}: package {package!r} is not installed')
        try:
            read = get_config(config, pretrained=True)
        except (AssertionError, FileNotFoundError):  # no weights in its metafile, or no such config
            try:
                read = get_config(config)
            except FileNotFoundError:
                raise ConfigError(f'teacher config {config}: {package} has no such config') from None
        return read, read.get('model_path')
    if not Path(config).expanduser().is_file():
        raise ConfigError(f'teacher config {config}: no such file (looked in {Path.cwd()})')
    return Config.fromfile(Path(config).expanduser()), None


def read_model(config: str | Mapping, what: str = 'config') -> ConfigDict:
    """The plain model of a config: its name, its path, or a whole config."""
    if isinstance(config, str):
        config, _ = _read_config(config)
    return plain_model(config)
