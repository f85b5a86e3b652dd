import pytest
import torch
from mmdet.models import MultiBranchDataPreprocessor
from mmdet.structures import DetDataSample
from mmengine.model import BaseDataPreprocessor

from mmkd.distill import distill
from mmkd.hosts.running import run
from mmkd.normalize import Renormalize
from mmkd.taps import Taps
from mmkd.testing import detectors, models, segmentors
from mmkd.testing.batches import random_batch


def preprocess(config, image):
    model = models.build(detectors.retinanet(data_preprocessor=config))
    data = {'inputs': [image], 'data_samples': [DetDataSample(metainfo=dict(img_shape=tuple(image.shape[1:])))]}
    batch = model.data_preprocessor(data)
    return model.data_preprocessor, batch['inputs'], batch['data_samples']


@pytest.mark.parametrize(
    'teachers',
    [
        dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], bgr_to_rgb=False),
        dict(mean=[0.0, 0.0, 0.0], std=[255.0, 255.0, 255.0], bgr_to_rgb=True),
        dict(mean=None, std=None, bgr_to_rgb=False),
        dict(pad_value=7),
    ],
)
def test_a_batch_is_renormalized_as_the_teacher_would_have_done(teachers):
    image = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8)
    source, inputs, data_samples = preprocess({}, image)
    target, expected, _ = preprocess(teachers, image)
    renormalised = Renormalize.between(source, target)(inputs, data_samples)
    assert renormalised.shape[2:] == (64, 96)
    torch.testing.assert_close(renormalised, expected, rtol=1e-5, atol=1e-3)
    assert (renormalised[:, :, 50:] == teachers.get('pad_value', 0)).all()
    assert (renormalised[:, :, :, 70:] == teachers.get('pad_value', 0)).all()


def test_equal_normalisation_costs_nothing():
    source, _, _ = preprocess({}, torch.zeros(3, 32, 32, dtype=torch.uint8))
    assert Renormalize.between(source, source) is None


def test_a_teacher_without_a_preprocessor_takes_the_students():
    source, _, _ = preprocess({}, torch.zeros(3, 32, 32, dtype=torch.uint8))
    assert Renormalize.between(source, BaseDataPreprocessor()) is None


def test_a_semi_supervised_teacher_normalizes_as_the_detector_inside_it():
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    source, inputs, data_samples = preprocess({}, image)
    config = {**detectors.PREPROCESSOR, 'mean': [1.0, 2.0, 3.0], 'bgr_to_rgb': False}
    _, expected, _ = preprocess(config, image)
    found = Renormalize.between(source, MultiBranchDataPreprocessor(config))(inputs, data_samples)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    'padding', [dict(size=(96, 128), size_divisor=None), dict(size_divisor=32)], ids=['size', 'divisor']
)
@pytest.mark.parametrize(
    'teachers',
    [
        dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], bgr_to_rgb=False),
        dict(mean=[127.5] * 3, std=[127.5] * 3, pad_val=0.5),
        dict(pad_val=-2.0),
        dict(mean=None, std=None, bgr_to_rgb=False),
    ],
)
def test_a_segmentor_with_its_own_normalisation_sees_what_it_would_have_made_itself(teachers, padding, tmp_path):
    """For a batch of two image sizes, padded."""
    teacher = segmentors.pspnet(24, data_preprocessor=dict(teachers, **padding))
    options = dict(config=teacher, checkpoint=models.save_weights(teacher, tmp_path / 'teacher.pth'))
    student = models.build(segmentors.pspnet(data_preprocessor=dict(pad_val=1.0, **padding)), seed=0)
    layer = 'decode_head.conv_seg'
    model = distill(student, options, dict(kd=dict(type='KD')))
    model.sources['teacher'].load()

    def batch():
        parts = [random_batch(model, (1, 3, *size), seed=seed) for seed, size in enumerate([(50, 120), (90, 70)])]
        return {key: parts[0][key] + parts[1][key] for key in parts[0]}

    own = models.build(teacher, seed=1).eval()
    images = own.data_preprocessor(batch(), True)['inputs']
    assert images.shape == (2, 3, 96, 128)
    with torch.no_grad(), Taps(own, [layer]) as taps:
        run(own, [layer], images, None)
    (expected,) = taps[layer]
    data = model.data_preprocessor(batch(), True)
    given = data['inputs'].clone()
    (found,) = model.sources['teacher'](data['inputs'], data['data_samples'])[layer]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert torch.equal(data['inputs'], given)  # the student's own images stay as they are
