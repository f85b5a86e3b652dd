"""What student and teacher see of a batch, and what their tapped layers make of it, side by side."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import nn

from mmkd.errors import ConfigError
from mmkd.hosts.running import run
from mmkd.normalize import normalization
from mmkd.taps import Taps, tensors

LEVELS = 3
"""Of a pyramid its levels with the smallest strides are shown."""


def shown(image: torch.Tensor, preprocessor: nn.Module) -> np.ndarray:
    """An image, (3, H, W), as its network's preprocessor normalized it, for the eye: (H, W, 3), 0 to 1, red first."""
    mean, std, swapped = normalization(preprocessor)
    values = image.cpu().float() * std + mean
    if not swapped:  # OpenCV loads blue first
        values = values.flip(0)
    top = 255.0 if values.max() > 2 else 1.0
    return (values / top).clamp(0, 1).permute(1, 2, 0).numpy()


def energy(level: torch.Tensor) -> np.ndarray:
    """Of a map, (C, H, W), the mean of its absolute values over the channels, (H, W)."""
    return level.detach().float().abs().mean(0).cpu().numpy()


def draw_labels(axis: Axes, sample: object) -> None:
    """A sample's boxes, or its label map, over its image."""
    if getattr(sample, 'gt_sem_seg', None) is not None:
        labels = sample.gt_sem_seg.data[0].cpu().numpy().astype(float)
        axis.imshow(np.where(labels == 255, np.nan, labels), cmap='tab20', vmin=0, vmax=19, alpha=0.45)
    elif getattr(sample, 'gt_instances', None) is not None:
        boxes = sample.gt_instances.bboxes
        for left, top, right, bottom in getattr(boxes, 'tensor', boxes).cpu().tolist():
            axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, ec='#e6194b', lw=1.2))


@torch.no_grad()
def tapped_maps(model: nn.Module, inputs: torch.Tensor, samples: list) -> dict[str, list[tuple[str, torch.Tensor]]]:
    """By network, ``'student'`` and each source's name: what its tapped layers put out for a batch, (B, C, H, W) each.

    Layers that a loss alone calls, and what is no map, are left out.
    """
    modes = {module: module.training for module in model.modules()}
    layers = tuple(dict.fromkeys(layer for each in model.distillers.values() for layer in _names(each.student_layers)))
    model.eval()
    with Taps(model, layers, images=len(inputs)) as taps:
        run(model, layers, inputs, samples)
    for module, mode in modes.items():
        module.training = mode
    found = {'student': _maps(taps, layers, inputs)}
    for name, source in model.sources.items():
        if source.kept is None and source.model is not model:
            taps, _ = source.read(model, inputs, samples)
            if taps is not None:
                found[name] = _maps(taps, tuple(taps), inputs)
    return found


def _names(layers: object) -> tuple[str, ...]:
    return (layers,) if isinstance(layers, str) else tuple(layers)


def _maps(taps: Taps, layers: Sequence[str], inputs: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    found = []
    for layer in layers:
        try:
            levels = [each for each in tensors(taps[layer]) if each.dim() == 4 and len(each) == len(inputs)]
        except ConfigError:  # of a layer that is called in training alone
            continue
        for level in sorted(levels, key=lambda each: -each.shape[-1])[:LEVELS]:
            found.append((f'{layer} /{round(inputs.shape[-1] / level.shape[-1])}', level))
    return found


@torch.no_grad()
def draw_batch(model: nn.Module, inputs: torch.Tensor, samples: list, images: int = 3) -> Figure:
    """For each image a row for the student, its input with the labels and its tapped maps, and one for each teacher.

    Args:
        model: The distilled student, loaded.
        inputs: A batch that is normalized for the student, (B, 3, H, W).
        samples: Its data samples.
        images: How many of them at most.
    """
    inputs, samples = inputs[:images], samples[:images]
    rows = []
    for name, levels in tapped_maps(model, inputs, samples).items():
        if name == 'student':
            seen, preprocessor = inputs, model.data_preprocessor
        else:
            source = model.sources[name]
            seen, preprocessor = source.renormalized(inputs, samples), source.model.data_preprocessor
        maps = [(title, [energy(each) for each in level]) for title, level in levels]
        rows.append((name, [('input', [shown(each, preprocessor) for each in seen]), *maps]))
    columns, (height, width) = max(len(each) for _, each in rows), inputs.shape[2:]
    side = min(2.4, 14 / columns)
    figure = Figure(
        figsize=(side * columns, (side * height / width + 0.3) * len(inputs) * len(rows)), layout='constrained'
    )
    axes = figure.subplots(len(inputs) * len(rows), columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for index, sample in enumerate(samples):
        for of, (name, pictures) in enumerate(rows):
            for axis, (title, each) in zip(axes[index * len(rows) + of], pictures):
                axis.imshow(each[index], cmap='magma', extent=(0, width, height, 0))
                axis.set_title(f'{name}: {title}', fontsize=8)
            if name == 'student':
                draw_labels(axes[index * len(rows), 0], sample)
    return figure
