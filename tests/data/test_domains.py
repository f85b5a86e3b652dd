from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.dataset import BaseDataset, ConcatDataset
from mmengine.registry import DefaultScope
from mmengine.runner import Runner

from mmkd.data.domains import DomainSampler, Unlabelled, split_domains
from mmkd.errors import ConfigError

META_KEYS = ('img_path', 'img_shape', 'flip', 'domain')
AUGMENTATION = [
    dict(type='RandomResize', scale=(96, 64), ratio_range=(0.9, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(48, 64), cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs', meta_keys=META_KEYS),
]


@pytest.fixture
def domains():
    """A function that makes a ConcatDataset of domains of the given sizes."""

    class Images(BaseDataset):
        def load_data_list(self):
            return [dict(index=index) for index in range(int(self.ann_file))]

    return lambda *sizes: ConcatDataset([Images(ann_file=str(size), serialize_data=False) for size in sizes])


def first(sampler, number):
    indices = iter(sampler)
    return [next(indices) for _ in range(number)]


def on_rank(monkeypatch, rank, world_size):
    monkeypatch.setattr('mmengine.dataset.sampler.get_dist_info', lambda: (rank, world_size))


def test_source_and_target_in_turn_each_used_up_before_it_starts_again(domains):
    indices = first(DomainSampler(domains(3, 5), seed=7), 60)
    source, target = indices[::2], indices[1::2]
    for start in range(0, 30, 3):
        assert sorted(source[start : start + 3]) == [0, 1, 2]
    for start in range(0, 30, 5):
        assert sorted(target[start : start + 5]) == [3, 4, 5, 6, 7]
    assert len({tuple(target[start : start + 5]) for start in range(0, 30, 5)}) > 1


def test_domains_of_one_size_have_orders_of_their_own(domains):
    indices = first(DomainSampler(domains(20, 20), seed=7), 40)
    assert [index - 20 for index in indices[1::2]] != indices[::2]


def test_without_shuffling_the_domains_are_in_order(domains):
    assert first(DomainSampler(domains(2, 3), shuffle=False), 12) == [0, 2, 1, 3, 0, 4, 1, 2, 0, 3, 1, 4]


def test_a_seed_gives_one_order_and_another_a_different_one(domains):
    dataset = domains(10, 10)
    assert first(DomainSampler(dataset, seed=1), 20) == first(DomainSampler(dataset, seed=1), 20)
    assert first(DomainSampler(dataset, seed=1), 20) != first(DomainSampler(dataset, seed=2), 20)
    sampler = DomainSampler(dataset)
    assert first(sampler, 20) == first(sampler, 20)
    assert len(sampler) == 20


@pytest.mark.parametrize('sizes', [(6, 10), (3, 5)])
def test_two_processes_take_turns_in_each_domain(domains, sizes, monkeypatch):
    dataset = domains(*sizes)
    alone = first(DomainSampler(dataset, seed=3), 120)
    parts = []
    for rank in range(2):
        on_rank(monkeypatch, rank, 2)
        parts.append(first(DomainSampler(dataset, seed=3), 60))
    for domain in range(2):
        merged = [index for pair in zip(parts[0][domain::2], parts[1][domain::2]) for index in pair]
        assert merged == alone[domain::2]
    for part in parts:
        assert all((index >= sizes[0]) == bool(position % 2) for position, index in enumerate(part))
    if sizes == (6, 10):  # until a domain is used up, no image is seen twice
        assert not set(parts[0][:6]) & set(parts[1][:6])


def test_what_is_no_pair_of_domains_is_an_error(domains):
    with pytest.raises(ConfigError, match='Images; expected'):
        DomainSampler(domains(3).datasets[0])
    with pytest.raises(ConfigError, match=r'\[3, 0\] images'):
        DomainSampler(domains(3, 0))


@pytest.fixture
def photographs(tmp_path):
    """Four generated images with labels, and three without."""
    random = np.random.default_rng(0)
    for domain, number in (('source', 4), ('target', 3)):
        for kind in ('images', 'labels') if domain == 'source' else ('images',):
            (tmp_path / domain / kind).mkdir(parents=True)
        for index in range(number):
            image = random.integers(0, 256, (64, 96, 3), dtype=np.uint8)
            cv2.imwrite(str(tmp_path / domain / 'images' / f'{index}.png'), image)
            if domain == 'source':
                labels = random.integers(0, 19, (64, 96), dtype=np.uint8)
                cv2.imwrite(str(tmp_path / domain / 'labels' / f'{index}.png'), labels)
    return tmp_path


def city(root, domain, load):
    prefix = dict(img_path='images') | (dict(seg_map_path='labels') if domain == 'source' else {})
    pipeline = [dict(type='LoadImageFromFile'), dict(type=load), *AUGMENTATION]
    names = dict(img_suffix='.png', seg_map_suffix='.png')
    return dict(type='CityscapesDataset', data_root=str(root / domain), data_prefix=prefix, pipeline=pipeline, **names)


def loader(root, workers):
    datasets = [city(root, 'source', 'LoadAnnotations'), city(root, 'target', 'mmkd.Unlabelled')]
    with DefaultScope.overwrite_default_scope('mmseg'):
        return Runner.build_dataloader(
            dict(
                batch_size=4,
                num_workers=workers,
                sampler=dict(type='mmkd.DomainSampler'),
                dataset=dict(type='ConcatDataset', datasets=datasets),
            ),
            seed=0,
        )


@pytest.mark.parametrize('workers', [0, 1])
def test_every_batch_of_mmengines_data_loader_is_half_of_each_domain(photographs, workers):
    batches = iter(loader(photographs, workers))
    for _ in range(5):
        batch = next(batches)
        assert split_domains(batch['data_samples']) == ([0, 2], [1, 3])
        for index, sample in enumerate(batch['data_samples']):
            labels = sample.gt_sem_seg.data
            assert batch['inputs'][index].shape == (3, *labels.shape[1:])
            assert labels.dtype == torch.int64
            assert (labels == 255).all() if index % 2 else (labels < 19).all()
            assert ('/target/' in sample.img_path) == bool(index % 2)


def test_an_unlabelled_image_needs_no_label_file(photographs):
    from mmseg.registry import DATASETS

    with DefaultScope.overwrite_default_scope('mmseg'):
        dataset = DATASETS.build(city(photographs, 'target', 'mmkd.Unlabelled'))
    sample = dataset[0]
    assert sample['inputs'].shape == (3, 48, 64)
    assert (sample['data_samples'].gt_sem_seg.data == 255).all()
    assert sample['data_samples'].domain == 'target'


def test_the_label_is_an_option_and_has_to_fit_into_a_label_map():
    results = Unlabelled(ignore_index=0)(dict(img=np.zeros((4, 6, 3), np.uint8)))
    assert results['gt_seg_map'].tolist() == np.zeros((4, 6)).tolist()
    assert results['gt_seg_map'].dtype == np.uint8
    assert results['seg_fields'] == ['gt_seg_map']
    for label in (-1, 256, 1.5):
        with pytest.raises(ConfigError, match='ignore_index'):
            Unlabelled(label)


@pytest.mark.parametrize(
    ('domains', 'message'),
    [
        (['target'] * 2, '0 source and 2 target'),
        ([None] * 3, '3 source and 0 target'),
        (None, '0 source and 0 target'),
    ],
)
def test_a_batch_without_one_of_the_domains_is_an_error(domains, message):
    samples = domains and [SimpleNamespace(metainfo=dict(domain=domain) if domain else {}) for domain in domains]
    with pytest.raises(ConfigError, match=message) as error:
        split_domains(samples)
    assert 'mmkd.DomainSampler' in str(error.value)
    assert 'mmkd.Unlabelled' in str(error.value)
