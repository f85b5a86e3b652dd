"""How strongly each loss pulls at the student's backbone, and whether it pulls where the task does."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

from mmkd.distill import Distilled
from mmkd.errors import ConfigError
from mmkd.registry import HOOKS
from mmkd.values import is_whole

TASK = 'task'
FAR_OFF = 30.0
"""A method whose gradient is so many times larger or smaller than the task's is said to be far off."""


class Pull(NamedTuple):
    """The gradient of one loss; the figures are tensors without a dimension.

    Attributes:
        norm: Its Euclidean norm over all parameters.
        share: Its norm over the sum of all losses' norms, 0 to 1.
        cosine: Of the angle to the task's gradient, -1 to 1; negative where the two work against each other.
    """

    norm: torch.Tensor
    share: torch.Tensor
    cosine: torch.Tensor


def pulls(losses: Mapping[str, Any], names: Iterable[str], parameters: Sequence[nn.Parameter]) -> dict[str, Pull]:
    """The gradients of a step's losses with respect to some parameters; the losses can be differentiated again afterwards.

    Args:
        losses: What the model returns in a training step, weights included: tensors, or lists of them.
        names: Of the distillers, whose losses are the entries ``<name>.<key>``.
        parameters: Those of the backbone, say.

    Returns:
        By loss: ``'task'`` is the sum of the student's own losses; ``'gid.loss_feature'`` each term of a distiller.
        Losses that do not reach the parameters, a critic's for example, are left out.
    """
    return figures_of(gradients_of(losses, names, parameters))


def figures_of(found: Mapping[str, list[torch.Tensor]]) -> dict[str, Pull]:
    """What :func:`pulls` gives of the gradients of :func:`gradients_of`; nothing where the task has none."""
    norms = {name: norm(gradients) for name, gradients in found.items()}
    total = sum(norms.values(), start=torch.tensor(1e-30))
    task = found.get(TASK, [])
    return {
        name: Pull(
            norms[name], norms[name] / total, _dot(gradients, task) / (norms[name] * norms[TASK]).clamp_min(1e-30)
        )
        for name, gradients in found.items()
        if TASK in norms
    }


def gradients_of(
    losses: Mapping[str, Any], names: Iterable[str], parameters: Sequence[nn.Parameter]
) -> dict[str, list[torch.Tensor]]:
    """The gradient of each loss, as :func:`pulls` names them."""
    starts = tuple(f'{name}.' for name in names)
    terms: dict[str, torch.Tensor] = {}
    for key, value in losses.items():
        if 'loss' in key:
            total = sum(each.mean() for each in value) if isinstance(value, (list, tuple)) else value.mean()
            name = key if key.startswith(starts) else TASK
            terms[name] = terms[name] + total if name in terms else total
    found: dict[str, list[torch.Tensor]] = {}
    for name, term in terms.items():
        if term.requires_grad:
            gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
            if any(each is not None for each in gradients):
                found[name] = [
                    torch.zeros_like(each) if gradient is None else gradient
                    for each, gradient in zip(parameters, gradients)
                ]
    return found


def without_loss(name: str) -> str:
    """``'gid.feature'`` for ``'gid.loss_feature'``: what has the word in its name would be optimized."""
    entry, _, key = name.partition('.')
    key = key.replace('loss', '').strip('_')
    return f'{entry}.{key}' if key else entry


def norm(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """The Euclidean norm over all of them."""
    return _dot(gradients, gradients).sqrt()


def _dot(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([(a.float() * b.float()).sum() for a, b in zip(one, other)]).sum()


def of_backbone(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the student's backbone that are trained; of a frozen backbone the rest of the student's."""
    student = [
        (name, each) for name, each in model.named_parameters() if not name.startswith(('distillers', 'sources'))
    ]
    trained = [(name, each) for name, each in student if each.requires_grad]
    backbone = [each for name, each in trained if name.startswith('backbone.')]
    return backbone or [each for _, each in trained]


def check_distilled(runner: Runner, hook: str) -> None:
    """Raise ConfigError unless a hook can look into the Runner's model."""
    model = getattr(runner.model, 'module', runner.model)
    if not isinstance(model, Distilled):
        raise ConfigError(f'{hook}: the model learns from nobody; it is for distilled models')
    if any(hasattr(each, 'placements') for each in model.parameters()):  # torch's distributed tensors
        raise ConfigError(f'{hook}: the model is sharded, and no process has all of it; leave the hook out')


@HOOKS.register_module()
class GradientShareHook(Hook):
    """Log, every so many iterations, how strongly each loss pulls at the student's backbone.

    The log, and each of mmengine's backends, gets ``share.<term>``, the norm of a loss's gradient over the sum of all
    losses' norms, and ``cosine.<term>``, the cosine of its angle to the gradient of the student's own losses. ``share.task``
    is that of the latter. Of each loss weight that a schedule changes there is ``weight.<term>``. A step in which they are
    measured takes a backward pass more for each term; the training itself is not changed.

    Args:
        interval: In iterations; the first iteration is measured as well.

    Raises:
        ConfigError: for a plain model, or an interval that is not a positive whole number.
    """

    def __init__(self, interval: int = 500):
        if not (is_whole(interval) and interval >= 1):
            raise ConfigError(f'GradientShareHook: interval={interval!r}: expected a positive whole number')
        self.interval = interval
        self._handle: torch.utils.hooks.RemovableHandle | None = None

    def before_train(self, runner: Runner) -> None:
        check_distilled(runner, 'GradientShareHook')

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        if runner.iter % self.interval == 0:
            model = getattr(runner.model, 'module', runner.model)
            self._handle = model.register_forward_hook(_add_pulls)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: dict | None = None
    ) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def _add_pulls(model: nn.Module, inputs: tuple, losses: object) -> object:
    """As a hook of the forward pass, which DDP and mixed precision run it in: the losses with the figures beside them."""
    if not isinstance(losses, dict) or not torch.is_grad_enabled():
        return losses
    figures = {}
    for name, pull in pulls(losses, model.distillers, of_backbone(model)).items():
        short = without_loss(name)
        figures[f'share.{short}'] = pull.share
        if name != TASK:
            figures[f'cosine.{short}'] = pull.cosine
    for name in model.distillers:
        for option, weight in model.distillers.schedules(name).items():
            term = f'{name}.{option.removesuffix("_weight")}'
            figures[f'weight.{without_loss(term)}'] = torch.tensor(weight())
    return {**losses, **figures}
