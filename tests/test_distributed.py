"""Two processes over gloo."""

import copy
import json
import math
import os
import re
import shutil
import subprocess

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from tool import ROOT, free_port, kill, launch, run_together, start, train_together, wait_until

from mmkd import cli
from mmkd.errors import ConfigError
from mmkd.testing import detectors, segmentors
from mmkd.testing.methods import DETECTION, SEGMENTATION
from mmkd.testing.runs import distilled, of_all_sources, shapes_config, streets_config

METHODS = dict(gid=dict(type='GID'), cwd=dict(type='CWD', layer='neck'))
pytestmark = pytest.mark.slow


def train(config, folder, processes, how=train_together):
    """Train in one or two processes; the weights of each, in the end and in the beginning."""
    config.work_dir = str(folder)
    config.custom_hooks = [*config.get('custom_hooks', ()), dict(type='mmkd.testing.runs.SaveEachRank')]
    path = folder.with_suffix('.py')
    config.dump(path)
    how(path, processes)
    assert 'find_unused_parameters' not in path.read_text()
    return [[torch.load(folder / f'rank{rank}{when}.pth') for rank in range(processes)] for when in ('', '_before')]


def edit_annotations(folder, edit):
    path = folder / 'shapes' / 'annotations' / 'train.json'
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize('pair', DETECTION)
@pytest.mark.parametrize('objects', [pytest.param('on both', marks=pytest.mark.long), 'on one'])
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
    [
        *(pytest.param(pair, 'on both', marks=() if 'domains' in pair else pytest.mark.long) for pair in SEGMENTATION),
        *((pair, 'on one') for pair in SEGMENTATION if 'domains' not in pair),
    ],
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


@pytest.mark.long
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
    in_order_and_not_flipped(config)
    config.optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=1.0))
    config.param_scheduler = []
    return config


def in_order_and_not_flipped(config):
    config.train_dataloader.sampler.shuffle = False
    pipeline = config.train_dataloader.dataset.pipeline
    config.train_dataloader.dataset.pipeline = [step for step in pipeline if step.type != 'RandomFlip']


def same_images_in_both_processes(tmp_path):
    """Every other image of the shapes is made equal to the one before; two processes take turns."""
    images = tmp_path / 'shapes' / 'train'

    def edit(content):
        kept = [each for each in content['annotations'] if each['image_id'] % 2 == 0]
        twins = [dict(each, image_id=each['image_id'] + 1, id=each['id'] + 10**6) for each in kept]
        content['annotations'] = kept + twins

    edit_annotations(tmp_path, edit)
    for image in sorted(images.iterdir())[::2]:
        shutil.copy(image, images / f'{int(image.stem) + 1:06d}.jpg')


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
    same_images_in_both_processes(tmp_path)
    one, two = updates(config, tmp_path / 'one', 1, 8), updates(config, tmp_path / 'two', 2, 4)
    trained = [name for name, update in one.items() if update.is_floating_point() and update.abs().max() > 0]
    assert any(name.startswith('backbone.') for name in trained)
    assert_equal_updates(one, two, trained)


def with_group_norm(config):
    """A model's config whose batch norms, which see the images of their own process, are group norms."""
    config = copy.deepcopy(config)

    def change(part):
        if part.get('norm_cfg'):
            part['norm_cfg'] = dict(type='GN', num_groups=4)
        for each in part.values():
            if isinstance(each, dict):
                change(each)

    change(config)
    return config


@pytest.mark.long
@pytest.mark.parametrize('family', ['RetinaNet', 'PSPNet'])
def test_two_times_four_images_are_one_time_eight_after_20_steps_with_all_sources(tmp_path, family):
    """A frozen teacher, an average, a peer and the student itself; all that is trained or averaged.

    In RetinaNet both processes have the same four images, for the reason above; PSPNet has the eight of the single process.
    """
    model = of_all_sources(tmp_path, family)
    if family == 'RetinaNet':
        config = shapes_config(tmp_path, model, iterations=20, images=48)
        same_images_in_both_processes(tmp_path)
    else:
        model['student'], peer = with_group_norm(model['student']), model['teacher']['peer']
        peer['config'] = with_group_norm(peer['config'])
        config = streets_config(tmp_path, model, iterations=20, images=48)
    in_order_and_not_flipped(config)
    one, two = updates(config, tmp_path / 'one', 1, 8), updates(config, tmp_path / 'two', 2, 4)
    trained = [name for name, update in one.items() if update.is_floating_point() and update.abs().max() > 0]
    for part in ('backbone.', 'sources.mean.', 'sources.peer.'):
        assert any(name.startswith(part) for name in trained)
    assert_equal_updates(one, two, trained)


