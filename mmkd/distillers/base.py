"""What a distiller is, and the common case of comparing two features."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from mmkd.distillers.levels import Layer, LevelPairs
from mmkd.distillers.schedule import Weight
from mmkd.taps import Taps


class Boxes(NamedTuple):
    """Boxes of a batch, for :meth:`Distiller.pictures`."""

    boxes: torch.Tensor
    """(B, K, 4), xyxy in pixels of the input."""
    valid: torch.Tensor
    """(B, K), False for one that is not there."""


class Distiller(nn.Module):
    """One method: reads the taps of both models and returns named losses.

    A subclass sets ``student_layers`` and ``teacher_layers``, the layers it reads, and writes :meth:`forward`. Any
    ``nn.Module`` with these three works in a config by its dotted path; inheriting is not needed.
    """

    student_layers: Sequence[str] = ()
    teacher_layers: Sequence[str] = ()
    training_layers: Sequence[str] = ()
    """The student's layers that are called in its ``loss`` alone, such as ``'rpn_head.loss_cls:input'``; they are tapped
    as well, but not probed."""
    unweighted: bool = False
    """True where the losses need not be 0 when all weights are, so that the method runs in every step."""
    several_teachers: bool = False
    """True for a method that learns from several at once: it is then given a dict of name to taps as ``teacher``, where
    its entry in the config names a list, and ``teacher_layers`` may be a dict as well."""
    maps_classes: bool = False
    """True for a method that compares classes by ``teacher.classes``, where those of the teacher are not the student's."""
    compares_classes: bool = False
    """True for a method that takes the teacher's classes for the student's; a teacher of others is refused."""
    first_steps: int = 0
    """In how many first steps of the training the method learns what it teaches by afterwards; it has to be read in these."""
    trains_heads: bool = False
    """True for a method that trains the student's heads by labels, though it reads no layer of them."""
    any_scale: bool = False
    """True for a method that compares maps of one size alone, whatever the size of the image that a teacher saw."""
    renamed: Mapping[str, str] = {}
    """Options of 0.1 and what they are called now."""

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        """Called once at build time, before the networks are run: name layers that depend on them, refuse what cannot be read.

        Args:
            student: The network that learns.
            teacher: The one that it learns from; a dict of name to network for a method with :attr:`several_teachers`.

        Raises:
            ConfigError: naming the option and what to do.
        """

    def setup(self, student: Taps, teacher: Taps) -> None:
        """Called once at build time with the taps of one image, as (1, 3, H, W): make adapters, refuse what cannot work.

        Raises:
            ConfigError: naming the option and what to do.
        """

    def start_from(self, teacher: nn.Module) -> None:
        """Called with the teacher once it has its weights, before it is changed for speed: trained parts that start from them."""

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        """Losses by name. A key that starts with ``loss`` is optimised; a statistic must not contain that word.

        The student's tensors carry gradients, the teacher's do not; both are float32.
        """
        raise NotImplementedError(f'{type(self).__name__} has no forward')

    def pictures(self, student: Taps, teacher: Taps, data_samples: list | None) -> Mapping[str, torch.Tensor | Boxes]:
        """What the method looks at in a batch, for :class:`mmkd.analysis.pictures.DistillVisualizationHook`.

        Returns:
            By title maps, (B, H, W), of any size and scale, or :class:`Boxes`. Nothing by default: the tapped layers are
            shown in any case.
        """
        return {}


class FeatureDistiller(Distiller):
    """Compares the levels of one layer (or several) of both networks, level by level.

    ``loss = loss_weight * sum over levels of compare(adapter(student level), teacher level)``

    A method with one such term writes :meth:`compare`; one with several terms uses
    :class:`mmkd.distillers.levels.LevelPairs` itself.

    Args:
        layer: The student's layer, a dotted name, or a list of them.
        loss_weight: A number or a schedule, see :class:`mmkd.distillers.schedule.Weight`.
        teacher_layer: The teacher's, where its name differs.
        adapter: ``'auto'``, None or a dict, see :class:`mmkd.adapters.Adapters`.
        match: ``'stride'`` or ``'index'``: which levels belong together, see
            :class:`mmkd.distillers.levels.LevelPairs`.
    """

    renamed = {'weight': 'loss_weight'}
    any_scale = True
    same_channels = True
    """False for a method that compares relations within each network: then both may have any number of channels."""

    def __init__(
        self,
        layer: Layer | Sequence[Layer],
        loss_weight: float | Mapping = 1.0,
        teacher_layer: Layer | Sequence[Layer] | None = None,
        adapter: str | Mapping | None = 'auto',
        match: str = 'stride',
    ):
        super().__init__()
        self.levels = LevelPairs(layer, teacher_layer, adapter, match, self.same_channels)
        self.student_layers, self.teacher_layers = self.levels.student_layers, self.levels.teacher_layers
        self.loss_weight = Weight(loss_weight, 'loss_weight')

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        if self.levels.prepare(student, teacher):
            self.student_layers, self.teacher_layers = self.levels.student_layers, self.levels.teacher_layers

    def setup(self, student: Taps, teacher: Taps) -> None:
        self.levels.setup(student, teacher)

    def compare(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """The loss between one level of both, already of the same shape."""
        raise NotImplementedError(f'{type(self).__name__} has no compare')

    def forward(self, student: Taps, teacher: Taps, data_samples: list | None) -> dict[str, torch.Tensor]:
        levels = self.levels(student, teacher)
        return {'loss': self.loss_weight() * sum(self.compare(pair.student, pair.teacher) for pair in levels)}
