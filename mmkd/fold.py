"""What makes a frozen model faster without changing what it puts out."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from mmengine.logging import print_log
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from mmkd.errors import ConfigError
from mmkd.hosts.running import CannotRun, Probe, probe
from mmkd.taps import INPUT, Taps, tensors

BATCH = 2
"""Images per probe: for a single one some operations accept a layout that they refuse for several."""
LAYOUT_BOUND = ('mmcv.ops.deform_conv', 'mmcv.ops.modulated_deform_conv')
"""Where modules are from whose kernels read memory as NCHW, whatever the strides say."""


class Pair(NamedTuple):
    """A convolution and the batch norm that takes in what it puts out."""

    conv: nn.Conv2d
    norm: _BatchNorm


class Pass(NamedTuple):
    """What a forward pass over an image of noise showed."""

    taps: Probe
    called: set[nn.Module]
    """The modules that were called."""
    pairs: list[Pair]


@torch.no_grad()
def accelerate(model: nn.Module, layers: Sequence[str], size: tuple[int, int]) -> tuple[int, bool]:
    """Fold a frozen model's batch norms and lay its weights out in ``channels_last``, where neither changes the layers' outputs.

    Only what is run for these layers is changed. A model that draws random numbers in eval mode is named in the log.

    Args:
        model: The model, with its weights.
        layers: What must stay as it is.
        size: Height and width of an image that it runs over.

    Returns:
        The number of batch norms folded, and whether the layout is ``channels_last``; then its inputs have to be, too.

    Raises:
        ConfigError: if the model puts out values that are not finite.
    """
    first = _observe(model, layers, size)
    for layer in first.taps:
        if not all(torch.isfinite(each).all() for each in tensors(first.taps[layer])):
            raise ConfigError(
                f'layer {layer!r} of {type(model).__name__} puts out values that are not finite for an image of noise: its '
                f'weights are damaged, or not its own'
            )
    if first.taps.random:
        print_log(
            f'Teacher {type(model).__name__}: it draws random numbers in eval mode as well, so what it puts out for an image '
            f'is another each time.',
            logger='current',
            level=logging.WARNING,
        )
    folded, taps = _fold(model, first, layers, size)
    return folded, _lay_out_channels_last(model, first.called, taps, layers, size)


def compile_parts(model: nn.Module, layers: Sequence[str]) -> None:
    """``torch.compile`` a model's backbone and neck, as far as they are run for ``layers``.

    Raises:
        ConfigError: for a layer inside of one, which could not be read any more.
    """
    for name in ('backbone', 'neck'):
        part = getattr(model, name, None)
        if part is None:
            continue
        inside = [layer for layer in layers if layer.startswith(f'{name}.')]
        if inside:
            raise ConfigError(
                f'compile=True: layer {inside[0]!r} is inside of what is compiled and could not be read; read {name!r} as a '
                f'whole, or leave compile out'
            )
        # `forward`: the taps' hooks on the part itself stay outside of what is compiled
        part.forward = torch.compile(type(part).forward.__get__(part))


@torch.no_grad()
def fold_batch_norm(model: nn.Module, layers: Sequence[str] = (), size: tuple[int, int] = (256, 256)) -> int:
    """Fold each batch norm of a frozen model into the convolution whose output it takes.

    The pairs are read off a forward pass, not guessed from the order of definition: a batch norm is folded if
    its input is the very tensor that a convolution put out, nothing else takes that in, and neither is called more
    than once. Layers that are tapped keep their own output. The tapped outputs are compared before and after.

    Returns:
        The number of batch norms folded; 0, with a warning, if that would change the outputs by more than rounding.
    """
    return _fold(model, _observe(model, layers, size), layers, size)[0]


def _observe(model: nn.Module, layers: Sequence[str], size: tuple[int, int]) -> Pass:
    _freeze(model)
    calls: dict[nn.Module, list[tuple[Any, Any]]] = {module: [] for module in model.modules()}

    def record(module: nn.Module, inputs: tuple, output: Any) -> None:
        kept = bool(inputs) and isinstance(module, (nn.Conv2d, _BatchNorm))
        calls[module].append((inputs[0], output) if kept else (None, None))

    with _removed([module.register_forward_hook(record) for module in calls]):
        taps = probe(model, layers, BATCH, size)
    names = {module: name for name, module in model.named_modules()}
    once = {module: called[0] for module, called in calls.items() if len(called) == 1}
    made_by = {
        id(output): module
        for module, (_, output) in once.items()
        if type(module) is nn.Conv2d and names[module] not in layers
    }
    pairs = [
        Pair(made_by[id(taken)], module)
        for module, (taken, _) in once.items()
        if isinstance(module, _BatchNorm) and module.running_var is not None
        if id(taken) in made_by and names[module] + INPUT not in layers
    ]
    return Pass(taps, {module for module, called in calls.items() if called}, pairs)


def _fold(model: nn.Module, first: Pass, layers: Sequence[str], size: tuple[int, int]) -> tuple[int, Probe]:
    """The number of batch norms folded, and what the layers put out then."""
    pairs = _taken_by_norm_alone(model, first.pairs, first.taps, layers, size)
    originals = [(conv, conv.weight, conv.bias) for conv, _ in pairs]
    for conv, norm in pairs:
        fused = torch.nn.utils.fuse_conv_bn_eval(conv, norm)
        conv.weight, conv.bias = fused.weight, fused.bias
    identities: dict[nn.Module, nn.Module] = {norm: nn.Identity() for _, norm in pairs}
    _replace(model, identities)
    _freeze(model)
    taps = probe(model, layers, BATCH, size)
    if _same(first.taps, taps):
        return len(pairs), taps
    for conv, weight, bias in originals:
        conv.weight, conv.bias = weight, bias
    _replace(model, {identity: norm for norm, identity in identities.items()})
    print_log(
        f'Teacher {type(model).__name__}: folding its batch norms would change {list(layers)}; it runs unfolded, and slower.',
        logger='current',
        level=logging.WARNING,
    )
    return 0, first.taps


def _taken_by_norm_alone(
    model: nn.Module, pairs: list[Pair], before: Taps, layers: Sequence[str], size: tuple[int, int]
) -> list[Pair]:
    """The pairs in which nothing but the batch norm takes in what the convolution puts out.

    Convolutions hand out NaN, and their batch norms alone are given the true output. Where that changes what the layers
    put out, each half of the pairs is tried.
    """
    if not pairs or _same_if_hidden(model, pairs, before, layers, size):
        return pairs
    if len(pairs) == 1:
        return []
    half = len(pairs) // 2
    return [
        pair
        for part in (pairs[:half], pairs[half:])
        for pair in _taken_by_norm_alone(model, part, before, layers, size)
    ]


def _same_if_hidden(
    model: nn.Module, pairs: Sequence[Pair], before: Taps, layers: Sequence[str], size: tuple[int, int]
) -> bool:
    hidden: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def hide(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        shown = torch.full_like(output, torch.nan)
        hidden[id(shown)] = shown, output
        return shown

    def reveal(module: nn.Module, inputs: tuple) -> torch.Tensor:
        return hidden[id(inputs[0])][1]

    handles = [conv.register_forward_hook(hide) for conv, _ in pairs]
    handles += [norm.register_forward_pre_hook(reveal) for _, norm in pairs]
    with _removed(handles):
        try:
            return _same(before, probe(model, layers, BATCH, size))
        except CannotRun:  # an operation that refuses NaN
            return False


def _lay_out_channels_last(
    model: nn.Module, called: Iterable[nn.Module], before: Taps, layers: Sequence[str], size: tuple[int, int]
) -> bool:
    """Whether it is done; not where that would change outputs, nor where operations of the model refuse it.

    Modules that are not called for the layers keep their layout: those of a second stage, say, which runs on regions.
    """
    if any(type(module).__module__ in LAYOUT_BOUND for module in called):
        return False
    _lay_out(called, torch.channels_last)
    try:
        if _same(before, probe(model, layers, BATCH, size, memory_format=torch.channels_last)):
            return True
    except CannotRun:
        pass  # it did run before, so it is the layout that it refuses
    _lay_out(called, torch.contiguous_format)
    return False


def _lay_out(modules: Iterable[nn.Module], layout: torch.memory_format) -> None:
    for module in modules:
        for parameter in module.parameters(recurse=False):
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=layout)


def _same(before: Taps, after: Taps) -> bool:
    return all(
        old.shape == new.shape and _close(old.float(), new.float())
        for layer in before
        for old, new in zip(tensors(before[layer]), tensors(after[layer]), strict=True)
    )


def _close(old: torch.Tensor, new: torch.Tensor) -> bool:
    largest = float(old.abs().amax()) if old.numel() else 0.0
    return torch.allclose(old, new, rtol=1e-3, atol=1e-3 * max(largest, 1e-6))


def _freeze(model: nn.Module) -> None:
    model.eval()  # of some models it returns None
    model.requires_grad_(False)


def _replace(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Wherever a module is registered: heads give one to several levels, and some under two names."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]


@contextmanager
def _removed(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
