"""What mmkd adds to mmengine 0.10: ``mmkd::`` configs, mmseg's by any name, resuming on torch >= 2.6, where weights are."""

from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from mmengine import hub
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.logging import HistoryBuffer
from mmengine.registry import MODELS, DefaultScope
from mmengine.utils import digit_version
from torch import nn

from mmkd.errors import ConfigError, nearest

# schemes by which mmengine's tables name pretrained weights
NAMED = ('torchvision://', 'modelzoo://', 'open-mmlab://', 'openmmlab://', 'mmcls://')
CONFIG_ROOT = Path(__file__).parents[1] / '.mim' / 'configs'


def config_path(name: str) -> str:
    """The file of ``mmkd::NAME``, wherever mmkd is installed.

    Raises:
        ConfigError: if there is no such config; the message has the nearest names.
    """
    relative = name.removeprefix('mmkd::')
    path = CONFIG_ROOT / relative
    if not path.is_file():
        known = (str(each.relative_to(CONFIG_ROOT)) for each in CONFIG_ROOT.rglob('*.py'))
        raise ConfigError(f'{name}: mmkd has no such config; the nearest are {nearest(relative, known)}')
    return str(path)


def accept_mmkd_configs() -> None:
    """Let ``_base_ = 'mmkd::gid_retinanet.py'`` resolve, and mmengine.hub's ``get_config`` and ``get_model`` of such a name.

    mmengine 0.10 looks for a package's configs at its distribution's location, which is wrong for editable installs,
    and refuses names without a folder. A config of mmkd is therefore read as a plain file. Its model is built in the config's
    default scope, not in one of the package's name: the student is mmdet's or mmseg's.
    """
    stock, stock_get_config, stock_get_model = Config._get_cfg_path, hub.get_config, hub.get_model

    def get_cfg_path(cfg_path: str, filename: str) -> tuple[str, str | None]:
        if cfg_path.startswith('mmkd::'):
            return config_path(cfg_path), None
        return stock(cfg_path, filename)

    def get_config(cfg_path: str, pretrained: bool = False) -> Config:
        if not cfg_path.startswith('mmkd::'):
            return stock_get_config(cfg_path, pretrained)
        if pretrained:
            raise ConfigError(f'{cfg_path}: mmkd publishes no weights; leave out pretrained=True')
        return Config.fromfile(config_path(cfg_path))

    def get_model(cfg_path: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if not cfg_path.startswith('mmkd::'):
            return stock_get_model(cfg_path, pretrained, **kwargs)
        config = get_config(cfg_path, pretrained)
        with DefaultScope.overwrite_default_scope(config.default_scope):
            return MODELS.build(config.model, default_args=kwargs)

    Config._get_cfg_path = staticmethod(get_cfg_path)
    hub.get_config, hub.get_model = get_config, get_model


def accept_mmseg_by_its_module() -> None:
    """Let ``mmseg::`` configs be found wherever mmseg can be imported: the distribution of a fork is not ``mmsegmentation``."""
    if find_spec('mmseg') is not None:
        MODULE2PACKAGE['mmseg'] = 'mmseg'


def weights_address(name: str) -> str:
    """The URL or path behind the name of a checkpoint, such as ``torchvision://resnet50``.

    mmengine's own tables are read. What is a URL or a path already, or has a scheme of another program, stays as it is.

    Raises:
        ConfigError: for a model that the tables do not have, or torchvision's where it cannot be imported.
    """
    if not name.startswith(NAMED):
        return name
    from mmengine.runner import checkpoint as tables  # a second, which `import mmkd` need not take

    scheme, _, model = name.partition('://')
    if scheme == 'mmcls':
        addresses = tables.get_mmcls_models()
    elif scheme in ('torchvision', 'modelzoo'):
        try:
            addresses = tables.get_torchvision_models()
        except (ImportError, OSError, RuntimeError) as error:  # the last two: a build for another torch
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f'{name}: needs torchvision, which cannot be imported ({reason}); install the release that belongs to torch '
                f'{torch.__version__}: pip install torchvision'
            ) from error
    else:
        addresses = tables.get_external_models()
        model = tables.get_deprecated_model_names().get(model, model)
    if model not in addresses:
        raise ConfigError(f'{name}: mmengine knows no such model; the nearest are {nearest(model, addresses)}')
    address = addresses[model]
    if '://' not in address:  # of a table of the user's own
        address = str(Path(tables._get_mmengine_home(), address))
    return address


def _history_method(owner: object, name: str) -> object:
    """Stand-in for ``getattr`` in checkpoints: mmengine's history buffers name their four methods through it."""
    if owner is HistoryBuffer and name in ('min', 'max', 'mean', 'current'):
        return getattr(HistoryBuffer, name)
    raise UnpicklingError(f'a checkpoint may not read attribute {name!r} of {owner!r}')


def accept_training_checkpoints() -> None:
    """Let ``torch.load(weights_only=True)``, torch >= 2.6's default, read mmengine's training checkpoints.

    They hold loss histories (:class:`HistoryBuffer`) and numpy scalars. These are data, no code; the check itself stays
    on, and ``getattr`` is replaced by :func:`_history_method`.
    """
    if digit_version(torch.__version__) < digit_version('2.6'):  # loads them unchecked, as mmengine expects
        return
    core: Any = np._core if hasattr(np, '_core') else np.core
    multiarray = core.multiarray
    numpy_data = [np.ndarray, np.dtype, multiarray.scalar, multiarray._reconstruct]
    numpy_data += [type(np.dtype(code)) for code in '?bBhHiIlLqQefd']
    # numpy 1 and numpy 2 write different module names for the same functions
    renamed = [
        (getattr(multiarray, name), f'{module}.multiarray.{name}')
        for name in ('scalar', '_reconstruct')
        for module in ('numpy.core', 'numpy._core')
    ]
    history = [HistoryBuffer, (_history_method, 'builtins.getattr')]
    torch.serialization.add_safe_globals([*numpy_data, *renamed, *history])
