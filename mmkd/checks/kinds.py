"""Whether a config has dicts, lists and strings where these are read, before anything else is looked at."""

from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.config import Config

from mmkd.errors import ConfigError
from mmkd.hosts.places import PARTS

DICTS = (
    *('auto_scale_lr', 'default_hooks', 'env_cfg', 'log_processor', 'optim_wrapper', 'randomness', 'visualizer'),
    *(f'{part}_{key}' for part in PARTS for key in ('cfg', 'dataloader')),
)
STRINGS = ('default_scope', 'experiment_name', 'load_from', 'work_dir')
WORDS = {Mapping: 'a dict', Sequence: 'a list', str: 'a string', bool: 'True or False'}
# of data sets
ENTRIES = {
    **dict.fromkeys(('metainfo', 'data_prefix'), Mapping),
    **dict.fromkeys(('data_root', 'ann_file', 'img_suffix', 'seg_map_suffix'), str),
    'pipeline': Sequence,
}


def check_kinds(config: Config) -> None:
    """Check the kind of what the Runner, the data sets and mmkd's own checks read.

    Raises:
        ConfigError: naming the option, and what is expected.
    """
    if not isinstance(config.get('model'), Mapping):
        raise ConfigError(f'model={config.get("model")!r}: expected a dict')
    for kind, options in ((Mapping, DICTS), (str, STRINGS), (Sequence, ('custom_hooks',))):
        for option in options:
            _expect(option, config.get(option), kind)
    for name, hook in (config.get('default_hooks') or {}).items():
        _expect(f'default_hooks.{name}', hook, Mapping)
    _expect('env_cfg.dist_cfg', (config.get('env_cfg') or {}).get('dist_cfg'), Mapping)
    _expect('auto_scale_lr.enable', (config.get('auto_scale_lr') or {}).get('enable'), bool)
    for part in PARTS:
        loader = config.get(f'{part}_dataloader')
        _expect(f'{part}_dataloader.sampler', (loader or {}).get('sampler'), Mapping)
        if loader and loader.get('dataset') is not None:
            _check_dataset(f'{part}_dataloader.dataset', loader['dataset'])
        metrics = config.get(f'{part}_evaluator')
        if not isinstance(metrics, (list, tuple)):
            metrics = [metrics]
        for metric in metrics:
            _expect(f'{part}_evaluator', metric, Mapping)
            _expect(f'{part}_evaluator.ann_file', (metric or {}).get('ann_file'), str)


def _expect(option: str, value: Any, kind: Any) -> None:
    """Raise ConfigError unless a value is of a kind, or None."""
    if value is None or (isinstance(value, kind) and not (kind is Sequence and isinstance(value, str))):
        return
    raise ConfigError(f'{option}={value!r}: expected {WORDS[kind]}')


def _check_dataset(option: str, dataset: Any) -> None:
    _expect(option, dataset, Mapping)
    inner = dataset.get('datasets') or ()
    _expect(f'{option}.datasets', inner, Sequence)
    for name, each in [('dataset', dataset.get('dataset')), *((f'datasets.{i}', each) for i, each in enumerate(inner))]:
        if each is not None:
            _check_dataset(f'{option}.{name}', each)
    for key, kind in ENTRIES.items():
        _expect(f'{option}.{key}', dataset.get(key), kind)
    for key, prefix in (dataset.get('data_prefix') or {}).items():
        _expect(f'{option}.data_prefix.{key}', prefix, str)
    for index, step in enumerate(dataset.get('pipeline') or ()):
        if not callable(step):
            _expect(f'{option}.pipeline.{index}', {} if step is None else step, Mapping)
    metainfo = dataset.get('metainfo') or {}
    _expect(f'{option}.metainfo.palette', metainfo.get('palette'), Sequence)
    classes = metainfo.get('classes')
    if not isinstance(classes, str):  # a file with the names
        _expect(f'{option}.metainfo.classes', classes, Sequence)
        for index, name in enumerate(classes or ()):
            _expect(f'{option}.metainfo.classes.{index}', name, str)
