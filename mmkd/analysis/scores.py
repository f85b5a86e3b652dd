"""Whether the teachers score, on the data that the student is to learn from."""

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.evaluator import Evaluator
from mmengine.registry import DATASETS, init_default_scope
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Subset

from mmkd.checks.classes import head_classes
from mmkd.checks.data import part_datasets
from mmkd.errors import ConfigError
from mmkd.hosts.configs import build_model, read_teacher, teachers
from mmkd.hosts.datasets import class_names, spread, type_name, without_workers
from mmkd.weights import load_weights

MAIN = ('bbox_mAP', 'segm_mAP', 'mIoU', 'mAP', 'AP')
"""What ranks models, as the ends of the keys of mmdet's and mmseg's metrics."""


class Scored(NamedTuple):
    """What a teacher scored.

    Attributes:
        option: What the config calls it.
        images: How many it was evaluated on.
        key: The metric that ranks models; '' where there is none.
        value: Its value: a fraction in detection, percent in segmentation.
        skipped: Why it was not evaluated; '' where it was.
    """

    option: str
    images: int = 0
    key: str = ''
    value: float = 0.0
    skipped: str = ''

    def __str__(self) -> str:
        if self.skipped:
            return f'{self.option}: not evaluated, {self.skipped}'
        return f'{self.option}: {self.key} {self.value:.4g} on {self.images} validation images'


def check_scores(config: Config, images: int) -> list[Scored]:
    """Evaluate each frozen teacher on some validation images, in the student's pipeline, as the training shows them to it.

    Args:
        config: The distilled config.
        images: How many; they are taken at equal distances. 0 evaluates nothing.

    Returns:
        What each teacher scored.

    Raises:
        ConfigError: if one scores next to nothing.
    """
    scored = [] if images < 1 else [_score(config, option, spec, images) for option, spec in teachers(config)]
    for each in scored:
        if not each.skipped and each.key and each.value < _least(config, each.key):
            raise ConfigError(
                f'{each}, which is next to nothing. Most often its checkpoint belongs to another config or other data, its '
                f"classes are not the data's, or its config normalizes images as it was not trained (mean, std, bgr_to_rgb); "
                f'mmkd test with its own config says which. --no-check trains all the same'
            )
    return scored


def _least(config: Config, key: str) -> float:
    """Below it a score is next to nothing: an AP of 1 %, half the mIoU of a model that knows one class of all."""
    if not key.endswith('mIoU'):
        return 0.01
    names = _classes(config)
    return min(5.0, 50 / len(names)) if names else 1.0


def _classes(config: Config) -> tuple[str, ...] | None:
    option, dataset = next(part_datasets(config, 'val'), ('', {}))
    return class_names(dataset, option, config.get('default_scope')) if dataset else None


def _loaded_views(config: Config) -> list[str]:
    """The views that are images of their own, and not the student's."""
    steps = [step for _, dataset in part_datasets(config, 'train') for step in dataset.get('pipeline') or ()]
    return [step['view'] for step in steps if type_name(step) == 'LoadView']


def _score(config: Config, option: str, spec: str | Mapping, images: int) -> Scored:
    if not config.get('val_dataloader') or not config.get('val_evaluator'):
        return Scored(option, skipped='the config has no val_dataloader or no val_evaluator')
    if isinstance(spec, Mapping) and spec.get('classes'):
        return Scored(option, skipped='it has classes of its own; mmkd test with its own config scores it')
    if isinstance(spec, Mapping) and spec.get('view') in _loaded_views(config):
        return Scored(option, skipped='it sees other images; mmkd test with its own config scores it')
    teacher, names = read_teacher(spec), _classes(config)
    for head, classes in head_classes(teacher.model, option):
        if names and classes != len(names):
            return Scored(option, skipped=f'{head} has {classes} classes and the validation data {len(names)}')
    model = build_model(teacher.model, teacher.scope, option)
    if teacher.checkpoint is None:
        return Scored(option, skipped='it has no checkpoint')
    load_weights(model, teacher.checkpoint)
    found, number = evaluate(model.to(get_device()), config, images)
    key = next((each for end in MAIN for each in found if each.endswith(end)), '')
    return Scored(option, number, key, float(found.get(key, 0.0)))


@torch.no_grad()
def evaluate(model: nn.Module, config: Config, images: int) -> tuple[dict[str, float], int]:
    """A model's scores by the config's ``val_evaluator``, and on how many images of its ``val_dataloader``.

    Of several processes each takes a part of the images.
    """
    init_default_scope(config.get('default_scope', 'mmengine'))
    loader = {**without_workers(config.val_dataloader), 'batch_sampler': None}
    with silent():
        dataset = DATASETS.build(loader['dataset'])
        if hasattr(dataset, 'full_init'):
            dataset.full_init()
        chosen = spread(range(len(dataset)), images)
        loader.update(dataset=_Part(dataset, chosen), sampler=dict(type='DefaultSampler', shuffle=False))
        evaluator = build_evaluator(config)
        evaluator.dataset_meta = dataset.metainfo
        for metric in evaluator.metrics:  # of COCO's: else all images count whose predictions are missing
            if getattr(metric, '_coco_api', None) is not None and hasattr(metric, 'img_ids'):
                metric.cat_ids = metric._coco_api.get_cat_ids(cat_names=dataset.metainfo['classes'])
                metric.img_ids = [dataset.get_data_info(index)['img_id'] for index in chosen]
        model.eval()
        for batch in Runner.build_dataloader(loader):
            evaluator.process(data_samples=model.test_step(batch), data_batch=batch)
        return evaluator.evaluate(len(chosen)), len(chosen)


class _Part(Subset):
    """Some images of a data set, which a metric still may ask for what the data are."""

    @property
    def metainfo(self) -> Any:
        return self.dataset.metainfo


def build_evaluator(config: Config) -> Evaluator:
    """The evaluator of a config's ``val_evaluator``: one metric, several, or an evaluator with ``metrics``."""
    given = config.val_evaluator
    return Evaluator(given.metrics if 'metrics' in given else given)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Without what data sets and metrics print and log."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
