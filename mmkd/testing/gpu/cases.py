"""Every method and kind of source as a model, and what it computes."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from mmengine.registry import DefaultScope

from mmkd.distill import distill
from mmkd.errors import first_line
from mmkd.sources import Teacher
from mmkd.testing import detectors, models, segmentors
from mmkd.testing.batches import random_batch
from mmkd.testing.device import RandomOnCPU
from mmkd.testing.gpu.section import Setting, Skip
from mmkd.testing.methods import DETECTION, SEGMENTATION

SEEDS = (11, 12, 13)
"""Of the batches of which the median difference counts: where rounding changes the sign of what a ReLU takes in, or which slot
is chosen, the gradient is another one's, and that is no matter of the device."""


def method_cases(quick: bool) -> Iterator[tuple[str, dict, dict, dict[str, dict]]]:
    """Name, configs of student and teacher, and distillers: one method each."""
    wanted = ('RetinaNet: gid', 'RetinaNet: mgd', 'Faster R-CNN: mimic', 'PSPNet: cirkd')
    for pair, (student, teacher, methods) in {**DETECTION, **SEGMENTATION}.items():
        wide = teacher(channels=24, base=8 if 'SegFormer' in pair else 12)
        for name, spec in methods.items():
            if not quick or f'{pair}: {name}' in wanted:
                yield f'{pair}: {name}', student(), wide, {name: spec}


def source_cases(quick: bool) -> Iterator[tuple[str, dict, dict, dict]]:
    """Name, the student's config, sources and distillers: one kind of source each."""
    families = {
        'RetinaNet': (detectors.retinanet, dict(type='AT', layer='neck')),
        'PSPNet': (segmentors.pspnet, dict(type='KD')),
    }
    for family, (make, method) in families.items():
        own = dict(type='AT', layer='backbone.layer3', teacher_layer='backbone.layer4')
        kinds = {
            'frozen': (dict(large=dict(config=make(channels=24))), dict(it=dict(method, teacher='large'))),
            'Average': (dict(mean=dict(type='Average', momentum=0.9)), dict(it=dict(method, teacher='mean'))),
            'Peer and Own': (
                dict(peer=dict(type='Peer', config=make(channels=24)), own=dict(type='Own')),
                dict(it=dict(method, teacher='peer'), up=dict(method, teacher='own', learner='peer')),
            ),
            'Own': (dict(own=dict(type='Own')), dict(it=own)),
        }
        for kind, (sources, distillers) in kinds.items():
            if not quick or f'{family} {kind}' == 'RetinaNet Average':
                yield f'{family} of {kind}', make(), sources, distillers
    if not quick:
        itself, labels = dict(type='Own'), dict(type='LabelEncoder')
        yield 'RetinaNet of labels, LGD', detectors.retinanet(), itself, dict(it=dict(type='LGD'))
        yield 'RetinaNet of labels, LabelEnc', detectors.retinanet(), labels, dict(it=dict(type='LabelEnc'))
        yield 'PSPNet of more heads, ONE', segmentors.pspnet(), itself, dict(it=dict(type='ONE'))
        yield 'PSPNet of more heads, OKDDip', segmentors.pspnet(), itself, dict(it=dict(type='OKDDip'))


def build(student: dict, teacher: Any, distillers: dict, device: Any) -> Any:
    """A distilled student with the same weights each time, in training; without dropout, and batch norms as in evaluation.

    Masks of dropout are drawn on the device. A batch norm of the few positions that small models have divides by
    differences that are mostly rounding.
    """
    scope = 'mmseg' if student['type'] == 'EncoderDecoder' else 'mmdet'
    with DefaultScope.overwrite_default_scope(scope):
        plain = models.build(student, seed=0)
        if 'backbone' in teacher:
            teacher = models.build(teacher, seed=1)
        torch.manual_seed(2)
        model = distill(student=plain, teacher=teacher, distillers=copy.deepcopy(distillers))
        for source in model.sources.values():
            if isinstance(source, Teacher):
                source.accept_current_weights()
        model.init_weights()
    model.to(device).train()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif isinstance(module, torch.nn.BatchNorm2d) and module.running_var is not None:
            module.eval()
    return model


