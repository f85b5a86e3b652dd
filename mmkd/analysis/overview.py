"""What a config's distillation is, without data or weights: layers, pairs, costs, batch, schedules."""

import contextlib
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass

from mmengine.config import Config
from mmengine.dist import get_world_size
from mmengine.registry import DATASETS, MODELS, init_default_scope
from torch import nn

from mmkd.analysis import schedules
from mmkd.analysis.costs import Cost, cost, share_of_step, training_size
from mmkd.analysis.layers import Survey, survey
from mmkd.analysis.schedules import Curve
from mmkd.checks import compare_batch_size
from mmkd.distill import Distilled
from mmkd.distillers.levels import LevelPairs
from mmkd.distillers.several import Several
from mmkd.errors import ConfigError
from mmkd.sources import Own
from mmkd.taps import names_of


@dataclass(frozen=True)
class Network:
    """The student, or what it learns from.

    Args:
        name: ``'student'``, or the source's.
        kind: Its class.
        cost: Of a forward pass, a frozen teacher's as far as it is run.
        whole: The parameters and multiplications of all of it.
        survey: Its layers.
        tapped: The names of those that are read.
        checkpoint: Where its weights are from; None where the config says nothing of it.
    """

    name: str
    kind: str
    cost: Cost
    whole: Cost
    survey: Survey
    tapped: tuple[str, ...]
    checkpoint: str | None = None


@dataclass(frozen=True)
class Overview:
    """What :func:`overview` finds.

    Args:
        networks: The student first.
        methods: What each distiller is and compares, a few lines each, by name.
        image: Height and width that multiplications are counted for.
        batch: Images of an optimizer's step, of all processes.
        curves: The learning rate, and the loss weights that change.
        iterations: Of the training.
        notes: What a reader has to know of the figures, and warnings.
    """

    networks: tuple[Network, ...]
    methods: Mapping[str, tuple[str, ...]]
    image: tuple[int, int]
    batch: int
    curves: tuple[Curve, ...]
    iterations: int
    notes: tuple[str, ...]

    @property
    def share(self) -> float:
        """The part of the training step's multiplications that is not the student's, 0 to 1."""
        return share_of_step(self.networks[0].cost, [each.cost for each in self.networks[1:]])

    @property
    def memory_share(self) -> float:
        """The part of weights, gradients and momenta that is not the student's, 0 to 1."""
        kept = [each.whole.parameters + 2 * each.whole.trained for each in self.networks]
        return sum(kept[1:]) / sum(kept)

    def as_dict(self) -> dict:
        """For JSON."""
        return {
            'networks': [
                {
                    'name': each.name,
                    'type': each.kind,
                    'checkpoint': each.checkpoint,
                    'parameters': each.whole.parameters,
                    'trained': each.whole.trained,
                    'multiplications': each.whole.flops,
                    'multiplications_as_far_as_tapped': each.cost.flops,
                    'probed_at': each.survey.size,
                    'layers': [
                        {
                            'name': layer.name,
                            'type': layer.kind,
                            'parameters': layer.parameters,
                            'calls': layer.calls,
                            'shapes': layer.shapes,
                            'strides': layer.strides,
                            'tapped': layer.name in each.tapped,
                            'can_be_tapped': layer.calls > 0 and layer.tappable,
                        }
                        for layer in each.survey.layers
                    ],
                }
                for each in self.networks
            ],
            'methods': {name: list(lines) for name, lines in self.methods.items()},
            'image': self.image,
            'batch': self.batch,
            'iterations': self.iterations,
            'teachers_share_of_multiplications': self.share,
            'teachers_share_of_memory': self.memory_share,
            'curves': {each.name: each.values for each in self.curves},
            'notes': list(self.notes),
        }


