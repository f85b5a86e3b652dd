"""What mmkd adds to mmengine's engine: bfloat16 on any device, sharded training, and errors for what cannot work."""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmengine._strategy import DDPStrategy, SingleDeviceStrategy
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import get_world_size, is_distributed
from mmengine.optim import OptimWrapper
from torch import nn

from mmkd.errors import ConfigError
from mmkd.hosts.configs import COPIES, described_sources
from mmkd.hosts.datasets import type_name
from mmkd.registry import OPTIM_WRAPPERS, STRATEGIES
from mmkd.taps import find_layer

WHOLE_STUDENT = 'copies the whole student, of which each process has a part here; use DDP, or another kind of teacher'


@OPTIM_WRAPPERS.register_module()
class Bf16OptimWrapper(OptimWrapper):
    """Trains under autocast to bfloat16, on a CPU as well; the weights stay float32.

    mmengine's ``AmpOptimWrapper`` with ``dtype='bfloat16'`` is the same on a GPU, and refuses a CPU. bfloat16 has
    the range of float32, so that no loss has to be scaled.

    Example:
        >>> optim_wrapper = dict(type='mmkd.Bf16OptimWrapper', optimizer=dict(type='SGD', lr=0.01))
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with super().optim_context(model), torch.autocast(torch.device(get_device()).type, torch.bfloat16):
            yield


@STRATEGIES.register_module()
class ShardedStrategy(DDPStrategy):
    """Each process keeps a part of the weights, gradients and optimizer state of all that is trained (torch's FSDP2).

    For mmengine's ``FlexibleRunner``. The weights of ``parts`` are gathered while each of them runs, those of the rest for
    the whole step. A frozen teacher is whole in each process. Checkpoints hold whole weights
    under the plain names; a training is resumed from those of a sharded one.

    Args:
        parts: Modules of the student that are gathered by themselves, such as ``['backbone.layer3', 'backbone.layer4']``.
            Each has to be called as a module, which mmseg's heads are not. Default: the backbone.
        options: Those of mmengine's ``DDPStrategy``.

    Raises:
        ConfigError: for a part that does not exist or cannot be gathered by itself, a source that is an average of the
            student, and torch before 2.6.

    Example:
        >>> runner_type = 'FlexibleRunner'
        >>> strategy = dict(type='mmkd.ShardedStrategy', parts=['backbone'])
    """

    def __init__(self, *, parts: Sequence[str] = ('backbone',), **options: Any):
        super().__init__(**options)
        self.parts = (parts,) if isinstance(parts, str) else tuple(parts)
        self._gathered: dict[str, dict] = {}

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        try:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard
        except ImportError:
            raise ConfigError(
                f'strategy: ShardedStrategy needs torch 2.6 or later, found {torch.__version__}'
            ) from None
        for name, source in getattr(model, 'sources', {}).items():
            if source.kept is not None and not source.kept.trained:
                raise ConfigError(f'strategy: teacher {name!r} ({type(source).__name__}) {WHOLE_STUDENT}')
        if not is_distributed():  # one process, to test or to try: there is nothing to share
            return SingleDeviceStrategy.convert_model(self, model).to(get_device())
        model = self.convert_model(model.to(get_device()))
        mesh = init_device_mesh(torch.device(get_device()).type, (get_world_size(),))
        for part in self.parts:
            module = find_layer(model, part, 'strategy.parts: ')
            if hasattr(module, 'conv_seg'):
                raise ConfigError(
                    f'strategy.parts: {part!r} is a head of mmseg, which is not called as a module; leave it out'
                )
            fully_shard(module, mesh=mesh)
        return fully_shard(model, mesh=mesh, reshard_after_forward=False)

    def save_checkpoint(self, filename: str, *, save_optimizer: bool = True, **options: Any) -> None:
        if not is_distributed():
            super().save_checkpoint(filename, save_optimizer=save_optimizer, **options)
            return
        from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

        # all processes gather, the first one writes
        whole = _whole()
        self._gathered = {'model': get_model_state_dict(self.model, options=whole)}
        if save_optimizer and hasattr(self, 'optim_wrapper'):
            self._gathered['optimizer'] = get_optimizer_state_dict(
                self.model, self.optim_wrapper.optimizer, options=whole
            )
        super().save_checkpoint(filename, save_optimizer=save_optimizer, **options)
        self._gathered = {}

    def model_state_dict(self) -> dict:
        return self._gathered['model'] if is_distributed() else super().model_state_dict()

    def optim_state_dict(self) -> dict:
        # beside the optimizer's, which is of parts: what mmengine's wrapper keeps
        return {**super().optim_state_dict(), **self._gathered.get('optimizer', {})}

    def load_model_state_dict(self, state_dict: dict, *, strict: bool = False, **options: Any) -> None:
        if not is_distributed():
            super().load_model_state_dict(state_dict, strict=strict, **options)
            return
        from torch.distributed.checkpoint.state_dict import set_model_state_dict

        left = set_model_state_dict(self.model, state_dict, options=_whole(strict=strict))
        if left.missing_keys or left.unexpected_keys:
            self.logger.warning(f'not in the checkpoint: {left.missing_keys}; not of the model: {left.unexpected_keys}')

    def load_optim_state_dict(self, state_dict: dict) -> None:
        if not is_distributed():
            super().load_optim_state_dict(state_dict)
            return
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

        optimizer = self.optim_wrapper.optimizer
        own = {key: state_dict.pop(key) for key in ('state', 'param_groups')}
        set_optimizer_state_dict(self.model, optimizer, own, options=_whole())
        self.optim_wrapper.load_state_dict({**optimizer.state_dict(), **state_dict})


def _whole(**options: Any) -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=True, **options)


def check_engine(config: Config) -> None:
    """Refuse what the engine cannot do, before anything is built.

    Raises:
        ConfigError: for wrappers and strategies that fail, or train something else than the config says.
    """
    on_cpu = get_device() == 'cpu'
    wrapper = type_name(config.get('optim_wrapper') or {})
    if on_cpu and wrapper == 'AmpOptimWrapper':
        raise ConfigError(
            "optim_wrapper.type='AmpOptimWrapper': mmengine's needs an accelerator, and none was found; on a CPU bfloat16 is "
            "optim_wrapper.type='mmkd.Bf16OptimWrapper'"
        )
    strategy = type_name(config.get('strategy') or {})
    if config.get('strategy') and 'runner_type' not in config:
        raise ConfigError(
            f"strategy={strategy}: mmengine's Runner has no strategies and would ignore it; add runner_type='FlexibleRunner'"
        )
    if config.get('compile') and config.get('runner_type') == 'FlexibleRunner':
        raise ConfigError(
            "compile: mmengine's FlexibleRunner ignores it in a config; leave runner_type out, or leave compile out"
        )
    if strategy == 'FSDPStrategy' and on_cpu:
        raise ConfigError(
            "strategy=FSDPStrategy: torch's first FSDP needs an accelerator, and none was found; "
            "strategy=dict(type='mmkd.ShardedStrategy') shards on a CPU as well"
        )
    if strategy == 'DeepSpeedStrategy':
        _check_deepspeed(config)
    copies = [
        option for option, spec in described_sources(config) if isinstance(spec, Mapping) and type_name(spec) in COPIES
    ]
    if strategy in ('FSDPStrategy', 'DeepSpeedStrategy', 'ColossalAIStrategy', 'ShardedStrategy') and copies:
        raise ConfigError(f'strategy={strategy}: {copies[0]} {WHOLE_STUDENT}')
    if type_name(config.get('model_wrapper_cfg') or {}) == 'MMSeparateDistributedDataParallel':
        raise ConfigError(
            'model_wrapper_cfg.type=MMSeparateDistributedDataParallel wraps each part of a model by itself, and a student that '
            "is distilled is trained as a whole; take 'MMDistributedDataParallel', the default"
        )
    checkpointed = config.get('activation_checkpointing') or ()
    for name in (checkpointed,) if isinstance(checkpointed, str) else checkpointed:
        if '.' not in name:
            # torch's reentrant checkpoints, which mmengine takes, look for a gradient in tensors among the arguments alone
            raise ConfigError(
                f'activation_checkpointing: {name!r} takes in the image or a tuple of levels, where mmengine finds no gradient: '
                f"it would not be trained; name modules inside of it that take in a single map, such as 'backbone.layer2'"
            )
    if on_cpu and config.get('launcher', 'none') != 'none':
        named = config.get('sync_bn') or next(_synchronized(config.get('model')), None)
        if named:
            raise ConfigError(
                f'{named}: batch norm is synchronized between GPUs alone, and none was found; use BN, or one process, in which '
                f'mmengine does'
            )


def _check_deepspeed(config: Config) -> None:
    """Raise ConfigError unless DeepSpeed can train a distilled student, which was tried with its release 0.16.9."""
    zero = (config.strategy.get('zero_optimization') or {}).get('stage', 0)
    if zero == 3:
        raise ConfigError(
            "strategy.zero_optimization.stage=3: DeepSpeed's hooks fail on what a student's parts put out; take stage 1 or 2, or "
            "strategy=dict(type='mmkd.ShardedStrategy'), which shards weights as well"
        )
    if importlib.util.find_spec('deepspeed') is None:
        raise ConfigError('strategy=DeepSpeedStrategy: deepspeed is not installed; pip install deepspeed==0.16.9')
    if importlib.util.find_spec('deepspeed.runtime.fp16.onebit') is None:
        raise ConfigError(
            "strategy=DeepSpeedStrategy: this deepspeed has no 1-bit Adam any more, which mmengine's strategy imports; "
            'pip install deepspeed==0.16.9'
        )


def _synchronized(node: Any) -> Iterator[str]:
    """The kinds of synchronized batch norm in a model's config, but for those of frozen teachers, which are in eval mode."""
    if isinstance(node, Mapping):
        if type_name(node) in ('SyncBN', 'MMSyncBN', 'NaiveSyncBN'):
            yield type_name(node)
        node = [value for key, value in node.items() if key != 'teacher']
    if isinstance(node, (list, tuple)):
        for each in node:
            yield from _synchronized(each)
