"""What a batch norm or an instance norm does to a feature, without scale, shift or running statistics."""

from collections.abc import Sequence

import torch

BATCH = (0, 2, 3)
"""The dimensions over which a batch norm takes its statistics."""
INSTANCE = (2, 3)
"""Those of an instance norm."""


def normalized(feature: torch.Tensor, over: Sequence[int], eps: float = 1e-5) -> torch.Tensor:
    r"""Mean 0 and variance 1 over some dimensions.

    .. math:: \tilde x = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}}

    with the biased :math:`\sigma^2`. A constant is 0, a single value among them, of which torch's own norms make an error.

    Args:
        feature: (B, C, H, W).
        over: :data:`BATCH` or :data:`INSTANCE`.
        eps: Added to the variance. Default 1e-5, torch's.

    Returns:
        The same shape.
    """
    variance, mean = torch.var_mean(feature, dim=tuple(over), correction=0, keepdim=True)
    return (feature - mean) * (variance + eps).rsqrt()
