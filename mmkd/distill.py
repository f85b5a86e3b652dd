"""Make a plain mmdet or mmseg model the student of another one.

:func:`distill` builds the student and puts :class:`Distilled` in front of its own class: a ``RetinaNet`` becomes a
``DistilledRetinaNet`` that still is a ``RetinaNet``, with its parameter names, checkpoints, hooks and optimizer rules.
"""

import functools
from collections.abc import Callable, Mapping

import torch
from mmengine.model import BaseModel
from mmengine.registry import MODELS as MMENGINE_MODELS

from mmkd.distillers.base import Distillers
from mmkd.registry import MODELS
from mmkd.taps import Taps, probe
from mmkd.teacher import build_teacher


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
        self._teacher.load(next(self.parameters()).device)

    def _apply(self, fn: Callable, *args, **kwargs):
        self._teacher.apply(fn)  # `.to()`, `.cuda()`, `.half()` take the teacher along
        return super()._apply(fn, *args, **kwargs)


@MODELS.register_module('Distill')
def distill(
    student: Mapping | BaseModel,
    teacher: str | Mapping,
    distillers: Mapping[str, Mapping],
    data_preprocessor: Mapping | None = None,
) -> BaseModel:
    """Build a student that learns from a teacher; in a config, ``model = dict(type='mmkd.Distill', ...)``.

    Args:
        student: The config of a plain mmdet or mmseg model, or such a model.
        teacher: A config's name (``'mmdet::retinanet/retinanet_r101_fpn_2x_coco.py'``), whose metafile names the
            weights, or ``dict(config=..., checkpoint=...)``; see :func:`mmkd.teacher.build_teacher`.
        distillers: Name to config of each method; losses are logged as ``<name>.<key>``.
        data_preprocessor: Given by mmengine's Runner where a config has one at its top level; for the student.

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
        collection.setup(probe(model, collection.student_layers), taps)
    teacher.layers = collection.teacher_layers
    # a layer that is called once per image has no fixed number of calls after which the teacher could stop
    teacher.calls = taps.calls if taps.calls == two_images.calls else None
    teacher.follow(model.data_preprocessor)
    model.__class__ = distilled_class(type(model))
    model._teacher = teacher
    model.distillers = collection.to(device)
    return model


@functools.cache
def distilled_class(plain: type) -> type:
    """``DistilledX`` for a model class ``X``."""
    return type(f'Distilled{plain.__name__}', (Distilled, plain), {'__module__': plain.__module__})
