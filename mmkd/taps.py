"""Read what named layers of a model took in and put out during one forward pass."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from mmkd.classes import ClassMap
from mmkd.errors import ConfigError, nearest

INPUT = ':input'
LAST_INPUT = ':last_input'
KWARGS = ':kwargs'


class _Reached(BaseException):
    """Every tapped layer has been called: the rest of the forward pass is not needed. No model catches it."""


def find_layer(model: nn.Module, layer: str, whose: str = '') -> nn.Module:
    """The module that ``layer`` names, a dotted name with an optional ``:input``, ``:last_input`` or ``:kwargs`` at its end.

    Raises:
        ConfigError: if the model has no such module; the message has the nearest existing names.
    """
    if not isinstance(layer, str) or not layer:
        raise ConfigError(f"{whose}layer {layer!r}: expected a module's dotted name, such as 'neck'")
    name = layer.removesuffix(INPUT).removesuffix(LAST_INPUT).removesuffix(KWARGS)
    try:
        return model.get_submodule(name)
    except AttributeError:
        known = [each for each, _ in model.named_modules() if each and not each.startswith(('distillers', 'sources'))]
        raise ConfigError(
            f'{whose}layer {name!r}: {type(model).__name__} has no such module; the nearest are {nearest(name, known)}'
        ) from None


AnyTaps = TypeVar('AnyTaps', bound='Taps')


def names_of(layers: Any, of: str | None = None) -> tuple[str, ...]:
    """The names of layers, of one or several, as a tuple; where teachers differ, those of one teacher."""
    if isinstance(layers, Mapping):
        layers = layers.get(of, ())
    return (layers,) if isinstance(layers, str) else tuple(layers)


class Taps(Mapping):
    """The outputs of named layers, recorded while the ``with`` block runs.

    ``taps[layer]`` is always a tuple: the layer's output where that is a tuple or list already (an FPN's levels), a
    single output in a tuple of one, or one entry per call where the layer was called several times (a convolution that
    a head shares between levels). ``taps['name:input']`` holds what a layer takes in, in the same form: its one
    positional input, or a tuple of them; that of an activation that works in place is a copy. ``taps['name:last_input']``
    is that of its last call alone, for an activation that a block calls several times. ``taps['name:kwargs']`` holds its
    keyword inputs, a dict for each call. :meth:`per_call` gives one entry per call, however many there were. Half-precision
    tensors are handed out as float32, so that losses are computed in float32 whatever the autocast state.

    Args:
        model: The model to read from; also ``taps.model``, for its prior generator, coder or assigner.
        layers: Dotted names, as in ``model.get_submodule``, with ``:input``, ``:last_input`` or ``:kwargs`` appended for
            what a layer takes in.
        stop_after: How often each layer is called in a full forward pass. If given, the forward pass ends
            as soon as all layers have been called as often, and what comes after them is never run.
        images: How many images the forward pass is over, if that is known; also ``taps.images``.

    Raises:
        ConfigError: if a layer does not exist, or on reading one that was never called or whose tensor
            was changed in place after it was recorded.

    Example:
        >>> with Taps(detector, ['neck']) as taps:
        ...     detector.extract_feat(images)
        >>> p3, p4, p5, p6, p7 = taps['neck']
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[str],
        stop_after: Mapping[str, int] | None = None,
        images: int | None = None,
    ):
        self.model = model
        self.images = images
        self.classes: ClassMap | None = None
        """Which of the student's classes the model's are, where a teacher's are not the same; see ``mmkd.classes``."""
        self.scale = 1.0
        """The size of the images that the model saw, relative to the student's."""
        self._modules = {layer: find_layer(model, layer) for layer in layers}
        self._records: dict[str, list[tuple[Any, list[tuple[torch.Tensor, int]]]]] = {}
        self._read: dict[str, tuple] = {}
        self._stop_after = stop_after
        self._handles: list[Any] = []

    def __enter__(self: AnyTaps) -> AnyTaps:
        self._records = {layer: [] for layer in self._modules}
        self._read = {}
        self._handles = [self._register(layer, module) for layer, module in self._modules.items()]
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> bool:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        return kind is _Reached

    def _register(self, layer: str, module: nn.Module) -> Any:
        def before(module: nn.Module, inputs: tuple, kwargs: dict) -> None:
            value: Any = kwargs if layer.endswith(KWARGS) else inputs[0] if len(inputs) == 1 else inputs
            if getattr(module, 'inplace', False) is True:  # else what it puts out would be read
                value = _map(torch.Tensor.clone, value)
            if layer.endswith(LAST_INPUT) and self._records[layer]:
                self._records[layer][-1] = (None, [])  # counts as a call, and is not read
            self._record(layer, value)

        def after(module: nn.Module, inputs: tuple, output: Any) -> None:
            self._record(layer, output)

        if layer.endswith((INPUT, LAST_INPUT, KWARGS)):
            return module.register_forward_pre_hook(before, with_kwargs=True)
        return module.register_forward_hook(after)

    def _record(self, layer: str, value: Any) -> None:
        self._records[layer].append((value, [(each, each._version) for each in tensors(value)]))
        if self._stop_after is not None and self.calls == self._stop_after:
            raise _Reached

    @property
    def calls(self) -> dict[str, int]:
        """How often each layer was called."""
        return {layer: len(records) for layer, records in self._records.items()}

    def per_call(self, layer: str) -> tuple:
        """What a layer put out (or took in, with ``:input`` and ``:kwargs``), one entry for each call.

        With ``:last_input`` one entry.
        """
        if layer not in self._modules:
            raise ConfigError(f'layer {layer!r} is not tapped; tapped are {sorted(self._modules)}')
        records = self._records.get(layer, [])
        if not records:
            raise ConfigError(
                f'layer {layer!r} of {type(self.model).__name__} was never called in the forward pass; {self._advice(layer)}'
            )
        if layer.endswith(LAST_INPUT):
            records = records[-1:]
        if any(tensor._version != version for _, versions in records for tensor, version in versions):
            raise ConfigError(
                f'layer {layer!r} of {type(self.model).__name__}: its output is changed in place by a later module (an '
                f'activation with inplace=True, most likely); tap that module instead, or what it takes in, by '
                f"':input' behind its name"
            )
        if layer not in self._read:
            self._read[layer] = tuple(_map(_float32, value) for value, _ in records)
        return self._read[layer]

    def _advice(self, layer: str) -> str:
        if hasattr(self._modules[layer], 'conv_seg'):  # mmseg's heads call their own `forward`, not themselves
            return f"its parts are: tap '{layer}.conv_seg', not {layer!r}"
        return 'tap a module that is, such as a part of it'

    def __getitem__(self, layer: str) -> tuple:
        values = self.per_call(layer)
        return values[0] if len(values) == 1 and isinstance(values[0], tuple) else values

    def detach(self) -> 'Taps':
        """The same taps without gradient."""
        other = copy.copy(self)
        other._read = {}
        other._records = {
            layer: [(_map(torch.Tensor.detach, value), versions) for value, versions in records]
            for layer, records in self._records.items()
        }
        return other

    def __iter__(self):
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


