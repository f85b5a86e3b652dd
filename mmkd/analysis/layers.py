"""The layers of a model that can be tapped: what they put out, at which stride, and how often they are called."""

from dataclasses import dataclass

import torch
from torch import nn

from mmkd.errors import ConfigError
from mmkd.hosts.running import Probe, at_first_size, probe, sizes_to_probe
from mmkd.taps import tensors

BESIDE = ('data_preprocessor', 'distillers', 'sources')


@dataclass(frozen=True)
class Layer:
    """A module, as a tap sees it.

    Args:
        name: Dotted, as ``layer=`` takes it.
        kind: Its class.
        parameters: Their number.
        calls: How often it is called in a forward pass; 0 for what only a loss or a prediction calls.
        shapes: Of all tensors that it puts out for one image, in the order of the calls; without the batch's dimension.
        strides: For each of the maps among them the image's width over its own; None for what is no map.
        tappable: False where a later module changes its output in place.
    """

    name: str
    kind: str
    parameters: int
    calls: int
    shapes: tuple[tuple[int, ...], ...]
    strides: tuple[int | None, ...]
    tappable: bool

    @property
    def depth(self) -> int:
        return self.name.count('.') + 1


@dataclass(frozen=True)
class Survey:
    """All layers of a model.

    Args:
        size: Height and width of the image that it was run over.
        layers: In the order of the model's modules.
    """

    size: tuple[int, int]
    layers: tuple[Layer, ...]


def survey(model: nn.Module, size: tuple[int, int] | None = None) -> Survey:
    """Run a model over a random image and note what each of its modules puts out; its state stays as it is.

    Args:
        model: Of mmdet or mmseg.
        size: Height and width of the image; None: the smallest that the model runs over, 256 x 256 for most.

    Raises:
        CannotRun: with the model's own error.
    """
    modules = {name: each for name, each in model.named_modules() if name and name.partition('.')[0] not in BESIDE}

    def attempt(size: tuple[int, int]) -> tuple[tuple[int, int], Probe]:
        return size, probe(model, list(modules), size=size)

    size, taps = at_first_size(sizes_to_probe([model]) if size is None else [size], attempt)
    return Survey(size, tuple(_layer(name, each, taps, size) for name, each in modules.items()))


def _layer(name: str, module: nn.Module, taps: Probe, size: tuple[int, int]) -> Layer:
    calls, outputs, tappable = taps.calls[name], [], True
    if calls:
        try:
            outputs = list(tensors(taps.per_call(name)))
        except ConfigError:
            tappable = False
    return Layer(
        name,
        type(module).__name__,
        sum(each.numel() for each in module.parameters()),
        calls,
        tuple(tuple(each.shape[1:]) for each in outputs),
        tuple(_stride(each, size) for each in outputs),
        tappable,
    )


def _stride(output: torch.Tensor, size: tuple[int, int]) -> int | None:
    return round(size[1] / output.shape[3]) if output.dim() == 4 and output.shape[3] else None
