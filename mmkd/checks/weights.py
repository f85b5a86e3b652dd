"""Whether the weights that a run begins with are there and can be read: of teachers, of students, of checkpoints."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mmengine.config import Config
from torch import nn

from mmkd.checks.data import TRY
from mmkd.errors import ConfigError
from mmkd.hosts.configs import (
    config_folder,
    described_sources,
    numbered,
    read_teacher,
    teacher_classes,
    teachers,
    trained_models,
)
from mmkd.hosts.datasets import type_name
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
        if isinstance(spec, Mapping) and spec.get('classes'):  # which says what they are, by the names of its config
            names, found = teacher_classes(spec), dataset_meta(content).get('classes')
            if names and found and tuple(names) != tuple(found):
                raise ConfigError(
                    f'{option}: its config has the classes {", ".join(names)}, and its checkpoint {path} {", ".join(found)}; '
                    f'give the config it was trained with'
                )
            continue
        known.append((f"{option}'s config", teacher_classes(spec)))
        known.append((f"{option}'s checkpoint {path}", dataset_meta(content).get('classes')))
    for option, spec in described_sources(config):
        if isinstance(spec, Mapping) and type_name(spec) in ('Peer', 'LabelEncoder') and spec.get('checkpoint'):
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
    for name, each in [('init_cfg', start)] if isinstance(start, Mapping) else numbered('init_cfg', start):
        if type_name(each) == 'Pretrained' and isinstance(each.get('checkpoint'), str):
            yield f'{option}.{name}', each['checkpoint']
            if each is start:
                return  # mmengine initializes nothing below it
    if isinstance(model.get('pretrained'), str):
        yield f'{option}.pretrained', model['pretrained']
    for key, value in model.items():
        for name, each in [(key, value)] if isinstance(value, Mapping) else numbered(key, value):
            if isinstance(each, Mapping):
                yield from pretrained(each, f'{option}.{name}')


def _start(config: Config) -> str | None:
    """The checkpoint that a run is to begin with."""
    checkpoint = config.get('load_from')
    return checkpoint if checkpoint and fetchable(checkpoint) else None


def check_checkpoint(config: Config, what: str = 'load_from') -> None:
    """Check that the checkpoint that ``load_from`` names is there and can be read; errors begin with ``what``."""
    checkpoint = _start(config)
    if checkpoint:
        read_checkpoint(fetch(checkpoint, what, missing='', unreachable='name another'), what)


def check_start(config: Config, model: nn.Module) -> None:
    """Check that the checkpoint that a training begins with has weights of this model; all is not needed."""
    checkpoint = _start(config)
    if not checkpoint:
        return
    own = {name: value.shape for name, value in model.state_dict().items() if not name.startswith(BESIDE)}
    found = read_checkpoint(fetch(checkpoint, 'load_from'), 'load_from')
    if not any(own.get(name) == value.shape for name, value in found.items()):
        raise ConfigError(
            f'load_from {checkpoint}: fits nothing of {type(model).__name__}; it holds {", ".join(list(found)[:3])}, ... and '
            f'the model {", ".join(list(own)[:3])}, ...'
        )


def check_fit(config: Config, model: nn.Module | None) -> None:
    """Check that the checkpoint that is tested has all weights of the model, and no others."""
    checkpoint = _start(config)
    if checkpoint and model is not None:
        load_weights(model, checkpoint, 'checkpoint', 'give a checkpoint of a training with this config')
