"""What can be said of a training once its model is built."""

from mmengine.config import Config
from mmengine.dist import get_world_size
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmkd.checks.options import passes_apart
from mmkd.errors import ConfigError
from mmkd.hosts.datasets import type_name
from mmkd.hosts.running import probe, sizes_to_probe
from mmkd.taps import INPUT
from mmkd.weights import BESIDE


def check_batch_norms(config: Config, model: nn.Module) -> None:
    """Check that no batch norm is to find mean and variance of a single value, as with one image and a map of 1x1.

    Raises:
        ConfigError: naming the layer.
    """
    given = batch = config.train_dataloader.get('batch_size', 1)
    sampler, images = config.train_dataloader.get('sampler') or {}, 'images'
    if type_name(sampler) == 'DomainSampler' and passes_apart(config):
        ratio = sampler.get('ratio') or [1, 1]
        batch, images = batch * min(ratio) // sum(ratio), 'images with labels and 2 without'
    if batch > 1:
        return
    model.train()
    alone = () if get_world_size() == 1 else (nn.SyncBatchNorm,)  # over all processes
    norms = {
        f'{name}{INPUT}': module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.training and not isinstance(module, alone)
    }
    layers = [name for name in norms if not name.startswith(BESIDE)]
    try:
        taps = probe(model, layers, size=sizes_to_probe([model])[-1])
    except ConfigError:  # not known before the training
        return
    for layer in layers:
        if taps.calls[layer] and any(each.numel() == each.shape[1] for each in taps.per_call(layer)):
            raise ConfigError(
                f'train_dataloader.batch_size={given}: {layer.removesuffix(INPUT)} is a batch norm over a single value of each '
                f'channel; give each process at least 2 {images}, or use SyncBN on several processes'
            )


def compare_custom_keys(config: Config, model: nn.Module) -> list[str]:
    """Say so where a rule for the optimizer is for parameters that the model does not have."""
    keys = (config.optim_wrapper.get('paramwise_cfg') or {}).get('custom_keys') or {}
    names = [name for name, _ in model.named_parameters()]
    return [
        f'optim_wrapper.paramwise_cfg.custom_keys.{key}: in no name of a parameter, so it changes nothing.'
        for key in keys
        if not any(key in name for name in names)
    ]


def compare_critics(config: Config, model: nn.Module) -> list[str]:
    """Say so where critics are clipped together with the student, or learn at its rate."""
    critics: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        entry, found, _ = name.partition('.critic')
        if found:
            critics.setdefault(entry, []).append(name)
    if not critics:
        return []
    warnings = []
    if config.optim_wrapper.get('clip_grad'):
        warnings.append(
            f'optim_wrapper.clip_grad takes one norm over the student and the critics of {", ".join(sorted(critics))}, '
            f"whose gradients can be a thousand times the student's and then leave it next to none: set "
            f'optim_wrapper.clip_grad=None, unless grad_norm in the log stays below max_norm.'
        )
    keys = list((config.optim_wrapper.get('paramwise_cfg') or {}).get('custom_keys') or ())
    for entry, names in critics.items():
        if not any(key in name for key in keys for name in names):
            warnings.append(
                f"The critic of {entry} learns at the student's rate: no key of optim_wrapper.paramwise_cfg.custom_keys is in "
                f"its parameters' names (keys: {keys}); add '{entry}.critic': dict(lr_mult=...)."
            )
    return warnings
