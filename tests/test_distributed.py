"""Two processes over gloo."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from tool import ROOT, train_together

from mmkd.testing import segmentors
from mmkd.testing.methods import DETECTION, SEGMENTATION
from mmkd.testing.runs import distilled, of_all_sources, shapes_config, streets_config

METHODS = dict(gid=dict(type='GID'), cwd=dict(type='CWD', layer='neck'))
pytestmark = pytest.mark.slow


def launch(script, *arguments):
    """Run a script of tools/ on a free port; what it printed."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    environment = {**os.environ, 'PYTHON': sys.executable, 'PORT': str(port), 'OMP_NUM_THREADS': '1'}
    command = ['bash', str(ROOT / 'tools' / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def train(config, folder, processes, start=train_together):
    """Train in one or two processes; the weights of each, in the end and in the beginning."""
    config.work_dir = str(folder)
    config.custom_hooks = [dict(type='mmkd.testing.runs.SaveEachRank')]
    path = folder.with_suffix('.py')
    config.dump(path)
    start(path, processes)
    assert 'find_unused_parameters' not in path.read_text()
    return [[torch.load(folder / f'rank{rank}{when}.pth') for rank in range(processes)] for when in ('', '_before')]


def edit_annotations(folder, edit):
    path = folder / 'shapes' / 'annotations' / 'train.json'
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize('pair', DETECTION)
@pytest.mark.parametrize('objects', ['on both', 'on one'])
def test_both_processes_end_with_the_same_student_and_trained_parts(tmp_path, objects, pair):
    """6 steps; 'on one': the second process has only images without objects. Memories of keys are equal as well."""
    student, teacher, methods = DETECTION[pair]
    model = distilled(tmp_path, methods, student(classes=6), teacher(classes=6, channels=24, base=12))
    config = shapes_config(tmp_path, model, iterations=6, batch=2)
    if objects == 'on one':
        config.train_dataloader.sampler.shuffle = False  # the processes take turns

        def edit(content):
            content['annotations'] = [each for each in content['annotations'] if each['image_id'] % 2 == 0]

        edit_annotations(tmp_path, edit)
    (first, second), _ = train(config, tmp_path / 'two', 2)
    for name, value in first.items():
        assert torch.isfinite(value).all(), name
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize(
    ('pair', 'labels'),
    # of two domains, half the images of both processes have no labels as it is
    [(pair, labels) for pair in SEGMENTATION for labels in ('on both', 'on one')][:-1],
)
def test_both_processes_end_with_the_same_segmentor_and_trained_parts(tmp_path, labels, pair):
    """6 steps; 'on one': all pixels of the second process's images are ignored. Queues are equal as well."""
    student, teacher, methods = SEGMENTATION[pair]
    two_domains = 'domains' in pair
    model = distilled(tmp_path, methods, student(), teacher(channels=24, base=12 if 'SegFormer' not in pair else 8))
    config = streets_config(tmp_path, model, iterations=6, batch=2, two_domains=two_domains)
    if labels == 'on one':
        config.train_dataloader.sampler.shuffle = False  # the processes take turns
        for index, path in enumerate(sorted((tmp_path / 'streets' / 'gtFine' / 'train').rglob('*.png'))):
            if index % 2:
                cv2.imwrite(str(path), np.full((64, 128), 255, np.uint8))
    (first, second), _ = train(config, tmp_path / 'two', 2)
    for name, value in first.items():
        assert torch.isfinite(value).all(), name
        if 'running_' not in name:  # of batch norms: each process has seen other images
            assert torch.equal(value, second[name]), name


@pytest.mark.parametrize(('family', 'make'), [('RetinaNet', shapes_config), ('PSPNet', streets_config)])
def test_both_processes_have_the_same_average_and_peer(tmp_path, family, make):
    """Also in steps in which one of them is not read; of the average the statistics of batch norms as well."""
    (first, second), _ = train(
        make(tmp_path, of_all_sources(tmp_path, family), iterations=6, batch=2), tmp_path / 'two', 2
    )
    assert {name.split('.')[1] for name in first if name.startswith('sources.')} == {'mean', 'peer'}
    for name, value in first.items():
        if 'running_' not in name or name.startswith('sources.mean'):
            assert torch.equal(value, second[name]), name


@pytest.mark.parametrize(
    ('make', 'model', 'metrics'),
    [
        (shapes_config, None, r'coco/bbox_mAP: \S+ .*coco/bbox_mAP_l: \S+'),
        (streets_config, segmentors.pspnet, r'aAcc: \S+ +mIoU: \S+ +mAcc: \S+'),
    ],
    ids=['detection', 'segmentation'],
)
def test_two_processes_evaluate_as_one(tmp_path, make, model, metrics):
    pair = () if model is None else (model(), model(channels=24))
    methods = METHODS if model is None else dict(kd=dict(type='KD'))
    config = make(tmp_path, distilled(tmp_path, methods, *pair), iterations=4)
    train(config, tmp_path / 'two', 2, lambda path, processes: launch('dist_train.sh', path, processes))
    path, checkpoint = tmp_path / 'two.py', tmp_path / 'two' / 'iter_4.pth'
    found = [re.search(metrics, launch('dist_test.sh', path, checkpoint, processes))[0] for processes in (1, 2)]
    assert found[0] == found[1]


def one_step(tmp_path):
    """A single step of plain SGD on the first eight images, in order and not flipped."""
    config = shapes_config(tmp_path, distilled(tmp_path, METHODS), iterations=1, images=8)
    config.train_dataloader.sampler.shuffle = False
    pipeline = config.train_dataloader.dataset.pipeline
    config.train_dataloader.dataset.pipeline = [step for step in pipeline if step.type != 'RandomFlip']
    config.optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=1.0))
    config.param_scheduler = []
    return config


