"""Weights of a checkpoint: found or downloaded, read without executing anything in the file, loaded strictly."""

import os
import re
import socket
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from urllib.parse import urlparse

import torch
from mmengine.dist import barrier
from mmengine.runner import CheckpointLoader
from mmengine.utils import digit_version
from torch import nn

from mmkd.errors import ConfigError
from mmkd.hosts.mmengine import NAMED, weights_address

# what the state of a distilled student holds beside the plain model's
BESIDE = ('distillers.', 'sources.')
NO_WEIGHTS = (
    "a teacher needs trained weights: give teacher=dict(config='...', checkpoint='/path/to/weights.pth'), or the name of "
    "a config whose metafile lists weights, such as 'mmdet::retinanet/retinanet_r101_fpn_2x_coco.py'"
)

OLD_TORCH = (
    '; torch < 2.6 reads no training checkpoints safely: save its state_dict alone'
    if digit_version(torch.__version__) < digit_version('2.6')
    else ''
)

_trusted = False
PATIENCE = 60  # seconds that a server may say nothing

ELSEWHERE = (
    "point to another with --cfg-options model.teacher.config='...' model.teacher.checkpoint='...'; to try mmkd without any "
    'download: make demo'
)


def fetch(
    checkpoint: str,
    what: str = 'teacher checkpoint',
    missing: str = NO_WEIGHTS,
    unreachable: str = ELSEWHERE,
    looked_in: Sequence[Path] = (),
) -> Path:
    """The local file of a checkpoint; a URL is downloaded once, by one process of each machine.

    Args:
        checkpoint: A path, a URL, or a name of mmengine's such as ``torchvision://resnet50``.
        what: What the checkpoint is for; errors begin with it.
        missing: What to do about a path that is not there, for the error.
        unreachable: What to do about a URL that cannot be downloaded, beside putting the file in its place.
        looked_in: The folders in which a relative path was looked for, for the error. Default: the current one.

    Raises:
        ConfigError: if the file is not there, or cannot be downloaded.
    """
    try:
        address = weights_address(checkpoint)
    except ConfigError as error:
        raise ConfigError(f'{what} {error}') from None
    if urlparse(address).scheme not in ('http', 'https'):
        path = Path(address).expanduser()
        if not path.is_file():
            places = ' and '.join(str(folder.absolute()) for folder in looked_in or [Path.cwd()])
            raise ConfigError(f'{what} {path}: no such file (looked in {places})' + (f'; {missing}' if missing else ''))
        return path
    address = mirrored(address)
    folder = Path(torch.hub.get_dir()) / 'checkpoints'
    path = folder / Path(urlparse(address).path).name
    failure = ''
    if not path.is_file() and int(os.environ.get('LOCAL_RANK', 0)) == 0:
        try:
            _download(address, path)
        except (OSError, HTTPException, RuntimeError, ConfigError) as error:  # a hash that differs is the third
            failure = f' ({error})'
    barrier()
    if not path.is_file():
        source = '' if address == checkpoint else f' from {address}'
        raise ConfigError(
            f'{what} {checkpoint}: could not be downloaded{source}{failure}; put the file at {path}, or {unreachable}'
        )
    return path


def _download(address: str, path: Path) -> None:
    """Download a file under another name, and give it its own when its hash is right and it can be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'{path.name}.{os.getpid()}.part')
    digest = torch.hub.HASH_REGEX.search(path.name)
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        torch.hub.download_url_to_file(address, str(part), digest[1] if digest else None)
        read_file(part, 'what was downloaded,')
        part.replace(path)
    finally:
        socket.setdefaulttimeout(patience)
        part.unlink(missing_ok=True)


def mirrored(address: str) -> str:
    """A URL in the place that the environment's ``MMKD_MIRRORS`` has for it.

    These are pairs ``https://download.openmmlab.com/=https://mirror.example.org/openmmlab/``, separated by spaces, of the
    beginnings of URLs.

    Raises:
        ConfigError: for what is no such pair.
    """
    for pair in os.environ.get('MMKD_MIRRORS', '').split():
        original, found, mirror = pair.partition('=')
        if not found or '://' not in original or '://' not in mirror:
            raise ConfigError(f'MMKD_MIRRORS={pair}: expected https://...=https://..., the beginnings of two URLs')
        if address.startswith(original):
            return mirror + address.removeprefix(original)
    return address


def fetchable(checkpoint: str) -> bool:
    """Whether :func:`fetch` can say where a checkpoint is; what mmengine's other file backends have, it cannot."""
    return '://' not in checkpoint or checkpoint.startswith(('http://', 'https://', *NAMED))


def trust_checkpoints() -> None:
    """Read all checkpoints from here on with pickle's full powers; what is in them may run code."""
    global _trusted
    _trusted = True


def read_file(path: Path, what: str = 'teacher checkpoint', map_location: Any = 'cpu') -> object:
    """The content of a checkpoint file, read without executing anything in it.

    Raises:
        ConfigError: if the file is damaged, or holds more than data.
    """
    if not path.is_file():  # a folder, or a pipe, which would be waited for
        raise ConfigError(f'{what} {path}: is not a file')
    try:
        _check_archive(path)
        return torch.load(path, map_location=map_location, weights_only=not _trusted)
    except UnpicklingError as error:
        code = re.search('(?:GLOBAL|Unsupported class) ([^ ]+)', str(error))  # the latter before torch 2.4
        if code is None:
            raise ConfigError(f'{what} {path}: is no checkpoint of PyTorch, or damaged ({_reason(error)})') from None
        raise ConfigError(
            f'{what} {path}: refused, it holds code instead of weights alone ({code[1]}); if you trust where it comes from, '
            f'--trust-checkpoint reads it all the same, and runs what is in it{OLD_TORCH}'
        ) from None
    except Exception as error:  # whatever a damaged file makes torch raise
        raise ConfigError(f'{what} {path}: cannot be read, it may be truncated ({_reason(error)})') from None


