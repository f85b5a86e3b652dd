"""What a distillation costs, as far as it can be counted without a training step."""

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from mmengine.config import Config
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmkd.analysis.layers import BESIDE
from mmkd.hosts.datasets import datasets
from mmkd.hosts.running import empty_sample, run
from mmkd.taps import Taps


@dataclass(frozen=True)
class Cost:
    """Of one image.

    Args:
        parameters: Of the whole model.
        trained: Those that are trained.
        flops: Multiplications with their additions, as mmdet and mmseg count them, of one forward pass: convolutions and
            products of matrices, without mmcv's own operators (deformable convolutions).
    """

    parameters: int
    trained: int
    flops: int


def cost(
    model: nn.Module,
    size: tuple[int, int],
    layers: Iterable[str] = (),
    calls: Mapping[str, int] | None = None,
) -> Cost:
    """Count a model's parameters, and what a forward pass over an image takes.

    Args:
        model: Of mmdet or mmseg.
        size: Height and width of the image.
        layers: Run no further than these; none: through all heads, as for predictions.
        calls: How often they are called in a whole pass, where the pass may stop when they were.
    """
    layers = tuple(layers)
    try:  # shapes alone, without computing anything
        flops = _flops(copy.deepcopy(model).to('meta'), size, layers, calls)
    except (NotImplementedError, RuntimeError):  # operators that need values, as those that select proposals
        flops = _flops(model, size, layers, calls)
    own = [(name, each) for name, each in model.named_parameters() if name.partition('.')[0] not in BESIDE]
    return Cost(
        sum(each.numel() for _, each in own),
        sum(each.numel() for _, each in own if each.requires_grad),
        flops,
    )


@torch.no_grad()
def _flops(model: nn.Module, size: tuple[int, int], layers: tuple[str, ...], calls: Mapping[str, int] | None) -> int:
    images = torch.zeros(1, 3, *size, device=next(model.parameters()).device)
    heads = [name for name, _ in model.named_children() if name not in BESIDE]
    training = model.training
    model.eval()
    with FlopCounterMode(display=False) as counter, Taps(model, layers, calls if layers else None):
        run(model, layers or heads, images, [empty_sample(size).to(images.device)])
    model.train(training)
    return counter.get_total_flops() // 2


def share_of_step(student: Cost, teachers: Iterable[Cost]) -> float:
    """The part of a step's multiplications that is not the student's, 0 to 1; a backward pass is taken for two forward passes."""
    of_teachers = sum(each.flops * (3 if each.trained else 1) for each in teachers)
    return of_teachers / (3 * student.flops + of_teachers)


def training_size(config: Config) -> tuple[int, int] | None:
    """Height and width of the images that a config trains on, as its pipeline's last size says it; None if it says none.

    They are rounded up to multiples of 32, as detectors pad them.
    """
    if not config.get('train_dataloader'):
        return None
    dataset = next(datasets(config.train_dataloader.dataset, 'train_dataloader.dataset'))[1]
    found = None
    for step in dataset.get('pipeline') or ():
        for key in ('crop_size', 'scale'):
            value = step.get(key)
            if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(each, int) for each in value):
                # a scale is width and height, a crop height and width
                found = tuple(value) if key == 'crop_size' else tuple(reversed(value))
    return None if found is None else (_rounded(found[0]), _rounded(found[1]))


def _rounded(side: int) -> int:
    return 32 * math.ceil(side / 32)