def build_like(other: Any, student: dict, teacher: Any, distillers: dict, device: Any) -> Any:
    """What :func:`build` makes, as far in its training as another one of the same configs."""
    model = build(student, teacher, distillers, device)
    model.load_state_dict(other.state_dict())
    model.distillers.iteration = other.distillers.iteration
    return model


def batch_of(model: Any, seed: int = 0) -> dict:
    """A batch on the model's device."""
    shape = (2, 3, 64, 128) if hasattr(model, 'decode_head') else (2, 3, 128, 160)
    return model.data_preprocessor(random_batch(model, shape, 4, seed), True)


def of_distillers(model: Any, losses: dict) -> dict[str, Any]:
    """What distillers and sources add to the losses."""
    names = (*model.distillers, *model.sources)
    return {key: value for key, value in losses.items() if key.startswith(tuple(f'{name}.loss' for name in names))}


def total(losses: dict) -> Any:
    """The sum of losses, some of which are lists of one per level."""
    return sum(sum(value) if isinstance(value, (list, tuple)) else value for value in losses.values())


def prepare(model: Any, number: int = 2, length: float = 0.3) -> Any:
    """Train for some steps, by which memories are filled and averages differ; the model.

    Each step changes the weights by a vector of this length, whatever the scale of the losses.
    """
    for seed in range(number):
        _, gradients = evaluate(model, seed, of_student=True)
        norm = torch.stack([each.double().norm() for each in gradients.values()]).norm()
        names = dict(model.named_parameters())
        with torch.no_grad():
            for name, gradient in gradients.items():
                names[name].sub_(gradient, alpha=length / float(norm))
    return model


def evaluate(model: Any, seed: int, of_student: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """The distillation losses of a batch and their gradients; random numbers are drawn on the CPU."""
    torch.manual_seed(seed)
    with RandomOnCPU():
        losses = model(**batch_of(model, seed), mode='loss')
    losses = (
        {key: value for key, value in losses.items() if 'loss' in key} if of_student else of_distillers(model, losses)
    )
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    # as a runner does: a backward pass under autocast would take its products in half precision
    with torch.autocast(next(iter(trained.values())).device.type, enabled=False):
        found = torch.autograd.grad(total(losses), list(trained.values()), allow_unused=True)
    gradients = {name: each for name, each in zip(trained, found) if each is not None}
    return {key: torch.stack(list(flat(value))).sum().detach() for key, value in losses.items()}, gradients


def compare(found: dict[str, Any], expected: dict[str, Any], least: float = 1e-3) -> float:
    """The largest difference of two sets of tensors, each relative to the largest value of its own tensor.

    Tensors whose largest value is below ``least`` times that of all are taken relative to that: they are rounding alone,
    as the gradient of a bias before a batch norm.
    """
    assert found.keys() == expected.keys(), set(found) ^ set(expected)
    largest = {key: float(value.abs().max()) if value.numel() else 0.0 for key, value in expected.items()}
    floor = max(least * max(largest.values(), default=0.0), 1e-12)
    return max(
        (
            float((found[key].cpu().double() - value.cpu().double()).abs().max()) / max(largest[key], floor)
            for key, value in expected.items()
            if value.numel()
        ),
        default=0.0,
    )


def finite(tensors: Any) -> bool:
    return all(bool(each.isfinite().all()) for each in tensors)


def require_plain(student: dict, dtype: str, setting: Setting) -> None:
    """Skip where the student alone does not run in this dtype: mmcv's ops do not have all of them."""
    with DefaultScope.overwrite_default_scope('mmseg' if student['type'] == 'EncoderDecoder' else 'mmdet'):
        plain = models.build(student, seed=0).to(setting.device).train()
    try:
        with torch.autocast(setting.device.type, getattr(torch, dtype)):
            plain(**batch_of(plain), mode='loss')
    except RuntimeError as error:
        raise Skip(f'the student alone does not run so: {first_line(error)}') from None


def flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for each in value:
            yield from flat(each)
    else:
        yield value
