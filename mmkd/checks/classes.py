"""Whether heads, data and teachers agree on the classes."""

from collections.abc import Iterator, Mapping, Sequence

from mmengine.config import Config

from mmkd.checks.data import WHICH, part_datasets
from mmkd.errors import ConfigError
from mmkd.hosts.configs import numbered, plain_model, trained_models
from mmkd.hosts.datasets import class_names, type_name

# heads whose classes are those of the data, and types among them whose classes are not
HEADS = ('bbox_head', 'mask_head', 'decode_head', 'auxiliary_head')
OTHER_CLASSES = ('STDCHead',)  # a boundary


def heads_have_the_datas_classes(config: Config) -> bool:
    """Whether ``num_classes`` of heads counts the data's classes: not of panoptic data, nor where classes are words."""
    panoptic = any('Panoptic' in type_name(dataset) for _, dataset in part_datasets(config, 'train'))
    return not panoptic and not {'language_model', 'text_encoder'} & set(plain_model(config))


def check_heads(config: Config, part: str = 'train') -> None:
    """Check that the heads of the student and its peers, or of a plain model, have as many classes as the data."""
    if not heads_have_the_datas_classes(config):
        return
    source, dataset = next(part_datasets(config, part), ('', {}))
    names = class_names(dataset, source, config.get('default_scope')) if dataset else None
    heads = [each for option, model in trained_models(config) for each in head_classes(model, option)]
    for head, classes in heads:
        if names and classes != len(names):
            shown = ', '.join(names[:5]) + (', ...' if len(names) > 5 else '')
            raise ConfigError(
                f'{head}.num_classes={classes}: {source} has {len(names)} classes ({shown}); give both the same'
            )


def head_classes(model: Mapping, option: str) -> Iterator[tuple[str, int]]:
    """The heads of a model's config that say how many classes of the data they have: their options, and the numbers."""
    for key, value in model.items():
        for name, each in [(key, value)] if isinstance(value, Mapping) else numbered(key, value):
            if not isinstance(each, Mapping):
                continue
            if key in HEADS and type_name(each) not in OTHER_CLASSES and isinstance(each.get('num_classes'), int):
                yield f'{option}.{name}', each['num_classes']
            yield from head_classes(each, f'{option}.{name}')


def compare_classes(config: Config, teachers: Sequence[tuple[str, Sequence[str] | None]] = ()) -> list[str]:
    """Compare names and order of the classes of data and teachers, where known, with the training data's.

    Args:
        config: The config of the training.
        teachers: What :func:`check_teachers` found.

    Raises:
        ConfigError: for the same names in another order, and for a validation on other classes than the training's.

    Returns:
        Warnings about as many classes of other names.
    """
    scope = config.get('default_scope')
    data = [
        (option, class_names(dataset, option, scope))
        for part in WHICH
        for option, dataset in part_datasets(config, part)
    ]
    known = [*data, *teachers]
    known = [(where, tuple(names)) for where, names in known if names]
    warnings = []
    for where, names in known[1:]:
        (first, own), position = known[0], _first_difference(known[0][1], names)
        if where.startswith(WHICH['val']) and len(names) != len(own) and heads_have_the_datas_classes(config):
            raise ConfigError(f'{where} has {len(names)} classes, and {first} {len(own)}; give both the same metainfo')
        if position is None or len(names) != len(own):
            continue
        found = f'{where}: class {position} is {names[position]!r}, and {own[position]!r} in {first}'
        if set(names) == set(own):
            raise ConfigError(f'{found}; the same classes have to be in the same order: {own}')
        if where.startswith(WHICH['val']) and heads_have_the_datas_classes(config):
            raise ConfigError(f'{found}; give both the same metainfo')
        warnings.append(f'{found}. Methods that compare classes need the same ones in the same order.')
    return warnings


def _first_difference(own: Sequence[str], other: Sequence[str]) -> int | None:
    return next((index for index, (one, two) in enumerate(zip(own, other)) if one != two), None)
