"""What student and teacher see of a batch, and what their tapped layers make of it, side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

from mmkd.analysis.gradients import check_distilled
from mmkd.distillers.base import Boxes, Distiller
from mmkd.errors import ConfigError
from mmkd.hosts.running import modes_kept, run
from mmkd.normalize import normalization
from mmkd.registry import HOOKS
from mmkd.sources import Own, Teacher
from mmkd.taps import Taps, names_of, tensors
from mmkd.values import is_whole

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


def draw_labels(axis: Axes, sample: Any) -> None:
    """A sample's boxes, or its label map, over its image."""
    if getattr(sample, 'gt_sem_seg', None) is not None:
        labels = sample.gt_sem_seg.data[0].cpu().numpy().astype(float)
        axis.imshow(np.where(labels == 255, np.nan, labels), cmap='tab20', vmin=0, vmax=19, alpha=0.45)
    elif getattr(sample, 'gt_instances', None) is not None:
        boxes = sample.gt_instances.bboxes
        _draw_boxes(axis, getattr(boxes, 'tensor', boxes), '#e6194b')


def _draw_boxes(axis: Axes, boxes: torch.Tensor, color: str) -> None:
    for left, top, right, bottom in boxes.cpu().tolist():
        axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, ec=color, lw=1.2))


@torch.no_grad()
def tap(model: nn.Module, inputs: torch.Tensor, samples: list) -> tuple[Taps, dict[str, Taps]]:
    """The taps of a batch that is normalized for the student, without a loss: the student's, and each teacher's and average's.

    Layers that a loss alone calls were not called. The model's state stays as it is.
    """
    layers = tuple(
        dict.fromkeys(layer for each in model.distillers.values() for layer in names_of(each.student_layers))
    )
    with modes_kept(model):
        model.eval()
        found = {}
        for name, source in model.sources.items():
            if isinstance(source, Own):
                layers = tuple(dict.fromkeys((*layers, *source.layers)))
            elif isinstance(source, Teacher):
                found[name] = source(inputs, samples)
            elif source.kept is not None and not source.has_gradient:  # not by `read`, which would average once more
                with Taps(source.model, source.layers, images=len(inputs)) as taps:
                    run(source.model, source.layers, source.seen(inputs, samples), samples)
                found[name] = taps
        with Taps(model, layers, images=len(inputs)) as student:
            run(model, layers, inputs, samples)
    return student, found


def maps_of(taps: Taps, inputs: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """The maps that tapped layers put out, (B, C, H, W), titled by layer, channels and stride; of a pyramid the largest ones."""
    found: list[tuple[str, torch.Tensor]] = []
    for layer in taps:
        if taps.calls[layer]:
            levels = [each for each in tensors(taps.per_call(layer)) if each.dim() == 4 and len(each) == len(inputs)]
            for level in sorted(levels, key=lambda each: -each.shape[-1])[:LEVELS]:
                stride = round(inputs.shape[-1] / level.shape[-1])
                found.append((f'{layer} {level.shape[1]} /{stride}', level))
    return found


Row = tuple[str, list[tuple[str, Sequence[np.ndarray], Boxes | None]]]
"""What a row is of; and of each of its pictures the title, one for each image, and boxes on it."""


@torch.no_grad()
def draw_batch(model: nn.Module, inputs: torch.Tensor, samples: list, images: int = 3) -> Figure:
    """For each image a row for the student, its input with the labels and its tapped maps; one for each frozen or averaged
    source; and one for each method that says what it looks at.

    Args:
        model: The distilled student, loaded.
        inputs: A batch that is normalized for the student, (B, 3, H, W).
        samples: Its data samples.
        images: How many of them at most.
    """
    inputs, samples = inputs[:images], samples[:images]
    student, others = tap(model, inputs, samples)
    of_student = [shown(each, model.data_preprocessor) for each in inputs]
    rows: list[Row] = [('student', [('input', of_student, None), *_energies(student, inputs)])]
    for name, taps in others.items():
        seen, preprocessor = model.sources[name].seen(inputs, samples), model.data_preprocessor
        if isinstance(model.sources[name], Teacher):
            preprocessor = model.sources[name].model.data_preprocessor
        pictures = [shown(each, preprocessor) for each in seen]
        rows.append((name, [('input', pictures, None), *_energies(taps, inputs)]))
    with modes_kept(model):
        model.eval()
        rows += _of_methods(model, student, others, samples, of_student)
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
            for axis, (title, each, boxes) in zip(axes[index * len(rows) + of], pictures):
                axis.imshow(each[index], cmap='magma', extent=(0, width, height, 0))
                axis.set_title(f'{name}: {title}', fontsize=7)
                if boxes is not None:
                    _draw_boxes(axis, boxes.boxes[index][boxes.valid[index]], 'white')
            if name == 'student':
                draw_labels(axes[index * len(rows), 0], sample)
    return figure


def _energies(taps: Taps, inputs: torch.Tensor) -> list[tuple[str, list[np.ndarray], None]]:
    return [(title, [energy(each) for each in level], None) for title, level in maps_of(taps, inputs)]


def _of_methods(
    model: nn.Module, student: Taps, others: Mapping[str, Taps], samples: list, images: Sequence[np.ndarray]
) -> list[Row]:
    """A row for each method of one frozen or averaged teacher that says what it looks at."""
    rows: list[Row] = []
    for name, distiller in model.distillers.items():
        teacher = others.get(model.distillers.teacher_of[name][0])
        if not isinstance(distiller, Distiller) or distiller.several_teachers or teacher is None:
            continue
        if model.distillers.learner_of[name] is not None:
            continue
        pictures: list[tuple[str, Sequence[np.ndarray], Boxes | None]] = []
        for title, found in distiller.pictures(student, teacher, samples).items():
            if isinstance(found, Boxes):
                pictures.append((title, images, found))
            else:
                pictures.append((title, [each.float().cpu().numpy() for each in found], None))
        if pictures:
            rows.append((name, pictures[: 2 * LEVELS]))
    return rows


@HOOKS.register_module()
class DistillVisualizationHook(Hook):
    """Draw, every so many iterations, what the networks and the methods look at in the batch at hand.

    The picture, :func:`draw_batch`, goes to the Runner's visualizer as ``distillation``, and so to each of its backends: a file
    in ``vis_data/vis_image`` by mmengine's own, TensorBoard, W&B. The first process draws its own batch. The training itself is
    not changed.

    Args:
        interval: In iterations; the first iteration is drawn as well.
        images: Of the batch, at most.

    Raises:
        ConfigError: for a plain or a sharded model, or values that are no positive whole numbers.
    """

    def __init__(self, interval: int = 1000, images: int = 2):
        for option, value in (('interval', interval), ('images', images)):
            if not (is_whole(value) and value >= 1):
                raise ConfigError(f'DistillVisualizationHook: {option}={value!r}: expected a positive whole number')
        self.interval, self.images = interval, images

    def before_train(self, runner: Runner) -> None:
        check_distilled(runner, 'DistillVisualizationHook')

    @master_only
    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        if runner.iter % self.interval:
            return
        model = getattr(runner.model, 'module', runner.model)
        batch = model.data_preprocessor(data_batch, True)
        canvas = FigureCanvasAgg(draw_batch(model, batch['inputs'], batch['data_samples'], self.images))
        canvas.draw()
        picture = np.asarray(canvas.buffer_rgba())[..., :3]
        runner.visualizer.add_image('distillation', np.ascontiguousarray(picture), step=runner.iter)
