"""What an entry of the distillers says beside its method's own options, and what of it cannot be."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from mmkd.distillers.levels import LevelPairs
from mmkd.distillers.several import Several
from mmkd.distillers.uncertainty import Uncertainty
from mmkd.errors import ConfigError
from mmkd.registry import DISTILLERS, build
from mmkd.sources.source import Source
from mmkd.taps import Taps, names_of


def for_each_teacher(name: str, made: nn.Module, options: Mapping, named: Any, combine: Any) -> nn.Module:
    """A method for one teacher, or where several are named one of its kind for each.

    Raises:
        ConfigError: for a combination without several teachers, or one that cannot be.
    """
    if isinstance(named, str) or named is None:
        if combine is not None:
            raise ConfigError(
                f"distillers.{name}: combine={combine!r}: there is one teacher; name several, such as teacher=['a', 'b']"
            )
        return made
    if not named or not all(isinstance(each, str) for each in named) or len(set(named)) < len(named):
        raise ConfigError(f'distillers.{name}: teacher={named!r}: expected a name, or a list of names, each once')
    methods = {each: build(DISTILLERS, f'distillers.{name}', options) for each in named[1:]}
    try:
        return Several({named[0]: made, **methods}, 'mean' if combine is None else combine)
    except ConfigError as error:
        raise ConfigError(f'distillers.{name}: {error}') from None


def make_uncertain(name: str, made: nn.Module, options: Any) -> None:
    """Give all that a method compares the same :class:`Uncertainty`.

    Raises:
        ConfigError: for other options, and for a method that compares no levels.
    """
    levels = [each for each in made.modules() if isinstance(each, LevelPairs)]
    option = f'distillers.{name}.uncertainty'
    if not levels:
        kind = type(getattr(made, 'first', made)).__name__
        raise ConfigError(
            f'{option}: {kind} does not compare features level by level; leave it out, or take a method that does, such as FGD '
            f'or PKD'
        )
    if not isinstance(options, Mapping) or set(options) - {'passes', 'p'}:
        raise ConfigError(f'{option}={options!r}: expected a dict such as dict(passes=5, p=0.1)')
    for each in levels:
        try:
            each.uncertainty = Uncertainty(**options)
        except ConfigError as error:
            raise ConfigError(f'{option}: {error}') from None


def check_view(distiller: Any, source: Source, name: str) -> None:
    """Raise ConfigError if a method takes a teacher's classes or pixels for the student's, and they are not."""
    method = getattr(distiller, 'first', distiller)
    kind = type(method).__name__
    if source.classes is not None and not getattr(distiller, 'maps_classes', False):
        if getattr(method, 'compares_classes', False):
            raise ConfigError(
                f'{kind} compares classes, and those of its teacher are others; use KD for class logits, and for features '
                f'a method that compares no classes'
            )
        heads = [layer for layer in names_of(distiller.teacher_layers, name) if _puts_out_classes(source.model, layer)]
        if heads:
            raise ConfigError(
                f'{kind} reads {heads[0]!r} of a teacher with other classes, and does not know which are which; use KD for class '
                f'logits, and this method for features'
            )
    if source.scale != 1 and not getattr(distiller, 'any_scale', False):
        raise ConfigError(
            f"{kind} needs a teacher that sees images of the size of the student's, found scale={source.scale}; use KD, or a "
            f'method that compares maps, such as CWD'
        )


def refuse_the_same(distiller: Any, learner: Taps, teachers: Taps | dict[str, Taps]) -> None:
    """Raise ConfigError if a network would learn a layer from that layer, and not from others' as well."""
    several = isinstance(teachers, dict) and any(taps.model is not learner.model for taps in teachers.values())
    if several and getattr(distiller, 'one_target', False):
        return
    for name, teacher in (teachers if isinstance(teachers, dict) else {'': teachers}).items():
        if teacher.model is not learner.model:
            continue
        pairs = zip(names_of(distiller.student_layers), names_of(distiller.teacher_layers, name))
        same = [s for s, t in pairs if s == t]
        if same:
            raise ConfigError(
                f'layer {same[0]!r} would be compared with itself; name the layer to learn from, teacher_layer'
            )


def _puts_out_classes(model: nn.Module, layer: str) -> bool:
    """Whether a layer is a head, or a classifier of one."""
    parts = layer.partition(':')[0].split('.')
    return 'conv_seg' in parts or parts[0] in ('bbox_head', 'roi_head')
