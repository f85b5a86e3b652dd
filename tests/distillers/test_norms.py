import pytest
import torch
import torch.nn.functional as F

from mmkd.distillers.norms import BATCH, INSTANCE, normalized


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
