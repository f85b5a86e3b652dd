"""What the command-line tools share: options, reading the config, one-line errors, building the Runner."""

import argparse
import contextlib
import datetime
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.dist import init_dist, is_distributed
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import METRICS, RUNNERS, DefaultScope
from mmengine.runner import Runner
from mmengine.utils.dl_utils import set_multi_processing
from mmengine.visualization import Visualizer
from torch import nn

from mmkd.checks import check_changes, check_folder, check_kinds, heads_have_the_datas_classes
from mmkd.errors import ConfigError, Stopped, describe, first_line, nearest
from mmkd.hosts.checkpoints import SafeCheckpointHook, check_resumable, latest_checkpoint
from mmkd.hosts.config_files import read_config_file
from mmkd.hosts.configs import check_named_configs, fill_in_class_names, name_classes, resolve_files
from mmkd.hosts.hooks import SavePictures, StopAtInvalidLoss
from mmkd.hosts.interrupts import StopOnSignal
from mmkd.hosts.mmengine import config_path
from mmkd.hosts.randomness import SeedIterations, seeded_loader
from mmkd.weights import fetch, fetchable, trust_checkpoints

# mmengine 0.10 imports it again and again
warnings.filterwarnings('ignore', message='pkg_resources is deprecated')


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """The options that every tool of mmdet and mmseg has."""
    parser.add_argument('--work-dir', help='folder for logs and checkpoints; default work_dirs/<config name>')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=_Changes,
        default={},
        metavar='KEY=VALUE',
        help='change entries of the config, as in model.distillers.gid.topk=5',
    )
    parser.add_argument(
        '--trust-checkpoint',
        action='store_true',
        help='read checkpoints that hold more than data, which may run code; see SECURITY.md',
    )
    add_debug_option(parser)
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help='set by the launcher')


def add_debug_option(parser: argparse.ArgumentParser) -> None:
    """``--debug``, for tools that have not all of the common options."""
    parser.add_argument('--debug', action='store_true', help='show the traceback of an error')


class _Changes(DictAction):
    """KEY=VALUE pairs, with errors of argparse's for what is none."""

    def __call__(self, parser, namespace, values, option_string=None):
        for each in values:
            if not each.partition('=')[1] or not each.partition('=')[0].strip():
                raise argparse.ArgumentError(self, f'expected KEY=VALUE, found {each!r}')
            try:
                super().__call__(parser, namespace, [each], option_string)
            except (AssertionError, ValueError) as error:
                raise argparse.ArgumentError(
                    self, f'{each!r}: {error}; quote values that hold spaces or brackets'
                ) from error


class Begun(Hook):
    """Knows in which iteration of a training or batch of a test the Runner is; 0 before the first."""

    def __init__(self):
        self.step = 0

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self.step = runner.iter + 1

    def before_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self.step = batch_idx + 1


@contextlib.contextmanager
def clear_errors(debug: bool = False) -> Iterator[Begun]:
    """Print errors as one line, the last on the screen, and exit with status 1.

    Before the first iteration an error is a user's mistake, most likely, whoever raises it: its traceback is shown with
    ``debug`` alone. What is raised later keeps it, unless it is a ConfigError or one that says what stopped the training.

    Yields:
        The hook that tells the two apart, to be registered with the Runner.
    """
    begun = Begun()
    try:
        yield begun
    except Exception as error:
        known = isinstance(error, (ConfigError, Stopped))
        if debug or (begun.step and not known):
            traceback.print_exc()
        line = first_line(error) if known else describe(error)
        if begun.step and not known:
            line += f' (in iteration {begun.step})'
        elif not known and not debug:
            line += '; --debug shows the traceback'
        sys.stdout.flush()  # so that the line is the last
        sys.exit(f'error: {" ".join(line.split())}')


def read_config(args: argparse.Namespace) -> Config:
    """The config that the parsed options name, changed as they say."""
    path = args.config
    if args.trust_checkpoint:
        trust_checkpoints()
    if path.startswith('mmkd::'):
        path = config_path(path)
    elif not Path(path).is_file():
        found = nearest(path, (str(each) for each in Path().glob('configs/**/*.py')))
        raise ConfigError(f'config {path}: no such file (looked in {Path.cwd()}); the nearest are {found}')
    config = read_config_file(path)
    name_classes(config._cfg_dict)
    model = config.get('model')
    if not isinstance(model, Mapping) or not model:
        raise ConfigError(
            f'config {path}: ' + ('it has no model' if not model else f'model={model!r}: expected a dict')
        )
    resolve_files(config)
    changed = [key for key in args.cfg_options if key.startswith('model.teacher.')]
    if changed and 'teacher' not in model:
        raise ConfigError(f'--cfg-options {changed[0]}: {path} trains a plain model, which has no teacher')
    # a teacher that is given by name alone can still get another checkpoint
    if changed and isinstance(config.model.teacher, str):
        config.model.teacher = dict(config=config.model.teacher)
    check_changes(config, args.cfg_options)
    try:
        config.merge_from_dict(args.cfg_options)
    except (KeyError, TypeError) as error:  # a list's entry that is not there, an entry of what has none
        raise ConfigError(f'--cfg-options: {describe(error)}') from error
    check_kinds(config)
    check_named_configs(config)
    fill_in_class_names(config)
    config.launcher = args.launcher
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    config.work_dir = args.work_dir or config.get('work_dir') or str(Path('work_dirs') / Path(path).stem)
    return config


