"""The teacher: a frozen model, built, loaded, fed with its own normalisation and run as far as its taps reach."""

import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple
from urllib.parse import urlparse

import torch
from mmengine.config import Config, ConfigDict
from mmengine.dist import barrier
from mmengine.hub import get_config
from mmengine.logging import print_log
from mmengine.registry import MODELS, DefaultScope
from mmengine.utils import digit_version, is_installed
from torch import nn

from mmkd.errors import ConfigError
from mmkd.host import config_path
from mmkd.taps import Taps, probe, run, tensors

NO_WEIGHTS = (
    "a teacher needs trained weights: give teacher=dict(config='...', checkpoint='/path/to/weights.pth'), or the name of "
    "a config whose metafile lists weights, such as 'mmdet::retinanet/retinanet_r101_fpn_2x_coco.py'"
)

OLD_TORCH = (
    '; torch < 2.6 reads no training checkpoints safely: save its state_dict alone'
    if digit_version(torch.__version__) < digit_version('2.6')
    else ''
)


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
        self._renormalise: Renormalise | None = None

    def __deepcopy__(self, memo: dict) -> 'Teacher':
        return self  # an averaged copy of the student (EMA) learns from the same teacher

    def follow(self, student_preprocessor: nn.Module) -> None:
        """From now on the inputs are batches that the student's data preprocessor has normalised."""
        self._renormalise = Renormalise.between(student_preprocessor, self.model.data_preprocessor)

    def apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Move or convert all tensors, as ``nn.Module._apply`` does; called with the student's."""
        if not self.loaded:  # testing needs no teacher, on its device least of all
            return
        self.model._apply(function)
        if self._renormalise is not None:
            self._renormalise.apply(function)

    @torch.no_grad()
    def __call__(self, inputs: torch.Tensor, data_samples: list | None) -> Taps:
        """Taps of one forward pass over a batch that is normalised for the student, (B, 3, H, W)."""
        if not self.loaded:
            raise ConfigError(
                'teacher: its weights are not loaded yet; call init_weights() of the student before training'
            )
        if self._renormalise is not None:
            inputs = self._renormalise(inputs, data_samples)
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


class TeacherConfig(NamedTuple):
    """What a config says of its teacher."""

    model: ConfigDict
    checkpoint: str | None
    dtype: str | None
    scope: str | None


def read_teacher(teacher: str | Mapping) -> TeacherConfig:
    """Read a teacher's config, without building it.

    Args:
        teacher: The name of a config whose metafile lists weights (``'mmdet::...'``), or a dict with ``config`` (a
            name, a path or a model dict), ``checkpoint`` (path or URL) and, if wanted, ``dtype``.
    """
    options = {'config': teacher} if isinstance(teacher, str) else dict(teacher)
    unknown = set(options) - {'config', 'checkpoint', 'dtype'}
    if unknown or 'config' not in options:
        raise ConfigError(
            f"teacher={options!r}: expected a config's name, or a dict with config, checkpoint and, if wanted, dtype"
        )
    config, published = _read_config(options['config'])
    return TeacherConfig(
        plain_model(config), options.get('checkpoint') or published, options.get('dtype'), config.get('default_scope')
    )


def plain_model(config: Config) -> ConfigDict:
    """The model that a config trains, without what distills it: of a distilled model, its student."""
    model = config.model.get('student', config.model)
    if config.get('data_preprocessor') and 'data_preprocessor' not in model:  # where mmseg has it, as Runner does
        model.data_preprocessor = config.data_preprocessor
    return model


def build_teacher(teacher: str | Mapping) -> Teacher:
    """Build a teacher, without weights; see :func:`read_teacher`."""
    config = read_teacher(teacher)
    with DefaultScope.overwrite_default_scope(config.scope):
        module = MODELS.build(config.model)
    return Teacher(module, config.checkpoint, config.dtype)


