"""A student's own losses on images that are labelled for some of its classes alone.

The logits of the other classes become next to minus infinity there before the loss reads them: a sigmoid's probability is 0,
as its target is, and a softmax is taken over the classes that are labelled. So the loss says nothing of the others, and they
get no gradient. What distillers read is not changed.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from mmkd.classes import index_of
from mmkd.errors import ConfigError

SILENT = -1e4
"""A logit whose probability is 0; float16 can hold it."""


def partly_labelled(data_samples: Sequence | None) -> bool:
    """Whether an image of a batch is labelled for some classes alone."""
    return any(sample.metainfo.get('labelled_for') is not None for sample in data_samples or ())


@contextlib.contextmanager
def labelled_classes(model: nn.Module, data_samples: Sequence | None, names: Sequence[str] | None) -> Iterator[None]:
    """While it lasts, ``model``'s heads say nothing of classes for which an image is not labelled, ``mmkd.LabelledFor``.

    Args:
        model: The student.
        data_samples: The batch's.
        names: Of the student's classes, where images name them.

    Raises:
        ConfigError: for a class that is not there, and for heads whose classes are not known.
    """
    known = [sample.metainfo.get('labelled_for') for sample in data_samples or ()]
    if not any(each is not None for each in known):
        yield
        return
    device = next(model.parameters()).device
    with contextlib.ExitStack() as stack:
        for module, hook in _hooks(model, known, names, device):
            stack.callback(module.register_forward_hook(hook).remove)
        yield


def _hooks(model: nn.Module, known: Sequence, names: Sequence[str] | None, device: torch.device) -> Iterator[tuple]:
    def mask(classes: int) -> torch.Tensor:
        """(B, classes): what an image is not labelled for."""
        rows = []
        for each in known:
            own = range(classes) if each is None else {index_of(name, names, 'LabelledFor', 'student') for name in each}
            if each is not None and max(own) >= classes:
                raise ConfigError(f'LabelledFor: class {max(own)}; the student has {classes}, 0 to {classes - 1}')
            rows.append([index not in own for index in range(classes)])
        return torch.tensor(rows).to(device, non_blocking=True)

    if hasattr(model, 'decode_head'):
        for part in ('decode_head', 'auxiliary_head'):
            heads = getattr(model, part, None)
            for head in heads if isinstance(heads, nn.ModuleList) else [heads] if heads is not None else ():
                if not hasattr(head, 'conv_seg'):
                    raise ConfigError(
                        f'LabelledFor: {part} is a {type(head).__name__}, in which classes cannot be left out; a head that '
                        f'classifies by conv_seg is needed'
                    )
                yield head.conv_seg, _of_pixels(mask(head.conv_seg.out_channels))
    elif hasattr(model, 'roi_head'):
        yield from _of_regions(model, mask)
    else:
        from mmkd.hosts.detection.dense_heads import dense_head  # segmentation needs no mmdet

        yield model.bbox_head, _of_slots(mask(dense_head(model.bbox_head).classes))


def _of_pixels(mask: torch.Tensor):
    def hook(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        return output.masked_fill(mask[..., None, None], SILENT)

    return hook


def _of_slots(mask: torch.Tensor):
    def hook(module: nn.Module, inputs: tuple, output: tuple) -> tuple:
        levels = []
        for level in output[0]:
            slots = mask.repeat(1, level.shape[1] // mask.shape[1])
            levels.append(level.masked_fill(slots[..., None, None], SILENT))
        return (levels, *output[1:])

    return hook


def _of_regions(model: nn.Module, mask: Any) -> Iterator[tuple]:
    heads, extractors = model.roi_head.bbox_head, model.roi_head.bbox_roi_extractor
    if isinstance(heads, nn.ModuleList):
        pairs = list(zip(heads, extractors, strict=True))
    else:
        pairs = [(heads, extractors)]
    for head, extractor in pairs:
        images: list[torch.Tensor] = []
        unknown = mask(head.num_classes)
        unknown = torch.cat([unknown, torch.zeros_like(unknown[:, :1])], 1)  # the background is always known

        def note(module: nn.Module, inputs: tuple, output: Any, images: list = images) -> None:
            images[:] = [inputs[1][:, 0].long()]

        def hook(
            module: nn.Module, inputs: tuple, output: tuple, images: list = images, unknown: torch.Tensor = unknown
        ) -> tuple:
            return (output[0].masked_fill(unknown[images[0]], SILENT), *output[1:])

        yield extractor, note
        yield head, hook
