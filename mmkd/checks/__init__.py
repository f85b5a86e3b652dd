"""What is checked before the first iteration: data, weights, classes, and options that do not go together.

:func:`check_config` needs nothing but the config; :func:`check_model` needs the model that was built from it. What
cannot work is a :class:`mmkd.errors.ConfigError`; what only looks wrong is a line for the log.
"""

from mmengine.config import Config
from torch import nn

from mmkd.checks.classes import check_heads, compare_classes, heads_have_the_datas_classes
from mmkd.checks.data import check_data
from mmkd.checks.keys import check_changes, check_names
from mmkd.checks.kinds import check_kinds
from mmkd.checks.models import check_batch_norms, compare_critics, compare_custom_keys
from mmkd.checks.options import check_folder, check_options, check_parts, compare_batch_size
from mmkd.checks.weights import (
    check_checkpoint,
    check_fit,
    check_pretrained,
    check_start,
    check_teachers,
    pretrained,
)
from mmkd.hosts.engine import check_engine

__all__ = [
    'check_batch_norms',
    'check_changes',
    'check_checkpoint',
    'check_config',
    'check_data',
    'check_fit',
    'check_folder',
    'check_heads',
    'check_kinds',
    'check_model',
    'check_names',
    'check_options',
    'check_parts',
    'check_pretrained',
    'check_start',
    'check_teachers',
    'compare_batch_size',
    'compare_classes',
    'compare_critics',
    'compare_custom_keys',
    'heads_have_the_datas_classes',
    'pretrained',
]


def check_config(config: Config) -> list[str]:
    """All that can be said of a training before data are read and models built.

    Returns:
        Warnings for the log, a line each.

    Raises:
        ConfigError: for the first thing that cannot work.
    """
    check_names(config, ('train', 'val'))
    check_engine(config)
    check_options(config)
    warnings = check_data(config, ('train', 'val'))
    check_heads(config)
    check_pretrained(config)
    if not config.get('resume'):  # what a training goes on from was read before, and is compared as a whole
        check_checkpoint(config)
    known = check_teachers(config)
    return [*warnings, *compare_classes(config, known), *compare_batch_size(config)]


def check_model(config: Config, model: nn.Module | None) -> list[str]:
    """What can be said of a training once its model is built, which some Runners do late; as :func:`check_config`."""
    if model is None:
        return []
    if not config.get('resume'):
        check_start(config, model)
    check_batch_norms(config, model)
    return [*compare_critics(config, model), *compare_custom_keys(config, model)]
