"""Where a config names classes, in which registry each is looked up, and which options each takes."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

from mmengine import registry as registries
from mmengine.config import Config
from mmengine.registry import Registry

from mmkd.hosts.configs import described_sources, numbered, source_kind
from mmkd.hosts.datasets import named_class
from mmkd.registry import DISTILLERS, SOURCES

PARTS = ('train', 'val', 'test')
# what of a model is built as a whole from its own dict; others, such as norm_cfg, have entries for who reads them
COMPONENTS = {
    *('data_preprocessor', 'backbone', 'neck', 'rpn_head', 'roi_head', 'bbox_head', 'mask_head', 'decode_head'),
    *('auxiliary_head', 'loss_cls', 'loss_bbox', 'loss_decode', 'loss_centerness', 'loss_dfl'),
}
# option, registry, the class where none is named, and what the dict has for who builds it
SIMPLE: tuple[tuple[str, Registry, str | None, tuple[str, ...]], ...] = (
    ('optim_wrapper', registries.OPTIM_WRAPPERS, 'OptimWrapper', ('optimizer', 'constructor', 'paramwise_cfg')),
    ('optim_wrapper.optimizer', registries.OPTIMIZERS, None, ()),
    ('param_scheduler', registries.PARAM_SCHEDULERS, None, ('convert_to_iter_based',)),
    ('default_hooks.*', registries.HOOKS, None, ('priority',)),
    ('custom_hooks', registries.HOOKS, None, ('priority',)),
    ('visualizer', registries.VISUALIZERS, 'Visualizer', ()),
    ('visualizer.vis_backends', registries.VISBACKENDS, None, ()),
    ('log_processor', registries.LOG_PROCESSORS, 'LogProcessor', ()),
    ('train_cfg', registries.LOOPS, None, ('by_epoch',)),
    ('val_cfg', registries.LOOPS, 'ValLoop', ()),
    ('test_cfg', registries.LOOPS, 'TestLoop', ()),
)
ALIKE = 0.85
"""How like an option another name has to be to be taken for a slip of the pen, where nobody knows what is read."""


class Place(NamedTuple):
    """A dict of a config from which something is built."""

    option: str
    spec: Mapping
    registry: Registry
    default: str | None = None
    """The class that is built where the dict names none."""
    extra: frozenset[str] = frozenset()
    """What the dict may have beside the class's own options, for who builds it."""

    def kind(self, scope: str | None) -> Any:
        """The class or function; None where there is no such thing."""
        spec = (
            self.spec
            if self.spec.get('type') is not None or self.default is None
            else {**self.spec, 'type': self.default}
        )
        return named_class(spec, self.registry, None if self.registry.scope == 'mmkd' else scope)


def places(config: Config) -> Iterator[Place]:
    """All of a config that the Runner and mmkd build from classes it names, outermost first."""
    yield from _models(config)
    for part in PARTS:
        yield from _data(config, part)
    for option, registry, default, extra in SIMPLE:
        for name, spec in _at(config, option):
            if option != 'optim_wrapper' or 'optimizer' in spec:  # several by name have a constructor of their own
                yield Place(name, spec, registry, default, frozenset(extra))


def _at(config: Config | Mapping, option: str) -> Iterator[tuple[str, Mapping]]:
    """The dicts at an option: itself, those of a list, or with ``*`` those of a dict."""
    parent, _, last = option.rpartition('.')
    node: Any = config._cfg_dict if isinstance(config, Config) else config
    for key in parent.split('.') if parent else ():
        node = node.get(key) if isinstance(node, Mapping) else None
    if not isinstance(node, Mapping):
        return
    found = node if last == '*' else {last: node.get(last)}
    for key, value in found.items():
        for name, each in [(key, value), *numbered(key, value)]:
            if isinstance(each, Mapping):
                yield f'{parent}.{name}' if parent else name, each


def _models(config: Config) -> Iterator[Place]:
    model = config.get('model')
    if not isinstance(model, Mapping):
        return
    yield from _model('model', model)
    student = model.get('student')
    if isinstance(student, Mapping):
        yield from _model('model.student', student)
    for option, source in described_sources(config):
        if isinstance(source, Mapping):
            yield Place(option, source, SOURCES, 'Teacher')
            if isinstance(source.get('config'), Mapping) and source_kind(source) in ('Teacher', 'Peer'):
                yield from _model(f'{option}.config', source['config'])
    for option, entry in _at(config, 'model.distillers.*'):
        yield Place(
            option, entry, DISTILLERS, extra=frozenset({'teacher', 'learner', 'combine', 'uncertainty', 'factor'})
        )


def _model(option: str, spec: Mapping) -> Iterator[Place]:
    of_head = {'bg_cls_weight'} if option.rpartition('.')[2].startswith('loss') else ()  # DETR's, which takes it out
    yield Place(option, spec, registries.MODELS, extra=frozenset(of_head))
    for key in spec:
        if key in COMPONENTS:
            for name, each in _at(spec, key):
                yield from _model(f'{option}.{name}', each)


def _data(config: Config, part: str) -> Iterator[Place]:
    for name, spec in _at(config, f'{part}_dataloader.dataset'):
        yield from _dataset(name, spec)
    for key in ('sampler', 'batch_sampler'):
        for name, spec in _at(config, f'{part}_dataloader.{key}'):
            yield Place(name, spec, registries.DATA_SAMPLERS)
    for name, spec in _at(config, f'{part}_evaluator'):
        if 'metrics' in spec:
            yield Place(name, spec, registries.EVALUATOR, 'Evaluator')
            yield from (Place(f'{name}.{key}', each, registries.METRICS) for key, each in _at(spec, 'metrics'))
        else:
            yield Place(name, spec, registries.METRICS)


def _dataset(option: str, spec: Mapping) -> Iterator[Place]:
    yield Place(option, spec, registries.DATASETS)
    for key in ('dataset', 'datasets'):
        for name, each in _at(spec, key):
            yield from _dataset(f'{option}.{name}', each)
    for name, each in _at(spec, 'pipeline'):
        yield Place(f'{option}.{name}', each, registries.TRANSFORMS)


class Options(NamedTuple):
    """The options that a class or function takes."""

    names: set[str]
    sure: bool
    """False where the class takes any and hands them on to what it inherits from, as far as one can tell."""

    def unknown(self, key: str) -> bool:
        """Whether there is no such option; where that is not sure, whether the key is one's that is misspelt."""
        if key in self.names:
            return False
        return self.sure or bool(get_close_matches(key, self.names, cutoff=ALIKE))


def options_of(kind: Callable) -> Options | None:
    """The options that a class or function takes; None where it takes any."""
    found: set[str] = set()
    classes = [each for each in kind.__mro__ if '__init__' in vars(each)] if inspect.isclass(kind) else [kind]
    for index, each in enumerate(classes):
        try:
            parameters = inspect.signature(each.__init__ if inspect.isclass(each) else each).parameters.values()
        except ValueError:  # of C
            return None
        found |= {one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
        if not any(one.kind is one.VAR_KEYWORD for one in parameters):
            return Options(found - {'self'}, sure=index == 0)
    return None
