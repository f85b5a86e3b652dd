"""What is checked before the first iteration: data, weights, classes, and options that do not go together.

:func:`check_config` needs nothing but the config; :func:`check_model` needs the model that was built from it. What
cannot work is a :class:`ConfigError`; what only looks wrong is a line for the log.
"""

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mmengine.config import Config
from mmengine.dist import get_world_size
from torch import nn

from mmkd.errors import ConfigError
from mmkd.hosts.configs import (
    config_folder,
    described_sources,
    plain_model,
    read_teacher,
    teacher_classes,
    teachers,
    trained_models,
)
from mmkd.hosts.datasets import (
    annotation_path,
    class_names,
    coco_categories,
    dataset_class,
    datasets,
    is_coco,
    local,
    type_name,
)
from mmkd.hosts.engine import check_engine
from mmkd.weights import (
    BESIDE,
    NO_WEIGHTS,
    dataset_meta,
    fetch,
    fetchable,
    load_weights,
    plain_weights,
    read_checkpoint,
    read_file,
)

WHICH = {'train': 'train_dataloader.dataset', 'val': 'val_dataloader.dataset', 'test': 'test_dataloader.dataset'}
# heads whose classes are those of the data, and types among them whose classes are not
HEADS = ('bbox_head', 'mask_head', 'decode_head', 'auxiliary_head')
OTHER_CLASSES = ('STDCHead',)  # a boundary
TRY = 'to try mmkd without any download: make demo, make demo-seg'


def check_config(config: Config) -> list[str]:
    """All that can be said of a training before data are read and models built.

    Returns:
        Warnings for the log, a line each.

    Raises:
        ConfigError: for the first thing that cannot work.
    """
    check_engine(config)
    check_data(config, ('train', 'val'))
    check_heads(config)
    check_pretrained(config)
    check_checkpoint(config)
    known = check_teachers(config)
    return [*compare_classes(config, known), *compare_batch_size(config)]


def check_model(config: Config, model: nn.Module | None) -> list[str]:
    """What can be said of a training once its model is built, which some Runners do late; as :func:`check_config`."""
    if model is None:
        return []
    check_start(config, model)
    return compare_critics(config, model)


# data


def check_data(config: Config, parts: Sequence[str]) -> None:
    """Check that the files of the data loaders and evaluators of ``train``, ``val`` or ``test`` are there.

    Raises:
        ConfigError: naming the option, the path, and how to point to another.
    """
    for part in parts:
        for option, dataset in _datasets(config, part):
            _check_dataset(option, dataset, config.get('default_scope'))
        evaluator = config.get(f'{part}_evaluator')
        for index, metric in enumerate(evaluator if isinstance(evaluator, list) else [evaluator or {}]):
            path = metric.get('ann_file')
            if path and local(metric) and not os.path.exists(path):
                option = f'{part}_evaluator.{index}' if isinstance(evaluator, list) else f'{part}_evaluator'
                raise ConfigError(
                    f'{option}.ann_file: {os.path.abspath(path)} does not exist; {elsewhere(option, "ann_file", path)}'
                )


def elsewhere(option: str, key: str, default: str) -> str:
    """What to do about data that are not where the config has them."""
    return (
        f'put or link the data there (ln -s /path/to/data {default.rstrip("/")}), or name another place in a config of your own '
        f'or with --cfg-options {option}.{key}=/path/to/data/ (train, val, test and the evaluators have their own); {TRY}'
    )


def _datasets(config: Config, part: str) -> Iterator[tuple[str, Mapping]]:
    loader = config.get(f'{part}_dataloader')
    return datasets(loader.dataset, WHICH[part]) if loader else iter(())


def _check_dataset(option: str, dataset: Mapping, scope: str | None) -> None:
    if not local(dataset):
        return
    coco = is_coco(dataset, scope)
    if coco and not dataset.get('ann_file'):
        raise ConfigError(
            f"{option}.ann_file: missing; {type_name(dataset)} reads its annotations from it, such as ann_file='annotations/"
            f"train.json', below data_root"
        )
    root = dataset.get('data_root') or ''
    prefixes = dataset.get('data_prefix') or {}
    folders = {f'data_prefix.{key}': prefix for key, prefix in prefixes.items() if isinstance(prefix, str)}
    wanted = {'data_root': '', **folders, 'ann_file': dataset.get('ann_file') or ''}
    for key, value in wanted.items():
        path = os.path.join(root, value)
        if path and not os.path.exists(path):
            advice = elsewhere(option, 'data_root', root or path)
            raise ConfigError(f'{option}.{key}: {os.path.abspath(path)} does not exist; {advice}')
    if coco:
        _check_coco(option, dataset, scope)
    elif 'img_path' in prefixes and not dataset.get('ann_file'):
        _check_label_maps(option, dataset, scope)


