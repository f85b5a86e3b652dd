"""Checkpoints that survive: written whole or not at all, and found again where the last one is damaged."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import nn

from mmkd.errors import ConfigError, Stopped, first_line
from mmkd.weights import plain_weights, read_file

INTERRUPTED = 'interrupted.pth'


@register_backend('atomic')
class AtomicBackend(LocalBackend):
    """Files of this machine's disks, each of which is at all times either the old or the new one, never a part.

    In a config: ``default_hooks.checkpoint.backend_args=dict(backend='atomic')``; the tools set it.
    """

    def put(self, obj: bytes, filepath: str | Path) -> None:
        path = Path(filepath)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f'.{path.name}.part')
        try:
            with open(part, 'wb') as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name itself
        finally:
            os.close(folder)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = 'utf-8') -> None:
        self.put(obj.encode(encoding), filepath)


class SafeCheckpointHook(CheckpointHook):
    """mmengine's ``CheckpointHook`` that removes an old checkpoint only when the next one is on the disk.

    Each file is written under another name, synced and renamed, ``last_checkpoint`` as well. The tools put it in the place
    of the config's ``CheckpointHook``, whose options it has.
    """

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        if type(self.file_backend) is LocalBackend and self.file_client_args is None:
            self.backend_args = dict(backend='atomic')
            self.file_backend = AtomicBackend()
            for left in Path(self.out_dir).glob('.*.part') if is_main_process() else ():
                left.unlink(missing_ok=True)  # of a process that was killed while it wrote

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        outdated = []
        if self.max_keep_ckpts > 0 and step not in self.keep_ckpt_ids:
            if len(self.keep_ckpt_ids) == self.max_keep_ckpts:
                outdated.append(self.filename_tmpl.format(self.keep_ckpt_ids[0]))
            self.keep_ckpt_ids.append(step)  # its length is bounded
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
        self.save(runner, self.filename_tmpl.format(step), meta)
        for name in [*outdated, INTERRUPTED] if is_main_process() else ():
            self._remove(self.file_backend.join_path(self.out_dir, name))

    def save(self, runner: Runner, name: str, meta: dict) -> None:
        """Write a checkpoint to resume from, and then its name to ``last_checkpoint``.

        Raises:
            Stopped: if it cannot be written; what was written before is as it was.
        """
        runner.call_hook('before_checkpoint')  # of StopAtInvalidLoss
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        with _explained(runner, self.last_ckpt):
            runner.save_checkpoint(
                self.out_dir,
                name,
                self.file_client_args,
                save_optimizer=self.save_optimizer,
                save_param_scheduler=self.save_param_scheduler,
                meta=meta,
                by_epoch=self.by_epoch,
                backend_args=self.backend_args,
                **self.args,
            )
            if is_main_process():
                AtomicBackend().put_text(self.last_ckpt, Path(runner.work_dir, 'last_checkpoint'))

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        backend, outdated = self.file_backend, _Removals(self.file_backend)
        self.file_backend = outdated
        try:
            with _explained(runner, f'the best one, in {self.out_dir}'):
                super()._save_best_checkpoint(runner, metrics)
        finally:
            self.file_backend = backend
        for path in outdated.paths:
            if path not in self.best_paths():
                self._remove(path)

    def best_paths(self) -> list[str]:
        """The checkpoints that are the best so far, one of each score."""
        if len(self.key_indicators) == 1:
            return [str(self.best_ckpt_path)]
        return list(map(str, self.best_ckpt_path_dict.values()))

    def _remove(self, path: str) -> None:
        if self.file_backend.isfile(path):
            self.file_backend.remove(path)
        elif self.file_backend.isdir(path):  # of DeepSpeed
            self.file_backend.rmtree(path)


class _Removals:
    """A file backend that notes what it is to remove, and does the rest."""

    def __init__(self, backend: LocalBackend):
        self._backend = backend
        self.paths: list[str] = []

    def remove(self, path: str) -> None:
        self.paths.append(path)

    rmtree = remove

    def __getattr__(self, name: str):
        return getattr(self._backend, name)


@contextmanager
def _explained(runner: Runner, path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # the second is torch's for a file that it cannot write
        raise Stopped(
            f'iteration {runner.iter + 1}: checkpoint {path} could not be written ({first_line(error)}); those before are as '
            f'they were: make room, or name another --work-dir, and go on with --resume'
        ) from error


def latest_checkpoint(folder: str | Path) -> tuple[Path | None, list[str]]:
    """The checkpoint in a work directory with which a training goes on: the one that was written last and can be read.

    All processes get what the first one finds.

    Returns:
        The file, or None if there is none; and a warning for each that was passed over.

    Raises:
        ConfigError: if none of those that are there can be read.
    """
    found: list = [None]
    if is_main_process():
        try:
            found = [_latest(Path(folder))]
        except ConfigError as error:
            found = [error]
    broadcast_object_list(found)
    if isinstance(found[0], ConfigError):
        raise found[0]
    return found[0]


def _latest(folder: Path) -> tuple[Path | None, list[str]]:
    record = folder / 'last_checkpoint'
    recorded = _recorded(record)
    warnings = [] if recorded or not record.exists() else [f'{record} names no checkpoint that is there.']
    written = [path for path in folder.glob('*.pth') if not path.name.startswith('best_')]  # those hold weights alone
    candidates = dict.fromkeys([*recorded, *sorted(written, key=lambda path: path.stat().st_mtime, reverse=True)])
    for path in candidates:
        if path.is_dir():  # of DeepSpeed, which reads it itself
            return path, warnings
        try:
            check_resumable(path)
        except ConfigError as error:
            warnings.append(f'{error}; it is passed over.')
        else:
            return path, warnings
    if candidates:
        raise ConfigError(f'--resume: {folder} has no checkpoint that can be read; {warnings[0]}')
    return None, warnings


def _recorded(record: Path) -> list[Path]:
    """What ``last_checkpoint`` names, there or, when the whole folder was moved, beside it; empty if neither is."""
    if not record.is_file():
        return []
    named = Path(record.read_text(errors='replace').replace('\0', '').strip())
    return [path for path in (named, record.parent / named.name) if named.name and path.exists()][:1]


def check_resumable(path: Path, what: str = 'checkpoint to resume from') -> dict:
    """The content of a checkpoint that holds a training's whole state.

    Raises:
        ConfigError: if it is damaged, or weights alone.
    """
    content = read_file(path, what)
    plain_weights(content, path, what)
    missing = [key for key in ('meta', 'optimizer', 'message_hub') if key not in content]
    if missing or not {'epoch', 'iter'} <= set(content['meta']):
        raise ConfigError(
            f'{what} {path}: holds weights but no state of a training (it lacks {", ".join(missing or ["meta.iter"])}); start '
            f'a new one from them with --cfg-options load_from={path}'
        )
    return content


def check_continues(content: Mapping, path: str | Path, runner: Runner) -> None:
    """Check that the state of a training is one of this config's: the same weights, and an optimizer of the same kind.

    Raises:
        ConfigError: with the first difference.
    """
    if not isinstance(runner.model, nn.Module):  # a Runner that builds its model later checks as it loads
        return
    model = getattr(runner.model, 'module', runner.model)
    found, own = content['state_dict'], model.state_dict()
    differ = [
        name for name in [*own, *found] if name not in found or name not in own or own[name].shape != found[name].shape
    ]
    begin = f'--resume: {path} is of another training'
    again = 'resume with the config it was written with, or name a new --work-dir'
    if differ:
        shapes = ['not there' if differ[0] not in each else tuple(each[differ[0]].shape) for each in (found, own)]
        raise ConfigError(
            f'{begin}: {len(differ)} weights differ, {differ[0]} is {shapes[0]} in it and {shapes[1]} in this model; {again}'
        )
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    if not isinstance(runner.optim_wrapper, OptimWrapper):  # several optimizers
        return
    groups = runner.optim_wrapper.optimizer.param_groups
    written = content['optimizer'].get('param_groups', [])
    sizes = [[len(group['params']) for group in each] for each in (written, groups)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f'{begin}: its optimizer has {len(written)} groups of {sum(sizes[0])} parameters, and this one {len(groups)} of '
            f'{sum(sizes[1])}; {again}'
        )
    options = [set(each[0]) - {'params', 'initial_lr'} for each in (written, groups)]
    if options[0] != options[1]:
        kind = type(runner.optim_wrapper.optimizer).__name__
        raise ConfigError(
            f'{begin}: its optimizer has the options {sorted(options[0])}, and {kind} has {sorted(options[1])}; {again}'
        )
