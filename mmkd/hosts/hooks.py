"""Hooks that the tools register with mmengine's Runner; no config names them."""

import json
import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from mmengine.dist import all_reduce, broadcast_object_list
from mmengine.fileio import get
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner
from torch import nn

from mmkd.distill import Distilled
from mmkd.errors import Stopped
from mmkd.hosts.checkpoints import AtomicBackend
from mmkd.taps import Taps, tensors

NEVER = 2**40  # an iteration that no training gets to


class StopAtInvalidLoss(Hook):
    """End a training whose loss is infinite or no number, before a checkpoint of it is written.

    Every term of the loss, each level of its own, is looked at in every iteration, on the device and without waiting for
    it; the result is read now and then. The error names the first iteration and process in which a term was not finite,
    and these terms; ``invalid_loss.json`` in the work directory has the images of that batch, and of all layers that are
    compared the statistics in the batch at hand when it was found.

    Args:
        interval: The number of iterations between two looks at the result; there is one in the last iteration, and before
            each checkpoint. Each waits for the device once.
        skip: Leave out steps whose losses or gradients are not finite, up to so many in a row. With more than 0, the default,
            every step waits for the device. In float16 torch's gradient scaler leaves out steps by itself, also such whose
            losses are finite, which are not counted.

    Raises:
        Stopped: by all processes together.
    """

    def __init__(self, interval: int = 50, skip: int = 0):
        self.interval, self.skip = interval, skip
        self.skipped = 0
        self._iteration = 0
        self._images: deque[tuple[int, list[str]]] = deque(maxlen=max(interval, 1) + 1)
        self._found: dict[tuple[str, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        self._batch: dict | None = None
        self._scale = 0.0

    def before_train(self, runner: Runner) -> None:
        model = getattr(runner.model, 'module', runner.model)
        model.register_forward_hook(self._look)
        if self.skip:
            runner.optim_wrapper.optimizer.register_step_pre_hook(self._leave_out)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        self._iteration, self._batch = runner.iter + 1, data_batch
        samples = data_batch.get('data_samples') if isinstance(data_batch, dict) else None
        names = [str(getattr(each, 'img_path', '')) for each in samples] if isinstance(samples, (list, tuple)) else []
        self._images.append((self._iteration, names))

    def _look(self, module: nn.Module, inputs: tuple, output: object) -> None:
        if not module.training or not isinstance(output, dict):
            return
        terms = dict(_terms(output))
        if not terms:
            return
        values = torch.stack([value.detach().float().mean() for value in terms.values()])
        names = tuple(terms)
        if names not in self._found:
            self._found[names] = (torch.full_like(values, NEVER, dtype=torch.long), values)
        first, worst = self._found[names]
        new = ~torch.isfinite(values) & (first == NEVER)
        self._found[names] = (torch.where(new, self._iteration, first), torch.where(new, values, worst))

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        scaler = getattr(runner.optim_wrapper, 'loss_scaler', None) if self.skip else None
        if scaler is not None and scaler.is_enabled():
            self._leave_out_with(scaler)
        if self.every_n_train_iters(runner, self.interval) or self.is_last_train_iter(runner):
            self.before_checkpoint(runner)

    def before_checkpoint(self, runner: Runner) -> None:
        """Stop, on all processes, if a term was not finite on any."""
        first = min((int(each.min()) for each, _ in self._found.values()), default=NEVER)
        seen = torch.tensor(first * runner.world_size + runner.rank)
        all_reduce(seen, 'min')
        first, process = divmod(int(seen), runner.world_size)
        if first == NEVER:
            return
        found = [None]
        if runner.rank == process:
            terms = {
                name: float(value)
                for names, (iterations, values) in self._found.items()
                for name, iteration, value in zip(names, iterations.tolist(), values)
                if iteration == first
            }
            found = [dict(iteration=first, process=process, terms=terms, images=dict(self._images).get(first, []))]
        broadcast_object_list(found, src=process)
        # all processes take part, because losses are averaged over them
        report: dict = {**found[0], 'layers': self._statistics(runner)}
        path = Path(runner.work_dir) / 'invalid_loss.json'
        if runner.rank == process:
            AtomicBackend().put_text(json.dumps(report, indent=1), path)
        invalid = ', '.join(f'{name} is {value:g}' for name, value in report['terms'].items())
        raise Stopped(
            f'iteration {first}, process {process}: {invalid}; the training was stopped, and the images and layers are in '
            f"{path}: lower the learning rate or that loss's weight, and go on with --resume from the checkpoint before"
        )

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        for name, value in checkpoint['state_dict'].items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise Stopped(
                    f'iteration {self._iteration}: {name} holds NaN or infinite values, and no checkpoint of it is written; '
                    f'lower the learning rate, and go on with --resume from the one before'
                )

    def _leave_out(self, optimizer: torch.optim.Optimizer, inputs: tuple, options: dict) -> None:
        parameters = [each for group in optimizer.param_groups for each in group['params'] if each.grad is not None]
        norms = torch.stack(torch._foreach_norm([each.grad for each in parameters]))
        seen = [first != NEVER for first, _ in self._found.values()]  # a loss may be invalid and its gradient none
        invalid = (
            (~torch.isfinite(norms))
            .any()
            .logical_or(torch.cat(seen).any() if seen else torch.zeros_like(norms[0], dtype=torch.bool))
            .long()
        )
        all_reduce(invalid, 'max')
        if not invalid:
            self.skipped = 0
            return
        if self._skip_step():
            for each in parameters:
                each.grad = None  # a parameter without gradient is left as it is

    def _skip_step(self) -> bool:
        """Count a step that is left out, and forget what was found in it, unless there are too many in a row."""
        self.skipped += 1
        if self.skipped > self.skip:
            return False  # what the loss shows in the next look ends the training
        self._found.clear()
        images = ', '.join(self._images[-1][1]) if self._images else 'unknown'
        print_log(
            f'iteration {self._iteration}: losses or gradients are not finite, the step is left out ({self.skipped} in a row; '
            f'images {images})',
            logger='current',
            level=logging.WARNING,
        )
        return True

    def _leave_out_with(self, scaler: torch.amp.GradScaler) -> None:
        """What the scaler has left out, which does so without a call of the optimizer: it has lowered its scale."""
        before, self._scale = self._scale, scaler.get_scale()
        if self._scale >= before:
            return
        invalid = torch.tensor(int(any((first != NEVER).any() for first, _ in self._found.values())))
        all_reduce(invalid, 'max')
        if invalid:  # else its scale was too large, which says nothing of the losses
            self._skip_step()

    def _statistics(self, runner: Runner) -> dict:
        """Of the layers that are compared, in student and teachers, over the batch at hand."""
        model = getattr(runner.model, 'module', runner.model)
        if not isinstance(model, Distilled):
            return {}
        with torch.no_grad():
            data = model.data_preprocessor(self._batch, True)
            inputs, samples = data['inputs'], data['data_samples']
            read = {name: source.read(model, inputs, samples)[0] for name, source in model.sources.items()}
            found = {name: taps for name, taps in read.items() if taps is not None}  # an Own is the student
            own = [layer for name in read.keys() - found.keys() for layer in model.sources[name].layers]
            layers = dict.fromkeys((*model.distillers.student_layers, *own))
            with Taps(model, layers, images=len(inputs)) as student:
                model.forward(inputs, samples, mode='loss')
        return {
            name: {layer: [_describe(each) for each in tensors(taps[layer])] for layer in taps if taps.calls[layer]}
            for name, taps in {'student': student, **found}.items()
        }


def _terms(losses: dict) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in losses.items():
        if 'loss' in name:
            levels = [value] if isinstance(value, torch.Tensor) else value
            for level, each in enumerate(levels):
                if isinstance(each, torch.Tensor) and each.numel():
                    yield (name if len(levels) == 1 else f'{name}[{level}]'), each


def _describe(tensor: torch.Tensor) -> dict:
    finite = tensor[torch.isfinite(tensor)].float()
    shown = dict(least=finite.min(), mean=finite.mean(), most=finite.max()) if finite.numel() else {}
    return dict(
        shape=list(tensor.shape),
        invalid=tensor.numel() - finite.numel(),
        **{key: float(each) for key, each in shown.items()},
    )


class SavePictures(Hook):
    """Draw each prediction of a test with the Runner's visualizer, and write it under its image's name.

    Args:
        folder: Where to; below it the files lie as the images lie in the data set's own folder.

    Attributes:
        written: How many there are.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser().absolute()
        self.written = 0

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: Sequence | None = None
    ) -> None:
        import mmcv  # what mmdet and mmseg need anyway; the core does not

        dataset = runner.test_dataloader.dataset
        prefixes = getattr(dataset, 'data_prefix', None) or {}
        root = prefixes.get('img_path', prefixes.get('img', ''))
        for sample in outputs or ():
            name = Path(sample.img_path).name
            if root and Path(root) in Path(sample.img_path).parents:
                name = os.path.relpath(sample.img_path, root)
            content = get(sample.img_path, backend_args=getattr(dataset, 'backend_args', None))
            image = mmcv.imfrombytes(content, channel_order='rgb')
            runner.visualizer.add_datasample(name, image, data_sample=sample, out_file=str(self.folder / name))
            self.written += 1
