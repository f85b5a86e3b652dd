"""A device that is none: its tensors are in the CPU's memory, and torch takes them for another device's.

What is left on the CPU by mistake, or waits for a copy, is found without a GPU.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from mmcv.utils import ext_loader
from mmengine.device import utils as device_of_mmengine
from mmengine.structures import instance_data
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from mmkd.errors import ConfigError
from mmkd.testing.device import INDEXING

ELSEWHERE = torch.device('lazy', 0)
"""Its name is that of a kind of which a build for CPUs has nothing, but whose gradients autograd computes where the CPU's are."""

COPYING = (torch.ops.aten._to_copy, torch.ops.aten.copy_, torch.ops.aten.copy)


@contextlib.contextmanager
def elsewhere() -> Iterator[torch.device]:
    """Inside it ``tensor.to(ELSEWHERE)`` and ``device=ELSEWHERE`` work, and what is computed there is what the CPU computes.

    As on CUDA, an operation on tensors of both devices is an error, but for a copy, for a CPU's tensor without dimensions
    beside elementwise others, and for an index that is on the CPU. mmcv's compiled operations take such tensors as well, and
    mmengine's Runner trains there. Autocast does nothing to them; saved ones are plain tensors.

    Yields:
        :data:`ELSEWHERE`.

    Raises:
        ConfigError: before torch 2.4.
        RuntimeError: at an operation on tensors of both devices; its traceback shows where.
    """
    if not hasattr(torch._C, '_only_lift_cpu_tensors'):
        raise ConfigError(f'mmkd.testing.elsewhere needs torch 2.4 or later, found {torch.__version__}')
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(device_of_mmengine, 'DEVICE', str(ELSEWHERE)))
        stack.enter_context(mock.patch.object(torch, 'autocast', _Autocast))
        stack.enter_context(mock.patch.object(torch, 'load', _load(torch.load)))
        # an InstanceData is indexed by these
        index = instance_data.IndexType | _Elsewhere
        stack.enter_context(mock.patch.object(instance_data, 'IndexType', index))
        compiled = ext_loader.load_ext('_ext', ['nms'])
        for name in dir(compiled):
            operation = getattr(compiled, name)
            if callable(operation) and not name.startswith('_'):
                stack.enter_context(mock.patch.object(compiled, name, _of_mmcv(name, operation)))
        # torch.tensor(..., device=ELSEWHERE) makes it on the CPU and copies it, which a mode sees
        before = torch._C._only_lift_cpu_tensors()
        stack.callback(torch._C._set_only_lift_cpu_tensors, before)
        torch._C._set_only_lift_cpu_tensors(True)
        stack.enter_context(_Mode())
        yield ELSEWHERE


class _Elsewhere(torch.Tensor):
    """A tensor that says it is elsewhere; ``here`` has its values."""

    here: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> '_Elsewhere':
        new = torch.Tensor._make_wrapper_subclass(
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            layout=here.layout,
            device=ELSEWHERE,
        )
        new.here = here
        return new

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(function, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().cpu().__reduce_ex__(protocol)

    # torch makes tensors of lists in an index where no mode sees it
    def __getitem__(self, index: Any) -> torch.Tensor:
        return super().__getitem__(_index(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_index(index), value)


class _Mode(TorchDispatchMode):
    """For operations on no tensor of elsewhere, such as those that make one."""

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(function, args, kwargs or {})


class _Autocast(torch.autocast):
    def __init__(self, device_type: str, *args: Any, **kwargs: Any):
        super().__init__('cpu' if device_type == ELSEWHERE.type else device_type, *args, **kwargs)


def _load(load: Callable) -> Callable:
    def call(file: Any, map_location: Any = None, **options: Any) -> Any:
        if not isinstance(map_location, (str, torch.device)) or torch.device(map_location).type != ELSEWHERE.type:
            return load(file, map_location, **options)
        return tree_map_only(torch.Tensor, lambda each: each.to(ELSEWHERE), load(file, 'cpu', **options))

    return call


def _index(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(_index(each) for each in index)
    return torch.tensor(index, device=ELSEWHERE) if isinstance(index, list) else index


def _here(tree: Any) -> Any:
    return tree_map_only(_Elsewhere, lambda each: each.here, tree)


def _there(tree: Any, known: dict[int, torch.Tensor]) -> Any:
    """As tensors of elsewhere; those that an operation changed and returned are the same objects as before."""
    return tree_map_only(torch.Tensor, lambda each: known[id(each)] if id(each) in known else _Elsewhere(each), tree)


def _run(function: Any, args: tuple, kwargs: dict) -> Any:
    tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)]
    there = [each for each in tensors if isinstance(each, _Elsewhere)]
    packet = function.overloadpacket
    if there and packet not in COPYING:
        left = [
            each
            for each in tensors
            if each.device.type == 'cpu' and (each.dim() or torch.Tag.pointwise not in function.tags)
        ]
        if left and not (packet in INDEXING and isinstance(args[0], _Elsewhere)):
            shapes = ', '.join(str(tuple(each.shape)) for each in left)
            raise RuntimeError(f'{function}: expected all tensors on {ELSEWHERE}, got {shapes} on the CPU')
    to_there = isinstance(args[0], _Elsewhere) if packet in COPYING and args else bool(there)
    if kwargs.get('device') is not None:
        to_there = torch.device(kwargs['device']).type == ELSEWHERE.type
        kwargs = kwargs | {'device': torch.device('cpu') if to_there else kwargs['device']}
    result = function(*_here(args), **_here(kwargs))
    return _there(result, {id(each.here): each for each in there}) if to_there else result


def _of_mmcv(name: str, operation: Callable) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
        tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)]
        there = [each for each in tensors if isinstance(each, _Elsewhere)]
        if there and len(there) < len(tensors):
            raise RuntimeError(f'{name}: expected all tensors on {ELSEWHERE}')
        result = operation(*_here(args), **_here(kwargs))
        return _there(result, {}) if there else result

    return run
