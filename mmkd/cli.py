"""What the command-line tools share: options, checks before the first iteration, one-line errors."""

import argparse
import contextlib
import inspect
import json
import mmap
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from mmengine.registry import DATASETS, METRICS, RUNNERS, DefaultScope
from mmengine.runner import Runner

from mmkd.errors import ConfigError, nearest
from mmkd.hosts.configs import read_teacher
from mmkd.hosts.mmengine import config_path
from mmkd.weights import fetch

# mmengine 0.10 imports it again and again
warnings.filterwarnings('ignore', message='pkg_resources is deprecated')


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """The options that every tool of mmdet and mmseg has."""
    parser.add_argument('--work-dir', help='folder for logs and checkpoints; default work_dirs/<config name>')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        metavar='KEY=VALUE',
        help='change entries of the config, as in model.distillers.gid.topk=5',
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help='set by the launcher')


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """Print a ConfigError as one line and exit with status 1; other errors keep their traceback."""
    try:
        yield
    except ConfigError as error:
        sys.exit(f'error: {error}')


def read_config(args: argparse.Namespace) -> Config:
    """The config that the parsed options name, changed as they say."""
    path = args.config
    if path.startswith('mmkd::'):
        path = config_path(path)
    elif not Path(path).is_file():
        found = nearest(path, (str(each) for each in Path().glob('configs/**/*.py')))
        raise ConfigError(f'config {path}: no such file (looked in {Path.cwd()}); the nearest are {found}')
    config = Config.fromfile(path)
    # a teacher that is given by name alone can still get another checkpoint
    if any(key.startswith('model.teacher.') for key in args.cfg_options) and isinstance(config.model.teacher, str):
        config.model.teacher = dict(config=config.model.teacher)
    config.merge_from_dict(args.cfg_options)
    config.launcher = args.launcher
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    config.work_dir = args.work_dir or config.get('work_dir') or str(Path('work_dirs') / Path(path).stem)
    return config


def scale_learning_rate(config: Config) -> None:
    """Switch on mmengine's scaling of the learning rate with the batch size."""
    if 'base_batch_size' not in config.get('auto_scale_lr', {}):
        raise ConfigError('--auto-scale-lr: the config has no auto_scale_lr.base_batch_size to scale from')
    config.auto_scale_lr.enable = True


def check_data(config: Config, parts: Sequence[str]) -> None:
    """Check that the files of the data loaders and evaluators of ``train``, ``val`` or ``test`` are there.

    Raises:
        ConfigError: naming the option, the path, and how to point to another.
    """
    for part in parts:
        if config.get(f'{part}_dataloader'):
            option = f'{part}_dataloader.dataset'
            for name, dataset in _datasets(config[f'{part}_dataloader'].dataset, option):
                _check_dataset(name, dataset)
        evaluator = config.get(f'{part}_evaluator')
        for index, metric in enumerate(evaluator if isinstance(evaluator, list) else [evaluator or {}]):
            path = metric.get('ann_file')
            if (
                path
                and (metric.get('backend_args') or {}).get('backend', 'local') == 'local'
                and not os.path.exists(path)
            ):
                option = f'{part}_evaluator.{index}' if isinstance(evaluator, list) else f'{part}_evaluator'
                raise ConfigError(
                    f'{option}.ann_file: {os.path.abspath(path)} does not exist; {elsewhere(option, "ann_file", path)}'
                )


def elsewhere(option: str, key: str, default: str) -> str:
    """What to do about data that are not where the config has them."""
    return (
        f'put or link the data there (ln -s /path/to/data {default.rstrip("/")}), or name another place in a config of your own '
        f'or with --cfg-options {option}.{key}=/path/to/data/ (train, val, test and the evaluators have their own); to try '
        f'mmkd without any download: make demo, make demo-seg'
    )


def _datasets(dataset: dict, option: str) -> Iterator[tuple[str, dict]]:
    """The data sets inside wrappers such as RepeatDataset and ConcatDataset."""
    if 'dataset' in dataset:
        yield from _datasets(dataset['dataset'], f'{option}.dataset')
    elif 'datasets' in dataset:
        for index, each in enumerate(dataset['datasets']):
            yield from _datasets(each, f'{option}.datasets.{index}')
    else:
        yield option, dataset


