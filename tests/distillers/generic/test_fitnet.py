import pytest
import torch

from mmkd.distill import distill
from mmkd.distillers.generic.fitnet import FitNet, hint_loss
from mmkd.errors import ConfigError
from mmkd.testing import detectors, models
from mmkd.testing.batches import random_batch
from mmkd.testing.closed_form import closed_form_inputs


def test_the_formula_as_plain_loops():
    student, teacher = (each.double() for each in closed_form_inputs((2, 3, 4, 5)))
    squares = [(s - t) ** 2 for s, t in zip(student.flatten().tolist(), teacher.flatten().tolist())]
    assert hint_loss(student, teacher).item() == pytest.approx(sum(squares) / len(squares), rel=1e-12)


def test_the_gradient_reaches_the_student_alone():
    student, teacher = (torch.randn(2, 3, 4, 5, requires_grad=True) for _ in range(2))
    hint_loss(student, teacher).backward()
    torch.testing.assert_close(student.grad, 2 * (student - teacher).detach() / student.numel())
    assert teacher.grad is None


def test_levels_are_summed_and_adapters_trained(tmp_path):
    teacher = detectors.retinanet(24)
    checkpoint = models.save_weights(teacher, tmp_path / 'teacher.pth')
    entry = dict(type='FitNet', layer='neck', loss_weight=3.0)
    model = distill(
        models.build(detectors.retinanet(), seed=0), dict(config=teacher, checkpoint=checkpoint), dict(it=entry)
    )
    model.sources['teacher'].load()
    data = model.train().data_preprocessor(random_batch(model, (1, 3, 64, 96)), True)
    taps = model.sources['teacher'](data['inputs'], data['data_samples'])
    found = model(**data, mode='loss')['it.loss']
    adapted = model.distillers.it.levels.adapters(model.extract_feat(data['inputs']), taps['neck'])
    expected = sum((s - t).square().mean() for s, t in zip(adapted, taps['neck']))
    torch.testing.assert_close(found, 3 * expected)
    found.backward()
    assert all(each.grad.any() for each in model.distillers.parameters())


def test_a_layer_that_is_none_is_an_error():
    with pytest.raises(ConfigError, match='layer=None'):
        FitNet(None)
