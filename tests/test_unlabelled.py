"""Images without labels, beside labelled ones or alone, and a student without its own losses."""

import copy

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope
from PIL import Image
from tool import tool, train_together

import mmkd
from mmkd.data import streets
from mmkd.data.images import Images
from mmkd.errors import ConfigError
from mmkd.hosts.plain import plain_config
from mmkd.testing import detectors, models, segmentors
from mmkd.testing.batches import random_batch
from mmkd.testing.runs import distilled, shapes_config, streets_config

HEADS = {'bbox_head': detectors.retinanet, 'locations': detectors.fcos}
CWD = dict(type='CWD', layer='neck')


def build(make=detectors.retinanet, distillers=None, seed=1, source=None, **options):
    model = mmkd.distill(
        models.build(make(), seed=0),
        dict(config=models.build(make(), seed=seed), **(source or {})),
        distillers or dict(it=CWD),
        **options,
    )
    model.sources['teacher'].load()
    return model.train()


def batch(model, images=4, unlabelled=()):
    data = model.data_preprocessor(random_batch(model, (images, 3, 64, 96)), True)
    for index in unlabelled:
        sample = data['data_samples'][index]
        sample.set_metainfo(dict(domain='target'))
        sample.gt_instances = sample.gt_instances[:0]
    return data


def part(data, indices):
    samples = [data['data_samples'][index] for index in indices]
    return dict(inputs=data['inputs'][list(indices)], data_samples=samples)


def own(losses):
    return {key: value for key, value in losses.items() if not key.startswith(('it.', 'task.'))}


def same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)


@pytest.mark.parametrize('head', HEADS)
def test_own_losses_are_those_of_the_labelled_images_alone(head):
    """No object of an unlabelled image is background."""
    model = build(HEADS[head])
    data = batch(model, unlabelled=(1, 2))
    same(own(model(**data, mode='loss')), own(model(**part(data, (0, 3)), mode='loss')))


@pytest.mark.parametrize(
    'entry', [CWD, dict(type='KD'), dict(type='CWD', layer='bbox_head.retina_cls'), dict(type='GID')]
)
def test_distillation_is_that_of_all_images_in_their_order(entry):
    model = build(distillers=dict(it=entry))
    data = batch(model, unlabelled=(1, 2))
    labelled = copy.deepcopy(data)
    for sample in labelled['data_samples']:
        sample.set_metainfo(dict(domain='source'))
    found, expected = (
        {key: value for key, value in model(**each, mode='loss').items() if key.startswith('it.')}
        for each in (data, labelled)
    )
    same(found, expected)


def test_a_batch_without_labelled_images_gives_every_parameter_a_gradient():
    """Which several processes count on."""
    model = build()
    losses = model(**batch(model, unlabelled=range(4)), mode='loss')
    assert own(losses) == {}
    model.parse_losses(losses)[0].backward()
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    assert all(each.grad is not None for each in trained.values())
    assert not any(each.grad.any() for name, each in trained.items() if name.startswith('bbox_head'))
    assert model.neck.lateral_convs[0].conv.weight.grad.any()


def test_batch_norms_see_images_with_and_without_labels_apart():
    """As semi-supervised training has it; a batch that has labels is as ever."""
    model = build()
    model.backbone.norm_eval = False
    model.train()
    data = batch(model, unlabelled=(2, 3))
    again = copy.deepcopy(model)
    model(**data, mode='loss')
    again(**part(data, (0, 1)), mode='loss')
    with torch.no_grad():
        again.extract_feat(data['inputs'][2:])
    torch.testing.assert_close(model.backbone.bn1.running_var, again.backbone.bn1.running_var)


@pytest.mark.parametrize('entry', [dict(type='FGD'), dict(type='FGFI', head='bbox_head', loss_weight=0.01)])
def test_methods_that_read_boxes_say_so(entry):
    model = build(distillers=dict(it=entry))
    with pytest.raises(ConfigError, match='a batch has images without labels, and this method reads the ground truth'):
        model(**batch(model, unlabelled=(1,)), mode='loss')


def test_regions_of_images_without_labels_are_refused():
    model = build(detectors.faster_rcnn, dict(it=dict(type='KD')))
    with pytest.raises(ConfigError, match='puts out other rows than the images of a batch'):
        model(**batch(model, unlabelled=(1,)), mode='loss')


# --- without the task


@pytest.mark.parametrize('make', [detectors.retinanet, detectors.faster_rcnn, segmentors.pspnet])
def test_without_the_task_no_label_is_read_and_no_head_is_trained(make):
    layer = 'backbone.layer4' if make is segmentors.pspnet else 'neck'
    model = build(make, dict(it=dict(CWD, layer=layer)), task_weight=0)
    data = batch(model)
    for sample in data['data_samples']:
        for field in ('gt_instances', 'ignored_instances', 'gt_sem_seg'):
            if field in sample:
                delattr(sample, field)
    losses = model(**data, mode='loss')
    assert own(losses) == {}
    model.parse_losses(losses)[0].backward()
    heads = [name for name, _ in model.named_children() if name.endswith('_head')]
    assert heads
    for name, each in model.named_parameters():
        if name.split('.')[0] in heads:
            assert not each.requires_grad
    assert model.backbone.layer4[0].conv1.weight.grad.any()