def _check_coco(option: str, dataset: Mapping, scope: str | None) -> None:
    """Check a COCO file's categories against the classes: all there, and in the order that labels will have."""
    path = annotation_path(dataset)
    names = coco_categories(path, f'{option}.ann_file')
    classes = class_names(dataset, option, scope)
    if classes is None:
        return
    stock = not (dataset.get('metainfo') or {}).get(
        'classes'
    )  # the data set class's own, of which a file may have some
    labels = tuple(name for name in names if name in classes)
    unknown = [name for name in classes if name not in names]
    if stock:
        if not labels or labels != classes[: len(labels)]:
            found = "COCO's categories not as mmdet would number them" if labels else "none of COCO's categories"
            raise ConfigError(
                f'{option}.ann_file: {path} has {found}; name yours with {option}.metainfo=dict(classes={tuple(names)}), '
                f'and set num_classes={len(names)} in the model'
            )
    elif unknown:
        raise ConfigError(
            f'{option}.ann_file: {path} has no category {unknown[0]!r}, which {option}.metainfo.classes names; its '
            f'categories are {names}'
        )
    elif labels != classes:
        raise ConfigError(
            f'{option}.metainfo.classes: {classes} is not the order of the categories in {path}, by which mmdet numbers '
            f'the labels whatever the order here; write classes={labels}'
        )


def _check_label_maps(option: str, dataset: Mapping, scope: str | None) -> None:
    """Check that a folder for segmentation has images, and that the first one found has its label map."""
    kind = dataset_class(dataset, scope)
    options = inspect.signature(kind).parameters if kind is not None else {}
    stock = {key: options[key].default if key in options else None for key in ('img_suffix', 'seg_map_suffix')}
    suffixes = [dataset.get(key) or default for key, default in stock.items()]
    if None in suffixes:  # a data set of another kind
        return
    root = dataset.get('data_root') or ''
    folder = Path(root, dataset['data_prefix']['img_path'])
    image = next(folder.rglob(f'*{suffixes[0]}'), None)
    if image is None:
        raise ConfigError(
            f'{option}.data_prefix.img_path: {folder.absolute()} has no file that ends with {suffixes[0]!r}; see '
            f"{option}.img_suffix, and mmseg's docs on preparing data sets"
        )
    reads_labels = any(type_name(step).endswith('LoadAnnotations') for step in dataset.get('pipeline', ()))
    labels = dataset['data_prefix'].get('seg_map_path')
    if reads_labels and labels is not None:
        path = Path(root, labels, str(image.relative_to(folder)).removesuffix(suffixes[0]) + suffixes[1])
        if not path.is_file():
            advice = 'python tools/dataset_converters/cityscapes.py data/cityscapes, in a clone of mmseg, makes them'
            raise ConfigError(
                f'{option}.data_prefix.seg_map_path: {path.absolute()} does not exist, the label map of {image.name}'
                + (f'; {advice}' if suffixes[1].endswith('_labelTrainIds.png') else f'; see {option}.seg_map_suffix')
            )


# weights


def check_teachers(config: Config) -> list[tuple[str, Sequence[str] | None]]:
    """Check that each teacher's weights are there and can be read.

    Returns:
        What is known of their classes: who says so, and the names.
    """
    known = []
    for option, spec in teachers(config):
        teacher = read_teacher(spec)
        if teacher.checkpoint is None:
            raise ConfigError(f'{option}: no checkpoint for {type_name(teacher.model)}; {NO_WEIGHTS}')
        path, content = _read_named(config, teacher.checkpoint)
        known.append((f"{option}'s config", teacher_classes(spec)))
        known.append((f"{option}'s checkpoint {path}", dataset_meta(content).get('classes')))
    for option, spec in described_sources(config):
        if isinstance(spec, Mapping) and type_name(spec) == 'Peer' and spec.get('checkpoint'):
            _read_named(config, spec['checkpoint'], f'{option}.checkpoint')
    return known


