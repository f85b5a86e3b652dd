import pytest
import torch
import torch.nn.functional as F

from mmkd.distillers.norms import BATCH, INSTANCE, BatchNorm2d, normalized
from mmkd.hosts.running import counted_once


@pytest.mark.parametrize('eps', [1e-5, 0.3])
def test_it_is_torchs_batch_norm_and_instance_norm(eps):
    feature = 3 * torch.randn(2, 3, 4, 5) + 1
    expected = F.batch_norm(feature, None, None, training=True, eps=eps)
    torch.testing.assert_close(normalized(feature, BATCH, eps), expected)
    torch.testing.assert_close(normalized(feature, INSTANCE, eps), F.instance_norm(feature, eps=eps))


def test_a_constant_and_a_single_value_are_zero_with_a_finite_gradient():
    for shape, over in (((2, 3, 4, 5), INSTANCE), ((1, 3, 1, 1), BATCH), ((2, 3, 1, 1), INSTANCE)):
        feature = torch.full(shape, 3.0, requires_grad=True)
        found = normalized(feature, over)
        found.square().sum().backward()
        assert (found == 0).all()
        assert torch.isfinite(feature.grad).all()


@pytest.mark.parametrize('shape', [(2, 3, 4, 5), (1, 3, 4, 1), (2, 3, 1, 1)])
def test_the_module_is_torchs_batch_norm(shape):
    feature = 3 * torch.randn(shape) + 1
    norm, other = BatchNorm2d(3), torch.nn.BatchNorm2d(3, track_running_stats=False)
    assert norm.state_dict().keys() == other.state_dict().keys() == {'weight', 'bias'}
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    other.load_state_dict(norm.state_dict())
    assert torch.equal(norm(feature), other(feature))


def test_the_module_shifts_a_single_value():
    norm = BatchNorm2d(3)
    torch.nn.init.normal_(norm.bias)
    feature = torch.randn(1, 3, 1, 1, requires_grad=True)
    found = norm(feature)
    found.square().sum().backward()
    assert torch.equal(found.flatten(), norm.bias)
    assert all(torch.isfinite(each.grad).all() for each in (feature, norm.weight, norm.bias))


@pytest.mark.parametrize('training', [True, False])
def test_a_second_run_is_the_same_and_leaves_running_statistics(training):
    norm = torch.nn.BatchNorm2d(3).train(training)
    torch.nn.init.normal_(norm.running_mean)
    feature = 3 * torch.randn(2, 3, 4, 5) + 1
    expected = norm(feature)
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    with counted_once(torch.nn.Sequential(norm)):
        assert norm.training == training
        if training:  # of the batch
            torch.testing.assert_close(norm(feature), expected)
        else:
            assert torch.equal(norm(feature), expected)
    assert norm.track_running_stats
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())
