"""To compare two devices, and to find out whether the host waits for one."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_, torch.ops.aten._index_put_impl_)


class RandomOnCPU(TorchFunctionMode):
    """Random tensors are drawn on the CPU, wherever they are wanted, so that two devices see the same ones."""

    DRAWN = (torch.rand, torch.randn, torch.randint, torch.randperm)

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if function not in self.DRAWN:
            return function(*args, **kwargs)
        device = kwargs.pop('device', None)
        return function(*args, **kwargs).to(device or 'cpu')


class NoWaiting:
    """Inside it an operation for which the host waits for the device is an error.

    On CUDA that is :func:`torch.cuda.set_sync_debug_mode`, which sees copies to the host and from memory that is not
    pinned, and operations whose result's size the host has to know; it holds in the backward pass too. On a CPU, where
    nothing is waited for, it refuses the operations that would: those whose output's shape, or whose value on the host,
    depends on values. Copies are seen where tensors are :mod:`mmkd.testing.elsewhere`.

    Args:
        device: Where the tensors are.

    Raises:
        RuntimeError: at such an operation; its traceback shows where.
    """

    def __init__(self, device: torch.device):
        self.mode = _NoHostReads() if device.type != 'cuda' else None
        self._before = 0

    def __enter__(self) -> 'NoWaiting':
        if self.mode is not None:
            self.mode.__enter__()
        else:
            self._before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode('error')
        return self

    def __exit__(self, *error: Any) -> None:
        if self.mode is not None:
            self.mode.__exit__(*error)
        else:
            torch.cuda.set_sync_debug_mode(self._before)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Waiting is allowed for a while: in code of others that does."""
        if self.mode is not None:
            self.mode.refuses = False
        else:
            torch.cuda.set_sync_debug_mode(self._before)
        try:
            yield
        finally:
            if self.mode is not None:
                self.mode.refuses = True
            else:
                torch.cuda.set_sync_debug_mode('error')


class _NoHostReads(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.refuses = True

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self.refuses and (_reads_values(function, args) or _copies(function, args, kwargs)):
            raise RuntimeError(f'called an operation that waits for the device: {function}')
        return function(*args, **kwargs)


def _reads_values(function: Any, args: tuple) -> bool:
    if function.overloadpacket in INDEXING:
        # their shape depends on values where an index is a mask
        return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1])
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(function.tags))


def _copies(function: Any, args: tuple, kwargs: dict) -> bool:
    """Whether the host waits for a copy from one device to another."""
    packet = function.overloadpacket
    if packet in INDEXING:
        return any(each is not None and each.device != args[0].device for each in args[1])
    if packet is torch.ops.aten.copy_:
        return args[0].device != args[1].device and not (kwargs.get('non_blocking') or True in args[2:])
    if packet is torch.ops.aten._to_copy and kwargs.get('device') is not None:
        return args[0].device.type != torch.device(kwargs['device']).type and not kwargs.get('non_blocking')
    return False
