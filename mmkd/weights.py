"""Weights of a checkpoint: found or downloaded, read without executing anything in the file, loaded strictly."""

import os
from collections import OrderedDict
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from urllib.parse import urlparse

import torch
from mmengine.dist import barrier
from mmengine.utils import digit_version
from torch import nn

from mmkd.errors import ConfigError

NO_WEIGHTS = (
    "a teacher needs trained weights: give teacher=dict(config='...', checkpoint='/path/to/weights.pth'), or the name of "
    "a config whose metafile lists weights, such as 'mmdet::retinanet/retinanet_r101_fpn_2x_coco.py'"
)

OLD_TORCH = (
    '; torch < 2.6 reads no training checkpoints safely: save its state_dict alone'
    if digit_version(torch.__version__) < digit_version('2.6')
    else ''
)


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
    weights: Any = OrderedDict((name, tensor) for name, tensor in state.items() if not name.startswith('distillers.'))
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
