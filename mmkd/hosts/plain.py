"""The plain config behind a distilled one: what stock mmdet and mmseg read, train and test without mmkd."""

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping

import mmengine.registry
from mmengine.config import Config
from mmengine.registry import Registry
from mmengine.runner import Runner

from mmkd.hosts.configs import plain_model
from mmkd.hosts.datasets import class_names, dataset_class, datasets, type_name
from mmkd.registry import ADAPTERS, DISTILLERS, SOURCES

STOCK = sorted(inspect.signature(Runner.__init__).parameters) + ['tta_model', 'tta_pipeline']


def plain_config(config: Config, parameters: Iterable[str], model: Mapping | None = None) -> tuple[Config, list[str]]:
    """A config of the plain model: of a distilled config, its student's.

    Left out are teacher and distillers, samplers and hooks of mmkd, data sets without labels, rules of the optimizer that
    match no parameter of the plain model, imports that only distillers need, and variables that mention mmkd.

    Args:
        config: The distilled config; it stays as it is.
        parameters: The names of the plain model's parameters.
        model: The plain model, where it is another than the student's.

    Returns:
        The config, and the keys in which something of mmkd is left all the same.
    """
    plain = copy.deepcopy(config)
    plain.model = plain_model(plain) if model is None else copy.deepcopy(model)
    for key in ('launcher', 'work_dir'):
        plain.pop(key, None)
    for part in ('train', 'val', 'test'):
        if plain.get(f'{part}_dataloader'):
            _keep_labelled(plain[f'{part}_dataloader'], endless='max_iters' in (plain.get('train_cfg') or {}))
    _keep_rules(plain.get('optim_wrapper') or {}, list(parameters))
    if plain.get('custom_hooks'):
        plain.custom_hooks = [each for each in plain.custom_hooks if not _of_mmkd(each)]
    for key in [key for key in plain if key not in STOCK and _mentions_mmkd(plain[key])]:
        plain.pop(key)
    _keep_imports(plain)
    return plain, [key for key in plain if _mentions_mmkd(plain[key])]


def data_meta(config: Config) -> dict:
    """Names and colors of the classes of a config's training data, as far as it or its data set's class states them."""
    scope = config.get('default_scope')
    if not config.get('train_dataloader'):
        return {}
    option, dataset = next(datasets(config.train_dataloader.dataset, 'train_dataloader.dataset'))
    palette = {**getattr(dataset_class(dataset, scope), 'METAINFO', {}), **(dataset.get('metainfo') or {})}.get(
        'palette'
    )
    meta = dict(classes=class_names(dataset, option, scope), palette=palette)
    return {key: value for key, value in meta.items() if value is not None}


MARKS = {'domain', 'labelled_for'}
"""What mmkd's transforms add to an image's meta data."""
VIEWS = ('KeepView', 'LoadView')
"""Those that add another image, by its name."""


def _kind(spec: object) -> str:
    """Module and name of a config's ``type``, as a dotted path, or its name alone."""
    kind = spec.get('type', '') if isinstance(spec, Mapping) else ''
    return kind if isinstance(kind, str) else f'{kind.__module__}.{kind.__qualname__}'


def _of_mmkd(spec: object) -> bool:
    return _kind(spec).startswith('mmkd.')


def _parts(value: object) -> Iterator[Mapping]:
    """All dicts in a config's value."""
    if isinstance(value, Mapping):
        yield value
        value = value.values()
    if not isinstance(value, str):
        for each in value if isinstance(value, Iterable) else ():
            yield from _parts(each)


def _mentions_mmkd(value: object) -> bool:
    return any(_of_mmkd(each) for each in _parts(value))


def _keep_labelled(loader: dict, endless: bool) -> None:
    """Of several domains, keep the data sets that have labels, with a stock sampler; no marks of partial labels, and no views."""
    added = set(MARKS)
    for each in list(_parts(loader.dataset)):
        if each.get('pipeline'):
            added |= {
                step.get('view', 'weak') for step in each['pipeline'] if type_name(step) in VIEWS and _of_mmkd(step)
            }
            each['pipeline'] = [kept for step in each['pipeline'] for kept in _without_views(step)]
    loader.dataset = _labelled(loader.dataset)
    for each in _parts(loader.dataset):
        if added & set(each.get('meta_keys') or ()):
            each['meta_keys'] = tuple(key for key in each['meta_keys'] if key not in added)
    if _of_mmkd(loader.get('sampler')):
        loader.sampler = dict(type='InfiniteSampler' if endless else 'DefaultSampler', shuffle=True)


def _without_views(step: dict) -> list[dict]:
    """A step as the student's own image needs it."""
    if not _of_mmkd(step):
        return [step]
    name = type_name(step)
    return list(step['transforms']) if name == 'Both' else [] if name in ('LabelledFor', *VIEWS) else [step]


def _labelled(dataset: dict) -> dict:
    """The data set itself; of a ``ConcatDataset`` of which a part has none, the parts with labels."""
    if 'datasets' not in dataset:
        return dataset
    parts = [each for each in dataset.datasets if not _mentions_mmkd(each.get('pipeline', ()))]
    if not parts or len(parts) == len(dataset.datasets):
        return dataset
    return parts[0] if len(parts) == 1 else type(dataset)(dataset, datasets=parts)


def _keep_rules(optim_wrapper: dict, parameters: list[str]) -> None:
    """Keep the optimizer's rules that match a parameter; the others have no effect."""
    rules = (optim_wrapper.get('paramwise_cfg') or {}).get('custom_keys') or {}
    for key in [key for key in rules if not any(key in name for name in parameters)]:
        rules.pop(key)
    if 'paramwise_cfg' in optim_wrapper and not rules:
        (optim_wrapper.paramwise_cfg or {}).pop('custom_keys', None)
        if not optim_wrapper.paramwise_cfg:
            optim_wrapper.pop('paramwise_cfg')


def _keep_imports(config: Config) -> None:
    """Leave out imports that register distillers, adapters or sources and nothing that the config names."""
    imports = config.get('custom_imports')
    if not imports:
        return
    modules = imports['imports']
    used = {_kind(each).rpartition('.')[2] for each in _parts({key: config[key] for key in config})}
    kept = []
    for module in [modules] if isinstance(modules, str) else modules:
        distils = any(_registered(registry, module) for registry in (DISTILLERS, ADAPTERS, SOURCES))
        if not distils or any(_registered(registry, module) & used for registry in _stock_registries()):
            kept.append(module)
    if kept:
        config.custom_imports.imports = kept
    else:
        config.pop('custom_imports')


def _registered(registry: Registry, module: str) -> set[str]:
    """The names under which a module or package has registered its classes."""
    return {name for name, each in registry.module_dict.items() if f'{each.__module__}.'.startswith(f'{module}.')}


def _stock_registries() -> Iterator[Registry]:
    """mmengine's registries and those of other packages below them."""
    left = [each for each in vars(mmengine.registry).values() if isinstance(each, Registry)]
    while left:
        registry = left.pop()
        yield registry
        left.extend(registry.children.values())
