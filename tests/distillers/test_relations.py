import pytest
import torch
from mmengine.structures import BaseDataElement

from mmkd.distill import distill
from mmkd.distillers.generic.sp import SP
from mmkd.distillers.relations import at_points, pool_cells, squared_distances
from mmkd.errors import ConfigError
from mmkd.hosts.extents import image_parts
from mmkd.testing import models, segmentors
from mmkd.testing.batches import random_batch


def sample(**meta):
    return BaseDataElement(metainfo=meta)


def pooled_loops(feature, size, parts):
    """Each cell from small pieces of its area, 60 along each side."""
    fine, out = 60, torch.zeros(*feature.shape[:2], *size, dtype=feature.dtype)
    for b, (down, across) in enumerate(parts.tolist()):
        height, width = feature.shape[2] * down / size[0], feature.shape[3] * across / size[1]
        for i in range(size[0]):
            for j in range(size[1]):
                rows = [int((i + (k + 0.5) / fine) * height) for k in range(fine)]
                columns = [int((j + (k + 0.5) / fine) * width) for k in range(fine)]
                out[b, :, i, j] = feature[b][:, rows][:, :, columns].mean((1, 2))
    return out


def test_cells_are_means_over_their_area():
    feature = torch.randn(2, 3, 6, 10, dtype=torch.float64)
    parts = torch.tensor([[1.0, 1.0], [0.5, 0.6]], dtype=torch.float64)
    torch.testing.assert_close(pool_cells(feature, (4, 5), parts), pooled_loops(feature, (4, 5), parts))


def test_cells_that_fit_are_those_of_average_pooling():
    feature = torch.randn(2, 3, 8, 12)
    torch.testing.assert_close(pool_cells(feature, (4, 3)), torch.nn.functional.avg_pool2d(feature, (2, 4)))
    torch.testing.assert_close(pool_cells(feature, (8, 12)), feature)
    assert pool_cells(feature[:, :, :1, :1], (2, 2)).shape == (2, 3, 2, 2)  # more cells than positions


def test_cells_do_not_see_the_padding():
    feature = torch.randn(1, 3, 8, 8, requires_grad=True)
    pool_cells(feature, (2, 2), torch.tensor([[0.5, 0.75]])).sum().backward()
    seen = feature.grad[0].any(0)
    assert seen[:4, :6].all()
    assert seen.sum() == 4 * 6


def test_points_are_the_positions_in_which_they_lie():
    feature = torch.arange(12.0).view(1, 1, 3, 4)
    points = torch.tensor([[[0.0, 0.0], [0.34, 0.24], [0.999999, 0.999999], [0.5, 0.5]]])
    assert at_points(feature, points).flatten().tolist() == [0, 4, 11, 6]


def test_parts_of_a_batch():
    feature = torch.zeros(4, 3, 5, 5)
    samples = [
        sample(img_shape=(80, 60), batch_input_shape=(100, 120), pad_shape=(96, 64)),  # mmdet's
        sample(img_shape=(80, 60), pad_shape=(80, 120)),  # mmseg's
        sample(img_shape=(80, 60, 3)),
        sample(),
    ]
    torch.testing.assert_close(
        image_parts(samples, feature), torch.tensor([[0.8, 0.5], [1.0, 0.5], [1.0, 1.0], [1.0, 1.0]])
    )
    assert image_parts(None, feature).eq(1).all()


def test_squared_distances_as_plain_loops():
    rows = torch.randn(5, 7, dtype=torch.float64) + 100
    rows[3] = rows[1]
    expected = [[sum((a - b) ** 2 for a, b in zip(x, y)) for y in rows.tolist()] for x in rows.tolist()]
    torch.testing.assert_close(squared_distances(rows), torch.tensor(expected, dtype=torch.float64))


def test_equal_rows_are_at_distance_0_without_gradient():
    rows = (torch.randn(1, 64) * 100).repeat(6, 1).requires_grad_()
    found = squared_distances(rows)
    assert not found.any()
    found.sum().backward()
    assert not rows.grad.any()


@pytest.mark.parametrize(
    ('between', 'samples', 'number', 'channels'),
    [
        ('cells', 64, 2 * 25, 16),
        ('cells', 2, 2, 16),
        ('cells', 1, 2, 16),
        ('pixels', 64, 64, 16),
        ('pixels', 1, 2, 16),
        ('images', 64, 2, 16 * 8 * 16),
    ],
)
def test_how_many_samples_there_are(between, samples, number, channels, tmp_path):
    """Of a batch of two, with the same points in both networks."""
    config = segmentors.pspnet()
    checkpoint = models.save_weights(config, tmp_path / 'teacher.pth')
    entry = dict(type='SP', layer='decode_head.bottleneck', between=between, samples=samples)
    model = distill(models.build(config, seed=0), dict(config=config, checkpoint=checkpoint), dict(it=entry))
    model.load_state_dict(torch.load(checkpoint, weights_only=True)['state_dict'])
    model.sources['teacher'].load()
    model.eval()
    batch = model.data_preprocessor(random_batch(model, (2, 3, 64, 128)), True)
    found = []
    method = model.distillers['it']
    method.forward = lambda *taps: (
        found.extend(method.rows(*taps)) or {'loss': taps[0]['decode_head.bottleneck'][0].sum()}
    )
    model(**batch, mode='loss')
    ((s, t),) = found
    assert s.shape == t.shape == (number, channels)
    torch.testing.assert_close(s, t, rtol=1e-3, atol=1e-4)
    assert not t.requires_grad
    assert s.requires_grad


@pytest.mark.parametrize(
    ('method', 'options', 'images', 'message'),
    [
        (
            'RKD',
            dict(between='images'),
            2,
            'a batch of 2 images has 2 samples, and RKD needs 3 to relate; take between=',
        ),
        (
            'RKD',
            dict(samples=2),
            2,
            'a batch of 2 images has 2 samples, and RKD needs 3 to relate; raise samples, found 2',
        ),
        ('SP', dict(between='images'), 1, 'a batch of 1 images has 1 samples, and SP needs 2 to relate; take between='),
    ],
)
def test_a_first_batch_too_small_to_relate_is_refused_and_a_later_one_is_not(method, options, images, message):
    config = segmentors.pspnet()
    model = distill(
        models.build(config, seed=0),
        models.build(config, seed=1),
        dict(it=dict(type=method, layer='decode_head.bottleneck', **options)),
    )
    model.sources['teacher'].accept_current_weights()
    model.eval()

    def losses(number):
        batch = model.data_preprocessor(random_batch(model, (number, 3, 64, 128)), True)
        found = model(**batch, mode='loss')
        return sum(float(value.detach()) for key, value in found.items() if key.startswith('it.loss'))

    with pytest.raises(ConfigError, match=message):
        losses(images)
    assert losses(3) > 0
    assert losses(images) == pytest.approx(0, abs=1e-5)


def test_pixels_are_drawn_anew_within_each_image():
    parts = torch.tensor([[0.5, 0.25]])
    feature = torch.zeros(1, 1, 8, 8)
    feature[..., :4, :2] = 1
    points = torch.rand(1, 1000, 2) * parts
    assert at_points(feature, points).eq(1).all()


@pytest.mark.parametrize('options', [dict(between='regions'), dict(samples=0), dict(samples=2.5), dict(match='size')])
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        SP('neck', **options)
