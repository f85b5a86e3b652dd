"""Tokens that are learnt on the frozen teacher first, and say afterwards where the student learns from it."""

from collections.abc import Mapping

import torch
from torch import nn

from mmkd.distillers.base import Distiller
from mmkd.distillers.levels import LevelPairs, maps
from mmkd.distillers.schedule import Weight
from mmkd.errors import ConfigError
from mmkd.hosts.teacher_task import check_task, task_layer, task_loss
from mmkd.taps import Taps
from mmkd.values import is_whole


def token_masks(tokens: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
    r"""A mask for each token: :math:`m_{bti} = \sigma(p_t^\top f_{bi})`.

    Args:
        tokens: p, (T, C).
        feature: f, (B, C, H, W).

    Returns:
        (B, T, H, W), of 0 to 1.
    """
    return torch.einsum('tc,bchw->bthw', tokens, feature).sigmoid()


def overlap(masks: torch.Tensor, eps: float = 1e-12) -> torch.Tensor:
    r"""How far masks cover the same: the mean Dice coefficient of two different ones.

    .. math::
        L = \frac{1}{B T (T - 1)} \sum_b \sum_{t \neq u}
        \frac{2 \sum_i m_{bti} m_{bui}}{\sum_i m_{bti}^2 + \sum_i m_{bui}^2 + 2 \epsilon}

    Args:
        masks: (B, T, H, W), of at least two tokens.
        eps: epsilon.

    Returns:
        A scalar, 1 for equal masks, 0 for masks that share no position.
    """
    rows = masks.flatten(2)
    products = rows @ rows.transpose(1, 2)
    squares = products.diagonal(dim1=1, dim2=2) + eps
    dice = 2 * products / (squares[:, :, None] + squares[:, None])
    number = masks.shape[1]
    others = 1 - torch.eye(number, device=masks.device, dtype=masks.dtype)
    return (dice * others).sum() / (len(masks) * number * (number - 1))


class Learnt(nn.Module):
    """A parameter that is trained for a while and then stays, whatever momentum and weight decay an optimizer has.

    Attributes:
        value: The parameter.
        kept: What it was when :meth:`keep` was called last; in the checkpoint.
    """

    kept: torch.Tensor

    def __init__(self, value: torch.Tensor):
        super().__init__()
        self.value = nn.Parameter(value)
        self.register_buffer('kept', value.clone())

    @torch.no_grad()
    def keep(self) -> None:
        self.kept.copy_(self.value)


class LevelTokens(nn.Module):
    """The tokens of one level; what a subclass makes of them."""

    def mask(self, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the teacher's feature is behind the masks that are learnt, (B, C, H, W), and their :func:`overlap`."""
        raise NotImplementedError(f'{type(self).__name__} has no mask')

    def compare(self, student: torch.Tensor, teacher: torch.Tensor, step: int) -> torch.Tensor:
        """The distance of both features behind the masks that were learnt, in a step counted from the end of their learning."""
        raise NotImplementedError(f'{type(self).__name__} has no compare')


class TokenDistiller(Distiller):
    """Learns tokens on the frozen teacher for some steps, and distils by them from then on.

    In the first ``token_steps`` steps of the training the teacher's heads are run over its own features behind the masks, and
    the tokens alone learn, by the same optimizer. ``loss_token`` is the teacher's own loss of that, by the labels, see
    :func:`mmkd.hosts.teacher_task.task_loss`, and the :func:`overlap` of the masks of a level, summed over levels, which is
    logged as ``overlap``.

    From then on the tokens stay as they are, and ``loss = loss_weight * sum over levels of compare``. The loss of the other
    phase is 0. A subclass has :meth:`level_tokens`.

    Args:
        layer: The student's layer. Default None: :func:`mmkd.hosts.teacher_task.task_layer`.
        loss_weight: Of ``loss``, a number or a schedule.
        tokens: How many there are of each mask's map, at least 2.
        token_steps: How many steps the tokens learn.
        teacher_layer: The teacher's layer, where its name differs.
        adapter: ``'auto'``, None or a dict, see :class:`mmkd.adapters.Adapters`.
    """

    def __init__(
        self,
        layer: str | None,
        loss_weight: float | Mapping,
        tokens: int,
        token_steps: int,
        teacher_layer: str | None,
        adapter: str | Mapping | None,
    ):
        super().__init__()
        if not (is_whole(tokens) and tokens >= 2):
            raise ConfigError(f'tokens={tokens!r}: expected a whole number of at least 2, whose masks can differ')
        if not (is_whole(token_steps) and token_steps >= 0):
            raise ConfigError(f'token_steps={token_steps!r}: expected a whole number of steps, at least 0')
        self.levels = LevelPairs(layer or task_layer, teacher_layer, adapter)
        self.loss_weight = Weight(loss_weight, 'loss_weight')
        self.number, self.token_steps = tokens, token_steps
        self.first_steps = token_steps
        learning = dict(type='constant', value=1.0, end=token_steps) if token_steps else 0.0
        self.token_weight = Weight(learning, 'token_steps')

    def level_tokens(self, channels: int, teacher: nn.Module) -> LevelTokens:
        """The tokens of a level whose teacher's feature has as many channels."""
        raise NotImplementedError(f'{type(self).__name__} has no level_tokens')

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        self.levels.prepare(student, teacher)
        self.student_layers, self.teacher_layers = self.levels.student_layers, self.levels.teacher_layers
        if len(self.student_layers) != 1 or len(self.teacher_layers) != 1:
            raise ConfigError(f'layer: {type(self).__name__} takes one; give each an entry of its own')
        check_task(teacher, self.teacher_layers[0], type(self).__name__)

    def setup(self, student: Taps, teacher: Taps) -> None:
        if teacher.classes is not None:
            raise ConfigError(
                f'{type(self).__name__} learns where a teacher looks by its own loss, and its classes are not those of the '
                f'labels; use a method without labels, such as PKD or MGD'
            )
        self.levels.setup(student, teacher)
        _, targets = self.levels.unadapted(student, teacher)
        self.tokens = nn.ModuleList(self.level_tokens(level.shape[1], teacher.model) for level in targets)

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        pairs = self.levels(student, teacher)
        # the trained parts of the phase that it is not
        idle = torch.stack([0 * each.sum() for each in self.parameters()]).sum()
        if self.token_weight():
            self._keep()
            shown, overlaps = list(maps(teacher, self.teacher_layers[0])), []
            for pair, tokens in zip(pairs, self.tokens, strict=True):
                shown[pair.teacher_level], found = tokens.mask(pair.teacher.detach())
                overlaps.append(found)
            nothing = torch.stack([0 * pair.student.sum() for pair in pairs]).sum()
            covered = torch.stack(overlaps).sum()
            task = task_loss(teacher.model, self.teacher_layers[0], shown, data_samples)
            return {'loss': nothing, 'loss_token': task + covered + idle, 'overlap': covered.detach()}
        step = self.token_weight.iteration - self.token_steps
        if step == 0:
            self._keep()  # what the last of their steps has made of them
        levels = [
            tokens.compare(pair.student, pair.teacher.detach(), step)
            for pair, tokens in zip(pairs, self.tokens, strict=True)
        ]
        distance = torch.stack(levels).sum()
        return {'loss': self.loss_weight() * distance, 'loss_token': idle, 'overlap': torch.zeros_like(distance)}

    def _keep(self) -> None:
        for module in self.tokens.modules():
            if isinstance(module, Learnt):
                module.keep()