def test_what_is_trained_is_reduced_and_a_frozen_teacher_neither_reduced_nor_broadcast(tmp_path, monkeypatch):
    """All collective operations from the Runner's start to the end of the second step, as torch's profiler saw them."""
    monkeypatch.setenv('LOCAL_RANK', '0')
    wide = detectors.retinanet(classes=6, channels=64, base=32)
    config = shapes_config(tmp_path, distilled(tmp_path, METHODS, teacher=wide), iterations=2)
    config.launcher, config.default_hooks.checkpoint = 'pytorch', None
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with torch.profiler.profile(record_shapes=True) as profile:
            runner = cli.build_runner(config)
            runner.train()
    finally:
        torch.distributed.destroy_process_group()
    model = runner.model.module
    (teacher,) = model.sources.values()
    found = {
        kind: [
            sum(math.prod(shape) for shape in event.input_shapes)
            for event in profile.events()
            if event.name == f'gloo:{kind}'
        ]
        for kind in ('all_reduce', 'broadcast')
    }
    in_teacher = sum(value.numel() for value in teacher.model.parameters())
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    assert any(name.startswith('distillers.') for name, _ in model.named_parameters())
    assert sum(found['all_reduce']) == 2 * trained
    # beside the weights, once, the seed and the start's time are broadcast, and the shapes of the weights
    assert 0 <= sum(found['broadcast']) - trained < 1000 < in_teacher


@pytest.mark.long
def test_processes_that_die_are_started_again_and_resume(tmp_path):
    """One of two is killed in mid-training; the end is that of a run that nothing happened to."""
    config = shapes_config(tmp_path, distilled(tmp_path, METHODS), iterations=8, batch=2)
    config.default_hooks.checkpoint.interval = 3
    # by the same launcher, because another has other numbers of threads, by which sums are rounded
    (whole, _), _ = train(config, tmp_path / 'whole', 2, lambda path, count: launch('dist_train.sh', path, count))
    config.custom_hooks.append(dict(type='mmkd.testing.runs.PauseAt', iteration=5))
    folder, log = tmp_path / 'parts', tmp_path / 'log'

    def with_a_kill(path, processes):
        training = start(log, 'dist_train.sh', path, processes, env=dict(MAX_RESTARTS=1))
        paused = [folder / f'paused{rank}' for rank in range(processes)]
        wait_until(lambda: all(each.exists() for each in paused) or training.poll() is not None, [log])
        kill(int(paused[1].read_text()))
        (folder / 'go_on').touch()
        assert training.wait(timeout=120) == 0, log.read_text()[-3000:]

    (first, second), _ = train(config, folder, 2, with_a_kill)
    assert 'resumed epoch: 0, iter: 3' in log.read_text()
    for name, value in whole.items():
        assert torch.equal(value, first[name]), name
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize('script', ['dist_train.sh', 'slurm_train.sh'])
def test_what_resumes_by_itself_takes_no_resume(script):
    arguments = ['c.py', 2] if script == 'dist_train.sh' else ['--requeue', 'gpu', 'job', 'c.py', 'out']
    command = ['bash', str(ROOT / 'tools' / script), *map(str, arguments), '--amp', '--resume', 'x.pth']
    env = {**os.environ, 'MAX_RESTARTS': '1'}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 2
    assert 'resumes by itself, from the latest checkpoint; leave --resume out' in done.stderr


OF_SLURM = dict(SLURM_NTASKS=2, SLURM_STEP_NODELIST='node[1-2]', SLURM_JOB_ID=7)