def _reason(error: Exception) -> str:
    """What torch found in a file, without its advice to read it unchecked."""
    advice = ('weights_only', 'PyTorch 2.6', 'trusted source', 'Weights only load failed', 'internal miniz')
    sentences = re.split(r'(?<=\.)\s+|\n+', str(error) or type(error).__name__)
    told = [each.strip() for each in sentences if each.strip() and not any(word in each for word in advice)]
    return told[0] if told else 'its format cannot be read safely'


def _check_archive(path: Path) -> None:
    """Refuse archives that grow when they are read; torch itself writes nothing compressed.

    Raises:
        ValueError: with the reason.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        packed = next((each for each in archive.infolist() if each.compress_type != zipfile.ZIP_STORED), None)
        declared = sum(each.file_size for each in archive.infolist())
    if packed is not None:
        raise ValueError(f'its entry {packed.filename} is compressed')
    if declared > path.stat().st_size:
        raise ValueError(f'its entries claim {declared} bytes and the file has {path.stat().st_size}')


def load_from_file(filename: str, map_location: Any = None) -> object:
    """:func:`fetch` and :func:`read_file` in the place of mmengine's own loaders; see :func:`read_safely`."""
    what = 'checkpoint'
    content = read_file(fetch(filename, what, missing='', unreachable='name another'), what, map_location)
    meta = content.get('meta') if isinstance(content, dict) else None
    if isinstance(meta, dict) and not _trusted:
        meta.pop('config', None)  # mmengine runs this text as Python when a training is resumed; it writes none itself
    return content


def read_safely() -> None:
    """Have mmengine read whatever it loads from files and addresses as :func:`read_file` does.

    Its own loaders unpickle without a check what comes from an address, and on torch < 2.6 all.
    """
    schemes = ['', 'http://', 'https://', *NAMED]
    CheckpointLoader.register_scheme(prefixes=schemes, loader=load_from_file, force=True)


def plain_weights(
    content: object, path: Path, what: str = 'teacher checkpoint', source: str | None = None
) -> dict[str, torch.Tensor]:
    """The plain model's weights in what :func:`read_file` read, without the adapters and sources of a student.

    With ``source`` those of the source of this name that is stored with a student, such as a peer.

    Raises:
        ConfigError: if there are none.
    """
    state = content.get('state_dict', content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not state or not all(isinstance(each, torch.Tensor) for each in state.values()):
        raise ConfigError(f"{what} {path}: holds no weights (expected a dict of tensors, or 'state_dict')")
    if source is not None:
        state = _of_source(state, source, f'{what} {path}')
    weights: Any = OrderedDict((name, tensor) for name, tensor in state.items() if not name.startswith(BESIDE))
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ConfigError(
                f'{what} {path}: {name} holds NaN or infinite values; take a checkpoint from before they arose'
            )
    if hasattr(state, '_metadata'):  # each module's version, by which it converts older weights
        weights._metadata = state._metadata
    return weights


def _of_source(state: dict, source: str, where: str) -> Any:
    """The part of a student's state that is a source's model."""
    prefix = f'sources.{source}.model.'
    found: Any = OrderedDict(
        (name.removeprefix(prefix), tensor) for name, tensor in state.items() if name.startswith(prefix)
    )
    if not found:
        raise ConfigError(f'{where}: holds nothing of a source {source!r}; take a checkpoint of a training that had it')
    versions = getattr(state, '_metadata', {})
    found._metadata = {
        f'{name}.'.removeprefix(prefix).rstrip('.'): each
        for name, each in versions.items()
        if f'{name}.'.startswith(prefix)
    }
    return found


def read_checkpoint(path: Path, what: str = 'teacher checkpoint') -> dict[str, torch.Tensor]:
    """The plain model's weights in a checkpoint file; see :func:`read_file` and :func:`plain_weights`."""
    return plain_weights(read_file(path, what), path, what)


def dataset_meta(content: object) -> dict:
    """What a checkpoint says of the data it was trained on, such as ``classes`` and ``palette``; may be empty."""
    meta = content.get('meta') if isinstance(content, dict) else None
    if not isinstance(meta, dict):
        return {}
    if isinstance(meta.get('dataset_meta'), dict):
        return meta['dataset_meta']
    return {key.lower(): meta[key] for key in ('CLASSES', 'PALETTE') if meta.get(key)}  # before mmdet 3 and mmseg 1


def load_weights(
    model: nn.Module,
    checkpoint: str,
    what: str = 'teacher checkpoint',
    advice: str = 'give the config it was trained with',
    source: str | None = None,
) -> None:
    """Load a checkpoint into a model; every weight has to fit.

    Adapters and sources of a distilled student are neither loaded nor missed. With ``source`` the weights are those of
    its source of this name.

    Raises:
        ConfigError: with the names that are missing, unexpected or of another shape.
    """
    path = fetch(checkpoint, what, missing=NO_WEIGHTS if what.startswith('teacher') else '')
    state = plain_weights(read_file(path, what), path, what, source)
    fits = True
    try:
        left = model.load_state_dict(state, strict=False)
        fits = not left.unexpected_keys and all(name.startswith(BESIDE) for name in left.missing_keys)
    except RuntimeError:  # another shape
        fits = False
    if fits:
        return
    own = {name: value for name, value in model.state_dict().items() if not name.startswith(BESIDE)}
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
    raise ConfigError(f'{what} {path} does not fit {type(model).__name__}: {found}; {advice}')