def overview(config: Config, size: tuple[int, int] | None = None) -> Overview:
    """Look at a distilled config; neither data nor weights are read.

    Args:
        config: As :func:`mmkd.cli.read_config` reads it; it stays as it is.
        size: Height and width to count multiplications for; None: what the pipeline says.

    Raises:
        ConfigError: for a plain model, and for all that :func:`mmkd.distill` refuses.
    """
    if 'student' not in config.model:
        raise ConfigError('model: it has no student; a plain model learns from nobody')
    init_default_scope(config.get('default_scope', 'mmengine'))
    model = MODELS.build(config.model)
    notes = []
    image = size or training_size(config)
    student = survey(model)
    if image is None:
        image = student.size
        notes.append(f'The pipeline names no size of images: multiplications are counted at {image[0]}x{image[1]}.')
    networks = [_network('student', model, image, student, model.distillers.student_layers)]
    for name, source in model.sources.items():
        if not isinstance(source, Own):
            networks.append(
                _network(
                    name,
                    source.model,
                    image,
                    survey(source.model),
                    source.layers,
                    None if source.has_gradient else source.calls,
                    getattr(source, 'checkpoint', None),
                )
            )
    epoch, of_data = _epoch(config)
    iterations = schedules.length(config, epoch) if config.get('train_cfg') else 0
    if iterations and not of_data and 'max_epochs' in config.train_cfg:
        notes.append(f'The data are not there: an epoch is taken for {epoch} iterations.')
    curves: list[Curve] = []
    if iterations and config.get('optim_wrapper'):
        curves = [schedules.learning_rate(config, epoch), *schedules.weights(model.distillers, iterations)]
        notes += compare_batch_size(config)
    return Overview(
        tuple(networks),
        {name: described(name, model) for name in model.distillers},
        image,
        _batch(config),
        tuple(curves),
        iterations,
        tuple(notes),
    )


def _network(
    name: str,
    model: nn.Module,
    image: tuple[int, int],
    layers: Survey,
    tapped: tuple[str, ...],
    calls: Mapping[str, int] | None = None,
    checkpoint: str | None = None,
) -> Network:
    whole = cost(model, image)
    kind = type(model).__mro__[2].__name__ if isinstance(model, Distilled) else type(model).__name__
    return Network(
        name,
        kind,
        cost(model, image, tapped, calls) if calls else whole,
        whole,
        layers,
        tuple(dict.fromkeys(each.partition(':')[0] for each in tapped)),
        checkpoint,
    )


def described(name: str, model: Distilled) -> tuple[str, ...]:
    """A distiller's class, from whom it learns, what it pairs, and what it trains."""
    distiller = model.distillers[name]
    learner = model.distillers.learner_of[name]
    teachers = ', '.join(model.distillers.teacher_of[name])
    kind = type(distiller).__name__
    if isinstance(distiller, Several):
        kind = f'{type(distiller.first).__name__} of several teachers, {distiller.kind}'
    lines = [f'{kind}: {learner or "student"} learns from {teachers}']
    pairs = [each.describe() for each in distiller.modules() if isinstance(each, LevelPairs)]
    if not pairs:
        of_teachers = [names_of(distiller.teacher_layers, each) for each in model.distillers.teacher_of[name]]
        read = names_of(distiller.student_layers), dict.fromkeys(layer for layers in of_teachers for layer in layers)
        reads = [', '.join(layers) for layers in read]
        pairs = [f'reads {reads[0]}' if reads[1] in ('', reads[0]) else f'reads {reads[0]}; of the teacher {reads[1]}']
    trained = sum(each.numel() for each in distiller.parameters() if each.requires_grad)
    return (*lines, *pairs, *([f'{trained:,} parameters are trained beside the student'] if trained else []))


def _batch(config: Config) -> int:
    loader = config.get('train_dataloader') or {}
    accumulated = (config.get('optim_wrapper') or {}).get('accumulative_counts', 1)
    return loader.get('batch_size', 1) * get_world_size() * accumulated


def _epoch(config: Config) -> tuple[int, bool]:
    """The iterations of an epoch, and whether the data say so; 1000 without data."""
    loader = config.get('train_dataloader')
    if loader and 'max_epochs' in (config.get('train_cfg') or {}):
        # without data there is nothing to read; pycocotools prints that it begins to
        with contextlib.suppress(OSError), contextlib.redirect_stdout(io.StringIO()):
            images = len(DATASETS.build({**loader.dataset, 'lazy_init': False}))
            return math.ceil(images / loader.get('batch_size', 1) / get_world_size()), True
    return 1000, False
