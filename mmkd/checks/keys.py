"""Whether somebody reads what a config or the command line sets: unknown keys, and classes that do not exist."""

import difflib
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from mmengine.config import Config
from mmengine.runner import Runner
from mmengine.utils.dl_utils import set_multi_processing
from torch.utils.data import DataLoader

from mmkd.errors import ConfigError, nearest
from mmkd.hosts.places import ALIKE, PARTS, Place, options_of, places
from mmkd.values import expected

# what is read of a config beside the Runner's own arguments: by its other parts, by mmdet's and mmseg's tools, by mmkd
READ_BESIDE = {
    *('activation_checkpointing', 'compile', 'custom_imports', 'efficient_conv_bn_eval', 'find_unused_parameters'),
    *('model_wrapper_cfg', 'runner_type', 'strategy', 'sync_bn', 'tta_model', 'tta_pipeline'),
}
LOADER = {*inspect.signature(DataLoader).parameters, 'num_batch_per_epoch', 'disable_subprocess_warning'}
# dicts that name no class, and the entries that are read of them
PLAIN: dict[str, set[str]] = {
    'auto_scale_lr': {'enable', 'base_batch_size'},
    'custom_imports': {'imports', 'allow_failed_imports'},
    'default_hooks': {'runtime_info', 'timer', 'sampler_seed', 'logger', 'param_scheduler', 'checkpoint'},
    'env_cfg': {'cudnn_benchmark', 'mp_cfg', 'dist_cfg', 'resource_limit'},
    'env_cfg.mp_cfg': set(inspect.signature(set_multi_processing).parameters) - {'distributed'},
    'optim_wrapper.clip_grad': {'type', 'max_norm', 'norm_type', 'error_if_nonfinite', 'foreach', 'clip_value'},
    'randomness': set(inspect.signature(Runner.set_randomness).parameters) - {'self'},
    **{f'{part}_dataloader': LOADER for part in PARTS},
}
PARAMWISE = {
    *('custom_keys', 'bias_lr_mult', 'bias_decay_mult', 'norm_decay_mult', 'flat_decay_mult', 'dwconv_decay_mult'),
    *('dcn_offset_lr_mult', 'bypass_duplicate'),
}
# registries whose classes say by annotations what their options take, and mean it
ANNOTATED = ('hook', 'data sampler', 'metric', 'log processor')
# dicts whose entries are named by the user, each with a class
NAMED = ('model.distillers', 'model.teacher', 'default_hooks')


@functools.cache
def known_keys() -> set[str]:
    """What somebody reads at the top level of a config."""
    return {*inspect.signature(Runner).parameters, *READ_BESIDE} - {'cfg'}


def check_changes(config: Config, changes: Mapping[str, Any]) -> None:
    """Check that each change of the command line is one of something that is read.

    Raises:
        ConfigError: naming the key, and those that were meant most likely.
    """
    known = {place.option: place for place in places(config)}
    for key in changes:
        problem = _problem(config, key, known, changes)
        if problem:
            raise ConfigError(f'--cfg-options {key}: {problem}')


def _problem(config: Config, key: str, known: Mapping[str, Place], changes: Mapping[str, Any]) -> str | None:
    """What is wrong with one change; None where nothing is."""
    parts = key.split('.')
    if not all(parts):
        return 'expected names between dots, as in model.distillers.gid.topk'
    if parts[0] not in known_keys():
        return _unread(config, key, parts, changes[key])
    node: Any = config._cfg_dict
    for index, part in enumerate(parts):
        path = '.'.join(parts[:index])
        if isinstance(node, Mapping):
            if part not in node:
                problem = _unknown(config, path, node, part, known, changes) if index else None
                return problem or _below(config, parts, index)
            node = node[part]
        elif isinstance(node, (list, tuple)):
            if not part.isdigit() or int(part) >= len(node):
                return f'{path} is a list of {len(node)}; its entries are counted from 0, as in {path}.0'
            if isinstance(node, tuple):
                return f'{path} is a tuple, whose entries cannot be changed one by one; give all of it'
            if index == len(parts) - 1:
                return f'an entry of a list cannot be changed as a whole; change what is in it, or give all of {path}'
            node = node[int(part)]
        else:
            return f'{path} is {node!r}, which has no entry {part!r}; give all of {path} instead'
    return None


def _entries(config: Config, path: str) -> set[str] | None:
    """What is read of a dict that names no class; None where that is not known."""
    if path == 'optim_wrapper.paramwise_cfg' and 'constructor' not in config.optim_wrapper:
        return PARAMWISE
    return PLAIN.get(path)


def _below(config: Config, parts: Sequence[str], index: int) -> str | None:
    """What is wrong below an entry that is read, but not in the config yet."""
    path = '.'.join(parts[: index + 1])
    entries = _entries(config, path)
    if len(parts) > index + 1 and entries and parts[index + 1] not in entries:
        return f'{path} has no entry {parts[index + 1]!r}; the nearest are {nearest(parts[index + 1], entries)}'
    return None


def _unread(config: Config, key: str, parts: Sequence[str], value: Any) -> str | None:
    """A key that nobody reads: it does not exist, or was only used to write others."""
    if parts[0] not in config:
        return f'there is no such key, and nothing would read it; the nearest are {_nearest_path(config, key)}'
    node: Any = config._cfg_dict
    for part in parts:
        node = node.get(part) if isinstance(node, Mapping) else None
    copies = [path for path, each in _paths(config._cfg_dict) if _written_with(path, each, parts[-1], node)]
    if node is None or not copies:
        return None  # the user's own code may read it
    shown = ', '.join(copies[:4]) + (', ...' if len(copies) > 4 else '')
    return f'the config uses it only to write other entries, which are written by then; change those: {shown}'


