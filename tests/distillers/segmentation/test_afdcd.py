import math
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from mmkd.distill import distill
from mmkd.distillers.segmentation.afdcd import AfDCD, dense_contrastive_loss, patches
from mmkd.errors import ConfigError
from mmkd.registry import DISTILLERS, build
from mmkd.testing import models, segmentors
from mmkd.testing.batches import random_batch
from mmkd.testing.closed_form import closed_form_inputs

ROOT = Path(__file__).resolve().parents[3]


def plain_loops(student, teacher, tau, groups, pool, patch):
    """The formula, position by position and group by group, in float64."""
    batch, channels, height, width = student.shape
    size = channels // groups

    def vectors(feature, b, y, x):
        window = feature[b, :, y * pool : (y + 1) * pool, x * pool : (x + 1) * pool].flatten(1)
        pooled = [max(row) for row in window.tolist()]
        return [pooled[m * size : (m + 1) * size] for m in range(groups)]

    rows, columns = height // pool // patch, width // pool // patch
    total, count = 0.0, 0
    for b in range(batch):
        for top in range(rows):
            for left in range(columns):
                cells = [(top * patch + v, left * patch + u) for v in range(patch) for u in range(patch)]
                own = {cell: vectors(student, b, *cell) for cell in cells}
                others = {cell: vectors(teacher, b, *cell) for cell in cells}
                for i in cells:
                    count += 1
                    for m in range(groups):
                        near = {
                            (j, n): math.exp(-sum(abs(p - q) for p, q in zip(own[i][m], others[j][n])) / tau)
                            for j in cells
                            for n in range(groups)
                            if n != m or j == i
                        }
                        total -= math.log(near[i, m] / sum(near.values()))
    return total / count


@pytest.mark.parametrize(
    ('groups', 'pool', 'patch', 'size'), [(2, 2, 2, (8, 12)), (3, 1, 2, (5, 6)), (6, 2, 4, (9, 8))]
)
def test_the_contrast_as_plain_loops(groups, pool, patch, size):
    """Rows and columns that no whole patch has are left out."""
    student, teacher = torch.randn(2, 2, 6, *size, dtype=torch.float64)
    expected = plain_loops(student, teacher, 0.7, groups, pool, patch)
    found = dense_contrastive_loss(student, teacher, 0.7, groups, pool, patch)
    assert found.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ('shape', 'options', 'expected'),
    [
        ((2, 32, 16, 32), {}, 138.5687255859375),
        ((2, 12, 16, 16), dict(groups=4, pool=2, patch=4, tau=1.0), 17.89731788635254),
    ],
)
def test_the_values_of_the_authors_code(shape, options, expected):
    """OSVAI/Af-DCD f1e1a24, losses/ocmgd.py: its contrast, divided by the batch, on closed-form inputs."""
    found = dense_contrastive_loss(*closed_form_inputs(shape), **options)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_patches_hold_each_position_and_group_once():
    feature = torch.arange(2.0 * 6 * 4 * 8).view(2, 6, 4, 8)
    found = patches(feature, groups=3, patch=2)
    assert found.shape == (2 * 2 * 4, 4 * 3, 2)
    assert sorted(found.flatten().tolist()) == feature.flatten().tolist()
    assert found[0, 0].tolist() == feature[0, :2, 0, 0].tolist()
    assert found[0, 1].tolist() == feature[0, 2:4, 0, 0].tolist()
    assert found[0, 3].tolist() == feature[0, :2, 0, 1].tolist()
    assert found[1, 0].tolist() == feature[0, :2, 0, 2].tolist()


