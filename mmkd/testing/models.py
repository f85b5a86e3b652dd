"""Build and store the small models of the tests."""

from pathlib import Path

import torch
from mmengine.registry import DefaultScope
from torch import nn

from mmkd.hosts.configs import build_model


def build(config: dict, seed: int | None = None) -> nn.Module:
    """Build a model from its config; with ``seed``, also initialise it, batch-norm statistics included."""
    with DefaultScope.overwrite_default_scope('mmdet'):
        if seed is None:
            return build_model(config)
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            model = build_model(config)
            model.init_weights()
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    nn.init.uniform_(module.running_mean, -0.2, 0.2)
                    nn.init.uniform_(module.running_var, 0.5, 1.5)
                    nn.init.uniform_(module.weight, 0.5, 1.5)
                    nn.init.uniform_(module.bias, -0.2, 0.2)
    return model


def save_weights(config: dict, path: str | Path, seed: int = 1) -> str:
    """Write a checkpoint of the initialised model; its path."""
    torch.save({'state_dict': build(config, seed).state_dict()}, path)
    return str(path)