def _read_named(config: Config, checkpoint: str, what: str = 'teacher checkpoint') -> tuple[Path, object]:
    """The file of a checkpoint with weights, and its content."""
    path = fetch(checkpoint, what, looked_in=[*config_folder(config), Path.cwd()])
    content = read_file(path, what)
    plain_weights(content, path, what)
    return path, content


def check_pretrained(config: Config) -> None:
    """Check that the weights are there from which the student, its peers, or a plain model start.

    These are mmengine's ``init_cfg=dict(type='Pretrained', checkpoint=...)`` and mmseg's ``pretrained=...``, anywhere in
    the model.
    """
    named = [each for option, model in trained_models(config) for each in pretrained(model, option)]
    for option, checkpoint in named:
        if fetchable(checkpoint):
            advice = f'start without: --cfg-options {option}=None; {TRY}'
            fetch(checkpoint, option, missing=f'put it there, or {advice}', unreachable=advice)


def pretrained(model: Mapping, option: str) -> Iterator[tuple[str, str]]:
    """The options by which a model's config names weights to start from, and these."""
    start = model.get('init_cfg')
    for name, each in [('init_cfg', start)] if isinstance(start, Mapping) else _numbered('init_cfg', start):
        if type_name(each) == 'Pretrained' and isinstance(each.get('checkpoint'), str):
            yield f'{option}.{name}', each['checkpoint']
            if each is start:
                return  # mmengine initializes nothing below it
    if isinstance(model.get('pretrained'), str):
        yield f'{option}.pretrained', model['pretrained']
    for key, value in model.items():
        for name, each in [(key, value)] if isinstance(value, Mapping) else _numbered(key, value):
            if isinstance(each, Mapping):
                yield from pretrained(each, f'{option}.{name}')


def _numbered(key: str, value: object) -> Iterator[tuple[str, object]]:
    for index, each in enumerate(value if isinstance(value, (list, tuple)) else ()):
        yield f'{key}.{index}', each


def _start(config: Config) -> tuple[str, str] | None:
    """The checkpoint that a run is to begin with, and the option that names it."""
    checkpoint = config.get('load_from')
    if not checkpoint or not fetchable(checkpoint):
        return None
    return checkpoint, 'checkpoint to resume from' if config.get('resume') else 'load_from'


def check_checkpoint(config: Config, what: str | None = None) -> None:
    """Check that the checkpoint that ``load_from`` names is there and can be read; errors begin with ``what``."""
    start = _start(config)
    if start:
        checkpoint, what = start[0], what or start[1]
        read_checkpoint(fetch(checkpoint, what, missing='', unreachable='name another'), what)


def check_start(config: Config, model: nn.Module) -> None:
    """Check that the checkpoint that a training begins with has weights of this model; all is not needed."""
    start = _start(config)
    if not start:
        return
    checkpoint, what = start
    own = {name: value.shape for name, value in model.state_dict().items() if not name.startswith(BESIDE)}
    found = read_checkpoint(fetch(checkpoint, what), what)
    if not any(own.get(name) == value.shape for name, value in found.items()):
        raise ConfigError(
            f'{what} {checkpoint}: fits nothing of {type(model).__name__}; it holds {", ".join(list(found)[:3])}, ... and '
            f'the model {", ".join(list(own)[:3])}, ...'
        )


def check_fit(config: Config, model: nn.Module | None) -> None:
    """Check that the checkpoint that is tested has all weights of the model, and no others."""
    start = _start(config)
    if start and model is not None:
        load_weights(model, start[0], 'checkpoint', 'give a checkpoint of a training with this config')


# classes


def heads_have_the_datas_classes(config: Config) -> bool:
    """Whether ``num_classes`` of heads counts the data's classes: not of panoptic data, nor where classes are words."""
    panoptic = any('Panoptic' in type_name(dataset) for _, dataset in _datasets(config, 'train'))
    return not panoptic and not {'language_model', 'text_encoder'} & set(plain_model(config))


