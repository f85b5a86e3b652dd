"""A training that is killed again and again ends with what it would have ended with."""

import random

import pytest
import torch
from tool import tool

from mmkd.testing.faults import MOMENTS
from mmkd.testing.runs import of_all_sources, shapes_config, streets_config

pytestmark = pytest.mark.long
LENGTH = 14


def detection(folder):
    model = of_all_sources(folder, 'RetinaNet')
    model['distillers'].update(
        gid=dict(type='GID', teacher='large'), mgd=dict(type='MGD', layer='neck', teacher='large')
    )
    return shapes_config(folder, model, LENGTH, batch=2)


def segmentation(folder):
    model = of_all_sources(folder, 'PSPNet')
    sizes = dict(
        pixel_contrast_size=64, region_contrast_size=64, pixel_memory_size=20, region_memory_size=20, teacher='large'
    )
    model['distillers'].update(skd=dict(type='SKD', teacher='large'), cirkd=dict(type='CIRKD', **sizes))
    for head in ('decode_head', 'auxiliary_head'):
        model['student'][head]['dropout_ratio'] = 0.1
    config = streets_config(folder, model, LENGTH, batch=2)
    config.train_dataloader.dataset.pipeline.insert(-1, dict(type='PhotoMetricDistortion'))
    config.train_dataloader.num_workers = 2  # whose augmentation goes on as well
    config.custom_hooks = [dict(type='EMAHook', momentum=0.1)]
    return config


@pytest.mark.parametrize('build', [detection, segmentation])
def test_killed_and_resumed_is_bit_identical_to_never_stopped(tmp_path, build, kills):
    kills = kills // 2 + (kills % 2 and build is segmentation)
    config = build(tmp_path)
    config.default_hooks.checkpoint.update(interval=2, max_keep_ckpts=1)
    config.dump(tmp_path / 'whole.py')
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    tool('train', tmp_path / 'whole.py', '--work-dir', whole)
    killed = random.Random(build.__name__)
    for number in range(kills):
        config.custom_hooks = [
            *config.get('custom_hooks', [])[: build is segmentation],
            dict(
                type='mmkd.testing.faults.Kill',
                iteration=killed.randrange(1, LENGTH - 2),
                moment=MOMENTS[(number + killed.randrange(2)) % len(MOMENTS)],
            ),
        ]
        path = tmp_path / f'killed{number}.py'
        config.dump(path)
        done = iteration_of(parts)
        if done >= config.custom_hooks[-1].iteration:  # begin again
            parts = tmp_path / f'parts{number}'
        tool('train', path, '--work-dir', parts, '--resume', expect=-9)
    tool('train', tmp_path / 'whole.py', '--work-dir', parts, '--resume')
    expected, found = (
        torch.load(each / f'iter_{LENGTH}.pth', weights_only=True, map_location='cpu') for each in (whole, parts)
    )
    for part in ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers'):
        assert (part in found) == (part in expected)
        differ = list(differences(expected.get(part), found.get(part), part))
        assert not differ, differ[:5]


def iteration_of(folder):
    names = [path.stem.partition('_')[2] for path in folder.glob('iter_*.pth')]
    return max(map(int, names), default=0)


def differences(one, two, name):
    """The names under which two nests differ."""
    if isinstance(one, torch.Tensor):
        if not torch.equal(one, two):
            yield name
    elif isinstance(one, dict):
        if one.keys() != two.keys():
            yield name
        for key in one.keys() & two.keys():
            yield from differences(one[key], two[key], f'{name}.{key}')
    elif isinstance(one, (list, tuple)):
        if len(one) != len(two):
            yield name
        for index, pair in enumerate(zip(one, two)):
            yield from differences(*pair, f'{name}.{index}')
    elif one != two:
        yield name