def check_work_dir(args: argparse.Namespace, config: Config) -> None:
    """Check that the Runner can write to its folder.

    Raises:
        ConfigError: naming the option.
    """
    check_folder(config.work_dir, '--work-dir' if args.work_dir else 'work_dir')


def was_trained(config: Config) -> bool:
    """Whether the work directory is that of a training that began before."""
    folder = Path(config.work_dir)
    # the Runner makes vis_data before there is a model; a .json is of what was logged in training
    return bool(config.get('resume')) or any(folder.glob('*/vis_data/*.json')) or (folder / 'last_checkpoint').exists()


def scale_learning_rate(config: Config) -> None:
    """Switch on mmengine's scaling of the learning rate with the batch size."""
    if 'base_batch_size' not in (config.get('auto_scale_lr') or {}):
        raise ConfigError('--auto-scale-lr: the config has no auto_scale_lr.base_batch_size to scale from')
    config.auto_scale_lr.enable = True
    accumulated = config.optim_wrapper.get('accumulative_counts', 1)
    if accumulated > 1:  # mmengine scales by the images of one forward pass, and a step has so many times as many
        config.auto_scale_lr.base_batch_size /= accumulated


# where each launcher tells a process its number, how many there are and its number on this machine; what else has to be set, and
# what sets it
LAUNCHERS = dict(
    pytorch=(
        ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'),
        ('MASTER_ADDR', 'MASTER_PORT'),
        'torchrun, as tools/dist_train.sh does',
    ),
    slurm=(
        ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID'),
        ('SLURM_STEP_NODELIST', 'SLURM_JOB_ID'),
        'srun, as tools/slurm_train.sh does',
    ),
    mpi=(
        ('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK'),
        ('MASTER_ADDR',),
        "Open MPI's mpirun -x MASTER_ADDR",
    ),
)


def join_processes(config: Config) -> None:
    """Start the process group as the Runner would, so that checks can use it; on machines without a GPU, over gloo.

    Raises:
        ConfigError: where the launcher did not start this process.
    """
    launcher = config.launcher
    if launcher == 'none' or is_distributed():
        return
    numbers, others, starter = LAUNCHERS[launcher]
    missing = [name for name in (*numbers, *others) if name not in os.environ]
    if missing:
        raise ConfigError(
            f'--launcher {launcher}: {", ".join(missing)} not set in the environment; start with {starter}, or leave '
            f'--launcher out for one process'
        )
    for name, given in zip(('RANK', 'WORLD_SIZE', 'LOCAL_RANK'), numbers):
        os.environ[name] = os.environ[given]
    environment = config.get('env_cfg') or {}
    options = environment.get('dist_cfg') or {}
    if launcher == 'slurm':
        hosts = subprocess.check_output(['scontrol', 'show', 'hostnames', os.environ['SLURM_STEP_NODELIST']], text=True)
        os.environ.setdefault('MASTER_ADDR', hosts.split()[0])
        # two jobs on a machine need two ports
        os.environ.setdefault('MASTER_PORT', str(options.get('port', 20000 + int(os.environ['SLURM_JOB_ID']) % 10000)))
    os.environ.setdefault('MASTER_PORT', '29500')
    set_multi_processing(**(environment.get('mp_cfg') or {}), distributed=True)
    if torch.cuda.is_available():
        init_dist(launcher, **options)
    else:  # mmengine would select a CUDA device first
        wait = {'timeout': datetime.timedelta(seconds=options['timeout'])} if 'timeout' in options else {}
        torch.distributed.init_process_group('gloo', **wait)


def build_runner(config: Config) -> Runner:
    """mmengine's Runner."""
    join_processes(config)
    if config.launcher != 'none' and not torch.cuda.is_available():
        # mmengine would hand DDP a device it does not have
        config.setdefault('model_wrapper_cfg', dict(type='MMDistributedDataParallel', broadcast_buffers=False))
        config.model_wrapper_cfg.device_ids = None
    drop_idle_schedulers(config)
    return RUNNERS.build(config) if 'runner_type' in config else Runner.from_cfg(config)


def drop_idle_schedulers(config: Config) -> None:
    """Leave out schedulers that begin when training is over: they never act, and mmengine cannot build them."""
    training, schedulers = config.get('train_cfg') or {}, config.get('param_scheduler')
    if not isinstance(schedulers, list):
        return

    def acts(scheduler: Mapping) -> bool:
        length = training.get('max_epochs' if scheduler.get('by_epoch', True) else 'max_iters')
        return length is None or 'end' in scheduler or scheduler.get('begin', 0) < length

    config.param_scheduler = [each for each in schedulers if acts(each)]


def bare_model(runner: Runner) -> nn.Module | None:
    """The Runner's model without the wrapper that makes it train on several devices; None where it is built later."""
    model = getattr(runner.model, 'module', runner.model)
    return model if isinstance(model, nn.Module) else None


