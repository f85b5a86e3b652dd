"""The configs that mmdet and mmseg come with, as small models with random weights."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from torch import nn

from mmkd.hosts.configs import build_model

_WEIGHTS = ('init_cfg', 'pretrained', 'checkpoint', 'checkpoint_file', 'teacher_ckpt')
_RESNETS = ('ResNet', 'ResNetV1c', 'ResNetV1d', 'ResNeXt', 'ResNeSt', 'Res2Net', 'TridentResNet', 'DetectoRS_ResNet')
_TRANSFORMERS = ('VisionTransformer', 'BEiT', 'MAE')
_AT_MOST = dict(num_queries=20, num_proposals=20, num_dn_queries=10, num_points=64)
_WIDTHS = ('embed_dim', 'embed_dims', 'num_feats', 'proposal_feature_channel', 'rfp_inplanes')


def config_root(package: str) -> Path:
    """The folder of a package's configs, which has a folder for every family of models."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f'{package} is not installed')
    return Path(spec.origin).parent / '.mim' / 'configs'


def small_config(name: str, narrow: int = 8, changes: Mapping[str, Any] | None = None) -> ConfigDict:
    """The model of a stock config without pretrained weights, at most 50 layers deep, its widths divided by ``narrow``.

    Args:
        name: ``'mmdet/atss/atss_r50_fpn_1x_coco.py'``.
        narrow: 1 for backbones whose widths no config can set, so that what follows them cannot be narrower.
        changes: Merged into the result.
    """
    package, _, file = name.partition('/')
    config = Config.fromfile(config_root(package) / file)
    model = config.model
    if 'data_preprocessor' not in model and 'data_preprocessor' in config:
        model.data_preprocessor = config.data_preprocessor
    _shrink(model, narrow)
    model.merge(changes or {})
    model._scope_ = package
    return model


def _shrink(node: Any, narrow: int) -> None:
    if isinstance(node, (list, tuple)):
        for each in node:
            _shrink(each, narrow)
    if not isinstance(node, dict):
        return
    kind = node.get('type')
    for key in _WEIGHTS:
        node.pop(key, None)
    if kind in _RESNETS:
        node.setdefault('base_channels', 64)
    if kind == 'PyramidVisionTransformer':
        node.setdefault('embed_dims', 64)
    for key, value in node.items():
        if key == 'depth' and kind != 'Darknet' and isinstance(value, int):
            node[key] = min(value, 50)
        elif key in ('depths', 'num_layers') and isinstance(value, (list, tuple)):
            node[key] = [1] * len(value)
        elif key == 'num_layers' and kind not in _TRANSFORMERS:
            node[key] = min(value, 2)
        elif key == 'out_indices' and kind in _TRANSFORMERS and not isinstance(value, int):
            node[key] = list(range(len(value)))
            node['num_layers'] = len(value)
        elif key in _AT_MOST and isinstance(value, int):
            node[key] = min(value, _AT_MOST[key])
        elif key == 'num_groups' and isinstance(value, int):
            node[key] = max(value // narrow, 1)
        elif key == 'widen_factor':
            node[key] = value / narrow
        elif key in _WIDTHS or (key.endswith('channels') and key != 'num_channels'):
            node[key] = _narrower(value, narrow)
        else:
            _shrink(value, narrow)


def _narrower(value: Any, narrow: int) -> Any:
    if isinstance(value, (list, tuple)):
        divided = [_narrower(each, narrow) for each in value]
        return value if narrow > 1 and any(a == b for a, b in zip(divided, value)) else type(value)(divided)
    return value // narrow if isinstance(value, int) and value >= 16 and value % narrow == 0 else value


def build_random(config: Mapping[str, Any], seed: int = 0) -> nn.Module:
    """The model with random weights, none of which has a value that it would start training with.

    Batch-norm statistics, the offsets of deformable convolutions and the factors of residual branches are random as well.
    """
    model = build_model(config)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=random)
            elif name.endswith('bias'):
                parameter.uniform_(-0.2, 0.2, generator=random)
            else:
                parameter.uniform_(0.5, 1.5, generator=random)
        for module in model.modules():
            if getattr(module, 'running_var', None) is not None:
                module.running_mean.uniform_(-0.2, 0.2, generator=random)
                module.running_var.uniform_(0.5, 1.5, generator=random)
    return model
