"""The distillers that a student trains with: who learns from whom, and when."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from mmengine.logging import MessageHub, print_log
from torch import nn

from mmkd.distillers.base import Distiller
from mmkd.distillers.entry import check_view, for_each_teacher, make_uncertain, refuse_the_same
from mmkd.distillers.levels import LevelPairs
from mmkd.distillers.schedule import Weight
from mmkd.distillers.several import Several
from mmkd.distillers.steps import check_first_steps, check_task, check_together
from mmkd.errors import ConfigError
from mmkd.registry import DISTILLERS, build
from mmkd.sources.own import Own
from mmkd.sources.source import Source
from mmkd.taps import Taps, find_layer, names_of


class Distillers(nn.ModuleDict):
    """The distillers of one student, by name.

    Args:
        specs: Name to config dict, as in a config file, or to a distiller. Beside a method's own options a dict may have
            ``teacher``, the name of the source it learns from or a list of names, ``combine``, how much it learns from each
            of these (:class:`mmkd.distillers.several.Several`), ``learner``, the source that learns instead of the student,
            ``uncertainty``, options of :class:`mmkd.distillers.uncertainty.Uncertainty`, and ``factor``, a number or a
            schedule by which all its losses are multiplied (default 1).
        optional: Whether there may be none, as where a teacher's labels alone are learnt.

    Attributes:
        iteration: The training step, counted from 0: that of mmengine's Runner, or without one that of the calls of
            :meth:`start_step`.

    Raises:
        ConfigError: for a name that cannot be logged, a distiller that does not exist, or an option it does not have.
    """

    def __init__(self, specs: Mapping[str, Mapping | nn.Module], optional: bool = False):
        super().__init__()
        if not isinstance(specs, Mapping) or not (specs or optional) or isinstance(specs.get('type'), str):
            raise ConfigError(f"distillers={specs!r}: expected a dict such as dict(gid=dict(type='GID'))")
        self.teacher_of: dict[str, tuple[str, ...]] = {}
        self.learner_of: dict[str, str | None] = {}
        self._named: dict[str, Any] = {}
        self._factors: dict[str, Weight] = {}
        for name, spec in specs.items():
            if 'loss' in name or '.' in name or hasattr(self, name):
                raise ConfigError(
                    f"distillers.{name}: a name starts the log keys and must not contain 'loss' or a dot, nor be a method of "
                    f'nn.ModuleDict; choose another'
                )
            options = dict(spec) if isinstance(spec, Mapping) else {}
            named = self._named[name] = options.pop('teacher', None)
            self.learner_of[name] = options.pop('learner', None)
            combine, uncertainty = options.pop('combine', None), options.pop('uncertainty', None)
            self._factors[name] = Weight(options.pop('factor', 1.0), f'distillers.{name}.factor')
            made = spec if isinstance(spec, nn.Module) else build(DISTILLERS, f'distillers.{name}', options or spec)
            if not isinstance(spec, nn.Module) and not getattr(made, 'several_teachers', False):
                made = for_each_teacher(name, made, options, named, combine)
            elif combine is not None:
                raise ConfigError(
                    f'distillers.{name}: combine={combine!r}: {type(made).__name__} combines by itself; leave it out'
                )
            for attribute in ('student_layers', 'teacher_layers'):
                if not hasattr(made, attribute):
                    raise ConfigError(f'distillers.{name}: {type(made).__name__} has no attribute {attribute!r}')
            if uncertainty is not None:
                make_uncertain(name, made, uncertainty)
            self[name] = made
        self.iteration = -1
        self._seen = _iteration_of_runner()
        self.student_layers: tuple[str, ...] = ()
        """What is tapped of the student in training."""
        self._weights: dict[str, list[Weight]] = {}

    def _load_from_state_dict(self, state: dict, prefix: str, *options: Any) -> None:
        _adapters_of_0_1(self, state, prefix)
        super()._load_from_state_dict(state, prefix, *options)

    def connect(self, sources: Mapping[str, Source]) -> None:
        """Find the sources that the distillers name.

        Raises:
            ConfigError: for a name that no source has, or none where there are several.
        """
        self._with_gradient = {name for name, source in sources.items() if source.has_gradient}
        self._views = {name: (source.classes, source.scale) for name, source in sources.items()}
        for name, distiller in self.items():
            named, several = self._named[name], self._learns_from_several(name)
            if named is None:
                if len(sources) > 1 and 'teacher' not in sources:
                    example = list(sources)[:2] if several else next(iter(sources))
                    raise ConfigError(
                        f'distillers.{name}: there are several teachers, {", ".join(sources)}; name one, as in '
                        f'teacher={example!r}'
                    )
                named = 'teacher' if 'teacher' in sources else next(iter(sources))
            if not isinstance(named, str) and not several:
                raise ConfigError(
                    f'distillers.{name}: {type(distiller).__name__} learns from one teacher, found teacher={named!r}; give each '
                    f'teacher an entry of its own'
                )
            self.teacher_of[name] = (named,) if isinstance(named, str) else tuple(named)
            layers = getattr(distiller, 'teacher_layers', ())
            unknown = set(layers) - set(self.teacher_of[name]) if isinstance(layers, Mapping) else ()
            if unknown:
                raise ConfigError(
                    f'distillers.{name}: teacher_layers names {", ".join(sorted(unknown))}; its teachers are '
                    f'{", ".join(self.teacher_of[name])}'
                )
            learner = self.learner_of[name]
            wanted = [
                *(('teacher', each) for each in self.teacher_of[name]),
                *([('learner', learner)] if learner else []),
            ]
            for option, each in wanted:
                if each not in sources:
                    raise ConfigError(
                        f'distillers.{name}: {option}={each!r}: there is none; there are {", ".join(sources)}'
                    )
            teachers = {each: sources[each] for each in self.teacher_of[name]}
            of_method, shares = getattr(distiller, 'first', distiller), []
            if isinstance(distiller, Several):
                check_together(name, teachers)
                shares = list(distiller.weights.values())
            check_first_steps(name, of_method, self._factors[name], shares, teachers)
            if learner and not (sources[learner].has_gradient and sources[learner].kept is not None):
                raise ConfigError(f'distillers.{name}: learner={learner!r} is not trained; a Peer is')
            if hasattr(of_method, 'label_weights') and (several or learner or isinstance(sources[named], Own)):
                raise ConfigError(
                    f'distillers.{name}: {type(of_method).__name__} weighs the labels of the student by one teacher, which '
                    f'is run before it; name one that is no Own, without a learner'
                )

    def prepare(self, student: nn.Module, sources: Mapping[str, Source]) -> None:
        """Let each distiller name its layers and refuse networks that it cannot read, before any of them is run."""
        for name, distiller in self.items():
            learner = self.learner_of[name]
            teachers = {each: sources[each].model for each in self.teacher_of[name]}
            several = self._learns_from_several(name)
            try:
                network = sources[learner].model if learner else student
                getattr(distiller, 'prepare', _nothing)(
                    network, teachers if several else teachers[self.teacher_of[name][0]]
                )
                self._find_layers(distiller, network, teachers)
                for each in self.teacher_of[name]:
                    check_view(distiller, sources[each], each)
            except ConfigError as error:
                raise ConfigError(f'distillers.{name}: {error}') from None

    @staticmethod
    def _find_layers(distiller: Any, student: nn.Module, teachers: Mapping[str, nn.Module]) -> None:
        for layer in names_of(distiller.student_layers):
            find_layer(student, layer, 'student ')
        for name, model in teachers.items():
            for layer in names_of(distiller.teacher_layers, name):
                find_layer(model, layer, 'teacher ')

    def layers(
        self, attribute: str, of: str | None = None, by: Callable[[str], bool] = lambda name: True
    ) -> tuple[str, ...]:
        """All distillers' layers for which ``by`` holds, each once; ``of`` picks one teacher's where they differ."""
        found: dict[str, None] = {}
        for name, distiller in self.items():
            if not by(name):
                continue
            found.update(dict.fromkeys(names_of(getattr(distiller, attribute, ()), of)))
        return tuple(found)

    def _learns_from_several(self, name: str) -> bool:
        return bool(getattr(self[name], 'several_teachers', False))

    def taught_by(self, source: str) -> Callable[[str], bool]:
        return lambda name: source in self.teacher_of[name]

    def learnt_by(self, learner: str | None) -> Callable[[str], bool]:
        return lambda name: self.learner_of[name] == learner

    def setup(self, student: Taps, knowledge: Mapping[str, Taps]) -> None:
        """Let each distiller make its adapters from probed shapes, and check each tapped layer.

        Args:
            student: The student's taps of an image.
            knowledge: Each source's taps of the same image.
        """
        for taps in (student, *knowledge.values()):
            for layer in taps:
                taps.per_call(layer)  # raises if it was never called or changed in place
        for name, distiller in self.items():
            learner, teacher = self._pair(name, student, knowledge)
            try:
                refuse_the_same(distiller, learner, teacher)
                getattr(distiller, 'setup', _nothing)(learner, teacher)
                for levels in distiller.modules():
                    if isinstance(levels, LevelPairs):
                        print_log(f'distillers.{name}: {levels.describe()}', logger='current')
            except ConfigError as error:
                raise ConfigError(f'distillers.{name}: {error}') from None
            self._weights[name] = [each for each in distiller.modules() if isinstance(each, Weight)]

    def start_from(self, source: str, model: nn.Module) -> None:
        """Let each distiller of a source take weights of it, see :meth:`mmkd.distillers.Distiller.start_from`."""
        for name in filter(self.taught_by(source), self):
            each = self[name].methods[source] if isinstance(self[name], Several) else self[name]
            if hasattr(each, 'start_from'):
                each.start_from(model)

    def starts_from(self, source: str) -> bool:
        """Whether any distiller takes weights of a source."""
        methods = (getattr(self[name], 'first', self[name]) for name in filter(self.taught_by(source), self))
        return any(
            getattr(type(each), 'start_from', Distiller.start_from) is not Distiller.start_from for each in methods
        )

    def start_step(self, counts: bool = True) -> int:
        """Count a training step and set the schedules; its number."""
        of_runner = _iteration_of_runner()
        if of_runner is not None and of_runner != self._seen:
            self.iteration = self._seen = of_runner
        elif counts:
            self.iteration += 1
        for weights in (*self._weights.values(), self._factors.values()):
            for weight in weights:
                weight.iteration = max(self.iteration, 0)
        return max(self.iteration, 0)

    def active(self, name: str) -> bool:
        """Whether a distiller's loss can be anything but 0 in this step."""
        if not self._factors[name]():
            return False
        if isinstance(self[name], Several):
            return self[name].active()
        weights = self._weights[name]
        always = bool(getattr(self[name], 'unweighted', False))
        return always or not weights or any(weight() for weight in weights)

    def check_task(self, task: Weight, sources: Mapping[str, Source]) -> None:
        """Raise ConfigError if a distiller reads the student's own losses in a step in which ``task_weight`` leaves them out."""
        for name, distiller in self.items():
            layers = names_of(getattr(distiller, 'training_layers', ()))
            if layers and not self.learner_of[name]:
                teachers = {each: sources[each] for each in self.teacher_of[name]}
                weights, active = [self._factors[name], *self._weights[name]], functools.partial(self.active, name)
                check_task(name, getattr(distiller, 'first', distiller), layers, task, weights, active, teachers)

    def wants(self, source: str) -> bool:
        """Whether any distiller reads a source in this step."""
        return any(
            self.active(name) for name in self if source in self.teacher_of[name] or source == self.learner_of[name]
        )

    def label_weights(self, knowledge: Mapping[str, Taps | None], data_samples: list | None) -> torch.Tensor | None:
        """How much the student's own losses count at each pixel of the labels, (B, H, W); None: fully."""
        found = None
        for name, distiller in self.items():
            source = self.teacher_of[name][0]
            taps = knowledge.get(source)
            if hasattr(distiller, 'label_weights') and taps is not None and self.active(name):
                taps.classes, taps.scale = self._views[source]
                weights = distiller.label_weights(taps, data_samples)
                found = weights if found is None else found * weights
        return found

    def _pair(
        self, name: str, student: Taps, knowledge: Mapping[str, Taps | None]
    ) -> tuple[Taps, Taps | dict[str, Taps]]:
        """Who learns, with gradient, and who is learnt from, without."""

        def taps_of(source: str) -> Taps:
            found = knowledge[source]
            return student if found is None else found

        learner = self.learner_of[name]
        teachers = {
            each: taps_of(each).detach() if each in self._with_gradient else taps_of(each)
            for each in self.teacher_of[name]
        }
        for each, taps in teachers.items():
            taps.classes, taps.scale = self._views[each]
        several = self._learns_from_several(name)
        return taps_of(learner) if learner else student, teachers if several else teachers[self.teacher_of[name][0]]

    def forward(
        self, student: Taps, knowledge: Mapping[str, Taps | None], data_samples: list | None
    ) -> dict[str, torch.Tensor]:
        """All losses, each under ``<name>.<key>``, computed in float32.

        Args:
            student: The student's taps.
            knowledge: The taps of each source that was read in this step; None for the student's own.
            data_samples: The batch's.
        """
        results = {}
        device = next(student.model.parameters()).device
        with torch.autocast(device.type, enabled=False):
            for name, distiller in self.items():
                needed = {*self.teacher_of[name], self.learner_of[name]} - {None}
                if not needed <= knowledge.keys() or not self.active(name):
                    results.update(idle_loss(name, distiller))
                    continue
                losses = self._checked(name, distiller(*self._pair(name, student, knowledge), data_samples))
                results.update(weighted(losses, self._factors[name]()))
        return results

    def schedules(self, name: str) -> dict[str, Weight]:
        """The weights of a distiller that change during the training, by option."""
        weights = {
            option: each for option, each in self[name].named_modules() if isinstance(each, Weight) and each.scheduled
        }
        return weights | ({'factor': self._factors[name]} if self._factors[name].scheduled else {})

    def _checked(self, name: str, losses: Any) -> dict[str, torch.Tensor]:
        """A distiller's losses under their log keys.

        Raises:
            ConfigError: for what cannot be logged, and where nothing would be learnt.
        """
        kind = type(self[name]).__name__
        if not isinstance(losses, Mapping):
            raise ConfigError(
                f'distillers.{name}: {kind} returned a {type(losses).__name__}; expected a dict of losses'
            )
        for key, value in losses.items():
            if 'loss' in key and not key.startswith('loss'):
                raise ConfigError(
                    f"distillers.{name}: key {key!r} contains 'loss' but does not start with it; one that is optimized "
                    f'starts with loss, a statistic does not contain the word'
                )
            if not isinstance(value, torch.Tensor):
                raise ConfigError(f'distillers.{name}: {key!r} is a {type(value).__name__}; expected a tensor')
        if torch.is_grad_enabled() and not any(losses[key].requires_grad for key in losses if key.startswith('loss')):
            raise ConfigError(
                f'distillers.{name}: {kind} returned {sorted(losses)}, of which none is a loss with a gradient: nothing would be '
                f"learnt; a loss's key starts with 'loss'"
            )
        return {f'{name}.{key}': value for key, value in losses.items()}


