"""Run a model of mmdet or mmseg no further than needed."""

from collections.abc import Sequence

import torch
from mmengine.structures import BaseDataElement
from torch import nn

from mmkd.taps import INPUT, Taps


def run(model: nn.Module, layers: Sequence[str], inputs: torch.Tensor, data_samples: list | None) -> None:
    """One forward pass of a mmdet or mmseg model, no further than needed for ``layers``; no loss, no assignment."""
    roots = dict.fromkeys(layer.removesuffix(INPUT).partition('.')[0] for layer in layers)
    heads = [root for root in roots if root not in ('backbone', 'neck')]
    if hasattr(model, 'decode_head'):
        run_segmentor(model, heads, inputs)
    elif set(heads) <= {'rpn_head', 'bbox_head'} and not hasattr(model, 'forward_transformer'):
        # called as in training, as modules: mmdet's tensor mode calls `head.forward`, past the hooks
        features = model.extract_feat(inputs)
        for head in heads:
            getattr(model, head)(features)
    else:
        model(inputs, data_samples, mode='tensor')


def run_segmentor(model: nn.Module, heads: Sequence[str], inputs: torch.Tensor) -> None:
    """The backbone and neck of a mmseg model, and those of its heads that are wanted, auxiliary ones too.

    mmseg's own tensor mode never runs an auxiliary head. Heads are called as in training, by their ``forward``: a hook
    on a head itself would not fire there either.
    """
    features = model.extract_feat(inputs)
    for name in heads:
        head = getattr(model, name)
        stages = head if isinstance(head, nn.ModuleList) else [head]
        output = None
        for stage in stages:
            if name == 'decode_head' and output is not None:  # a cascade: each head refines the one before
                output = stage.forward(features, output)
            else:
                output = stage.forward(features)


@torch.no_grad()
def probe(model: nn.Module, layers: Sequence[str], batch: int = 1, size: int = 256) -> Taps:
    """Taps of one forward pass over random images, (batch, 3, size, size), for shapes and checks at build time.

    Batch-norm statistics, training modes and random states stay as they were.
    """
    shape = (size, size)
    sample = BaseDataElement(
        metainfo=dict(
            img_shape=shape, ori_shape=shape, pad_shape=shape, batch_input_shape=shape, scale_factor=(1.0, 1.0)
        )
    )
    modes = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == 'cuda' else []), Taps(model, layers) as taps:
        model.eval()
        if layers:
            images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
            run(model, layers, images.to(device), [sample] * batch)
    for module, mode in modes.items():
        module.training = mode
    return taps