LINEAR, LATER = dict(type='linear', value=1.0, end=5), dict(type='constant', value=1.0, begin=1)
"""A weight that is 0 in the first step alone, and one that is 0 there."""


@pytest.mark.parametrize('kind', ['DKD', 'DeFeat', 'Chen'])
@pytest.mark.parametrize(
    ('weight', 'step'), [(0, 0), (LINEAR, 0), (dict(type='constant', value=1.0, end=7), 7), (dict(LATER, begin=2.5), 0)]
)
def test_methods_that_read_the_students_own_losses_say_so(kind, weight, step):
    entry = dict(it=dict(type=kind))
    message = (
        rf"distillers.it: {kind} reads '.*loss_cls:input', .* task_weight is 0 in step {step}, .*; give it a value"
    )
    with pytest.raises(ConfigError, match=message):
        build(detectors.faster_rcnn, entry, task_weight=weight)
    build(detectors.faster_rcnn, entry, task_weight=0.1)


@pytest.mark.parametrize(
    ('entry', 'source'),
    [
        (dict(type='DKD', factor=LATER), {}),
        (dict(type='DKD', tckd_weight=LATER, nckd_weight=LATER), {}),
        (dict(type='DKD'), dict(begin=1)),
        (dict(type='DeFeat', cls_object_weight=0, cls_background_weight=0), {}),
    ],
)
def test_they_may_begin_when_the_task_does(entry, source):
    build(detectors.faster_rcnn, dict(it=entry), source=source, task_weight=LINEAR)
    with pytest.raises(ConfigError, match='task_weight is 0 in step 4'):
        build(
            detectors.faster_rcnn,
            dict(it=dict(type='DKD')),
            task_weight=dict(type='step', value=1.0, gamma=0, milestones=[4]),
        )


def test_a_head_that_is_read_is_trained_without_the_task():
    model = build(distillers=dict(it=dict(type='KD')), task_weight=0)
    model.parse_losses(model(**batch(model), mode='loss'))[0].backward()
    assert model.bbox_head.retina_cls.weight.grad.any()


def test_heads_that_are_trained_by_labels_all_the_same_are_not_frozen():
    for source, method in (('Own', 'LGD'), ('LabelEncoder', 'LabelEnc')):
        entry = dict(it=dict(type=method))
        model = mmkd.distill(models.build(detectors.retinanet()), dict(type=source), entry, task_weight=0)
        assert all(each.requires_grad for each in model.bbox_head.parameters())


@pytest.mark.parametrize('name', ['task', 'unlabelled'])
def test_names_of_the_students_own_log_keys_are_refused(name):
    with pytest.raises(ConfigError, match=f'distillers.{name}: losses of the student have log keys of this name'):
        build(distillers={name: dict(type='CWD', layer='neck')})


def test_the_tasks_weight_is_a_schedule():
    model = build(task_weight=dict(type='linear', start=1.0, value=0.0, end=2))
    plain = build()
    data = batch(model)
    found = [own(model(**data, mode='loss')) for _ in range(3)]
    expected = own(plain(**data, mode='loss'))
    for weight, losses in zip((1.0, 0.5), found):
        for key, value in losses.items():
            factor = weight if 'loss' in key else 1
            torch.testing.assert_close(sum(value), factor * sum(expected[key]))
    assert found[2] == {}


@pytest.mark.parametrize(
    ('weight', 'message'), [('1', 'task_weight'), (dict(type='linear'), 'task_weight'), (-1, 'task_weight')]
)
def test_weights_that_are_none(weight, message):
    with pytest.raises(ConfigError, match=message):
        build(task_weight=weight)


# --- the data


