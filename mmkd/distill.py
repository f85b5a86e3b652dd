"""Make a plain mmdet or mmseg model the student of another one.

:func:`distill` builds the student and puts :class:`Distilled` in front of its own class: a ``RetinaNet`` becomes a
``DistilledRetinaNet`` that still is a ``RetinaNet``, with its parameter names, checkpoints, hooks and optimizer rules.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from mmengine.model import BaseModel
from mmengine.registry import MODELS as MMENGINE_MODELS
from torch import nn

from mmkd.distillers.base import Distillers
from mmkd.errors import ConfigError
from mmkd.hosts.running import probe
from mmkd.registry import MODELS
from mmkd.sources.teacher import build_teacher
from mmkd.taps import Taps, find_layer


class Distilled:
    """What distillation adds to a student's class."""

    def forward(self, inputs, data_samples=None, mode: str = 'tensor'):
        # Not `loss` or `train_step`: DDP calls `forward` alone, and synchronises what is computed in it.
        if mode != 'loss':
            return super().forward(inputs, data_samples, mode)
        teacher = self._teacher(inputs, data_samples)
        with Taps(self, self.distillers.student_layers) as student:
            losses = super().forward(inputs, data_samples, mode)
        losses.update(self.distillers(student, teacher, data_samples))
        return losses

    def init_weights(self) -> None:
        """Initialise the student and load the teacher; ``Runner.train`` calls it, ``Runner.test`` does not."""
        super().init_weights()
        device = next(self.parameters()).device
        # after `init_weights`, which would overwrite it; before the teacher's batch norms are folded
        self._teacher.load(device, then=functools.partial(inherit_weights, self, parts=self._inherit))

    def _apply(self, fn: Callable, *args, **kwargs):
        self._teacher.apply(fn)  # `.to()`, `.cuda()`, `.half()` take the teacher along
        return super()._apply(fn, *args, **kwargs)


@MODELS.register_module('Distill')
def distill(
    student: Mapping | BaseModel,
    teacher: str | Mapping,
    distillers: Mapping[str, Mapping],
    data_preprocessor: Mapping | None = None,
    inherit: Sequence[str] = (),
) -> BaseModel:
    """Build a student that learns from a teacher; in a config, ``model = dict(type='mmkd.Distill', ...)``.

    Args:
        student: The config of a plain mmdet or mmseg model, or such a model.
        teacher: A config's name (``'mmdet::retinanet/retinanet_r101_fpn_2x_coco.py'``), whose metafile names the
            weights, or ``dict(config=..., checkpoint=...)``; see :func:`mmkd.sources.teacher.build_teacher`.
        distillers: Name to config of each method; losses are logged as ``<name>.<key>``.
        data_preprocessor: Given by mmengine's Runner where a config has one at its top level; for the student.
        inherit: The student's parts that start from the teacher's weights, such as ``['neck', 'bbox_head']`` (the
            "inheriting strategy"); ``init_weights`` copies them.

    Returns:
        The student. Its ``state_dict`` holds the plain model's keys and, where a method has trainable parts,
        ``distillers.<name>.*``; nothing of the teacher.

    Raises:
        ConfigError: for layers, options or shapes that cannot work, with what to do.

    Example:
        >>> model = distill(
        ...     student=retinanet_config,
        ...     teacher='mmdet::retinanet/retinanet_r101_fpn_2x_coco.py',
        ...     distillers=dict(gid=dict(type='GID')))
    """
    if isinstance(student, Mapping):
        if data_preprocessor is not None and student.get('data_preprocessor') is None:
            student = {**student, 'data_preprocessor': data_preprocessor}
        model = MMENGINE_MODELS.build(student)
    else:
        model = student
    device = next(model.parameters()).device
    with torch.random.fork_rng([]):  # the student's initial weights do not depend on who teaches it
        teacher = build_teacher(teacher)
        collection = Distillers(distillers)
        taps = probe(teacher.model, collection.teacher_layers)
        two_images = probe(teacher.model, collection.teacher_layers, batch=2)
        collection.setup(probe(model, collection.probed_layers), taps)
    for layer in collection.student_layers:
        find_layer(model, layer)
    check_inheritance(model, teacher.model, inherit)
    teacher.layers = collection.teacher_layers
    # a layer that is called once per image has no fixed number of calls after which the teacher could stop
    teacher.calls = taps.calls if taps.calls == two_images.calls else None
    teacher.follow(model.data_preprocessor)
    model.__class__ = distilled_class(type(model))
    model._teacher = teacher
    model._inherit = tuple(inherit)
    model.distillers = collection.to(device)
    return model


def check_inheritance(student: nn.Module, teacher: nn.Module, parts: Sequence[str]) -> None:
    """Raise ConfigError unless each of the student's parts can take the teacher's weights."""
    if isinstance(parts, str):
        raise ConfigError(f'inherit={parts!r}: expected a list of parts, such as [{parts!r}]')
    for part in parts:
        try:
            shapes = [
                {name: tuple(value.shape) for name, value in find_layer(model, part).state_dict().items()}
                for model in (student, teacher)
            ]
        except ConfigError as error:
            raise ConfigError(f'inherit: {error}') from None
        for name in [*shapes[0], *shapes[1]]:
            own, other = (each.get(name, 'not there') for each in shapes)
            if own != other:
                raise ConfigError(
                    f'inherit: {part}.{name} is {own} in the student and {other} in the teacher; give both the same shapes, or '
                    f'inherit other parts'
                )


@torch.no_grad()
def inherit_weights(student: nn.Module, teacher: nn.Module, parts: Sequence[str]) -> None:
    """Copy the teacher's weights into the student's parts."""
    for part in parts:
        student.get_submodule(part).load_state_dict(teacher.get_submodule(part).state_dict())


@functools.cache
def distilled_class(plain: type) -> type:
    """``DistilledX`` for a model class ``X``."""
    return type(f'Distilled{plain.__name__}', (Distilled, plain), {'__module__': plain.__module__})