def _read_config(config: str | Mapping) -> tuple[Config, str | None]:
    """The config and the URL of the weights that its metafile lists, if any."""
    if isinstance(config, Mapping):
        return Config(dict(model=ConfigDict(config))), None
    package, found, _ = config.partition('::')
    if found and package == 'mmkd':
        return Config.fromfile(config_path(config)), None
    if found:
        if not is_installed({'mmseg': 'mmsegmentation'}.get(package, package)) and not is_installed(package):
            raise ConfigError(f'teacher config {config}: package {package!r} is not installed')
        try:
            read = get_config(config, pretrained=True)
        except (AssertionError, FileNotFoundError):  # no weights in its metafile, or no such config
            try:
                read = get_config(config)
            except FileNotFoundError:
                raise ConfigError(f'teacher config {config}: {package} has no such config') from None
        return read, read.get('model_path')
    if not Path(config).expanduser().is_file():
        raise ConfigError(f'teacher config {config}: no such file (looked in {Path.cwd()})')
    return Config.fromfile(Path(config).expanduser()), None


class Renormalise:
    """Turn a batch that one data preprocessor normalised into what another would have made of it.

    ``x * scale + shift`` per channel, channels swapped where the two orders differ, padding set to the target's
    padding value again.
    """

    def __init__(self, scale: torch.Tensor, shift: torch.Tensor, swap: bool, pad_value: float):
        self.scale, self.shift, self.swap, self.pad_value = scale, shift, swap, pad_value

    @classmethod
    def between(cls, source: nn.Module, target: nn.Module) -> 'Renormalise | None':
        """None where both normalise alike."""
        (mean_s, std_s, swap_s), (mean_t, std_t, swap_t) = _normalisation(source), _normalisation(target)
        swap = swap_s != swap_t
        if swap:  # the source's values, in the target's channel order
            mean_s, std_s = mean_s.flip(0), std_s.flip(0)
        pads = [
            float(getattr(each, 'pad_value', getattr(each, 'pad_val', 0))) for each in (source, target)
        ]  # mmseg: pad_val
        if not swap and torch.equal(mean_s, mean_t) and torch.equal(std_s, std_t) and pads[0] == pads[1]:
            return None
        return cls(std_s / std_t, (mean_s - mean_t) / std_t, swap, pads[1])

    def apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.scale, self.shift = function(self.scale), function(self.shift)

    def __call__(self, inputs: torch.Tensor, data_samples: list | None) -> torch.Tensor:
        if self.swap:
            inputs = inputs.flip(1)
        inputs = inputs * self.scale + self.shift
        for image, sample in zip(inputs, data_samples or ()):
            height, width = sample.metainfo.get('img_shape', inputs.shape[2:])[:2]
            image[:, height:] = self.pad_value
            image[:, :, width:] = self.pad_value
        return inputs