def check_heads(config: Config) -> None:
    """Check that the heads of the student and its peers, or of a plain model, have as many classes as the data."""
    if not heads_have_the_datas_classes(config):
        return
    source, dataset = next(_datasets(config, 'train'), ('', {}))
    names = class_names(dataset, source, config.get('default_scope')) if dataset else None
    heads = [each for option, model in trained_models(config) for each in _head_classes(model, option)]
    for head, classes in heads:
        if names and classes != len(names):
            shown = ', '.join(names[:5]) + (', ...' if len(names) > 5 else '')
            raise ConfigError(
                f'{head}.num_classes={classes}: {source} has {len(names)} classes ({shown}); give both the same'
            )


def _head_classes(model: Mapping, option: str) -> Iterator[tuple[str, int]]:
    for key, value in model.items():
        for name, each in [(key, value)] if isinstance(value, Mapping) else _numbered(key, value):
            if not isinstance(each, Mapping):
                continue
            if key in HEADS and type_name(each) not in OTHER_CLASSES and isinstance(each.get('num_classes'), int):
                yield f'{option}.{name}', each['num_classes']
            yield from _head_classes(each, f'{option}.{name}')


def compare_classes(config: Config, teachers: Sequence[tuple[str, Sequence[str] | None]] = ()) -> list[str]:
    """Compare names and order of the classes of data and teachers, where known, with the training data's.

    Args:
        config: The config of the training.
        teachers: What :func:`check_teachers` found.

    Raises:
        ConfigError: for the same names in another order.

    Returns:
        Warnings about as many classes of other names.
    """
    scope = config.get('default_scope')
    data = [
        (option, class_names(dataset, option, scope)) for part in WHICH for option, dataset in _datasets(config, part)
    ]
    known = [*data, *teachers]
    known = [(where, tuple(names)) for where, names in known if names]
    warnings = []
    for where, names in known[1:]:
        (first, own), position = known[0], _first_difference(known[0][1], names)
        if position is None or len(names) != len(own):
            continue
        found = f'{where}: class {position} is {names[position]!r}, and {own[position]!r} in {first}'
        if set(names) == set(own):
            raise ConfigError(f'{found}; the same classes have to be in the same order: {own}')
        warnings.append(f'{found}. Methods that compare classes need the same ones in the same order.')
    return warnings


def _first_difference(own: Sequence[str], other: Sequence[str]) -> int | None:
    return next((index for index, (one, two) in enumerate(zip(own, other)) if one != two), None)


# options that do not go together


def compare_batch_size(config: Config) -> list[str]:
    """Say so where the batch is not the one that the learning rate was chosen for."""
    scaling = config.get('auto_scale_lr') or {}
    base = scaling.get('base_batch_size')
    accumulated = config.optim_wrapper.get('accumulative_counts', 1)
    batch = config.train_dataloader.get('batch_size', 1) * get_world_size() * accumulated
    if not base or batch == base or scaling.get('enable'):
        return []
    return [
        f'The learning rate was chosen for a batch of {base} images and this run has {batch}: '
        f'add --auto-scale-lr to scale it by {batch / base:g}.'
    ]


def compare_critics(config: Config, model: nn.Module) -> list[str]:
    """Say so where critics are clipped together with the student, or learn at its rate."""
    critics: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        entry, found, _ = name.partition('.critic')
        if found:
            critics.setdefault(entry, []).append(name)
    if not critics:
        return []
    warnings = []
    if config.optim_wrapper.get('clip_grad'):
        warnings.append(
            f'optim_wrapper.clip_grad takes one norm over the student and the critics of {", ".join(sorted(critics))}, '
            f"whose gradients can be a thousand times the student's and then leave it next to none: set "
            f'optim_wrapper.clip_grad=None, unless grad_norm in the log stays below max_norm.'
        )
    keys = list((config.optim_wrapper.get('paramwise_cfg') or {}).get('custom_keys') or ())
    for entry, names in critics.items():
        if not any(key in name for key in keys for name in names):
            warnings.append(
                f"The critic of {entry} learns at the student's rate: no key of optim_wrapper.paramwise_cfg.custom_keys is in "
                f"its parameters' names (keys: {keys}); add '{entry}.critic': dict(lr_mult=...)."
            )
    return warnings
