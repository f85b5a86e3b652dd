"""Each scheme through the real Runner: two processes end alike, and a resumed training ends as if it never stopped."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tool import tool, train_together

from mmkd.data.shapes import CLASSES
from mmkd.distill import distill
from mmkd.testing import detectors, models, segmentors
from mmkd.testing.runs import shapes_config, streets_config

pytestmark = [pytest.mark.slow, pytest.mark.long]
CWD = dict(type='CWD', layer='neck')


def distilled(folder: Path, student: dict, teachers: dict, **options) -> dict:
    """A student of teachers with other weights each: name to config, and to options of the source."""
    named = {}
    for seed, (name, (config, given)) in enumerate(teachers.items(), 1):
        checkpoint = models.save_weights(config, folder / f'{name}.pth', seed=seed)
        named[name] = dict(config=config, checkpoint=checkpoint, **given)
    return dict(type='mmkd.Distill', student=student, teacher=named, **options)


def detector(folder, teachers, distillers, **options):
    return shapes_config(
        folder,
        distilled(folder, detectors.retinanet(classes=6), teachers, distillers=distillers, **options),
        iterations=6,
        batch=2,
    )


def segmentor(folder, teachers, distillers, **options):
    student = segmentors.pspnet()
    return streets_config(
        folder, distilled(folder, student, teachers, distillers=distillers, **options), iterations=6, batch=2
    )


def wide(classes=6):
    return detectors.retinanet(classes=classes, channels=24, base=12)


def several(combine, type='KD'):
    def make(folder):
        entry = dict(type=type, teacher=['a', 'b'], combine=combine)
        if type == 'CWD':
            entry['layer'] = 'neck'
        return detector(folder, dict(a=(wide(), {}), b=(detectors.retinanet(classes=6), {})), dict(it=entry))

    return make


def labels(folder):
    entry = dict(type='KD', teacher=['a', 'b'], combine='labels')
    return segmentor(folder, dict(a=(segmentors.pspnet(24), {}), b=(segmentors.pspnet(), {})), dict(it=entry))


def specialists(folder):
    """Whose images are labelled for the classes of one of them alone, in the first process; of both in the second."""
    teachers = dict(
        a=(wide(3), dict(classes=dict(circle=0, square=2))), b=(wide(2), dict(classes=dict(star=1, ring=0)))
    )
    config = detector(folder, teachers, dict(it=dict(type='KD', teacher=['a', 'b'], combine='entropy')))
    dataset = config.train_dataloader.dataset
    pack = dict(type='PackDetInputs', meta_keys=('img_path', 'img_shape', 'ori_shape', 'labelled_for'))
    dataset.pipeline = [*dataset.pipeline[:-1], dict(type='mmkd.LabelledFor', classes=('circle', 'square')), pack]
    return config


def trusted(folder):
    return segmentor(folder, dict(a=(segmentors.pspnet(24), {})), dict(it=dict(type='Trust')))


def amalgamated(folder):
    entry = dict(type='CFL', layer='neck', teacher=['a', 'b'], positions=16)
    return detector(folder, dict(a=(wide(3), {}), b=(detectors.retinanet(classes=2), {})), dict(it=entry))


def incremental(folder):
    """A model of three classes learns three more."""
    teacher = (detectors.gfl(classes=3), dict(classes=dict(circle=0, square=1, ring=2)))
    options = dict(inherit=['backbone', 'neck', 'bbox_head'], class_names=CLASSES)
    model = distilled(
        folder, detectors.gfl(classes=6), dict(a=teacher), distillers=dict(it=dict(type='ERD')), **options
    )
    config = shapes_config(folder, model, iterations=6, batch=2)
    dataset = config.train_dataloader.dataset
    pack = dict(type='PackDetInputs', meta_keys=('img_path', 'img_shape', 'ori_shape', 'labelled_for'))
    new = dict(type='mmkd.LabelledFor', classes=('triangle', 'star', 'cross'), class_names=CLASSES)
    dataset.pipeline = [*dataset.pipeline[:-1], new, pack]
    return config


def scaled(folder):
    return detector(folder, dict(a=(wide(), dict(scale=2.0))), dict(it=dict(type='KD'), cwd=CWD))


def unlabelled(folder, ratio=(1, 1), **options):
    config = detector(folder, dict(a=(wide(), {})), dict(it=CWD, kd=dict(type='KD')), **options)
    images = folder / 'unlabelled'
    images.mkdir()
    rng = np.random.default_rng(0)
    for index in range(6):
        Image.fromarray(rng.integers(0, 255, (96, 96, 3), dtype=np.uint8)).save(images / f'{index}.png')
    labelled = config.train_dataloader.dataset
    pack = dict(type='PackDetInputs', meta_keys=('img_path', 'img_shape', 'ori_shape', 'domain'))
    pipeline = [labelled.pipeline[0], dict(type='mmkd.Unlabelled'), *labelled.pipeline[2:-1], pack]
    other = dict(
        type='mmkd.Images',
        like='CocoDataset',
        metainfo=labelled.metainfo,
        data_prefix=dict(img_path=str(images)),
        pipeline=pipeline,
    )
    config.train_dataloader.dataset = dict(type='ConcatDataset', datasets=[labelled, other])
    config.train_dataloader.sampler = dict(type='mmkd.DomainSampler', ratio=list(ratio))
    return config


def uncertain(folder):
    return detector(folder, dict(a=(wide(), {})), dict(it=dict(**CWD, uncertainty=dict(passes=2, p=0.2))))


def now_and_then(folder):
    """Some batches have labelled images alone, some unlabelled ones."""
    config = unlabelled(folder, (1, 2))
    config.train_dataloader.batch_size = 1
    return config


def weak_and_strong(folder):
    """The teacher sees each image before its colours are distorted."""
    config = detector(folder, dict(a=(wide(), dict(view='weak'))), dict(it=CWD))
    dataset = config.train_dataloader.dataset
    strong = [dict(type='mmkd.KeepView'), dict(type='PhotoMetricDistortion')]
    pack = dict(type='PackDetInputs', meta_keys=('img_path', 'img_shape', 'ori_shape', 'weak'))
    dataset.pipeline = [*dataset.pipeline[:-1], *strong, pack]
    return config


def beside(folder):
    """The teacher sees another image, the one of a folder beside, mirrored as the student's is."""
    config = detector(folder, dict(a=(wide(), dict(view='other'))), dict(it=CWD))
    dataset = config.train_dataloader.dataset
    (folder / 'shapes' / 'other').symlink_to(folder / 'shapes' / 'train')
    load = dict(type='mmkd.LoadView', view='other', replace={'/train/': '/other/'})
    both = dict(type='mmkd.Both', view='other', transforms=[dict(type='RandomFlip', prob=0.5)])
    pack = dict(type='PackDetInputs', meta_keys=('img_path', 'img_shape', 'ori_shape', 'other'))
    dataset.pipeline = [*dataset.pipeline[:2], load, both, pack]
    return config