def _check_dataset(option: str, dataset: dict) -> None:
    if (dataset.get('backend_args') or {}).get('backend', 'local') != 'local':
        return  # the files are not on this machine's disks
    root = dataset.get('data_root') or ''
    prefixes = dataset.get('data_prefix') or {}
    folders = {f'data_prefix.{key}': prefix for key, prefix in prefixes.items() if isinstance(prefix, str)}
    wanted = {'data_root': '', **folders, 'ann_file': dataset.get('ann_file') or ''}
    for key, value in wanted.items():
        path = os.path.join(root, value)
        if path and not os.path.exists(path):
            advice = elsewhere(option, 'data_root', root or path)
            raise ConfigError(f'{option}.{key}: {os.path.abspath(path)} does not exist; {advice}')
    if str(dataset.get('type', '')).rpartition('.')[2] == 'CocoDataset':
        _check_coco(f'{option}.ann_file', os.path.join(root, dataset['ann_file']), dataset)
    elif 'img_path' in prefixes and not dataset.get('ann_file'):
        _check_label_maps(option, root, dataset)


def _check_label_maps(option: str, root: str, dataset: dict) -> None:
    """Check that a folder for segmentation has images, and that the first one found has its label map."""
    kind = DATASETS.get(dataset['type'] if '.' in dataset['type'] else f'mmseg.{dataset["type"]}')
    options = inspect.signature(kind).parameters if kind is not None else {}
    stock = {key: options[key].default if key in options else None for key in ('img_suffix', 'seg_map_suffix')}
    suffixes = [dataset.get(key) or default for key, default in stock.items()]
    if None in suffixes:  # a data set of another kind
        return
    folder = Path(root, dataset['data_prefix']['img_path'])
    image = next(folder.rglob(f'*{suffixes[0]}'), None)
    if image is None:
        raise ConfigError(
            f'{option}.data_prefix.img_path: {folder.absolute()} has no file that ends with {suffixes[0]!r}; see '
            f"{option}.img_suffix, and mmseg's docs on preparing data sets"
        )
    reads_labels = any(str(step.get('type', '')).endswith('LoadAnnotations') for step in dataset.get('pipeline', ()))
    labels = dataset['data_prefix'].get('seg_map_path')
    if reads_labels and labels is not None:
        path = Path(root, labels, str(image.relative_to(folder)).removesuffix(suffixes[0]) + suffixes[1])
        if not path.is_file():
            advice = 'python tools/dataset_converters/cityscapes.py data/cityscapes, in a clone of mmseg, makes them'
            raise ConfigError(
                f'{option}.data_prefix.seg_map_path: {path.absolute()} does not exist, the label map of {image.name}'
                + (f'; {advice}' if suffixes[1].endswith('_labelTrainIds.png') else f'; see {option}.seg_map_suffix')
            )


def _check_coco(option: str, path: str, dataset: dict) -> None:
    """Check a COCO file without parsing all of it."""
    with open(path, 'rb') as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise ConfigError(f'{option}: {path} is empty')
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        missing = [key for key in ('images', 'annotations', 'categories') if content.find(f'"{key}"'.encode()) < 0]
        if missing or content[:64].lstrip()[:1] != b'{':
            reason = f'it lacks {", ".join(missing)}' if missing else 'it is no JSON object'
            raise ConfigError(f'{option}: {path} is not a COCO annotation file ({reason})')
        start = content.find(b'[', content.find(b'"categories"'))
        try:
            categories, _ = json.JSONDecoder().raw_decode(content[start : start + 2**22].decode('utf-8', 'ignore'))
            names = [category['name'] for category in categories]
        except (ValueError, TypeError, KeyError):
            raise ConfigError(f'{option}: {path} is not a COCO annotation file (cannot read its categories)') from None
    classes = (dataset.get('metainfo') or {}).get('classes')
    if isinstance(classes, str):
        return
    stock = classes is None
    if stock:  # the data set class's own, of which a file may have some
        classes = DATASETS.get('mmdet.CocoDataset').METAINFO['classes']
    unknown = [name for name in classes if name not in names]
    if unknown and stock and len(unknown) == len(classes):
        raise ConfigError(
            f"{option}: {path} has none of COCO's categories; name yours with {option.removesuffix('ann_file')}"
            f'metainfo=dict(classes={tuple(names)}), and set num_classes={len(names)} in the model'
        )
    if unknown and not stock:
        raise ConfigError(
            f'{option}: {path} has no category {unknown[0]!r}, which {option.removesuffix("ann_file")}metainfo.classes '
            f'names; its categories are {names}'
        )


