"""Make a plain mmdet or mmseg model the student of other ones.

:func:`distill` builds the student and puts :class:`Distilled` in front of its own class: a ``RetinaNet`` becomes a
``DistilledRetinaNet`` that still is a ``RetinaNet``, with its parameter names, checkpoints, hooks and optimizer rules.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from mmengine.model import BaseModel
from torch import nn

from mmkd.distillers.collection import Distillers, idle_loss, weighted
from mmkd.distillers.schedule import Weight
from mmkd.errors import ConfigError
from mmkd.hosts.configs import build_model, read_model
from mmkd.hosts.detection.ignored import leaving_out_ignored
from mmkd.hosts.partial_labels import labelled_classes
from mmkd.hosts.running import at_first_size, probe, run, scaled, sizes_to_probe, unlabelled, without_labels
from mmkd.hosts.segmentation.label_weights import weighted_labels
from mmkd.inherit import check_inheritance, inherit_weights, parts_by_teacher
from mmkd.registry import MODELS
from mmkd.sources import Own, Source, Sources, build_sources
from mmkd.sources.teacher_labels import PREFIX, TeacherLabels
from mmkd.taps import Taps, find_layer, join

LABELLED, UNLABELLED, UNTAUGHT = 'labelled', 'unlabelled', 'untaught'


class Distilled(BaseModel if TYPE_CHECKING else object):  # type: ignore[misc]
    """What distillation adds to a student's class."""

    distillers: Distillers
    sources: Sources
    _inherit: dict[str, Sequence[str]]
    _task_weight: Callable[[int], float]
    _teacher_labels: TeacherLabels | None
    _class_names: Sequence[str] | None
    _frozen: list[str]

    def forward(self, inputs, data_samples=None, mode: str = 'tensor'):
        # Not `loss` or `train_step`: DDP calls `forward` alone, and synchronizes what is computed in it.
        if mode != 'loss':
            return super().forward(inputs, data_samples, mode)
        iteration = self.distillers.start_step(counts=self.training)
        knowledge, losses = {}, {}
        for name, source in self.sources.items():
            if self.training:
                source.start_step(self, iteration)
            if source.due(iteration) and self.distillers.wants(name):
                knowledge[name], own = source.read(self, inputs, data_samples)
                losses.update({f'{name}.{key}': value for key, value in own.items()})
            else:
                losses.update(idle_loss(name, source.kept))
        trust = self.distillers.label_weights(knowledge, data_samples) if self._task_weight(iteration) else None
        student, own = self._learn(inputs, data_samples, iteration, trust)
        losses.update(own)
        losses.update(self.distillers(student, knowledge, data_samples))
        return losses

    def _learn(
        self, inputs: torch.Tensor, data_samples: list, iteration: int, trust: torch.Tensor | None
    ) -> tuple[Taps, dict]:
        """The student's taps of all images, and its own losses: of those that have labels, and of those that a teacher labels.

        Each of the two kinds has a pass of its own, and so have the images without either, which is run no further than the
        distillers need.
        """
        labels = self._teacher_labels
        without = unlabelled(data_samples) if labels else without_labels(self, data_samples)
        weights = {LABELLED: self._task_weight(iteration), UNLABELLED: labels.weight(iteration) if labels else 0.0}
        passes: dict[str, list[int]] = {LABELLED: [], UNLABELLED: [], UNTAUGHT: []}
        for index in range(len(inputs)):
            kind = UNLABELLED if index in without else LABELLED
            passes[kind if weights[kind] else UNTAUGHT].append(index)
        losses, parts = {}, []
        for kind, indices in passes.items():
            if not indices:
                continue
            images, samples, trusted = inputs, data_samples, trust
            if len(indices) < len(inputs):
                images, samples = _pick(inputs, indices), [data_samples[index] for index in indices]
                trusted = None if trust is None else _pick(trust, indices)
            if kind == LABELLED:
                taps, own = self._task(images, samples, weights[kind], trusted)
                losses.update(own)
            elif kind == UNLABELLED and labels is not None:
                samples, factor, figures = labels(self, images, samples)
                with leaving_out_ignored(self):
                    taps, own = self._task(images, samples, weights[kind] * factor)
                losses.update({f'{PREFIX}.{key}': value for key, value in {**own, **figures}.items()})
            else:
                with Taps(self, self.distillers.student_layers, images=len(indices)) as taps:
                    run(self, self.distillers.student_layers, images, samples, trains=True)
            parts.append((indices, taps))
        return join(parts), losses or idle_loss('task', self)

    def _task(
        self, inputs: torch.Tensor, data_samples: list, weight: float, trust: torch.Tensor | None = None
    ) -> tuple[Taps, dict]:
        # the taps' hooks come first, and read what heads say of all classes
        with (
            Taps(self, self.distillers.student_layers, images=len(inputs)) as taps,
            weighted_labels(self, trust),
            labelled_classes(self, data_samples, self._class_names),
        ):
            losses = super().forward(inputs, data_samples, 'loss')
        return taps, weighted(losses, weight)

    def init_weights(self) -> None:
        """Initialize the student, unless it was given as a built model, and load what it learns from.

        ``Runner.train`` calls it, ``Runner.test`` does not.
        """
        if not self.is_init:
            super().init_weights()
        # after `init_weights`, which would overwrite what is inherited; before the teacher's batch norms are folded
        device = next(self.parameters()).device
        self.sources.load(device, self._inherit_from)
        for name in self.sources:
            taken = name in self._inherit or self.distillers.starts_from(name)
            if taken and self.sources[name].loaded_alone:
                raise ConfigError(
                    f'{name}: was loaded by itself, before the parts that start from its weights could take them; call '
                    f'init_weights() alone'
                )

    def _inherit_from(self, name: str, teacher: nn.Module) -> None:
        inherit_weights(self, teacher, self._inherit.get(name, ()), self.sources[name].classes)
        self.distillers.start_from(name, teacher)

    def plain(self) -> BaseModel:
        """The student as the plain model again, in place: without distillers and without what it learnt from."""
        for name in self._frozen:  # without the task, which nobody leaves out any more
            self.get_parameter(name).requires_grad_(True)
        del self.distillers, self.sources, self._inherit, self._task_weight, self._teacher_labels
        del self._class_names, self._frozen
        self.__class__ = type(self).__mro__[2]
        return self

    def __reduce_ex__(self, protocol):
        return _restore, (type(self).__mro__[2],), self.__dict__