def watch(runner: Runner, stop: StopOnSignal | None = None) -> None:
    """Have a training survive what befalls it, and stop when it cannot work.

    The hooks of :mod:`mmkd.hosts` are registered unless the config has them; its ``CheckpointHook`` becomes a
    :class:`mmkd.hosts.checkpoints.SafeCheckpointHook`. mmdet's ``NumClassCheckHook`` compares all modules that have
    ``num_classes`` with the data's classes. ``stop`` is a hook that listens already.
    """
    config, there = runner.cfg, {type(hook).__name__ for hook in runner.hooks}
    for hook in runner.hooks:
        if type(hook) is CheckpointHook:
            hook.__class__ = SafeCheckpointHook
    if not there & {'CheckInvalidLossHook', 'StopAtInvalidLoss'}:
        runner.register_hook(StopAtInvalidLoss())
    if 'StopOnSignal' not in there:
        runner.register_hook(stop or StopOnSignal())
    detects = config.get('default_scope') == 'mmdet' and heads_have_the_datas_classes(config)
    if detects and 'NumClassCheckHook' not in there:
        runner.register_hook(dict(type='NumClassCheckHook'))


def resume(config: Config, checkpoint: str | None = None) -> tuple[dict | None, list[str]]:
    """Have a training go on from a checkpoint, or with ``'auto'`` from the last one in the work directory that can be read.

    Without ``checkpoint`` the config decides: ``resume=True`` goes on from ``load_from`` or from the last one.

    Returns:
        What the checkpoint holds, None where nothing can be said of it before it is loaded; and warnings for the log.

    Raises:
        ConfigError: if the checkpoint holds no state of a training.
    """
    warnings: list[str] = []
    path: Path | None
    if checkpoint is None and config.get('resume'):
        # FlexibleRunner takes a path as well
        checkpoint = config.resume if isinstance(config.resume, str) else config.get('load_from') or 'auto'
    if checkpoint is None:
        return None, []
    if checkpoint == 'auto':
        path, warnings = latest_checkpoint(config.work_dir)
        if path is None:
            config.resume = False
            return None, [*warnings, f'--resume: {config.work_dir} has no checkpoint; the training begins anew.']
    elif fetchable(checkpoint):
        path = fetch(checkpoint, '--resume', missing='', unreachable='name another')
    else:  # of another file backend of mmengine's
        path = None
    config.resume, config.load_from = True, str(path or checkpoint)
    if path is None or path.is_dir():  # the second is DeepSpeed's
        return None, warnings
    content = check_resumable(path, '--resume')
    if content['meta'].get('seed') is not None:
        config.setdefault('randomness', {}).seed = content['meta']['seed']
    return content, warnings


def repeatable(runner: Runner, done: int) -> None:
    """Have a training's random numbers depend on the iteration alone; ``done`` were trained before."""
    if isinstance(runner._train_dataloader, Mapping):
        runner._train_dataloader = seeded_loader(runner._train_dataloader, runner.seed, done)
        runner.register_hook(SeedIterations(runner.seed))


def end_processes() -> None:
    """Leave the process group, as torch asks for before a process exits.

    It waits first because gloo's threads may still hold the tensors of the last collective operation, and need the
    interpreter's lock to let go of them: while it waits, the lock is free. A thread that asks for it when the interpreter is
    already shutting down aborts the process. The barrier alone is not enough: another thread than the one that serves it
    may be the late one.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        time.sleep(0.2)
        torch.distributed.destroy_process_group()


def draw_predictions(runner: Runner, folder: str) -> SavePictures:
    """Have every prediction drawn and written to a folder."""
    if runner.world_size > 1:
        raise ConfigError('--show-dir: mmengine draws in one process alone; run the test without a launcher')
    if type(runner.visualizer).add_datasample is Visualizer.add_datasample:
        raise ConfigError(
            f'--show-dir: visualizer={type(runner.visualizer).__name__} draws no predictions; set visualizer=dict(type='
            f"'DetLocalVisualizer' or 'SegLocalVisualizer', name='visualizer')"
        )
    hook = SavePictures(folder)
    runner.register_hook(hook)
    return hook


def check_outputs(args: argparse.Namespace) -> None:
    """Check that the pickle file and the folder can be written to which ``--out`` and ``--show-dir`` name.

    Raises:
        ConfigError: naming the option.
    """
    if args.out:
        if not args.out.endswith(('.pkl', '.pickle')):
            raise ConfigError(f'--out {args.out}: expected a name that ends with .pkl or .pickle')
        check_folder(os.path.dirname(args.out) or '.', '--out')
    if args.show_dir:
        check_folder(args.show_dir, '--show-dir')


def dump_predictions(runner: Runner, file: str) -> None:
    """Have the evaluator write the predictions to a pickle file."""
    kind = 'DumpDetResults' if DefaultScope.get_current_instance().scope_name == 'mmdet' else 'DumpResults'
    runner.test_evaluator.metrics.append(METRICS.build(dict(type=kind, out_file_path=file)))
