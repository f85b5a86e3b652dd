"""Registries of mmkd.

``type='mmkd.Distill'`` in a config makes mmengine import this module, which is why no ``custom_imports`` is needed.
Distillers and adapters have roots of their own: mmengine allows one child per scope under a root, and none of its own
registries is for losses of two models.
"""

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from mmengine.registry import DATA_SAMPLERS as MMENGINE_DATA_SAMPLERS
from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPERS as MMENGINE_OPTIM_WRAPPERS
from mmengine.registry import STRATEGIES as MMENGINE_STRATEGIES
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import Registry
from torch import nn

from mmkd.errors import ConfigError, nearest
from mmkd.values import expected

MODELS = Registry('model', parent=MMENGINE_MODELS, scope='mmkd', locations=['mmkd.distill'])
SOURCES = Registry('source', scope='mmkd', locations=['mmkd.sources'])
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope='mmkd', locations=['mmkd.analysis'])
DATASETS = Registry('dataset', parent=MMENGINE_DATASETS, scope='mmkd', locations=['mmkd.data.images'])
DATA_SAMPLERS = Registry('data sampler', parent=MMENGINE_DATA_SAMPLERS, scope='mmkd', locations=['mmkd.data.domains'])
TRANSFORMS = Registry(
    'transform', parent=MMENGINE_TRANSFORMS, scope='mmkd', locations=['mmkd.data.domains', 'mmkd.data.views']
)
OPTIM_WRAPPERS = Registry(
    'optim wrapper', parent=MMENGINE_OPTIM_WRAPPERS, scope='mmkd', locations=['mmkd.hosts.engine']
)
STRATEGIES = Registry('strategy', parent=MMENGINE_STRATEGIES, scope='mmkd', locations=['mmkd.hosts.engine'])
DISTILLERS = Registry('distiller', scope='mmkd', locations=['mmkd.distillers'])
ADAPTERS = Registry('adapter', scope='mmkd', locations=['mmkd.adapters'])


def build(registry: Registry, option: str, spec: Mapping, **given: Any) -> Any:
    """Build what ``spec`` describes: a registered name or a dotted path under ``type``, and its options.

    Args:
        registry: Where names are looked up.
        option: What the spec is called in the config, for error messages.
        spec: The config dict.
        given: Options that the caller fills in, where the type has them.

    Raises:
        ConfigError: for a type that does not exist or cannot be imported, options that it does not have or misses, and values
            that its annotations rule out.
    """
    kind, options = resolve(registry, option, spec, **given)
    try:
        made = kind(**options)
    except ConfigError as error:
        raise ConfigError(f'{option}: {error}') from None
    except TypeError as error:
        if 'unexpected keyword argument' not in str(error):
            raise
        raise ConfigError(f'{option}: {error}') from None
    except AttributeError as error:
        if 'before Module.__init__() call' not in str(error):
            raise
        raise ConfigError(f'{option}: {kind.__name__}.__init__ has to call super().__init__() first') from None
    if isinstance(made, nn.Module) and '_modules' not in vars(made):
        raise ConfigError(f'{option}: {kind.__name__}.__init__ has to call super().__init__() first')
    return made


def resolve(registry: Registry, option: str, spec: Mapping, **given: Any) -> tuple[Any, dict[str, Any]]:
    """What :func:`build` would build, and with which options; arguments and errors are the same."""
    if not isinstance(spec, Mapping) or 'type' not in spec:
        raise ConfigError(f"{option}={spec!r}: expected a dict with type, such as dict(type='...')")
    kind = spec['type']
    if isinstance(kind, str):
        kind = _find(registry, option, kind)
    elif not callable(kind):
        raise ConfigError(f'{option}: type={kind!r}: expected a name, a dotted path or a class')
    options = {key: value for key, value in spec.items() if key not in ('type', '_scope_')}
    parameters = inspect.signature(kind).parameters
    if getattr(kind, '__init__', None) is nn.Module.__init__:  # which takes everything, to refuse it later
        parameters = inspect.signature(object).parameters
    takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    for key, value in given.items():
        if key in options:
            raise ConfigError(f'{option}: {key} is filled in, found {key}={options[key]!r}; leave it out')
        if key in parameters or takes_all:
            options[key] = value
    for old, new in getattr(kind, 'renamed', {}).items():
        if old in options and old not in parameters:
            raise ConfigError(f'{option}: {kind.__name__} calls {old!r} {new!r} now')
    if not takes_all:
        for key in options:
            if key not in parameters:
                known = nearest(key, parameters)
                raise ConfigError(f'{option}: {kind.__name__} has no option {key!r}; the nearest are {known}')
    for key, value in options.items():
        wanted = expected(kind, key, value)
        if wanted:
            raise ConfigError(f'{option}: {key}={value!r}: expected {wanted}')
    missing = [
        each.name
        for each in parameters.values()
        if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD and each.name not in options
    ]
    if missing:
        raise ConfigError(f'{option}: {kind.__name__} needs {", ".join(missing)}')
    return kind, options


def _find(registry: Registry, option: str, name: str) -> Any:
    registry.import_from_location()
    registered = registry.module_dict.get(name.removeprefix('mmkd.'))
    if registered is not None:
        return registered
    module, _, attribute = name.rpartition('.')
    if not module:
        known = nearest(name, registry.module_dict)
        raise ConfigError(
            f'{option}: there is no {registry.name} {name!r}; the nearest are {known}; a class of your own is named by its '
            f'dotted path'
        )
    try:
        return getattr(import_module(module), attribute)
    except ImportError as error:
        raise ConfigError(
            f'{option}: cannot import {module} for type={name!r}: {error} (is it on PYTHONPATH?)'
        ) from error
    except AttributeError:
        raise ConfigError(f'{option}: module {module} has no {attribute!r}') from None
