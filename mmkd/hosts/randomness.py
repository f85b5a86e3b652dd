"""Random numbers that depend on the seed, the process and the iteration alone, so that a resumed training repeats none.

mmengine seeds each process and each data worker once. What a training draws after a resume is then not what it would have
drawn, and to find its place among the data it has to load all that was trained on. Here every sample and every iteration
is seeded by its number: a training that is resumed goes on at once with the data, the augmentation and the dropout of the
one that was never stopped, whatever the number of its data workers.
"""

import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import DATA_SAMPLERS, FUNCTIONS
from mmengine.runner import IterBasedTrainLoop, Runner
from torch.utils.data import BatchSampler, Sampler, get_worker_info

from mmkd.hosts.interrupts import heed_parent_alone
from mmkd.hosts.samples import name_samples

START_WORKER = 'mmkd_start_worker'  # mmengine's FlexibleRunner takes a name alone
SAMPLES, ITERATIONS = range(2)  # so that both have other numbers


def seed_all(*key: int) -> None:
    """Seed the generators of Python, NumPy and torch, on CPU and CUDA devices, with numbers derived from ``key``."""
    first, second, third = np.random.SeedSequence(key).generate_state(3, np.uint32).tolist()
    random.seed(first)
    np.random.seed(second)
    # what `torch.manual_seed` does, without the stack trace that it takes for a device that is not used
    torch.default_generator.manual_seed(third)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(third)


@dataclass(frozen=True)
class SeededBatch:
    """The indices of a batch. Whoever reads its samples, in whichever process, is seeded before each of them."""

    indices: Sequence[int]
    key: tuple[int, ...]

    def __iter__(self) -> Iterator[int]:
        for position, index in enumerate(self.indices):
            seed_all(*self.key, position)
            yield index

    def __len__(self) -> int:
        return len(self.indices)


class SeededBatches(Sampler):
    """Batches of another batch sampler as :class:`SeededBatch`.

    Args:
        sampler: Of indices; what has ``epoch`` and ``set_epoch`` gets other numbers in each epoch.
        batch_size: Images per process.
        seed: The training's.
        batches: The config of the batch sampler, such as mmdet's ``AspectRatioBatchSampler``. Default: torch's own.
        drop_last: Of torch's own.
        start: The number of batches that were trained on before, of all epochs.
    """

    def __init__(
        self,
        sampler: Sampler,
        batch_size: int,
        seed: int,
        batches: Mapping | None = None,
        drop_last: bool = False,
        start: int = 0,
    ):
        self.sampler, self.batch_size, self.seed, self.start = sampler, batch_size, seed, start
        self.drop_last = drop_last
        self.batches = BatchSampler(sampler, batch_size, drop_last)
        if batches is not None:
            self.batches = DATA_SAMPLERS.build(batches, default_args=dict(sampler=sampler, batch_size=batch_size))

    def __iter__(self) -> Iterator[SeededBatch]:
        start, self.start = self.start, 0
        if start and hasattr(self.sampler, 'epoch'):
            epoch, start = divmod(start, len(self))
            self.sampler.set_epoch(epoch)
        key = (SAMPLES, self.seed, get_rank(), getattr(self.sampler, 'epoch', 0))
        for number, indices in enumerate(self.batches):
            if number >= start:
                yield SeededBatch(indices, (*key, number))

    def __len__(self) -> int:
        return len(self.batches)


def seeded_loader(config: Mapping, seed: int, done: int = 0) -> dict:
    """The config of a training's data loader with seeded samples, which begins where the training stopped.

    Args:
        config: Of the data loader, for mmengine's ``Runner.build_dataloader``.
        seed: The training's.
        done: Iterations that were trained before.
    """
    config = {**config}
    batches = dict(type=SeededBatches, seed=seed, start=done, batches=config.pop('batch_sampler', None))
    config['batch_sampler'] = dict(batches, drop_last=config.pop('drop_last', False))
    if 'worker_init_fn' not in config:
        quiet = config.pop('disable_subprocess_warning', False)
        config['worker_init_fn'] = dict(type=START_WORKER, disable_subprocess_warning=quiet)
    return config


@FUNCTIONS.register_module(name=START_WORKER)
def start_worker(worker: int, disable_subprocess_warning: bool = False) -> None:
    """Prepare a data worker: it outlives the signals that end a training, which needs its data up to the checkpoint."""
    if disable_subprocess_warning and worker:
        warnings.simplefilter('ignore')
    heed_parent_alone()
    info = get_worker_info()
    if info is not None:
        name_samples(info.dataset)


class SeedIterations(Hook):
    """Seed each training iteration by its number, and go on with the data that come next.

    Args:
        seed: The training's.
    """

    priority = 'VERY_HIGH'

    def __init__(self, seed: int):
        self.seed = seed

    def before_train(self, runner: Runner) -> None:
        loop = runner.train_loop
        name_samples(loop.dataloader.dataset)
        if isinstance(loop, IterBasedTrainLoop) and loop.iter:
            loop.dataloader_iterator = _Advanced(loop.dataloader_iterator, loop.iter)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        seed_all(ITERATIONS, self.seed, runner.rank, runner.iter)


class _Advanced:
    """An iterator of data that begins in the right place already: mmengine's steps to advance it there do nothing.

    Args:
        iterator: mmengine's own over the data loader, which counts the times it went over all data.
        steps: How many these are.
    """

    def __init__(self, iterator: Any, steps: int):
        self.iterator, self.left = iterator, steps
        sampler = iterator._dataloader.batch_sampler.sampler
        iterator._epoch = getattr(sampler, 'epoch', 0)

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> Any:
        if self.left:
            self.left -= 1
            return None
        return next(self.iterator)

    def skip_iter(self, steps: int) -> None:
        """What onedl-mmengine calls in place of as many ``next``."""
        self.left = 0
