"""A frozen teacher's own loss over maps that are made of its own, for what is trained on it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from mmkd.errors import ConfigError
from mmkd.hosts.detection.second_pass import check_heads, losses_of_maps
from mmkd.hosts.running import modes_kept, unlabelled
from mmkd.hosts.segmentation.heads import logits_layer

CLASSIFIER = '.conv_seg'


def task_layer(model: nn.Module) -> str:
    """The layer whose maps :func:`task_loss` takes by default: a detector's neck, a segmentor's class logits."""
    return logits_layer(model) if hasattr(model, 'decode_head') else 'neck'


def check_task(model: nn.Module, layer: str, method: str) -> None:
    """Raise ConfigError unless :func:`task_loss` can be taken of a model's layer, and does not train the model."""
    kind = type(model).__name__
    if any(each.requires_grad for each in model.parameters()):
        raise ConfigError(f'{method} learns on a teacher that must not learn from that; use a frozen teacher')
    if not hasattr(model, 'decode_head'):
        check_heads(model, method)
        if layer != 'neck':
            raise ConfigError(
                f"{layer!r}: {method} runs the heads of a {kind} over its maps, which are those of 'neck'"
            )
        return
    head = model.get_submodule(layer.removesuffix(CLASSIFIER))
    usual = getattr(getattr(type(head), 'loss_by_feat', None), '__qualname__', '') == 'BaseDecodeHead.loss_by_feat'
    if not layer.endswith(CLASSIFIER) or not usual:
        raise ConfigError(
            f"{layer!r}: {method} takes a {kind}'s own loss of class logits; name the conv_seg of a head that is trained by "
            f'them alone, such as {logits_layer(model)!r}'
        )


def task_loss(
    model: nn.Module, layer: str, maps: Sequence[torch.Tensor], data_samples: Sequence | None
) -> torch.Tensor:
    """The sum of a model's own losses, as if ``maps`` were what ``layer`` put out; see :func:`check_task`.

    Images of a detector without labels do not count. Heads do what they do in training, but for norms and dropout.

    Args:
        model: A frozen detector or segmentor.
        layer: ``'neck'`` or the classifier of a segmentor's head.
        maps: The levels, (B, C, H, W); no gradient flows into the model itself.
        data_samples: The batch's; they stay as they are.
    """
    samples = list(data_samples or [])
    with _in_training(model):
        if hasattr(model, 'decode_head'):
            losses = model.get_submodule(layer.removesuffix(CLASSIFIER)).loss_by_feat(maps[0], samples)
            return torch.stack([value for key, value in losses.items() if 'loss' in key]).sum()
        without = unlabelled(samples)
        if without:
            labelled = [index for index in range(len(samples)) if index not in without]
            if not labelled:
                return torch.stack([0 * level.sum() for level in maps]).sum()
            # slices and not an index on the device, for which it would wait
            maps = [torch.cat([level[index : index + 1] for index in labelled]) for level in maps]
            samples = [samples[index] for index in labelled]
        with _without_masks(model, samples):
            return losses_of_maps(model, maps, samples)


@contextmanager
def _in_training(model: nn.Module) -> Iterator[None]:
    # some heads put out other things in evaluation, such as FCOS's boxes in pixels
    with modes_kept(model):
        for module in model.modules():
            module.training = not isinstance(module, (_NormBase, _DropoutNd))
        yield


@contextmanager
def _without_masks(model: nn.Module, data_samples: Sequence) -> Iterator[None]:
    """Inside, a Mask R-CNN is a Faster R-CNN where the labels are boxes alone."""
    head = getattr(model, 'roi_head', None)
    mask_head = getattr(head, 'mask_head', None)
    if mask_head is None or all('masks' in sample.gt_instances for sample in data_samples):
        yield
        return
    try:
        head.mask_head = None
        yield
    finally:
        head.mask_head = mask_head