def _written_with(path: str, entry: Any, name: str, variable: Any) -> bool:
    """Whether an entry may have been written with a variable: of strings the beginning is enough, as in a path."""
    if isinstance(variable, str):
        return isinstance(entry, str) and len(variable) > 2 and entry.startswith(variable)
    if isinstance(variable, (int, float)):  # such as True, which is everywhere
        return path.rpartition('.')[2] == name and entry == variable
    return bool(variable) and type(entry) is type(variable) and entry == variable


def _paths(node: Any, path: str = '') -> Iterator[tuple[str, Any]]:
    """All entries of a config that somebody reads, with their options."""
    entries: Iterator[tuple[Any, Any]] = iter(())
    if isinstance(node, Mapping):
        entries = iter(node.items())
    elif isinstance(node, list):
        entries = enumerate(node)
    for key, value in entries:
        if path or key in known_keys():
            option = f'{path}.{key}' if path else str(key)
            yield option, value
            yield from _paths(value, option)


def _nearest_path(config: Config, key: str) -> str:
    paths = [path for path, _ in _paths(config._cfg_dict)]
    last = key.rpartition('.')[2]
    same = [path for path in paths if path.rpartition('.')[2] == last]
    close = difflib.get_close_matches(key, [*paths, *known_keys()], n=3, cutoff=0.6)
    found = list(dict.fromkeys([*close, *same]))[:3]
    return ', '.join(map(repr, found)) or 'none'


def _unknown(
    config: Config, path: str, node: Mapping, part: str, known: Mapping[str, Place], changes: Mapping[str, Any]
) -> str | None:
    """An entry that a dict does not have: what is wrong with it, if anything."""
    if path in known:
        kind = known[path].kind(config.get('default_scope'))
        if kind is not None and options_of(kind) is not None:
            return None  # :func:`check_names` has more to say
    elif path in NAMED:
        new = f'{path}.{part}'
        if (
            new + '.type' not in changes
            and not isinstance(changes.get(new), Mapping)
            and part not in PLAIN.get(path, ())
        ):
            return f'{path} has no entry {part!r}; the nearest are {nearest(part, node)}; a new one needs {new}.type'
        return None
    else:
        options = _entries(config, path)
        if options is not None:
            found = nearest(part, {*options, *node})
            return None if part in options else f'{path} has no entry {part!r}; the nearest are {found}'
    alike = difflib.get_close_matches(
        part, [str(each) for each in node], n=1, cutoff=ALIKE
    )  # nobody knows what is read
    return f'{path} has no entry {part!r}, but {alike[0]!r}; write it into a config if it is meant' if alike else None


def check_names(config: Config, parts: Sequence[str]) -> None:
    """Check that the classes exist that a config names, and that they have the options that it gives them.

    Args:
        config: The config.
        parts: Which of ``'train'``, ``'val'`` and ``'test'`` will be built.

    Raises:
        ConfigError: naming the option, and the nearest classes or options.
    """
    scope = config.get('default_scope')
    unused = tuple(f'{part}_' for part in PARTS if part not in parts)
    for key in config:
        slip = difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.92)
        if slip and key not in known_keys():
            raise ConfigError(f'config {config.filename}: nothing reads {key!r}; {slip[0]!r} was meant, most likely')
    for option, entries in PLAIN.items():
        node = config.get(option) if not option.startswith(unused) else None
        for key in node if isinstance(node, Mapping) and option not in NAMED else ():
            if key not in entries:
                raise ConfigError(f'{option} has no entry {key!r}; the nearest are {nearest(key, entries)}')
    for place in places(config):
        if place.option.startswith(unused):
            continue
        if place.spec.get('type', place.default) is None:
            if place.option == 'train_cfg':  # by_epoch may stand for a type
                continue
            raise ConfigError(f'{place.option}: it names no class; give it a type')
        if place.registry.scope == 'mmkd':
            continue  # their own building says more
        kind = place.kind(scope)
        if kind is None:
            named = place.spec['type']
            package = named.partition('.')[0]
            if '.' in named and package not in place.registry.children and find_spec(package) is None:
                raise ConfigError(
                    f'{place.option}.type={named!r}: package {package!r} is not installed, or not on PYTHONPATH'
                )
            advice = '' if scope else "; default_scope='mmdet' or 'mmseg' says whose classes are meant"
            raise ConfigError(
                f'{place.option}.type={named!r}: there is no such {place.registry.name} in {scope or "mmengine"}; the nearest '
                f'are {nearest(named, _registered(place, named, scope))}{advice}'
            )
        if not callable(kind):
            raise ConfigError(f'{place.option}.type={kind!r}: expected the name of a class')
        _check_options(place, kind)


def _check_options(place: Place, kind: Any) -> None:
    """The options that a dict gives its class: their names, and their values where annotations can be relied on."""
    options = options_of(kind)
    for key, value in place.spec.items():
        if key in place.extra | {'type', '_scope_'}:
            continue
        if options is not None and options.unknown(key):
            found = nearest(key, options.names)
            raise ConfigError(f'{place.option}: {kind.__name__} has no option {key!r}; the nearest are {found}')
        wanted = expected(kind, key, value) if place.registry.name in ANNOTATED else None
        if wanted:
            raise ConfigError(f'{place.option}.{key}={value!r}: expected {wanted}')


def _registered(place: Place, named: str, scope: str | None) -> set[str]:
    """The names of a registry, those of the package that a name begins with where it does."""
    children, package = place.registry.children, named.partition('.')[0]
    if package in children:
        return {f'{package}.{name}' for name in children[package].module_dict}
    return {*place.registry.module_dict, *(children[scope].module_dict if scope in children else ())}