@pytest.fixture
def folder(tmp_path):
    """Three images, one of them a folder further down, and a file that is none."""
    rng = np.random.default_rng(0)
    (tmp_path / 'images' / 'b').mkdir(parents=True)
    for index, name in enumerate(('a.jpg', 'b/c.PNG', 'd.jpeg')):
        pixels = rng.integers(0, 255, (96, 96 + 32 * index, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / 'images' / name)
    (tmp_path / 'images' / 'list.txt').write_text('no image')
    return tmp_path / 'images'


PIPELINES = {
    'mmdet': [
        dict(type='LoadImageFromFile'),
        dict(type='mmkd.Unlabelled'),
        dict(type='Resize', scale=(64, 64), keep_ratio=True),
        dict(type='RandomFlip', prob=1.0),
        dict(type='PackDetInputs', meta_keys=('img_path', 'img_shape', 'domain')),
    ],
    'mmseg': [
        dict(type='LoadImageFromFile'),
        dict(type='mmkd.Unlabelled'),
        dict(type='RandomCrop', crop_size=(48, 48)),
        dict(type='PackSegInputs', meta_keys=('img_path', 'img_shape', 'domain')),
    ],
}


def test_the_images_of_a_folder(folder):
    with DefaultScope.overwrite_default_scope('mmdet'):
        data = Images(dict(img_path=str(folder)), pipeline=PIPELINES['mmdet'], metainfo=dict(classes=('a', 'b')))
        assert len(data) == 3
        assert [data.get_data_info(index)['width'] for index in range(3)] == [96, 128, 160]
        sample = data[1]['data_samples']
    assert sample.domain == 'target'
    assert sample.img_shape == (48, 64)
    assert len(sample.gt_instances) == 0
    assert data.metainfo['classes'] == ('a', 'b')


def test_they_are_images_of_a_segmentor_as_well(folder):
    import mmseg.datasets.transforms  # noqa: F401

    with DefaultScope.overwrite_default_scope('mmseg'):
        data = Images(dict(img_path=str(folder)), pipeline=PIPELINES['mmseg'])
        sample = data[0]['data_samples']
    assert (sample.gt_sem_seg.data == 255).all()
    assert sample.domain == 'target'


def test_what_is_no_folder_of_images(folder, tmp_path):
    with pytest.raises(ConfigError, match='nothing has no image'):
        Images(dict(img_path=str(tmp_path / 'nothing')))
    with pytest.raises(ConfigError, match="like='CocoData': there is no such data set"):
        Images(dict(img_path=str(folder)), like='CocoData')


def test_they_are_concatenated_with_labelled_images(folder, tmp_path):
    config = streets_config(tmp_path, segmentors.pspnet())
    labelled = config.train_dataloader.dataset
    unlabelled = dict(
        type='mmkd.Images',
        like='CityscapesDataset',
        data_prefix=dict(img_path=str(folder)),
        pipeline=PIPELINES['mmseg'],
    )
    with DefaultScope.overwrite_default_scope('mmseg'):
        both = DATASETS.build(dict(type='ConcatDataset', datasets=[labelled, unlabelled]))
    assert len(both) == 24 + 3
    assert both.metainfo['classes'] == streets.CLASSES


def semi_supervised(tmp_path, folder, **options):
    """A training on shapes, and on images of a folder without labels."""
    spec = dict(distilled(tmp_path, dict(it=CWD)), **options)
    config = shapes_config(tmp_path, spec, iterations=3)
    labelled = config.train_dataloader.dataset
    pack = dict(labelled.pipeline[-1], meta_keys=('img_path', 'ori_shape', 'img_shape', 'domain'))
    pipeline = [labelled.pipeline[0], dict(type='mmkd.Unlabelled'), *labelled.pipeline[2:-1], pack]
    unlabelled = dict(
        type='mmkd.Images',
        like='CocoDataset',
        data_prefix=dict(img_path=str(folder)),
        metainfo=labelled.metainfo,
        pipeline=pipeline,
    )
    config.train_dataloader.dataset = dict(type='ConcatDataset', datasets=[labelled, unlabelled])
    config.train_dataloader.sampler = dict(type='mmkd.DomainSampler', ratio=[1, 3])
    path = tmp_path / 'semi.py'
    config.dump(path)
    return path


def test_the_plain_config_has_the_labelled_images_alone(folder, tmp_path):
    config = Config.fromfile(semi_supervised(tmp_path, folder, task_weight=0.5, class_names=('a',)))
    labelled = config.train_dataloader.dataset.datasets[0]
    marked = dict(type='mmkd.LabelledFor', classes=('circle',))
    pack = dict(labelled.pipeline[-1], meta_keys=('img_path', 'labelled_for'))
    labelled.pipeline = [*labelled.pipeline[:-1], marked, pack]
    plain, left = plain_config(config, [])
    assert left == []
    assert 'mmkd' not in plain.pretty_text
    assert plain.train_dataloader.dataset.type == 'CocoDataset'
    assert plain.train_dataloader.dataset.pipeline[-1].meta_keys == ('img_path',)
    assert plain.model == config.model.student


@pytest.mark.slow
def test_a_training_on_both_in_two_processes(folder, tmp_path):
    path = semi_supervised(tmp_path, folder)
    said = train_together(path, 2, '--work-dir', tmp_path / 'two')
    assert 'it.loss' in said[0]


@pytest.mark.slow
def test_without_the_domain_an_unlabelled_image_would_be_background(folder, tmp_path):
    path = semi_supervised(tmp_path, folder)
    path.write_text(path.read_text().replace("'domain'", "'flip'"))
    said = tool('train', path, '--work-dir', tmp_path / 'one', expect=1).splitlines()[-1]
    assert said.startswith('error: train_dataloader.dataset.datasets.1.pipeline: mmkd.Unlabelled marks images as ')
    assert "meta_keys=(..., 'domain')" in said
