"""What tests of properties ask of a distilled model whose one distiller is called ``it``."""

from collections.abc import Mapping

import torch
from torch import nn


def losses(model: nn.Module, batch: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """The distiller's losses of a batch, with the same random numbers each time."""
    torch.manual_seed(seed)
    found = model(**batch, mode='loss')
    return {key: value for key, value in found.items() if key.startswith('it.loss')}


def assert_zero(
    found: dict[str, torch.Tensor], different: dict[str, torch.Tensor], exempt: Mapping[str, str] = {}
) -> None:
    """Each loss is 0, up to rounding where that of different networks is large, and that of different networks is not.

    Args:
        found: The losses of equal networks.
        different: The same of different ones.
        exempt: The keys of losses that are not 0 for equal networks, and why.
    """
    assert exempt.keys() <= found.keys()
    for key, value in different.items():
        assert abs(value.item()) > 1e-4, f'{key} is dead: {value.item()}'
        if key not in exempt:
            assert abs(found[key].item()) <= 1e-6 * max(1.0, value.item()), key


def assert_differentiable(model: nn.Module, found: dict[str, torch.Tensor]) -> None:
    """The losses are finite, and so is their gradient, which every trainable part gets, the backbone, and no teacher."""
    assert all(torch.isfinite(value) and value.requires_grad for value in found.values())
    sum(found.values()).backward()
    own = dict(model.distillers.named_parameters())
    assert all(each.grad is not None and torch.isfinite(each.grad).all() for each in own.values())
    gradients = [each.grad for each in model.backbone.parameters() if each.grad is not None]
    assert gradients
    assert all(torch.isfinite(each).all() for each in gradients)
    assert all(each.grad is None for each in model.sources['teacher'].model.parameters())


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol: float, atol: float) -> None:
    """The same losses, all float32."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == torch.float32
        torch.testing.assert_close(found[key], value, rtol=rtol, atol=atol)
