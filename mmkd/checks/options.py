"""Options that do not go together."""

from mmengine.config import Config
from mmengine.dist import get_world_size
from torch import nn


def compare_batch_size(config: Config) -> list[str]:
    """Say so where the batch is not the one that the learning rate was chosen for."""
    scaling = config.get('auto_scale_lr') or {}
    base = scaling.get('base_batch_size')
    accumulated = config.optim_wrapper.get('accumulative_counts', 1)
    batch = config.train_dataloader.get('batch_size', 1) * get_world_size() * accumulated
    if not base or batch == base or scaling.get('enable'):
        return []
    return [
        f'The learning rate was chosen for a batch of {base} images and this run has {batch}: '
        f'add --auto-scale-lr to scale it by {batch / base:g}.'
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
