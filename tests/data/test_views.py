"""Another image of a sample for a teacher: kept before strong augmentation, or loaded beside it."""

import pickle

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DefaultScope
from PIL import Image
from torch.utils.data import DataLoader

import mmkd
from mmkd.checks.data import check_data
from mmkd.data.views import Both, KeepView, LoadView, View, views_of
from mmkd.errors import ConfigError
from mmkd.hosts.plain import plain_config
from mmkd.normalize import Normalize
from mmkd.testing import detectors, models, segmentors
from mmkd.testing.batches import random_batch

CWD = {'mmdet': dict(type='CWD', layer='neck'), 'mmseg': dict(type='CWD', layer='backbone.layer4')}
MAKE = {'mmdet': detectors.retinanet, 'mmseg': segmentors.pspnet}
OTHER = dict(mean=[10.0, 20.0, 30.0], std=[3.0, 2.0, 1.0], bgr_to_rgb=False)


def build(host='mmdet', source=None, **teacher):
    config = MAKE[host]()
    spec = source or dict(
        config=models.build(MAKE[host](data_preprocessor=teacher.pop('normal', {})), seed=1), **teacher
    )
    model = mmkd.distill(models.build(config, seed=0), spec, dict(it=CWD[host]))
    model.sources['teacher'].load()
    return model.eval()


def batch(model, sizes=((64, 96), (48, 80)), view=lambda image: image):
    """A batch of images of several sizes, each of which has a view, as a data loader yields it."""
    each = [random_batch(model, (1, 3, *size), seed=index) for index, size in enumerate(sizes)]
    data = {key: [one[key][0] for one in each] for key in each[0]}
    for image, sample in zip(data['inputs'], data['data_samples']):
        sample.set_metainfo(dict(weak=View(view(image.permute(1, 2, 0).numpy()))))
    return data


def losses(model, data):
    torch.manual_seed(0)
    found = model(**model.data_preprocessor(data, True), mode='loss')
    return {key: sum(value) if isinstance(value, list) else value for key, value in found.items()}


@pytest.mark.parametrize('host', MAKE)
def test_the_same_image_as_view_is_no_view_bit_for_bit(host):
    found = losses(model := build(host, view='weak'), batch(model))
    expected = losses(model := build(host), batch(model))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_of_an_average_alike():
    found, expected = (
        losses(model := build(source=dict(type='Average', **view)), batch(model)) for view in (dict(view='weak'), {})
    )
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize('host', MAKE)
def test_a_teacher_sees_its_view_in_its_own_normalization(host):
    """As its own data preprocessor would make a batch of it, padding included."""
    model = build(host, view='weak', normal=OTHER)
    data = model.data_preprocessor(batch(model, view=lambda image: 255 - image), True)
    teacher = model.sources['teacher']
    seen = teacher.seen(**data)
    other = batch(model)
    other['inputs'] = [255 - each for each in other['inputs']]
    expected = teacher.model.data_preprocessor(other, True)['inputs']
    assert torch.equal(seen, expected)
    assert (seen[1, :, 48:] == 0).all()