@pytest.mark.parametrize('size', [(1, 1), (3, 5), (4, 40)])
def test_maps_smaller_than_a_window_or_a_patch(size):
    student, teacher = torch.randn(2, 1, 32, *size)
    student.requires_grad_()
    loss = dense_contrastive_loss(student, teacher)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def test_it_falls_towards_the_teacher_and_a_far_one_is_finite():
    student, teacher = torch.randn(2, 2, 32, 16, 16)
    far, near = (dense_contrastive_loss(teacher + step * student, teacher) for step in (1.0, 0.1))
    assert 0 <= near < far
    student = (1e4 * student).requires_grad_()
    loss = dense_contrastive_loss(student, teacher)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def test_the_gradient_reaches_the_student_alone():
    student, teacher = torch.randn(2, 1, 4, 4, 4, dtype=torch.float64).requires_grad_().unbind()
    student, teacher = student.detach().requires_grad_(), teacher.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: dense_contrastive_loss(x, teacher, 0.5, 2, 2, 2), student)
    dense_contrastive_loss(student, teacher, 0.5, 2, 2, 2).backward()
    assert student.grad.any()
    assert teacher.grad is None


def pair(tmp_path, family='pspnet', **options):
    config = segmentors.pspnet(24, base=16)
    checkpoint = models.save_weights(config, tmp_path / 'teacher.pth')
    student = models.build(getattr(segmentors, family)(), seed=0)
    options = dict(layer='backbone.layer4', groups=4) | options
    model = distill(student, dict(config=config, checkpoint=checkpoint), dict(afdcd=dict(type='AfDCD', **options)))
    model.sources['teacher'].load()
    return model.train()


@pytest.mark.parametrize(
    ('family', 'options'),
    [
        ('pspnet', {}),
        ('segformer', dict(layer='decode_head.fusion_conv', teacher_layer='decode_head.bottleneck')),
        ('deeplabv3', dict(layer=['backbone.layer4', 'decode_head.bottleneck'])),
    ],
)
def test_a_training_step(family, options, tmp_path):
    model = pair(tmp_path, family, **options)
    for objects in (4, 0):
        data = model.data_preprocessor(random_batch(model, (2, 3, 64, 96), objects), True)
        model.zero_grad()
        losses = {key: value for key, value in model(**data, mode='loss').items() if key.startswith('afdcd.')}
        assert list(losses) == ['afdcd.loss_feature', 'afdcd.loss_contrast']
        for loss in losses.values():
            model.zero_grad()
            loss.backward(retain_graph=True)
            for name, parameter in model.distillers.named_parameters():
                assert parameter.grad.any(), name
            assert next(model.backbone.parameters()).grad.any()


def test_weights(tmp_path):
    found = []
    for scale in (1, 3):
        model = pair(tmp_path, feature_weight=1e-3 * scale, contrast_weight=0.5 * scale)
        for other in (model.distillers, *model.distillers.modules()):
            for parameter in other.parameters():
                torch.nn.init.constant_(parameter, 0.01)
        data = model.data_preprocessor(random_batch(model, (2, 3, 64, 96)), True)
        torch.manual_seed(0)
        found.append(model(**data, mode='loss'))
    for key in ('afdcd.loss_feature', 'afdcd.loss_contrast'):
        torch.testing.assert_close(found[1][key], 3 * found[0][key])


def test_groups_that_do_not_divide_the_channels_are_an_error(tmp_path):
    with pytest.raises(ConfigError, match='groups=16: does not divide the 24 channels'):
        pair(tmp_path, layer='decode_head.bottleneck', groups=16)


def test_without_a_layer_it_is_an_error():
    with pytest.raises(ConfigError, match='layer'):
        build(DISTILLERS, 'distillers.it', dict(type='AfDCD'))


@pytest.mark.parametrize('name', ['afdcd_deeplabv3.py', 'afdcd_deeplabv3_mbv2.py', 'streets/afdcd_pspnet.py'])
def test_its_configs_compare_what_the_backbones_last_stages_put_out(name):
    """The authors' layers, 512 or MobileNetV2's 320 channels against 2048."""
    config = Config.fromfile(ROOT / 'configs' / name)
    spec = config.model.distillers.afdcd
    last = 'backbone.layer7' if 'mbv2' in name else 'backbone.layer4'
    assert (spec.layer, spec.get('teacher_layer', spec.layer)) == (last, 'backbone.layer4')


@pytest.mark.parametrize(
    'options',
    [
        dict(mask_ratio=1.0),
        dict(tau=0),
        dict(groups=1),
        dict(groups=2.5),
        dict(pool=0),
        dict(patch='4'),
        dict(match='size'),
    ],
)
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        AfDCD('backbone.layer4', **options)
