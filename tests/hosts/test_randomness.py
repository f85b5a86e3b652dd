"""Random numbers depend on the seed, the process and the iteration alone."""

import itertools
import random

import numpy as np
import pytest
import torch
from mmdet.datasets.samplers import AspectRatioBatchSampler
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.runner import Runner
from torch.utils.data import BatchSampler, Dataset

from mmkd.hosts.randomness import SeededBatch, SeededBatches, seed_all, seeded_loader


class Numbers(Dataset):
    """Three random numbers a sample, one of each generator."""

    def __len__(self):
        return 7

    def __getitem__(self, index):
        return [index, random.random(), np.random.rand(), torch.rand(()).item()]

    def get_data_info(self, index):
        return dict(width=1 + index % 2, height=1)


def draw():
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_a_key_seeds_all_generators():
    seed_all(1, 2)
    first = draw()
    seed_all(1, 2, 1)
    other = draw()
    seed_all(1, 2)
    assert draw() == first
    assert all(one != two for one, two in zip(first, other))


def test_reading_a_batch_seeds_each_sample():
    found = [(index, *draw()) for index in SeededBatch([5, 5], (3,))]
    assert found[0][1:] != found[1][1:]
    assert found == [(index, *draw()) for index in SeededBatch([5, 5], (3,))]
    assert [draw() for _ in SeededBatch([5, 5], (4,))] != [each[1:] for each in found]


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('sampler', ['InfiniteSampler', 'DefaultSampler'])
def test_a_loader_begins_where_the_training_stopped(sampler, workers):
    config = dict(
        dataset=Numbers(), sampler=dict(type=sampler), batch_size=2, num_workers=workers, persistent_workers=workers > 0
    )

    def epochs(done, number):
        loader = Runner.build_dataloader(seeded_loader(config, 5, done), seed=5)
        found = []
        for _ in range(number):
            found += [[list(map(float, each)) for each in batch] for batch in itertools.islice(loader, 10)]
            if sampler == 'DefaultSampler':
                loader.batch_sampler.sampler.set_epoch(loader.batch_sampler.sampler.epoch + 1)
        return found

    if sampler == 'InfiniteSampler':
        assert epochs(0, 1)[3:] == epochs(3, 1)[:7]
        return
    whole = epochs(0, 3)
    assert len(whole) == 12
    assert whole[:4] != whole[4:8]  # another order and other numbers in each epoch
    assert epochs(6, 2) == whole[6:]
    assert epochs(4, 2) == whole[4:]
    assert epochs(3, 3)[:9] == whole[3:]


def test_the_number_of_workers_changes_nothing():
    config = dict(dataset=Numbers(), sampler=dict(type='DefaultSampler'), batch_size=2)
    found = [
        list(Runner.build_dataloader(seeded_loader(dict(config, num_workers=workers), 5), seed=5))
        for workers in (0, 1, 3)
    ]
    assert found[0] == found[1] == found[2]


def test_other_batch_samplers_are_kept():
    data = Numbers()
    inner = dict(type=AspectRatioBatchSampler)
    found = SeededBatches(DefaultSampler(data, seed=1), 2, seed=5, batches=inner)
    expected = AspectRatioBatchSampler(DefaultSampler(data, seed=1), 2)
    assert [each.indices for each in found] == list(expected)
    dropped = SeededBatches(DefaultSampler(data, seed=1), 2, seed=5, drop_last=True)
    assert [each.indices for each in dropped] == list(BatchSampler(DefaultSampler(data, seed=1), 2, True))
    assert len(dropped) == 3
    endless = SeededBatches(InfiniteSampler(data, seed=1), 2, seed=5, start=100)
    assert len(next(iter(endless))) == 2