def test_a_strong_augmentation_changes_what_the_student_sees_alone():
    model = build(view='weak')
    data = batch(model)
    before = model.sources['teacher'](**model.data_preprocessor(data, True))['neck']
    data['inputs'] = [each // 2 for each in data['inputs']]
    strong = model.data_preprocessor(data, True)
    after = model.sources['teacher'](**strong)['neck']
    assert all(torch.equal(one, other) for one, other in zip(before, after))
    with torch.no_grad():
        expected = model.sources['teacher'].model.extract_feat(strong['inputs'])
    assert not torch.allclose(after[0], expected[0])


def test_a_view_is_shared_by_copies_and_goes_through_processes():
    view = View(np.arange(24, dtype=np.uint8).reshape(2, 4, 3))
    data = batch(model := build(view='weak'))
    sample = data['data_samples'][0]
    kept = sample.metainfo['weak']
    assert sample.new().metainfo['weak'] is kept
    assert model.data_preprocessor(data, True)['data_samples'][0].metainfo['weak'] is kept
    assert torch.equal(pickle.loads(pickle.dumps(view)).image, view.image)
    (other,) = DataLoader([view], num_workers=1, collate_fn=lambda items: items[0])
    assert torch.equal(other.image, view.image)


# --- pipelines


def run_pipeline(steps, results, scope='mmdet', seed=0):
    np.random.seed(seed)
    with DefaultScope.overwrite_default_scope(scope):
        return Compose(steps)(results)


def results(image, scope='mmdet'):
    found = dict(img=image, img_shape=image.shape[:2], ori_shape=image.shape[:2], img_path='a.png')
    if scope == 'mmdet':
        from mmdet.structures.bbox import HorizontalBoxes

        return {
            **found,
            'gt_bboxes': HorizontalBoxes(torch.tensor([[4.0, 4, 20, 30]])),
            'gt_bboxes_labels': np.zeros(1, int),
        }
    return {**found, 'gt_seg_map': image[..., 0] // 8, 'seg_fields': ['gt_seg_map']}


def noise(height=64, width=96):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


GEOMETRY = {
    'mmdet': [
        dict(type='RandomResize', scale=(80, 60), ratio_range=(0.5, 2.0), keep_ratio=True),
        dict(type='RandomCrop', crop_size=(40, 32), allow_negative_crop=True),
        dict(type='RandomFlip', prob=0.5),
    ],
    'mmseg': [
        dict(type='RandomResize', scale=(96, 64), ratio_range=(0.5, 2.0), keep_ratio=True),
        dict(type='RandomCrop', crop_size=(30, 40), cat_max_ratio=0.75),
        dict(type='RandomFlip', prob=0.5),
        dict(type='Pad', size=(40, 48)),
    ],
}


@pytest.mark.parametrize('scope', GEOMETRY)
@pytest.mark.parametrize('seed', range(6))
def test_both_images_move_alike_and_labels_once(scope, seed):
    import mmseg.datasets.transforms  # noqa: F401

    image = noise()
    given = {**results(image, scope), 'other': View(255 - image)}
    both = run_pipeline([dict(type='mmkd.Both', view='other', transforms=GEOMETRY[scope])], given, scope, seed)
    alone = run_pipeline(GEOMETRY[scope], results(image, scope), scope, seed)
    assert np.array_equal(both['img'], alone['img'])
    moved = both['other'].image.numpy()
    assert moved.shape == both['img'].shape
    inside = (both['img'] > 0) | (moved > 0)  # padding is 0 in both
    assert (np.abs(255 - moved.astype(int) - both['img'])[inside] <= 1).all()  # resizing rounds
    for key in ('flip', 'img_shape', 'scale_factor'):
        assert both[key] == alone[key], key
    if scope == 'mmdet':
        assert torch.equal(both['gt_bboxes'].tensor, alone['gt_bboxes'].tensor)
    else:
        assert np.array_equal(both['gt_seg_map'], alone['gt_seg_map'])


def test_a_kept_image_is_not_what_later_transforms_write_into():
    image = noise()
    steps = [
        dict(type='mmkd.KeepView'),
        dict(type='YOLOXHSVRandomAug', hue_delta=90, saturation_delta=90, value_delta=90),
    ]
    found = run_pipeline(steps, results(image.copy()))
    assert np.array_equal(found['weak'].image.numpy(), image)
    assert not np.array_equal(found['img'], image)


@pytest.fixture
def pair(tmp_path):
    for folder, image in (('rgb', noise()), ('thermal', 255 - noise())):
        (tmp_path / folder).mkdir()
        Image.fromarray(image).save(tmp_path / folder / 'a.png')
    return tmp_path


def test_another_image_is_loaded_from_beside_the_first(pair):
    steps = [
        dict(type='LoadImageFromFile'),
        dict(type='mmkd.LoadView', view='thermal', replace={'/rgb/': '/thermal/'}),
        dict(type='mmkd.Both', view='thermal', transforms=[dict(type='RandomFlip', prob=1.0)]),
        dict(type='PackDetInputs', meta_keys=('img_path', 'img_shape', 'thermal')),
    ]
    found = run_pipeline(steps, dict(img_path=str(pair / 'rgb' / 'a.png')))
    (view,) = views_of([found['data_samples']], 'thermal')
    assert torch.equal(255 - view.permute(2, 0, 1), found['inputs'])


def test_what_cannot_be_loaded(pair):
    load = LoadView('thermal', {'/rgb/': '/thermal/'})
    with pytest.raises(ConfigError, match="'/rgb/', which is not in"):
        load(dict(img=noise(), img_path='/images/a.png'))
    with pytest.raises(ConfigError, match='does not exist; correct replace'):
        load(dict(img=noise(), img_path=str(pair / 'rgb' / 'b.png')))
    with pytest.raises(ConfigError, match='is 96x64, and the image 96x32'):
        load(dict(img=noise(32), img_path=str(pair / 'rgb' / 'a.png')))


@pytest.mark.parametrize('make', [KeepView, lambda view: LoadView(view, {'a': 'b'}), lambda view: Both(view, [1])])
@pytest.mark.parametrize('name', ['', 'img', 'two words', 3])
def test_what_is_no_name(make, name):
    with pytest.raises(ConfigError, match='view='):
        make(name)


def test_images_without_the_view_or_moved_behind_it():
    model = build(view='other')
    with pytest.raises(ConfigError, match="an image has no view 'other'; put dict"):
        losses(model, batch(model))
    model = build(view='weak')
    with pytest.raises(
        ConfigError, match='the view .weak. of an image is 48x32, and the image 96x64; what moves pixels'
    ):
        losses(model, batch(model, ((64, 96),), lambda image: image[:32, :48]))


# --- configs

LOAD, FLIP = dict(type='LoadImageFromFile'), dict(type='RandomFlip', prob=0.5)
KEEP = dict(type='mmkd.KeepView')


def config(*steps, keys=('img_path', 'weak'), **teacher):
    pipeline = [LOAD, *steps, dict(type='PackDetInputs', meta_keys=keys)]
    return Config(
        dict(
            default_scope='mmdet',
            model=dict(type='mmkd.Distill', student=dict(), teacher=dict(config='t.py', view='weak', **teacher)),
            train_dataloader=dict(dataset=dict(type='mmkd.Images', data_prefix=dict(img_path='.'), pipeline=pipeline)),
        )
    )


@pytest.mark.parametrize(
    ('made', 'message'),
    [
        (config(FLIP), r'model.teacher sees the view .weak., which it does not give'),
        (config(KEEP, FLIP), r'RandomFlip behind the view .weak. would move the pixels of the image alone'),
        (config(KEEP, dict(type='RandomApply', transforms=[FLIP])), r'RandomFlip behind the view'),
        (config(FLIP, KEEP, keys=('img_path',)), r"mmkd.KeepView adds an image .* meta_keys=\(..., 'weak'\)"),
    ],
)
def test_pipelines_that_do_not_give_the_view_are_refused(made, message):
    with pytest.raises(ConfigError, match=message):
        check_data(made, ('train',))


def test_pipelines_that_do():
    strong = dict(type='RandAugment', aug_space=[[dict(type='Color')]])
    assert check_data(config(FLIP, KEEP, strong), ('train',)) == []
    thermal = dict(type='mmkd.LoadView', view='weak', replace={'a': 'b'})
    both = dict(type='mmkd.Both', view='weak', transforms=[FLIP])
    assert check_data(config(thermal, both), ('train',)) == []


def test_the_plain_config_has_no_view():
    thermal = dict(type='mmkd.LoadView', view='thermal', replace={'a': 'b'})
    both = dict(type='mmkd.Both', view='thermal', transforms=[FLIP])
    made = config(thermal, both, KEEP, keys=('img_path', 'weak', 'thermal'))
    made.model.student = detectors.retinanet()
    made.train_dataloader.dataset.type = 'CocoDataset'
    plain, left = plain_config(made, [])
    assert left == []
    assert plain.train_dataloader.dataset.pipeline == [LOAD, FLIP, dict(type='PackDetInputs', meta_keys=('img_path',))]


def test_normalize_takes_the_others_where_a_model_has_none():
    from mmengine.model import BaseDataPreprocessor

    model = build()
    image = torch.from_numpy(noise())
    both = [
        Normalize(each, model.data_preprocessor)([image], (64, 96), torch.device('cpu'))
        for each in (BaseDataPreprocessor(), model.data_preprocessor)
    ]
    assert torch.equal(*both)
