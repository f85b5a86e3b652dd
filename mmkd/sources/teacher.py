"""The teacher: a frozen model, built, loaded, fed with its own normalization and run as far as its taps reach."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
from mmengine.logging import print_log
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mmkd.errors import ConfigError
from mmkd.fold import fold_batch_norm
from mmkd.hosts.configs import read_teacher
from mmkd.hosts.running import run
from mmkd.normalize import Renormalize
from mmkd.taps import Taps
from mmkd.weights import NO_WEIGHTS, load_weights


class Teacher:
    """A frozen model that is learnt from.

    It is no ``nn.Module``, so nothing that walks over the student's modules finds it: it is in no ``parameters()``,
    ``state_dict()``, optimizer, DDP bucket or ``train()`` call. It is always in eval mode and never needs a gradient.

    Args:
        model: The model, without weights yet.
        checkpoint: File or URL of its weights. None is an error as soon as weights are needed, by :meth:`load`.
        dtype: ``'float16'`` or ``'bfloat16'`` to run it under autocast; None leaves that to the caller.

    Attributes:
        layers: What :meth:`__call__` taps.
        calls: How often a forward pass calls each layer; with it the pass ends at the last tapped one.
    """

    def __init__(self, model: nn.Module, checkpoint: str | None = None, dtype: str | None = None):
        if dtype not in (None, 'float16', 'bfloat16'):
            raise ConfigError(f"teacher.dtype={dtype!r}: expected 'float16', 'bfloat16' or None")
        self.model = model.eval().requires_grad_(False)
        self.checkpoint = checkpoint
        self.dtype = getattr(torch, dtype) if dtype else None
        self.layers: tuple[str, ...] = ()
        self.calls: dict[str, int] | None = None
        self.loaded = False
        self._renormalize: Renormalize | None = None

    def __deepcopy__(self, memo: dict) -> 'Teacher':
        return self  # an averaged copy of the student (EMA) learns from the same teacher

    def follow(self, student_preprocessor: nn.Module) -> None:
        """From now on the inputs are batches that the student's data preprocessor has normalised."""
        self._renormalize = Renormalize.between(student_preprocessor, self.model.data_preprocessor)

    def apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Move or convert all tensors, as ``nn.Module._apply`` does; called with the student's."""
        if not self.loaded:  # testing needs no teacher, on its device least of all
            return
        self.model._apply(function)
        if self._renormalize is not None:
            self._renormalize.apply(function)

    @torch.no_grad()
    def __call__(self, inputs: torch.Tensor, data_samples: list | None) -> Taps:
        """Taps of one forward pass over a batch that is normalised for the student, (B, 3, H, W)."""
        if not self.loaded:
            raise ConfigError(
                'teacher: its weights are not loaded yet; call init_weights() of the student before training'
            )
        if self._renormalize is not None:
            inputs = self._renormalize(inputs, data_samples)
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        autocast = torch.autocast(inputs.device.type, self.dtype) if self.dtype else nullcontext()
        with autocast, Taps(self.model, self.layers, self.calls) as taps:
            run(self.model, self.layers, inputs, data_samples)
        return taps

    def load(self, device: torch.device | str = 'cpu', then: Callable[[nn.Module], None] | None = None) -> None:
        """Load the weights, strictly, speed the model up and move it to the device.

        Args:
            device: Where to.
            then: Called with the model when it is loaded, before its batch norms are folded.

        Raises:
            ConfigError: if there is no checkpoint, it cannot be read safely, or it does not fit the model.
        """
        if self.loaded:
            return
        if self.checkpoint is None:
            raise ConfigError(f'teacher: no checkpoint for {type(self.model).__name__}; {NO_WEIGHTS}')
        load_weights(self.model, self.checkpoint)
        if then is not None:
            then(self.model)
        folded = self.speed_up(device)
        print_log(
            f'Teacher {type(self.model).__name__}: loaded {self.checkpoint}; it runs as far as {list(self.layers)}, '
            f'with {folded} batch norms folded into convolutions.',
            logger='current',
        )

    def speed_up(self, device: torch.device | str = 'cpu') -> int:
        """Make ready to run with the weights as they are: the exact speed-ups that a frozen model allows.

        Returns:
            The number of batch norms folded.
        """
        folded = fold_batch_norm(self.model, self.layers)
        self.loaded = True
        self.model.to(memory_format=torch.channels_last)
        self.apply(lambda tensor: tensor.to(device))
        return folded


def build_teacher(teacher: str | Mapping) -> Teacher:
    """Build a teacher, without weights; see :func:`read_teacher`."""
    config = read_teacher(teacher)
    with DefaultScope.overwrite_default_scope(config.scope):
        module = MODELS.build(config.model)
    return Teacher(module, config.checkpoint, config.dtype)