@pytest.mark.parametrize('launcher', ['slurm', 'mpi'])
def test_without_a_gpu_other_launchers_join_as_torchruns_does(tmp_path, launcher):
    """From the variables that srun and mpirun set, and an scontrol that has the first machine's name for a list of them."""
    scontrol = tmp_path / 'scontrol'
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[1-2]" ] && printf "localhost\\nnode2\\n"\n')
    scontrol.chmod(0o755)
    shared = dict(PATH=f'{tmp_path}:{os.environ["PATH"]}', MASTER_PORT=free_port())
    environments = [
        dict(shared, **OF_SLURM, SLURM_PROCID=rank, SLURM_LOCALID=rank)
        if launcher == 'slurm'
        else dict(
            shared,
            MASTER_ADDR='127.0.0.1',
            OMPI_COMM_WORLD_RANK=rank,
            OMPI_COMM_WORLD_SIZE=2,
            OMPI_COMM_WORLD_LOCAL_RANK=rank,
        )
        for rank in range(2)
    ]
    config = shapes_config(tmp_path, distilled(tmp_path, METHODS), iterations=2, batch=2)
    (first, _), _ = train(config, tmp_path / 'torchrun', 2)

    def how(path, processes):
        run_together('train', [path, '--launcher', launcher], environments)

    (same, second), _ = train(config, tmp_path / launcher, 2, how)
    for name, value in first.items():
        assert torch.equal(value, same[name]), name
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize(
    ('launcher', 'given', 'line'),
    [
        (
            'pytorch',
            {'RANK': 0, 'WORLD_SIZE': 2},
            '--launcher pytorch: MASTER_ADDR, MASTER_PORT not set in the environment; start with torchrun, as '
            'tools/dist_train.sh does, or leave --launcher out for one process',
        ),
        (
            'slurm',
            {'SLURM_JOB_ID': 7, 'SLURM_NTASKS': 2, 'SLURM_PROCID': 0, 'SLURM_LOCALID': 0},  # in sbatch, without srun
            '--launcher slurm: SLURM_STEP_NODELIST not set in the environment; start with srun, as tools/slurm_train.sh '
            'does, or leave --launcher out for one process',
        ),
        (
            'mpi',
            {},
            '--launcher mpi: OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_SIZE, OMPI_COMM_WORLD_LOCAL_RANK, MASTER_ADDR not set '
            "in the environment; start with Open MPI's mpirun -x MASTER_ADDR, or leave --launcher out for one process",
        ),
    ],
)
def test_a_launcher_that_did_not_start_the_process_is_one_line(monkeypatch, launcher, given, line):
    for name in list(os.environ):
        if name.startswith(('SLURM_', 'OMPI_', 'MASTER_')) or name in ('RANK', 'WORLD_SIZE'):
            monkeypatch.delenv(name)
    monkeypatch.setenv('LOCAL_RANK', '0')  # which the tools set
    for name, value in given.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ConfigError) as error:
        cli.join_processes(Config(dict(launcher=launcher)))
    assert str(error.value) == line


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

    def run(**changes):
        return subprocess.run(
            command, capture_output=True, text=True, env={**environment, **changes}, check=True
        ).stdout

    assert '--job-name=job --ntasks=2 --ntasks-per-node=2 ' in run(GPUS='2', GRES='')
    assert '--gres=gpu:2 --ntasks=2 --ntasks-per-node=2 ' in run(GPUS='2')
    assert '--gres=gpu:a100:4 --ntasks=16 --ntasks-per-node=4 ' in run(GPUS_PER_NODE='4', GRES='gpu:a100:4')
    printed = run().strip()
    assert printed.startswith('-p gpu --job-name=job --gres=gpu:8 --ntasks=16 --ntasks-per-node=8 --cpus-per-task=5')
    assert '--time=1:00 --exclusive python -u' in printed
    assert printed.endswith(runs)
    done = subprocess.run(['bash', str(ROOT / 'tools' / script), 'gpu'], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert 'usage:' in done.stderr