@MODELS.register_module('Distill')
def distill(
    student: str | Mapping | BaseModel,
    teacher: str | Mapping | nn.Module | Source,
    distillers: Mapping[str, Mapping | nn.Module],
    data_preprocessor: Mapping | None = None,
    inherit: Sequence[str] | Mapping[str, Sequence[str]] = (),
    class_names: Sequence[str] | None = None,
    task_weight: float | Mapping = 1.0,
    pseudo_labels: Mapping | None = None,
) -> BaseModel:
    """Build a student that learns from others; in a config, ``model = dict(type='mmkd.Distill', ...)``.

    Args:
        student: The config of a plain mmdet or mmseg model, a config's name or path, or such a model, which keeps its
            weights.
        teacher: A config's name (``'mmdet::retinanet/retinanet_r101_fpn_2x_coco.py'``), whose metafile names the
            weights, ``dict(config=..., checkpoint=...)``, or a built model; see :class:`mmkd.sources.Teacher`. Several
            by name: ``dict(large=dict(config=...), mean=dict(type='Average'))``, see :mod:`mmkd.sources`.
        distillers: Name to config of each method, or to a distiller; losses are logged as ``<name>.<key>``. With several
            teachers each entry names its own, ``teacher='large'``.
        data_preprocessor: Given by mmengine's Runner where a config has one at its top level; for the student.
        inherit: The student's parts that start from the teacher's weights, such as ``['neck', 'bbox_head']`` (the
            "inheriting strategy"); ``init_weights`` copies them. With several teachers ``dict(large=['neck'])``.
            Of a teacher with other ``classes`` the rows of the shared ones are copied.
        class_names: The names of the student's classes, for a teacher with other ``classes``, and for images that are labelled
            for some alone. mmkd's commands fill in those of the training data.
        task_weight: Of the student's own losses, a number or a schedule (:class:`mmkd.distillers.schedule.Weight`). Default
            1. In a step in which it is 0 no label is read, and the student is run no further than the distillers need; where
            it is always 0, heads that no distiller reads are not trained.
        pseudo_labels: Let a teacher label the unlabelled images of a batch, ``dict(teacher='large', score=0.5)``; see
            :class:`mmkd.sources.teacher_labels.TeacherLabels`. ``distillers`` may then be empty. Default None: they are
            learnt from by distillers alone.

    Returns:
        The student, in place where it was given as a model. Its ``state_dict`` holds the plain model's keys and, where a
        method has trainable parts, ``distillers.<name>.*``; of teachers only what is trained or averaged along, as
        ``sources.<name>.*``.

    Raises:
        ConfigError: for layers, options or shapes that cannot work, with what to do.

    Example:
        >>> model = distill(
        ...     student=retinanet_config,
        ...     teacher='mmdet::retinanet/retinanet_r101_fpn_2x_coco.py',
        ...     distillers=dict(gid=dict(type='GID')))
    """
    model = _build_student(student, data_preprocessor)
    device = next(model.parameters()).device
    with torch.random.fork_rng([]):  # the student's initial weights do not depend on who teaches it
        sources = build_sources(teacher, model)
        for source in sources.values():
            try:
                source.name_classes(class_names)
            except ConfigError as error:
                raise ConfigError(f'{source.name}: {error}') from None
        collection = Distillers(distillers, optional=pseudo_labels is not None)
        _connect(model, sources, collection)
    parts = parts_by_teacher(inherit, sources)
    for name, each in parts.items():
        check_inheritance(model, sources[name].model, each, sources[name].classes)
    labels = None
    if pseudo_labels is not None:
        labels = TeacherLabels.read(pseudo_labels)
        labels.connect(model, sources)
    weight, frozen = Weight(task_weight, 'task_weight'), []
    collection.check_task(weight, sources)
    if not weight.scheduled and weight() == 0 and labels is None:
        frozen = _freeze_unread(model, collection, sources)
    model.__class__ = distilled_class(model.__class__)
    model._task_weight, model._class_names, model._frozen = weight.at, class_names, frozen
    model._teacher_labels = labels
    model._inherit = parts
    model.distillers = collection.to(device)
    model.sources = Sources(sources)
    return model