def idle_loss(name: str, module: nn.Module | None) -> dict[str, torch.Tensor]:
    """What keeps the trained parts of a module in the graph in a step that does not use them, as DDP asks for."""
    trained = [] if module is None else [each for each in module.parameters() if each.requires_grad]
    return {f'{name}.loss': torch.stack([0 * each.sum() for each in trained]).sum()} if trained else {}


def weighted(losses: dict[str, Any], weight: float) -> dict[str, Any]:
    """A model's losses times a weight; statistics stay as they are."""
    if weight == 1:
        return losses

    def times(value: Any) -> Any:
        return [weight * each for each in value] if isinstance(value, (list, tuple)) else weight * value

    return {key: times(value) if 'loss' in key else value for key, value in losses.items()}


def _nothing(learner: Any, teacher: Any) -> None:
    """What a distiller that knows nothing of mmkd has to prepare or set up."""


def _iteration_of_runner() -> int | None:
    return MessageHub.get_current_instance().get_info('iter')


def _adapters_of_0_1(module: Distillers, state: dict, prefix: str) -> None:
    """Checkpoints of 0.1 have ``<name>.adapters.*`` where ``<name>.levels.adapters.*`` is now."""
    for name, distiller in module.items():
        old = f'{prefix}{name}.adapters.'
        if isinstance(getattr(distiller, 'levels', None), LevelPairs):
            for key in [each for each in state if each.startswith(old)]:
                state[f'{prefix}{name}.levels.adapters.{key.removeprefix(old)}'] = state.pop(key)