def updates(config, folder, processes, batch):
    """What the step changed, by name."""
    config.train_dataloader.batch_size = batch
    (after, *_), (before, *_) = train(config, folder, processes)
    return {name: after[name] - before[name] for name in after}


def assert_equal_updates(one, two, names):
    """Up to float32 rounding of sums over the batch, which are taken in another order: 1e-3 of each tensor's largest."""
    assert names
    for name in names:
        scale = float(one[name].abs().max())
        assert float((one[name] - two[name]).abs().max()) <= 1e-3 * scale + 1e-7, name


def test_two_times_four_images_train_adapters_as_one_time_eight(tmp_path):
    """Adapters get the distillation's gradient alone, whose terms are means over images or equally many instances."""
    config = one_step(tmp_path)
    one, two = updates(config, tmp_path / 'one', 1, 8), updates(config, tmp_path / 'two', 2, 4)
    names = [name for name in one if name.startswith('distillers.')]
    assert len(names) == 8
    assert_equal_updates(one, two, names)


def test_two_times_four_images_train_the_student_as_one_time_eight(tmp_path):
    """mmdet's RetinaNet and GID's response loss divide by the positive slots of their own process. The sum of both
    is equal to that of one process where those numbers are equal, so here both processes have the same four images."""
    config = one_step(tmp_path)
    images = tmp_path / 'shapes' / 'train'

    def edit(content):
        kept = [each for each in content['annotations'] if each['image_id'] % 2 == 0]
        twins = [dict(each, image_id=each['image_id'] + 1, id=each['id'] + 1000) for each in kept]
        content['annotations'] = kept + twins

    edit_annotations(tmp_path, edit)
    for index in range(0, 8, 2):
        shutil.copy(images / f'{index:06d}.jpg', images / f'{index + 1:06d}.jpg')
    one, two = updates(config, tmp_path / 'one', 1, 8), updates(config, tmp_path / 'two', 2, 4)
    trained = [name for name, update in one.items() if update.is_floating_point() and update.abs().max() > 0]
    assert any(name.startswith('backbone.') for name in trained)
    assert_equal_updates(one, two, trained)


@pytest.mark.parametrize(
    ('script', 'arguments', 'runs'),
    [
        (
            'slurm_train.sh',
            ['gpu', 'job', 'c.py', 'out', '--amp'],
            'train.py c.py --work-dir=out --launcher=slurm --amp',
        ),
        (
            'slurm_test.sh',
            ['gpu', 'job', 'c.py', 'w.pth', '--out', 'o.pkl'],
            'test.py c.py w.pth --launcher=slurm --out o.pkl',
        ),
    ],
)
def test_slurm_scripts_hand_over_to_srun(tmp_path, script, arguments, runs):
    """With an srun that prints what it was given."""
    srun = tmp_path / 'srun'
    srun.write_text('#!/bin/sh\necho "$@"\n')
    srun.chmod(0o755)
    environment = {
        **os.environ,
        'PATH': f'{tmp_path}:{os.environ["PATH"]}',
        'GPUS': '16',
        'SRUN_ARGS': '--time=1:00 --exclusive',
    }
    environment.pop('PYTHON', None)
    command = ['bash', str(ROOT / 'tools' / script), *arguments]
    printed = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout.strip()
    assert printed.startswith('-p gpu --job-name=job --gres=gpu:8 --ntasks=16 --ntasks-per-node=8 --cpus-per-task=5')
    assert '--time=1:00 --exclusive python -u' in printed
    assert printed.endswith(runs)
    done = subprocess.run(['bash', str(ROOT / 'tools' / script), 'gpu'], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert 'usage:' in done.stderr