def _normalisation(preprocessor: nn.Module) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Mean and standard deviation, (3, 1, 1), and whether the channels of the loaded image are swapped."""
    # mmengine and mmdet keep the flag private, mmseg does not
    swap = getattr(preprocessor, '_channel_conversion', getattr(preprocessor, 'channel_conversion', False))
    if getattr(preprocessor, '_enable_normalize', False):
        mean, std = preprocessor.mean.reshape(-1, 1, 1), preprocessor.std.reshape(-1, 1, 1)
        return mean.expand(3, 1, 1).cpu(), std.expand(3, 1, 1).cpu(), bool(swap)
    return torch.zeros(3, 1, 1), torch.ones(3, 1, 1), bool(swap)


def fetch(checkpoint: str, what: str = 'teacher checkpoint') -> Path:
    """The local file of a checkpoint; a URL is downloaded once, by one process of each machine.

    Raises:
        ConfigError: if the file is not there, or cannot be downloaded.
    """
    if urlparse(checkpoint).scheme not in ('http', 'https'):
        path = Path(checkpoint).expanduser()
        if not path.is_file():
            raise ConfigError(f'{what} {path}: no such file (looked in {Path.cwd()}); {NO_WEIGHTS}')
        return path
    folder = Path(torch.hub.get_dir()) / 'checkpoints'
    path = folder / Path(urlparse(checkpoint).path).name
    failure = ''
    if not path.is_file() and int(os.environ.get('LOCAL_RANK', 0)) == 0:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            digest = torch.hub.HASH_REGEX.search(path.name)
            torch.hub.download_url_to_file(checkpoint, str(path), digest[1] if digest else None)
        except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: the hash in its name is another
            failure = f' ({error})'
    barrier()
    if not path.is_file():
        raise ConfigError(
            f'{what} {checkpoint}: could not be downloaded{failure}; put the file at {path}, or point to '
            f"another with --cfg-options model.teacher.config='...' model.teacher.checkpoint='...'; to try mmkd without "
            f'any download: make demo'
        )
    return path


def read_checkpoint(path: Path, what: str = 'teacher checkpoint') -> dict[str, torch.Tensor]:
    """The weights in a checkpoint file, read without executing anything in it.

    Adapters of a teacher that was distilled itself are left out.

    Raises:
        ConfigError: if the file is damaged, holds more than data, or holds no weights.
    """
    try:
        content = torch.load(path, map_location='cpu', weights_only=True)
    except UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if 'GLOBAL' in line), first_line(error))
        raise ConfigError(
            f'{what} {path}: refused, it is damaged or holds code instead of weights alone ({reason.strip()}){OLD_TORCH}'
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ConfigError(f'{what} {path}: cannot be read, it may be truncated ({first_line(error)})') from None
    state = content.get('state_dict', content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not state or not all(isinstance(each, torch.Tensor) for each in state.values()):
        raise ConfigError(f"{what} {path}: holds no weights (expected a dict of tensors, or 'state_dict')")
    weights = OrderedDict((name, tensor) for name, tensor in state.items() if not name.startswith('distillers.'))
    if hasattr(state, '_metadata'):  # each module's version, by which it converts older weights
        weights._metadata = state._metadata
    return weights


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def load_weights(model: nn.Module, checkpoint: str, what: str = 'teacher checkpoint') -> None:
    """Load a checkpoint into a model; every weight has to fit.

    Raises:
        ConfigError: with the names that are missing, unexpected or of another shape.
    """
    path = fetch(checkpoint, what)
    state = read_checkpoint(path, what)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError:
        own = model.state_dict()
        differences = {
            'missing': [name for name in own if name not in state],
            'unexpected': [name for name in state if name not in own],
            'of another shape': [
                f'{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}'
                for name in own
                if name in state and state[name].shape != own[name].shape
            ],
        }
        found = '; '.join(
            f'{len(names)} {kind} ({", ".join(names[:3])}{", ..." if len(names) > 3 else ""})'
            for kind, names in differences.items()
            if names
        )
        raise ConfigError(
            f'{what} {path} does not fit {type(model).__name__}: {found}; give the config it was trained with'
        ) from None


@torch.no_grad()
def fold_batch_norm(model: nn.Module, layers: Sequence[str] = ()) -> int:
    """Fold each batch norm of a frozen model into the convolution whose output it takes.

    The pairs are read off a forward pass, not guessed from the order of definition: a batch norm is folded if
    its input is the very tensor that a convolution put out, and neither is called more than once. Layers that are
    tapped keep their own output. The tapped outputs are compared before and after.

    Returns:
        The number of batch norms folded; 0, with a warning, if that would change the outputs by more than rounding.
    """
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm)
    modules = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    calls: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in modules}

    def record(name: str):
        return lambda module, inputs, output: calls[name].append((inputs[0], output))

    handles = [module.register_forward_hook(record(name)) for name, module in modules.items()]
    before = probe(model, layers)
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

    after = probe(model, layers)
    unchanged = all(
        torch.allclose(old, new, rtol=1e-3, atol=1e-3 * float(old.abs().amax().clamp(min=1e-6)))
        for layer in layers
        for old, new in zip(tensors(before[layer]), tensors(after[layer]), strict=True)
    )
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