def pseudo_labels(folder):
    weight = dict(type='linear', value=1.0, begin=0, end=3)
    return unlabelled(folder, pseudo_labels=dict(score=0.013, uncertain=0.012, weight=weight))


def pseudo_labels_of_an_average(folder):
    config = unlabelled(folder, pseudo_labels=dict(teacher='mean', score=0.01))
    config.model.teacher.mean = dict(type='Average', momentum=0.9, begin=1)
    for entry in config.model.distillers.values():
        entry.teacher = 'a'
    return config


def pseudo_labels_of_pixels(folder):
    config = segmentor(
        folder, dict(a=(segmentors.pspnet(24), {})), dict(it=dict(type='KD')), pseudo_labels=dict(score=0.06)
    )
    config.train_dataloader.batch_size = 4  # a pooled map of one image has no variance
    two = streets_config(folder, config.model, two_domains=True)
    config.train_dataloader.dataset, config.train_dataloader.sampler = (
        two.train_dataloader.dataset,
        two.train_dataloader.sampler,
    )
    return config


def without_the_task(folder):
    return detector(folder, dict(a=(wide(), {})), dict(it=CWD), task_weight=0)


def task_from_step_3(folder):
    weight = dict(type='constant', value=1.0, begin=3)
    return unlabelled(folder, task_weight=weight)


def collaborative(folder):
    entry = dict(type='KD', teacher=['own', 'peer'], combine='min_logits', tau=2.0)
    return online(
        folder,
        dict(down=entry, up=dict(entry, learner='peer')),
        own=dict(type='Own'),
        peer=dict(type='Peer', config=segmentors.pspnet(24)),
    )


def online(folder, distillers, **teachers):
    """Without a teacher; the weight of what heads learn from each other is 0 in the first step."""
    teachers = teachers or dict(own=dict(type='Own'))
    model = dict(type='mmkd.Distill', student=segmentors.pspnet(), teacher=teachers, distillers=distillers)
    return streets_config(folder, model, iterations=6, batch=2)


def heads(type):
    return lambda folder: online(folder, dict(it=dict(type=type, loss_weight=dict(type='linear', value=1.0, end=4))))


def snapshot(folder):
    """Copied after steps 2 and 4; resumed in between."""
    return online(folder, dict(it=dict(type='KD')), before=dict(type='Snapshot', cycle=2))


def of_labels(teacher, method):
    """Without any other network; one batch of a process has more boxes than the other's, or fewer."""

    def make(folder):
        schedule = dict(type='constant', value=1.0, begin=2)
        model = dict(
            type='mmkd.Distill',
            student=detectors.retinanet(classes=6),
            teacher=dict(type=teacher),
            distillers=dict(it=dict(type=method, loss_weight=schedule)),
        )
        return shapes_config(folder, model, iterations=6, batch=2)

    return make


