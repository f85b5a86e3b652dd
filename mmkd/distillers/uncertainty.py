"""A teacher's features with their uncertainty (UET), estimated by Monte Carlo dropout.

Yi et al., "Teaching with Uncertainty: Unleashing the Potential of Knowledge Distillation in Object Detection", 2024,
arXiv 2406.06999.
"""

import torch
import torch.nn.functional as F
from torch import nn

from mmkd.errors import ConfigError
from mmkd.values import is_number, is_whole


def uncertain(feature: torch.Tensor, passes: int, p: float) -> torch.Tensor:
    r"""The mean of a feature and of several dropouts of it.

    .. math:: \tilde t = \frac{1}{n + 1} \Big( t + \sum_{k=1}^n \frac{m_k \odot t}{1 - p} \Big), \qquad
        m_k \sim \operatorname{Bernoulli}(1 - p)

    Its expectation is t, and its variance :math:`t^2 \frac{n}{(n + 1)^2} \frac{p}{1 - p}` at each element, apart.

    Args:
        feature: t, of any shape.
        passes: n, at least 1.
        p: The probability that an element is dropped, at least 0 and below 1.

    Returns:
        The same shape.
    """
    total = feature
    for _ in range(passes):
        total = total + F.dropout(feature, p)
    return total / (passes + 1)


class Uncertainty(nn.Module):
    """Gives the student :func:`uncertain` features of its teacher, drawn anew in each step; ``docs/methods/uet.md``.

    An entry of ``distillers`` has it as ``uncertainty=dict(passes=5, p=0.1)``, whatever its method, where that compares
    levels by :class:`mmkd.distillers.LevelPairs`. In eval mode, as for pictures, features are as they are.

    Args:
        passes: How often is drawn, beside the feature itself. Default 5.
        p: The probability that an element is dropped. Default 0.1.

    Raises:
        ConfigError: for numbers that are out of range.
    """

    def __init__(self, passes: int = 5, p: float = 0.1):
        super().__init__()
        if not (is_whole(passes) and passes >= 1):
            raise ConfigError(f'passes={passes!r}: expected a whole number of at least 1')
        if not (is_number(p) and 0 < p < 1):
            raise ConfigError(f'p={p!r}: expected a probability above 0 and below 1')
        self.passes, self.p = passes, p

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        return uncertain(feature, self.passes, self.p) if self.training else feature
