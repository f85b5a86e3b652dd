"""What makes a frozen model faster without changing what it puts out."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.logging import print_log
from torch import nn

from mmkd.errors import ConfigError
from mmkd.hosts.running import CannotRun, probe
from mmkd.taps import Taps, tensors

LAYOUT_BOUND = ('mmcv.ops.deform_conv', 'mmcv.ops.modulated_deform_conv')
"""Modules that read memory in the order of NCHW, whatever the strides say."""


@torch.no_grad()
def accelerate(model: nn.Module, layers: Sequence[str], size: tuple[int, int]) -> tuple[int, bool]:
    """Fold a frozen model's batch norms and lay its weights out in ``channels_last``, where neither changes the layers' outputs.

    Args:
        model: The model, with its weights.
        layers: What must stay as it is.
        size: Height and width of an image that it runs over.

    Returns:
        The number of batch norms folded, and whether the layout is ``channels_last``; then its inputs have to be, too.

    Raises:
        ConfigError: if the model puts out values that are not finite.
    """
    before = probe(model, layers, size=size)
    for layer in before:
        if not all(torch.isfinite(each).all() for each in tensors(before[layer])):
            raise ConfigError(
                f'layer {layer!r} of {type(model).__name__} puts out values that are not finite for an image of noise: its '
                f'weights are damaged, or not its own'
            )
    return fold_batch_norm(model, layers, size), _lay_out_channels_last(model, layers, size)


def _lay_out_channels_last(model: nn.Module, layers: Sequence[str], size: tuple[int, int]) -> bool:
    """Whether it is done; not where that would change outputs, nor where operations of the model refuse it."""
    if any(type(module).__module__ in LAYOUT_BOUND for module in model.modules()):
        return False
    before = probe(model, layers, size=size)
    model.to(memory_format=torch.channels_last)
    try:
        if _same(before, probe(model, layers, size=size, memory_format=torch.channels_last)):
            return True
    except CannotRun:
        pass  # it did run before, so it is the layout that it refuses
    model.to(memory_format=torch.contiguous_format)
    return False


def _same(before: Taps, after: Taps) -> bool:
    return all(
        torch.allclose(old, new, rtol=1e-3, atol=1e-3 * float(old.abs().amax().clamp(min=1e-6)))
        for layer in before
        for old, new in zip(tensors(before[layer]), tensors(after[layer]), strict=True)
    )


@torch.no_grad()
def fold_batch_norm(model: nn.Module, layers: Sequence[str] = (), size: tuple[int, int] = (256, 256)) -> int:
    """Fold each batch norm of a frozen model into the convolution whose output it takes.

    The pairs are read off a forward pass, not guessed from the order of definition: a batch norm is folded if
    its input is the very tensor that a convolution put out, and neither is called more than once. Layers that are
    tapped keep their own output. The tapped outputs are compared before and after.

    Returns:
        The number of batch norms folded; 0, with a warning, if that would change the outputs by more than rounding.
    """
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm)
    modules: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    calls: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in modules}

    def record(name: str):
        return lambda module, inputs, output: calls[name].append((inputs[0], output))

    handles = [module.register_forward_hook(record(name)) for name, module in modules.items()]
    before = probe(model, layers, size=size)
    for handle in handles:
        handle.remove()

    made_by = {
        id(calls[name][0][1]): name
        for name, module in modules.items()
        if type(module) is nn.Conv2d and len(calls[name]) == 1 and name not in layers
    }
    pairs = []
    for name, module in modules.items():
        norm_ready = isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)) and module.running_var is not None
        if norm_ready and len(calls[name]) == 1 and id(calls[name][0][0]) in made_by:
            pairs.append((made_by[id(calls[name][0][0])], name))
    calls.clear()
    originals = []
    for conv_name, norm_name in pairs:
        conv, norm = modules[conv_name], modules[norm_name]
        originals.append((conv, conv.weight, conv.bias, norm_name, norm))
        fused = torch.nn.utils.fuse_conv_bn_eval(conv, norm)
        conv.weight, conv.bias = fused.weight, fused.bias
        _replace(model, norm_name, nn.Identity())
    model.eval().requires_grad_(False)

    unchanged = _same(before, probe(model, layers, size=size))
    if unchanged:
        return len(pairs)
    for conv, weight, bias, norm_name, norm in originals:
        conv.weight, conv.bias = weight, bias
        _replace(model, norm_name, norm)
    print_log(
        f'Teacher {type(model).__name__}: folding its batch norms would change {list(layers)}, as some convolution is also '
        f'used without its batch norm; it runs unfolded, and slower.',
        logger='current',
        level=logging.WARNING,
    )
    return 0


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition('.')
    setattr(model.get_submodule(parent), child, module)
