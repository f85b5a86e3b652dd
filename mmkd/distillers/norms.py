"""What a batch norm or an instance norm does to a feature, without running statistics."""

from collections.abc import Sequence

import torch
from torch import nn

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


class BatchNorm2d(nn.BatchNorm2d):
    """torch's, always of the batch; a single value of each channel, an image of one position, becomes the shift.

    torch's own makes an error of that one.

    Args:
        channels: C, of maps (B, C, H, W).
    """

    def __init__(self, channels: int):
        super().__init__(channels, track_running_stats=False)

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        if feature.numel() > self.num_features:
            return super().forward(feature)
        return normalized(feature, BATCH) * self.weight[:, None, None] + self.bias[:, None, None]
