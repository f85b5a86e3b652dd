"""The teacher: a frozen model, built, loaded, fed with its own normalization and run as far as its taps reach."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import nn

from mmkd.classes import class_map
from mmkd.data.views import check_name, views_of
from mmkd.errors import ConfigError
from mmkd.fold import accelerate, compile_parts
from mmkd.hosts.configs import build_model, read_teacher, teacher_classes
from mmkd.hosts.running import answering_layers, predict, run, scaled, scaled_samples
from mmkd.normalize import Normalize, Renormalize
from mmkd.registry import SOURCES
from mmkd.sources.source import Source
from mmkd.taps import Taps
from mmkd.values import is_number
from mmkd.weights import NO_WEIGHTS, load_weights


@SOURCES.register_module()
class Teacher(Source):
    """A frozen model that is learnt from.

    It is no ``nn.Module``, so nothing that walks over the student's modules finds it: it is in no ``parameters()``,
    ``state_dict()``, optimizer, DDP bucket or ``train()`` call. It is always in eval mode and never needs a gradient.

    Args:
        config: The name of a config whose metafile lists weights (``'mmdet::...'``), a path, a model's config, or a built
            model, which is copied and whose weights are taken as they are.
        checkpoint: File or URL of its weights. Default None: those of the metafile. No weights at all are an error as
            soon as they are needed, by :meth:`load`.
        dtype: ``'float16'`` or ``'bfloat16'`` to run it under autocast; None leaves that to the caller.
        classes: Which of its classes the student's are, by name or index, ``dict(car='vehicle')``, where they are not the
            same ones in the same order; the student's others learn nothing from it. None: they are the same.
        scale: Of its images, relative to the student's: 2.0 for twice the height and width, bilinear. Levels of both networks
            belong together where their maps are of one size. Default 1.
        view: The name of another image of the sample that it sees in place of the student's, ``'weak'`` or ``'thermal'``, which
            the pipeline keeps or loads (:mod:`mmkd.data.views`). Default None: it sees the student's.
        compile: Whether ``torch.compile`` speeds it up. Its first steps then take a minute or more. Default False.
        interval: See :class:`mmkd.sources.source.Source`, as ``begin`` and ``end``.
        begin: Default 0.
        end: Default None.

    Raises:
        ConfigError: for a config that is not there, or another dtype.
    """

    frozen = True

    def __init__(
        self,
        config: str | Mapping | nn.Module,
        checkpoint: str | None = None,
        dtype: str | None = None,
        classes: Mapping | None = None,
        scale: float = 1.0,
        view: str | None = None,
        compile: bool = False,
        interval: int = 1,
        begin: int = 0,
        end: int | None = None,
    ):
        super().__init__(interval, begin, end)
        if dtype not in (None, 'float16', 'bfloat16'):
            raise ConfigError(f"dtype={dtype!r}: expected 'float16', 'bfloat16' or None")
        if not (is_number(scale) and 0.1 <= scale <= 10):
            raise ConfigError(f'scale={scale!r}: expected a number from 0.1 to 10, of the size of the images')
        self.loaded = self._has_weights = False
        self._classes, self._named_by = classes, None
        self.scale, self.compiled = float(scale), compile
        self.view = None if view is None else check_name(view)
        if isinstance(config, nn.Module):
            model, self._has_weights = copy.deepcopy(config), checkpoint is None
        else:
            read = read_teacher(dict(config=config, checkpoint=checkpoint))
            self._named_by = config if isinstance(config, str) else None
            checkpoint = read.checkpoint
            model = build_model(read.model, read.scope, 'config')
        model.eval()  # of some models it returns None
        self.model = model.requires_grad_(False)
        self.checkpoint = checkpoint
        self.dtype = getattr(torch, dtype) if dtype else None
        self._channels_last = False
        self._renormalize: Renormalize | None = None
        self._normalize: Normalize | None = None

    def name_classes(self, student: Sequence[str] | None) -> None:
        if self._classes is not None:
            names = teacher_classes(self._named_by) if self._named_by else None
            self.classes = class_map(self._classes, student, names)

    def __deepcopy__(self, memo: dict) -> 'Teacher':
        return self  # an averaged copy of the student (EMA) learns from the same teacher

    def follow(self, preprocessor: nn.Module) -> None:
        self._renormalize = Renormalize.between(preprocessor, self.model.data_preprocessor)
        self._normalize = Normalize(self.model.data_preprocessor, preprocessor)

    def apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if not self.loaded:  # testing needs no teacher, on its device least of all
            return
        self.model._apply(function)
        if self._renormalize is not None:
            self._renormalize.apply(function)

    @torch.no_grad()
    def __call__(self, inputs: torch.Tensor, data_samples: list | None) -> Taps:
        """Taps of one forward pass over a batch that is normalized for the student, (B, 3, H, W)."""
        inputs = self._taken(inputs, data_samples)
        with self._precision(inputs), Taps(self.model, self.layers, self.calls, images=len(inputs)) as taps:
            run(self.model, self.layers, inputs, scaled_samples(data_samples, self.scale))
        return taps

    @torch.no_grad()
    def predict(self, student: nn.Module, inputs: torch.Tensor, data_samples: list) -> list:
        taken = self._taken(inputs, data_samples)
        with self._precision(taken):
            return predict(self.model, taken, scaled_samples(data_samples, self.scale) or [], inputs.shape[2:])

    def _taken(self, inputs: torch.Tensor, data_samples: list | None) -> torch.Tensor:
        if not self.loaded:
            raise ConfigError(
                f'{self.name}: its weights are not loaded yet; call init_weights() of the student, or load() of the '
                f'teacher, before training'
            )
        inputs = self.seen(inputs, data_samples)
        return inputs.contiguous(memory_format=torch.channels_last) if self._channels_last else inputs

    def _precision(self, inputs: torch.Tensor) -> AbstractContextManager:
        return torch.autocast(inputs.device.type, self.dtype) if self.dtype else nullcontext()

    def seen(self, inputs: torch.Tensor, data_samples: list | None) -> torch.Tensor:
        """A batch that is normalized for the student as the teacher sees it: of its view, normalization and scale."""
        if self.view is not None and self._normalize is not None:
            inputs = self._normalize(views_of(data_samples, self.view, self.name), inputs.shape[2:], inputs.device)
        elif self._renormalize is not None:
            inputs = self._renormalize(inputs, data_samples)
        if self.scale != 1:
            inputs = F.interpolate(inputs, scaled(inputs.shape[2:], self.scale), mode='bilinear', align_corners=False)
        return inputs

    def read(self, student: nn.Module, inputs: torch.Tensor, data_samples: list | None) -> tuple[Taps, dict]:
        return self(inputs, data_samples), {}

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
        if self.checkpoint is not None:
            load_weights(self.model, self.checkpoint)
        elif not self._has_weights:
            raise ConfigError(f'{self.name}: no checkpoint for {type(self.model).__name__}; {NO_WEIGHTS}')
        self.loaded_alone = then is None
        if then is not None:
            then(self.model)
        self._accelerate(
            device, f'loaded {self.checkpoint}' if self.checkpoint else 'its weights are those it came with'
        )

    def accept_current_weights(self, device: torch.device | str = 'cpu') -> None:
        """Take the weights as they are for the trained ones, random ones too: for measurements and tests."""
        self._accelerate(device, 'its weights are taken as they are')

    def _accelerate(self, device: torch.device | str, weights: str) -> None:
        answers = answering_layers(self.model) if self.labels else ()
        folded, self._channels_last = 0, False
        if answers is not None:  # else nobody could tell whether it still predicts the same
            layers = tuple(dict.fromkeys((*self.layers, *answers)))
            folded, self._channels_last = accelerate(self.model, layers, scaled(self.size, self.scale))
        if self.compiled:
            compile_parts(self.model, self.layers)
        self.loaded = True
        self.apply(lambda tensor: tensor.to(device))
        layout = '' if self._channels_last else ', in the layout of NCHW as channels_last would change its outputs'
        labels = ' and labels images' if self.labels else ''
        print_log(
            f'{self.name.capitalize()} {type(self.model).__name__}: {weights}; it runs as far as {list(self.layers)}{labels}, '
            f'with {folded} batch norms folded into convolutions{layout}.',
            logger='current',
        )
