"""Adversarial terms in one backward pass, with one optimizer.

A critic learns to tell the student's outputs from the teacher's while the student learns to deceive it. The losses of both
are added: the student's sees the critic's weights as constants (:func:`with_constant_weights`), the critic's sees the
student's outputs as constants (``detach``). Each loss then has a gradient for its own network alone, and one step of one
optimizer changes the weights as the usual two steps do, whose gradients are taken at the same weights.

Reversing the gradient between student and critic would save a pass through the critic, but is right only where the
student's loss is the negative of the critic's (WGAN), not for hinge or cross-entropy. ``clip_grad`` of mmengine's
optimizer wrapper takes one norm over both networks, and a critic's with a gradient penalty can be a thousand times the
student's: set it to None, as mmseg's configs have it.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.func import functional_call


def with_constant_weights(module: nn.Module) -> Callable[..., torch.Tensor]:
    """``module`` as a function through which gradients flow to its inputs, but not to its weights."""
    weights = {name: weight.detach() for name, weight in module.named_parameters()}
    return lambda *inputs: functional_call(module, weights, inputs)
