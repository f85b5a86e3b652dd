"""What is compared with what: a folder of configs, its data, and the score that ranks its models."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mmengine.config import Config

from mmkd.data import shapes, streets
from mmkd.errors import ConfigError
from mmkd.hosts.mmengine import CONFIG_ROOT

SHORT = {'coco/bbox_mAP': 'AP', 'coco/segm_mAP': 'mask AP'}


@dataclass(frozen=True)
class Score:
    """What ranks models; the larger, the better.

    Args:
        key: In the logs, such as ``'coco/bbox_mAP'``.
        name: What tables call it.
        digits: Behind its decimal point; ``None``: 3 where no score is above 1, else 2.
    """

    key: str
    name: str
    digits: int | None = None


@dataclass(frozen=True)
class Suite:
    """A folder of configs, the data they are trained on, and the score that ranks them.

    Args:
        name: What it is called.
        configs: The folder.
        score: What ranks its models.
        heading: Of the report.
        about: What the score is, a sentence without its period.
        images: The number of validation images, if known.
        generate: Writes the data unless they are there, and says where; ``None``: the data are the user's.
    """

    name: str
    configs: Path
    score: Score
    heading: str
    about: str
    images: int | None = None
    generate: Callable[[], str] | None = None

    def config(self, name: str) -> str:
        """The file of a config."""
        return str(self.configs / f'{name}.py')

    def ranked_by(self, key: str) -> 'Suite':
        """The same with another score."""
        return replace(self, score=named(key), about=description(key))


def named(key: str) -> Score:
    return Score(key, SHORT.get(key, key.rpartition('/')[2]))


def description(key: str) -> str:
    name = named(key).name
    return f'{name} is {"that" if name == key else key} on the validation data, at the end of the training'


def of_folder(folder: Path, configs: Mapping[str, Config], key: str | None = None) -> Suite:
    """A user's folder of configs.

    Args:
        folder: Where they are.
        configs: Those that distill, by name.
        key: The score's, as the logs have it; ``None``: the one that the configs name.

    Raises:
        ConfigError: if the configs name none, or several.
    """
    name = folder.resolve().name
    keys: dict[str, str] = {}
    for method, config in configs.items() if key is None else ():
        try:
            keys[score_key(config)] = method
        except ConfigError as error:
            raise ConfigError(f'{folder / method}.py: {error}') from None
    if len(keys) > 1:
        found = ', '.join(f'{each} ({method})' for each, method in keys.items())
        raise ConfigError(
            f'{folder}: its methods have several scores, {found}; choose one with --score, or name methods'
        )
    key = key or next(iter(keys))
    return Suite(name, folder, named(key), f'Methods compared: {name}', description(key))


def score_key(config: Config) -> str:
    """The key of a config's score in the logs: that of its best checkpoint, or its evaluator's first.

    Raises:
        ConfigError: if neither names one, or the smaller one is better.
    """
    hook = (config.get('default_hooks') or {}).get('checkpoint') or {}
    best = hook.get('save_best')
    best = best[0] if isinstance(best, list | tuple) and best else best
    rule = hook.get('rule')
    if best and best != 'auto':
        if (rule[0] if isinstance(rule, list | tuple) else rule) == 'less':
            raise ConfigError(
                f'default_hooks.checkpoint: {best} is better the smaller it is; choose a score with --score'
            )
        return best
    metrics = evaluators(config)
    for metric in metrics:
        key = _key_of(metric)
        if key:
            return key
    kinds = ', '.join(str(metric.get('type')) for metric in metrics) or 'none'
    raise ConfigError(f'val_evaluator: its score is not known (found {kinds}); name its key in the logs with --score')


def evaluators(config: Config) -> list[dict]:
    """The configs of the metrics of a config's evaluations."""
    metrics = config.get('val_evaluator') or []
    return list(metrics if isinstance(metrics, list | tuple) else metrics.get('metrics', [metrics]))


def _key_of(metric: dict) -> str | None:
    """The key of a metric's main score, as the metric itself makes it; ``None`` for a metric that is not known."""
    kind = metric['type']
    kind = getattr(kind, '__name__', str(kind)).rpartition('.')[2]

    def first(option: str, default: str) -> str:
        value = metric.get(option, default)
        return value if isinstance(value, str) else value[0]

    prefix, name = {
        'CocoMetric': lambda: ('coco', f'{first("metric", "bbox")}_mAP'),
        'LVISMetric': lambda: ('lvis', f'{first("metric", "bbox")}_AP'),
        'VOCMetric': lambda: ('pascal_voc', 'mAP'),
        'IoUMetric': lambda: (None, first('iou_metrics', 'mIoU')),
    }.get(kind, lambda: (None, None))()
    prefix = metric.get('prefix') or prefix
    return f'{prefix}/{name}' if prefix and name else name


def generate_shapes() -> str:
    return f'{shapes.generate("data/shapes")} (1200 generated images)'


def generate_streets() -> str:
    folders = [streets.generate('data/streets'), streets.generate('data/streets_dusk', light='dusk')]
    return f'{folders[0]} and {folders[1]} (700 generated images each)'


SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            'shapes',
            CONFIG_ROOT / 'shapes',
            Score('coco/bbox_mAP', 'AP', 3),
            'Methods for detection on generated data',
            'AP is that of COCO, on the 200 validation images of the generated data set "shapes"',
            200,
            generate_shapes,
        ),
        Suite(
            'streets',
            CONFIG_ROOT / 'streets',
            Score('mIoU', 'mIoU', 2),
            'Methods for segmentation on generated data',
            'mIoU is in percent, over 19 classes, on the 100 validation images of the generated data set "streets"',
            100,
            generate_streets,
        ),
    )
}