def check_teacher(config: Config) -> None:
    """Check that the teacher's weights are there, before data and models are built."""
    if 'teacher' not in config.model:
        return
    teacher = read_teacher(config.model.teacher)
    if teacher.checkpoint is not None and (config.launcher == 'none' or '://' not in teacher.checkpoint):
        fetch(teacher.checkpoint)


def build_runner(config: Config) -> Runner:
    """mmengine's Runner; on machines without a GPU several processes talk over gloo."""
    if config.launcher == 'pytorch' and not torch.cuda.is_available():
        # mmengine would select a CUDA device first, and hand DDP a device it does not have
        torch.distributed.init_process_group('gloo')
        config.setdefault('model_wrapper_cfg', dict(type='MMDistributedDataParallel', broadcast_buffers=False))
        config.model_wrapper_cfg.device_ids = None
    return RUNNERS.build(config) if 'runner_type' in config else Runner.from_cfg(config)


def end_processes() -> None:
    """Leave the process group, as torch asks for before a process exits.

    The barrier comes first because gloo's threads may still hold the tensors of the last collective operation, and need
    the interpreter's lock to let go of them: while it waits, the lock is free. A thread that asks for it when
    the interpreter is already shutting down aborts the process.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def compare_batch_sizes(runner: Runner) -> None:
    """Say so where the batch is not the one that the learning rate was chosen for."""
    scaling = runner.cfg.get('auto_scale_lr') or {}
    base = scaling.get('base_batch_size')
    accumulated = runner.cfg.optim_wrapper.get('accumulative_counts', 1)
    batch = runner.cfg.train_dataloader.get('batch_size', 1) * runner.world_size * accumulated
    if base and batch != base and not scaling.get('enable'):
        runner.logger.warning(
            f'The learning rate was chosen for a batch of {base} images and this run has {batch}: '
            f'add --auto-scale-lr to scale it by {batch / base:g}.'
        )


def compare_clipped_networks(runner: Runner) -> None:
    """Say so where one norm is clipped over a student and its critics, whose gradients are far larger."""
    critics = {name.partition('.critic')[0] for name, _ in runner.model.named_parameters() if '.critic' in name}
    if critics and runner.cfg.optim_wrapper.get('clip_grad'):
        runner.logger.warning(
            f'optim_wrapper.clip_grad takes one norm over the student and the critics of {", ".join(sorted(critics))}, '
            f"whose gradients can be a thousand times the student's and then leave it next to none: set "
            f'optim_wrapper.clip_grad=None, unless grad_norm in the log stays below max_norm.'
        )


def draw_predictions(config: Config, folder: str) -> None:
    """Have the visualisation hook write pictures of the predictions."""
    hook = config.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise ConfigError('--show-dir: the config has no default_hooks.visualization')
    hook.draw = True
    if hook.type.rpartition('.')[2] == 'DetVisualizationHook':
        hook.test_out_dir = folder
    else:
        config.visualizer.save_dir = folder


def dump_predictions(runner: Runner, file: str) -> None:
    """Have the evaluator write the predictions to a pickle file."""
    if not file.endswith(('.pkl', '.pickle')):
        raise ConfigError(f'--out {file}: expected a name that ends with .pkl or .pickle')
    kind = 'DumpDetResults' if DefaultScope.get_current_instance().scope_name == 'mmdet' else 'DumpResults'
    runner.test_evaluator.metrics.append(METRICS.build(dict(type=kind, out_file_path=file)))
