"""Hooks that the tools register with mmengine's Runner; no config names them."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.fileio import get
from mmengine.hooks import Hook
from mmengine.runner import Runner


class StopAtInvalidLoss(Hook):
    """End a training whose loss is infinite or no number.

    Args:
        interval: The number of iterations between two looks; the last iteration's loss is looked at as well. Each waits
            for the device once.
    """

    def __init__(self, interval: int = 50):
        self.interval = interval

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        if not self.every_n_train_iters(runner, self.interval) and not self.is_last_train_iter(runner):
            return
        values = {name: torch.as_tensor(value) for name, value in (outputs or {}).items() if 'loss' in name}
        if 'loss' in values and not torch.isfinite(values['loss']).all():
            invalid = [
                f'{name} is {value.sum():g}' for name, value in values.items() if not torch.isfinite(value).all()
            ]
            raise FloatingPointError(f'iteration {runner.iter + 1}: {", ".join(invalid)}; the training was stopped')


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