def _build_student(student: Any, data_preprocessor: Mapping | None) -> BaseModel:
    if isinstance(student, Distilled):
        student = student.plain()
    if isinstance(student, nn.Module):
        model: BaseModel = student
        model.is_init = True  # it keeps its weights
        return model
    if isinstance(student, str) or 'model' in student:
        student = read_model(student, 'student')
    if data_preprocessor is not None and student.get('data_preprocessor') is None:
        student = {**student, 'data_preprocessor': data_preprocessor}
    return build_model(student, what='student')


def _connect(model: BaseModel, sources: Mapping[str, Source], distillers: Distillers) -> None:
    """Find out which layers are read, and how they look, by running all networks over an image."""
    distillers.connect(sources)
    distillers.prepare(model, sources)
    for name in sorted({*distillers, *sources} & {'task', PREFIX}):
        raise ConfigError(
            f'{"distillers" if name in distillers else "teacher"}.{name}: losses of the student have log keys of this name; '
            f'choose another'
        )
    clash = sorted(set(distillers) & set(sources))
    if clash:
        raise ConfigError(f'distillers.{clash[0]}: a teacher has this name, and both start log keys; choose another')
    for name, source in sources.items():
        taught = distillers.layers('teacher_layers', name, distillers.taught_by(name))
        learnt = distillers.layers('student_layers', name, distillers.learnt_by(name))
        source.layers = tuple(dict.fromkeys(taught + learnt))
    own = [layer for source in sources.values() if isinstance(source, Own) for layer in source.layers]
    probed = tuple(dict.fromkeys((*distillers.layers('student_layers', None, distillers.learnt_by(None)), *own)))
    others = {name: source for name, source in sources.items() if not isinstance(source, Own)}

    def attempt(size: tuple[int, int]) -> tuple[tuple[int, int], Taps, Mapping[str, Taps], Mapping[str, Taps]]:
        student = probe(model, probed, size=size, trains=True, name='student')
        found = [
            {
                name: probe(
                    source.model,
                    source.layers,
                    batch,
                    scaled(size, source.scale),
                    trains=source.has_gradient,
                    name=source.name,
                )
                for name, source in others.items()
            }
            for batch in (1, 2)
        ]
        return size, student, found[0], found[1]

    sizes = sizes_to_probe([model, *(source.model for source in others.values())])
    size, student, found, of_two = at_first_size(sizes, attempt)
    for name, source in others.items():
        # a layer that is called once per image has no fixed number of calls after which the pass could stop
        source.calls = found[name].calls if found[name].calls == of_two[name].calls else None
        source.follow(model.data_preprocessor)
        source.size = size
    distillers.setup(student, {name: found.get(name, student) for name in sources})
    training = distillers.layers('training_layers', None, distillers.learnt_by(None))
    for layer in training:
        find_layer(model, layer)
    distillers.student_layers = tuple(dict.fromkeys(probed + training))
    for name, source in sources.items():
        of_learner = distillers.layers('training_layers', name, distillers.learnt_by(name))
        source.layers = tuple(dict.fromkeys(source.layers + of_learner))


def _freeze_unread(model: nn.Module, distillers: Distillers, sources: Mapping[str, Source]) -> list[str]:
    """Freeze heads, and the neck, that no distiller reads: nothing trains them without labels, and an optimizer would still
    shrink them by its weight decay. The names of what was trained before."""
    if any(getattr(each, 'trains_heads', False) for each in (*distillers.values(), *sources.values())):
        return []
    read = {layer.partition(':')[0].partition('.')[0] for layer in distillers.student_layers}
    frozen = []
    for name, part in model.named_children():
        unread = name not in read if name.endswith('_head') else name == 'neck' and read <= {'backbone'}
        for parameter, value in part.named_parameters() if unread else ():
            if value.requires_grad:
                frozen.append(f'{name}.{parameter}')
                value.requires_grad_(False)
    return frozen


def _pick(inputs: torch.Tensor, indices: Sequence[int]) -> torch.Tensor:
    # a list as an index would wait for the device
    return torch.stack([inputs[index] for index in indices])


@functools.cache
def distilled_class(plain: Any) -> Any:
    """``DistilledX`` for a model class ``X``."""
    return type(f'Distilled{plain.__name__}', (Distilled, plain), {'__module__': plain.__module__})


def _restore(plain: type) -> nn.Module:
    """An empty student, for pickle and copy."""
    return object.__new__(distilled_class(plain))