def join(parts: Sequence[tuple[Sequence[int], Taps]]) -> Taps:
    """The taps of a batch, of parts of which a forward pass each was run.

    Args:
        parts: Which images of the batch a pass was over, and its taps.

    Raises:
        ConfigError: on reading a layer that puts out something else than a row for each image, which cannot be put in order.
    """
    if len(parts) == 1:
        return parts[0][1]
    order = [index for indices, _ in parts for index in indices]
    place = [order.index(index) for index in range(len(order))]
    joined = copy.copy(parts[0][1])
    joined.images, joined._read = len(order), {}
    joined._records = {}
    for layer in joined._modules:
        records = [taps._records[layer] for _, taps in parts]
        if len({len(each) for each in records}) > 1:
            continue  # called in a loss alone, or as often as there are objects: never called, says who reads it
        calls = []
        for each in zip(*records, strict=True):
            value = _join([value for value, _ in each], [len(indices) for indices, _ in parts], place, layer)
            calls.append((value, [pair for _, versions in each for pair in versions]))
        joined._records[layer] = calls
    return joined


def _join(values: Sequence[Any], images: Sequence[int], place: Sequence[int], layer: str) -> Any:
    first = values[0]
    if isinstance(first, torch.Tensor):
        if [len(each) if each.dim() else 0 for each in values] != list(images):
            raise ConfigError(
                f'layer {layer!r} puts out other rows than the images of a batch, which cannot be told apart where some images '
                f'have no labels; tap a layer that puts out a map of each image'
            )
        rows = [row for each in values for row in each.unbind(0)]
        return torch.stack([rows[index] for index in place])
    if isinstance(first, (tuple, list)):
        return tuple(_join(each, images, place, layer) for each in zip(*values, strict=True))
    if isinstance(first, dict):
        return {key: _join([each[key] for each in values], images, place, layer) for key in first}
    return first


def tensors(value: Any) -> Iterable[torch.Tensor]:
    """The tensors in a nest of tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from tensors(each)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


def _map(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """A nest with ``function`` applied to its tensors; lists become tuples."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        return tuple(_map(function, each) for each in value)
    if isinstance(value, dict):
        return {key: _map(function, each) for key, each in value.items()}
    return value


def _float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