def encoded(folder):
    """A student of a frozen label encoder."""
    config = of_labels('LabelEncoder', 'LabelEnc')(folder)
    student = models.build(config.model.student, seed=1)
    first = distill(student, dict(type='LabelEncoder'), dict(it=dict(type='LabelEnc')))
    torch.save(dict(state_dict=first.state_dict()), folder / 'first.pth')
    config.model.teacher.update(checkpoint=str(folder / 'first.pth'), end=5)
    config.model.inherit = ['neck', 'bbox_head']
    return config


def stage_by_stage(folder):
    """Channels are assigned in the steps 0 and 2, tracked in 0 to 2, 4 and 5; a stage begins and one ends between."""
    layers = [f'backbone.layer{i}' for i in (2, 3)]
    distillers = dict(
        matched=dict(type='MatchingGuided', layer=layers, interval=4, track=3, loss_weight=1e-4),
        first=dict(type='OFD', layer=layers[0], loss_weight=dict(type='constant', value=1e-4, end=4)),
        second=dict(type='OFD', layer=layers[1], loss_weight=dict(type='constant', value=1e-4, begin=2)),
    )
    return detector(folder, dict(teacher=(wide(), {})), distillers)


def decoder(folder):
    """Which learns from the first step on, and the student from the third."""
    entry = dict(type='ICD', loss_weight=dict(type='constant', value=8.0, begin=2))
    return detector(folder, dict(a=(wide(), {})), dict(it=entry))


def tokens(folder):
    """Which learn for two steps, stay, and are read in both networks from the fifth on."""
    entry = dict(type='MasKD', token_steps=2, both_begin=2)
    return detector(folder, dict(a=(wide(), {})), dict(it=entry))


SCHEMES = {
    'mean': several('mean', 'CWD'),
    'entropy': several('entropy'),
    'drop': several(dict(type='drop', p=0.5)),
    'schedules': several(dict(a=1.0, b=dict(type='linear', start=1.0, value=0.0, end=4))),
    'labels': labels,
    'specialists': specialists,
    'trusted': trusted,
    'amalgamated': amalgamated,
    'incremental': incremental,
    'scale': scaled,
    'unlabelled': unlabelled,
    'uncertain': uncertain,
    'now and then': now_and_then,
    'weak and strong': weak_and_strong,
    'beside': beside,
    'pseudo labels': pseudo_labels,
    'pseudo labels of an average': pseudo_labels_of_an_average,
    'pseudo labels of pixels': pseudo_labels_of_pixels,
    'without the task': without_the_task,
    'task from step 3': task_from_step_3,
    'one target': collaborative,
    'stage by stage': stage_by_stage,
    'ONE': heads('ONE'),
    'OKDDip': heads('OKDDip'),
    'snapshot': snapshot,
    'LGD': of_labels('Own', 'LGD'),
    'LabelEnc, first': of_labels('LabelEncoder', 'LabelEnc'),
    'LabelEnc, second': encoded,
    'tokens': tokens,
    'decoder': decoder,
}


@pytest.mark.parametrize('scheme', [name for name in SCHEMES if name != 'now and then'])
def test_both_processes_end_alike(scheme, tmp_path):
    config = SCHEMES[scheme](tmp_path)
    config.custom_hooks = [dict(type='mmkd.testing.runs.SaveEachRank')]
    path = tmp_path / 'two.py'
    config.dump(path)
    assert 'find_unused_parameters' not in path.read_text()
    train_together(path, 2, '--work-dir', tmp_path / 'two')
    first, second = (torch.load(tmp_path / 'two' / f'rank{rank}.pth') for rank in range(2))
    before = torch.load(tmp_path / 'two' / 'rank0_before.pth')
    assert any(not torch.equal(value, before[name]) for name, value in first.items())
    for name, value in first.items():
        assert torch.isfinite(value).all(), name
        if 'running_' not in name:  # of batch norms: each process has seen other images
            assert torch.equal(value, second[name]), name


def test_processes_take_turns_alike(tmp_path):
    """Else one would wait for sums over processes that the other does not make."""
    path = tmp_path / 'two.py'
    now_and_then(tmp_path).dump(path)
    for said in train_together(path, 2, '--work-dir', tmp_path / 'two', expect=1):
        assert 'a batch_size that 3 (the sum of its ratio) divides' in said


@pytest.mark.parametrize('scheme', SCHEMES)
def test_a_resumed_training_ends_bit_for_bit_as_if_it_never_stopped(scheme, tmp_path):
    config = SCHEMES[scheme](tmp_path)
    config.default_hooks.checkpoint.interval = 3
    path, whole, stopped = tmp_path / 'config.py', tmp_path / 'whole', tmp_path / 'stopped'
    config.dump(path)
    tool('train', path, '--work-dir', whole)
    stopped.mkdir()
    (stopped / 'iter_3.pth').write_bytes((whole / 'iter_3.pth').read_bytes())
    (stopped / 'last_checkpoint').write_text(str(stopped / 'iter_3.pth'))
    tool('train', path, '--work-dir', stopped, '--resume')
    found, expected = (
        torch.load(folder / 'iter_6.pth', map_location='cpu', weights_only=True)['state_dict']
        for folder in (stopped, whole)
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
