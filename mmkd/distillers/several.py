"""One method that learns from several teachers at once, and how much from each."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.dist import all_reduce, get_world_size
from torch import nn

from mmkd.distillers.base import Distiller
from mmkd.distillers.schedule import Weight
from mmkd.errors import ConfigError
from mmkd.hosts.class_logits import ClassLogits
from mmkd.taps import Taps, names_of
from mmkd.values import is_number


class Several(Distiller):
    r"""A method for one teacher, given several: one of its kind for each, with adapters of its own, and their losses combined.

    .. math:: L = \sum_m w_m L_m

    ============================ ==================================================================================
    ``combine``                  w of teacher m, of M
    ============================ ==================================================================================
    ``'mean'``                   1 / M
    ``'entropy'``                the surer a teacher is of a position, the larger, :func:`entropy_weights` (EBKD)
    ``'labels'``                 the better it knows a position's label, the larger, :func:`label_weights` (CA-MKD)
    ``'drop'``                   1 / (number that are left), see :func:`drop_weights`
    ``dict(a=0.7, b=0.3)``       as they are, numbers or schedules
    ============================ ==================================================================================

    Weights of a position sum to 1, once. ``'entropy'`` and ``'labels'`` weigh each position apart, for methods that compare
    class logits (:class:`mmkd.distillers.KD`); of sigmoid scores each class of a position as well.

    Or one target is made of the class logits of all, and learnt from once (KDCL). The learner may be one of them:

    ============================ ==================================================================================
    ``combine``                  the target
    ============================ ==================================================================================
    ``'best'``                   the logits of who knows a position's label best, :func:`best_logits`
    ``'mean_logits'``            their mean
    ``'min_logits'``             of each class the smallest, relative to the label's, :func:`min_logits`
    ============================ ==================================================================================

    Kwon et al., "Adaptive Knowledge Distillation Based on Entropy", ICASSP 2020 (EBKD). Zhang et al., "Confidence-Aware
    Multi-Teacher Knowledge Distillation", ICASSP 2022, arXiv 2201.00007 (CA-MKD). Sariyildiz et al., "UNIC: Universal
    Classification Models via Multi-teacher Distillation", ECCV 2024, arXiv 2408.05088 (dropping). Guo et al., "Online Knowledge
    Distillation via Collaborative Learning", CVPR 2020 (KDCL).

    Args:
        methods: By the name of a teacher the method that learns from it.
        combine: One of the names above, ``dict(type='drop', p=0.5)``, or a weight for each teacher.

    Raises:
        ConfigError: for another combination, or one that the method does not have.
    """

    several_teachers = True

    def __init__(self, methods: Mapping[str, nn.Module], combine: str | Mapping = 'mean'):
        super().__init__()
        self.methods = nn.ModuleDict(methods)
        self.kind, self.p = 'mean', 0.5
        self.weights = nn.ModuleDict()
        if isinstance(combine, str) or (isinstance(combine, Mapping) and 'type' in combine):
            options = dict(combine) if isinstance(combine, Mapping) else dict(type=combine)
            self.kind = options.pop('type')
            self.p = options.pop('p', 0.5) if self.kind == 'drop' else 0.5
            if self.kind not in COMBINATIONS or options:
                raise ConfigError(
                    f"combine={combine!r}: expected one of {', '.join(COMBINATIONS)}, dict(type='drop', p=0.5) or a weight for "
                    f'each teacher'
                )
            if not (is_number(self.p) and 0 <= self.p <= 1):
                raise ConfigError(f'combine: p={self.p!r}: expected a probability, 0 to 1')
        elif isinstance(combine, Mapping):
            if set(combine) != set(methods):
                raise ConfigError(
                    f'combine={dict(combine)!r}: expected a weight for each of its teachers, {", ".join(methods)}'
                )
            self.kind = 'fixed'
            self.weights = nn.ModuleDict({name: Weight(each, f'combine.{name}') for name, each in combine.items()})
        else:
            raise ConfigError(
                f'combine={combine!r}: expected one of {", ".join(COMBINATIONS)}, or a weight for each teacher'
            )
        first = self.first
        self.one_target = self.kind in TARGETS
        self._of_logits = self.one_target or self.kind in ('entropy', 'labels')
        if self._of_logits and not hasattr(first, 'compare_weighted'):
            raise ConfigError(
                f'combine={self.kind!r}: reads class logits, which {type(first).__name__} does not compare; KD does, and any '
                f"method can be combined by 'mean', 'drop' or a weight for each teacher"
            )
        self.maps_classes = bool(getattr(first, 'maps_classes', False))
        self.any_scale = bool(getattr(first, 'any_scale', False))
        self.unweighted = bool(getattr(first, 'unweighted', False))
        self._read_layers()

    @property
    def first(self) -> nn.Module:
        """The method that learns from the first teacher; the others are of its kind."""
        return next(iter(self.methods.values()))

    def active(self) -> bool:
        """Whether the loss can be anything but 0 in this step."""
        own = [each() for each in self.methods.modules() if isinstance(each, Weight)]
        shares = [each() for each in self.weights.values()]
        return (self.unweighted or not own or any(own)) and (not shares or any(shares))

    def _read_layers(self) -> None:
        self.student_layers, self.training_layers = (
            tuple(
                dict.fromkeys(
                    layer for each in self.methods.values() for layer in names_of(getattr(each, attribute, ()))
                )
            )
            for attribute in ('student_layers', 'training_layers')
        )
        self.teacher_layers = {name: names_of(each.teacher_layers) for name, each in self.methods.items()}

    def prepare(self, student: nn.Module, teacher: Mapping[str, nn.Module]) -> None:
        for name, method in self.methods.items():
            if hasattr(method, 'prepare'):
                method.prepare(student, teacher[name])
        self._read_layers()

    def setup(self, student: Taps, teacher: Mapping[str, Taps]) -> None:
        if self.kind in LABELLED and not self.first.reader.has_labels:
            other = "'mean_logits'" if self.one_target else "'mean', 'entropy' or 'drop'"
            raise ConfigError(f'combine={self.kind!r}: takes a segmentor, whose pixels have labels; choose {other}')
        mapped = [name for name, taps in teacher.items() if taps.classes is not None]
        if self.one_target and mapped:
            raise ConfigError(
                f'combine={self.kind!r}: makes one target of all, and {mapped[0]} has other classes; choose '
                f"'mean', 'entropy' or 'drop'"
            )
        for name, method in self.methods.items():
            if hasattr(method, 'setup'):
                method.setup(student, teacher[name])
        if self._of_logits:
            shapes = {name: method.reader.positions(student, teacher[name]) for name, method in self.methods.items()}
            if len(set(map(str, shapes.values()))) > 1:
                raise ConfigError(
                    f'combine={self.kind!r}: takes teachers position by position, and theirs differ: '
                    f'{", ".join(f"{name} {each}" for name, each in shapes.items())} (sizes of maps, or compared levels); '
                    f"choose 'mean', or label_size=True of segmentors"
                )

    def forward(self, student: Taps, teacher: Mapping[str, Taps], data_samples: list | None) -> dict[str, torch.Tensor]:
        if self._of_logits:
            return self._of_positions(student, teacher, data_samples)
        found = {name: method(student, teacher[name], data_samples) for name, method in self.methods.items()}
        if self.kind == 'fixed':
            weights: Sequence[Any] = [self.weights[name]() for name in found]
        elif self.kind == 'drop':
            totals = [
                sum(value for key, value in losses.items() if key.startswith('loss')) for losses in found.values()
            ]
            weights = drop_weights(torch.stack(totals).detach(), self.p)
        else:
            weights = [1 / len(found)] * len(found)
        keys = next(iter(found.values()))
        return {key: sum(w * losses[key] for w, losses in zip(weights, found.values(), strict=True)) for key in keys}

    def _of_positions(
        self, student: Taps, teacher: Mapping[str, Taps], data_samples: list | None
    ) -> dict[str, torch.Tensor]:
        read = {name: method.read(student, teacher[name], data_samples) for name, method in self.methods.items()}
        layers = list(zip(*read.values(), strict=True))
        labels = [
            self.first.reader.labels(layer[0], student, data_samples) if self.kind in LABELLED else None
            for layer in layers
        ]
        if self.one_target:
            make = TARGETS[self.kind]
            targets = [
                layer[0]._replace(teacher=make(torch.stack([each.teacher for each in layer]), known))
                for layer, known in zip(layers, labels, strict=True)
            ]
            targets = [self.first.weigh(each, student, data_samples) for each in targets]
            return {'loss': self.first.compare_weighted(targets, [None] * len(targets))}
        by_layer = [
            entropy_weights(layer) if known is None else label_weights(layer, known)
            for layer, known in zip(layers, labels, strict=True)
        ]
        by_teacher = zip(*by_layer)
        losses = [
            method.compare_weighted(read[name], weights)
            for (name, method), weights in zip(self.methods.items(), by_teacher, strict=True)
        ]
        return {'loss': sum(losses)}


def entropy_weights(logits: Sequence[ClassLogits]) -> list[torch.Tensor]:
    r"""How much is learnt of each position from each teacher, by how sure it is.

    .. math:: w_m = \frac{1}{M - 1} \Big( 1 - \frac{H_m}{\sum_{m'} H_{m'}} \Big)

    with the entropy H of a teacher's class probabilities; of sigmoid scores of each class's own, over the M teachers that know
    the class. The entropies of softmax scores over different numbers of classes are compared as shares of their largest, log K.

    Returns:
        For each teacher (P, ...), or of sigmoid scores (P, K, ...) of its own classes. They sum to 1 over the teachers.
    """
    if not logits[0].sigmoid:
        shares = []
        for each in logits:
            p = each.teacher.log_softmax(1)
            shares.append(-(p.exp() * p).sum(1) / math.log(each.teacher.shape[1]))
        return list(_less_is_more(torch.stack(shares), torch.ones_like(shares[0]) * len(shares)))
    known = [each.classes.student if each.classes else range(each.teacher.shape[1]) for each in logits]
    number = 1 + max(max(each) for each in known)
    entropies, present = [], []
    for each, classes in zip(logits, known, strict=True):
        p = each.teacher.sigmoid()
        entropy = F.binary_cross_entropy_with_logits(each.teacher, p, reduction='none')
        columns = dict(zip(classes, entropy.unbind(1)))
        nothing = torch.zeros_like(entropy[:, 0])
        entropies.append(torch.stack([columns.get(c, nothing) for c in range(number)], 1))
        present.append([float(c in columns) for c in range(number)])
    counts = (
        torch.tensor(present)
        .sum(0)
        .reshape(1, -1, *[1] * (entropies[0].dim() - 2))
        .to(entropies[0].device, non_blocking=True)
    )
    weights = _less_is_more(torch.stack(entropies), counts.expand_as(entropies[0]))
    return [torch.stack([weight[:, c] for c in classes], 1) for weight, classes in zip(weights, known, strict=True)]


def label_weights(logits: Sequence[ClassLogits], labels: torch.Tensor) -> list[torch.Tensor]:
    r"""How much is learnt of each position from each teacher, by how well it knows the label.

    .. math:: w_m = \frac{1}{M - 1} \big( 1 - \operatorname{softmax}_m(-\log p_m(y)) \big)

    Of a class that it does not know a teacher's cross entropy is that of one that guesses. Without a label all have 1 / M.

    Args:
        logits: Those of each teacher, softmax scores.
        labels: (P, ...), -1 for none.

    Returns:
        For each teacher (P, ...). They sum to 1 over the teachers.
    """
    entropies = []
    for each in logits:
        target = each.positions_of(labels)
        log_p = each.teacher.log_softmax(1)
        found = -log_p.gather(1, target.clamp(min=0)[:, None])[:, 0]
        unknown = math.log(each.teacher.shape[1])  # as one that guesses
        entropies.append(found.where(target >= 0, unknown))
    stacked = torch.stack(entropies)
    if len(stacked) == 1:
        return [torch.ones_like(stacked[0])]
    weights = (1 - stacked.softmax(0)) / (len(stacked) - 1)
    return list(weights.where(labels >= 0, 1 / len(stacked)))


def _less_is_more(entropies: torch.Tensor, teachers: torch.Tensor) -> torch.Tensor:
    """Weights, (M, ...), that sum to 1 over the ``teachers``, their number, which have an entropy there; the others have 0."""
    total = entropies.sum(0)
    share = torch.where(total > 0, entropies / total.clamp(min=1e-12), 1 / teachers.clamp(min=1))
    return torch.where(teachers > 1, (1 - share) / (teachers - 1).clamp(min=1), 1.0)


def drop_weights(losses: torch.Tensor, p: float) -> torch.Tensor:
    """Each teacher but the one with the largest loss is left out with probability p; the others have equal weights.

    Losses are those of all processes together, and so is what is drawn, so that all processes leave out the same.

    Args:
        losses: (M,), of each teacher.
        p: The probability.

    Returns:
        (M,), which sum to 1.
    """
    shared = torch.cat([losses, torch.rand(len(losses), device=losses.device)])
    if get_world_size() > 1:
        all_reduce(shared)
    losses, draw = shared.chunk(2)
    draw = draw % 1  # a sum of uniform numbers is uniform again
    kept = (draw >= p).to(losses.dtype)
    kept = torch.maximum(kept, F.one_hot(losses.argmax(), len(losses)).to(losses.dtype))
    return kept / kept.sum()


def mean_logits(logits: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    """The mean of all networks' logits.

    Args:
        logits: (M, P, K, ...), of M networks.
        labels: Not needed.

    Returns:
        (P, K, ...).
    """
    return logits.mean(0)


def best_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    r"""At each position the logits of the network whose cross entropy with the label is the smallest.

    .. math:: z = z_m, \qquad m = \operatorname{argmin}_{m'} -\log \operatorname{softmax}(z_{m'})_y

    Without a label their mean.

    Args:
        logits: (M, P, K, ...), of M networks.
        labels: y, (P, ...), -1 for none.

    Returns:
        (P, K, ...).
    """
    own = labels.clamp(min=0)[None, :, None].expand(len(logits), *[-1] * (logits.dim() - 1))
    best = logits.log_softmax(2).gather(2, own).argmax(0, keepdim=True)  # (1, P, 1, ...)
    found = logits.gather(0, best.expand(1, *logits.shape[1:]))[0]
    return found.where(labels[:, None] >= 0, logits.mean(0))


def min_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    r"""Of each class the smallest of all networks' logits, each relative to its network's own of the label.

    .. math:: z_k = \min_m (z_{mk} - z_{my})

    Its cross entropy with the label is at most that of any of the networks. Without a label the mean of their logits.

    Args:
        logits: (M, P, K, ...), of M networks.
        labels: y, (P, ...), -1 for none.

    Returns:
        (P, K, ...).
    """
    own = labels.clamp(min=0)[None, :, None].expand(len(logits), *[-1] * (logits.dim() - 1))
    found = (logits - logits.gather(2, own)).amin(0)
    return found.where(labels[:, None] >= 0, logits.mean(0))


TARGETS = {'best': best_logits, 'mean_logits': mean_logits, 'min_logits': min_logits}
COMBINATIONS = ('mean', 'entropy', 'labels', 'drop', *TARGETS)
LABELLED = ('labels', 'best', 'min_logits')
"""What needs the labels of positions."""
