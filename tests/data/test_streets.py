import cv2
import numpy as np
import pytest
from mmengine.registry import DefaultScope
from mmseg.datasets import CityscapesDataset

from mmkd.data import streets
from mmkd.errors import ConfigError

SPLITS = {'train': 6, 'val': 2}
IMAGE = 'leftImg8bit/train/streets/streets_000000_000019_leftImg8bit.png'
LABELS = 'gtFine/train/streets/streets_000000_000019_gtFine_labelTrainIds.png'


@pytest.fixture
def root(tmp_path):
    return streets.generate(tmp_path / 'streets', SPLITS)


def test_the_same_arguments_give_the_same_images(root, tmp_path):
    again = streets.generate(tmp_path / 'again', SPLITS)
    files = [path.relative_to(root) for path in sorted(root.rglob('*.*'))]
    assert len(files) == 18
    for path in files:
        assert (root / path).read_bytes() == (again / path).read_bytes()
    for options in (dict(seed=1), dict(light='dusk')):
        other = streets.generate(tmp_path / str(options), SPLITS, **options)
        assert (other / IMAGE).read_bytes() != (root / IMAGE).read_bytes()


def test_more_images_leave_the_first_as_they_are(root, tmp_path):
    more = streets.generate(tmp_path / 'more', {'train': 7, 'val': 2})
    assert (more / IMAGE).read_bytes() == (root / IMAGE).read_bytes()


def test_data_that_is_there_is_kept_and_other_data_not_overwritten(root):
    (root / IMAGE).write_bytes(b'mine')
    streets.generate(root, SPLITS)
    assert (root / IMAGE).read_bytes() == b'mine'
    with pytest.raises(ConfigError, match='made from'):
        streets.generate(root, SPLITS, light='dusk')


def test_the_stock_cityscapes_dataset_reads_it(root):
    assert CityscapesDataset.METAINFO['classes'] == streets.CLASSES
    pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
    prefix = dict(img_path='leftImg8bit/train', seg_map_path='gtFine/train')
    with DefaultScope.overwrite_default_scope('mmseg'):
        dataset = CityscapesDataset(data_root=str(root), data_prefix=prefix, pipeline=pipeline)
    assert len(dataset) == 6
    sample = dataset[0]
    assert sample['inputs'].shape == (3, 128, 256)
    labels = sample['data_samples'].gt_sem_seg.data[0].numpy()
    np.testing.assert_array_equal(labels, cv2.imread(str(root / LABELS), cv2.IMREAD_UNCHANGED))


def test_every_class_occurs_and_the_border_is_ignored():
    seen = np.zeros(256, int)
    for seed in range(40):
        image, labels = streets.draw(np.random.default_rng(seed), (128, 256))
        assert image.shape == (128, 256, 3)
        assert image.dtype == labels.dtype == np.uint8
        seen += np.bincount(np.unique(labels), minlength=256)
        border = np.ones((128, 256), bool)
        border[2:-4, 2:-2] = False
        np.testing.assert_array_equal(labels == streets.IGNORED, border)
    assert (seen[:19] >= 8).all()  # images that have the class
    assert seen[19:255].sum() == 0


def test_the_road_is_below_the_sky():
    for seed in range(10):
        _, labels = streets.draw(np.random.default_rng(seed), (128, 256))
        rows = {name: np.nonzero(labels == streets.ID[name])[0].mean() for name in ('road', 'sky')}
        assert rows['road'] > 64 > rows['sky']


def test_dusk_is_darker_than_day():
    day, dusk = (streets.draw(np.random.default_rng(0), (128, 256), light)[0].mean() for light in streets.LIGHTS)
    assert dusk < 0.7 * day
    with pytest.raises(ConfigError, match="light='noon'"):
        streets.generate('unused', light='noon')
