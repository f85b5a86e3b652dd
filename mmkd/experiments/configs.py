"""Read the configs of a comparison: their teachers, their changes, and what makes the end of a run recognizable."""

import copy
import functools
from collections.abc import Mapping
from pathlib import Path

from mmengine.config import Config, ConfigDict

from mmkd.errors import ConfigError
from mmkd.hosts.mmengine import config_path


def read(name: str) -> Config:
    """A config file, or a config of mmkd (``mmkd::...``).

    It is parsed anew if a config in its folder, or in a folder there, has changed.

    Raises:
        ConfigError: if the file is no config.
    """
    path = Path(config_path(name) if name.startswith('mmkd::') else name)
    around = [*path.parent.glob('*.py'), *path.parent.glob('*/*.py')]
    return copy.deepcopy(_parse(str(path), max(each.stat().st_mtime_ns for each in around)))


@functools.lru_cache
def _parse(path: str, stamp: int) -> Config:
    try:
        return Config.fromfile(path)
    except Exception as error:  # whatever the file runs into: a config is code
        reason = str(error).strip().partition('\n')[0]
        raise ConfigError(f'{path}: cannot be read as a config: {type(error).__name__}: {reason}') from error


_TEXTS: dict[str, str] = {}


def text_of(config: Config) -> str:
    """``config.pretty_text``, whose formatting takes long, kept for the next call."""
    key = repr(config.to_dict())
    if key not in _TEXTS:
        _TEXTS[key] = config.pretty_text
    return _TEXTS[key]


def teachers_of(config: Config) -> dict[str, dict]:
    """The frozen teachers of a distilled config: their option, such as ``model.teacher``, to ``config`` and ``checkpoint``.

    Other sources, such as an average of the student, need no weights and are left out.
    """
    given = config.model.get('teacher')
    if given is None:
        return {}
    single = isinstance(given, str) or bool({'config', 'checkpoint', 'type'} & set(given))
    found = {'model.teacher': given} if single else {f'model.teacher.{name}': each for name, each in given.items()}
    found = {option: dict(config=each) if isinstance(each, str) else each for option, each in found.items()}
    return {
        option: dict(each)
        for option, each in found.items()
        if isinstance(each, Mapping) and each.get('type', 'Teacher') == 'Teacher' and 'config' in each
    }


def recordable(config: Config) -> dict[str, object]:
    """Changes to a config after which its logs and checkpoints count what its training loop counts.

    mmengine's hooks count epochs unless told otherwise, even if the loop counts iterations; nothing would then tell that
    a run is at its end.

    Raises:
        ConfigError: if a run of this config cannot leave scores or weights behind.
    """
    backends = (config.get('visualizer') or {}).get('vis_backends', [dict(type='LocalVisBackend')])
    if not any('LocalVisBackend' in str(each['type']) for each in backends):
        raise ConfigError(
            "visualizer.vis_backends: scores are read from what dict(type='LocalVisBackend') writes; add it"
        )
    loop = config.train_cfg
    if not (loop.get('max_epochs') or loop.get('max_iters')):
        raise ConfigError('train_cfg: expected max_iters or max_epochs, and found neither')
    by_epoch = 'max_epochs' in loop
    wanted = {
        'logger': dict(type='LoggerHook', log_metric_by_epoch=by_epoch),
        'checkpoint': dict(type='CheckpointHook', by_epoch=by_epoch, save_last=True, filename_tmpl=None, out_dir=None),
    }
    stock = dict(log_metric_by_epoch=True, by_epoch=True, save_last=True, filename_tmpl=None, out_dir=None)
    changes: dict[str, object] = {}
    for name, options in wanted.items():
        hook = (config.get('default_hooks') or {}).get(name, {})
        if hook is None:
            raise ConfigError(
                f'default_hooks.{name}=None: scores and weights are read from what this hook writes; leave it on'
            )
        different = {
            key: value for key, value in options.items() if key != 'type' and hook.get(key, stock[key]) != value
        }
        if 'by_epoch' in different:
            different['interval'] = 1 if by_epoch else loop.max_iters
        if different and 'type' not in hook:
            different['type'] = options['type']
        changes |= {f'default_hooks.{name}.{key}': value for key, value in different.items()}
    return changes


def changed(config: Config, options: Mapping[str, object]) -> Config:
    """The config with changes, as ``--cfg-options`` takes them; a teacher that is given by its name alone can have some."""
    for option, teacher in teachers_of(config).items():
        if any(each.startswith(f'{option}.') for each in options):
            *parents, last = option.split('.')
            functools.reduce(lambda node, name: node[name], parents, config)[last] = ConfigDict(teacher)
    config.merge_from_dict(dict(options))
    return config
