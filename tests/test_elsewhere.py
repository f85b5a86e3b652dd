"""mmkd.testing.elsewhere: a device that is none does what another one does, and refuses what that would."""

import copy

import pytest
import torch
from mmcv import ops
from mmcv.utils import ext_loader
from mmengine.runner import Runner
from mmengine.structures import InstanceData

from mmkd.testing.device import NoWaiting
from mmkd.testing.elsewhere import ELSEWHERE, elsewhere
from mmkd.testing.runs import of_all_sources, shapes_config, streets_config

CPU = torch.device('cpu')
pytestmark = pytest.mark.skipif(not hasattr(torch._C, '_only_lift_cpu_tensors'), reason='needs torch 2.4')


@pytest.fixture
def there():
    with elsewhere() as device:
        yield device


def test_what_is_computed_there_is_what_the_cpu_computes(there):
    torch.manual_seed(0)
    here = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten())
    other = copy.deepcopy(here).to(there)
    image = torch.randn(2, 3, 8, 8)
    steps = [torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9) for each in (here, other)]
    for _ in range(2):
        losses = [model(image.to(next(model.parameters()).device)).square().mean() for model in (here, other)]
        for loss, step in zip(losses, steps, strict=True):
            step.zero_grad()
            loss.backward()
            step.step()
    assert losses[1].device == ELSEWHERE
    assert losses[0].item() == losses[1].item()
    for name, value in other.state_dict().items():
        assert value.device == ELSEWHERE
        assert torch.equal(value.cpu(), here.state_dict()[name]), name


def test_tensors_are_made_there_and_brought_back(there):
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=there)
    assert (
        x.device == x.new_ones(2).device == torch.zeros(3, device=there).device == torch.zeros_like(x).device == there
    )
    assert x[[1, 0], 0].tolist() == [3, 1]
    assert x[x > 1].tolist() == [2, 3, 4]
    x[[0]] = 5.0
    assert x.cpu().numpy().tolist() == [[5, 5], [3, 4]]
    assert x.add_(1) is x
    assert x.sum().item() == 21
    assert x.cpu().device == CPU


def test_mmcvs_operations_and_instances_take_them(there):
    boxes, scores = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 5], [9, 9, 12, 12]]), torch.tensor([0.5, 0.9, 0.8])
    kept, index = ops.nms(boxes.to(there), scores.to(there), 0.5)
    assert kept.device == there
    assert index.tolist() == ops.nms(boxes, scores, 0.5)[1].tolist() == [1, 2]
    assert InstanceData(scores=scores.to(there))[index].scores.device == there
    with pytest.raises(RuntimeError, match='expected all tensors on lazy:0'):
        ops.nms(boxes.to(there), scores, 0.5)


@pytest.mark.parametrize(
    'mixes',
    [
        lambda there, here: there + here,
        lambda there, here: torch.cat([there, here]),
        lambda there, here: torch.where(here > 0, there, 0.0),
        lambda there, here: there @ here,
        lambda there, here: there.mul_(here),
        lambda there, here: here[there.long()],
        lambda there, here: torch.stack([there.sum(), here.sum()]),
    ],
)
def test_tensors_of_both_devices_are_refused(there, mixes):
    with pytest.raises(RuntimeError, match='expected all tensors on lazy:0, got'):
        mixes(torch.ones(3, device=there), torch.ones(3))


def test_what_cuda_allows_of_both_is_allowed(there):
    x = torch.ones(3, device=there)
    assert (x + torch.tensor(2.0)).tolist() == [3, 3, 3]
    assert x[torch.tensor([0, 1])].device == there
    assert x.copy_(torch.zeros(3)).tolist() == [0, 0, 0]
    assert torch.zeros(3).copy_(x).device == CPU


@pytest.mark.parametrize(
    ('waits', 'operation'),
    [
        (True, lambda x: x.cpu()),
        (True, lambda x: x.tolist()),
        (True, lambda x: x.new_tensor([1.0])),
        (True, lambda x: torch.tensor([1.0], device=x.device)),
        (True, lambda x: torch.arange(3).to(x.device)),
        (True, lambda x: x[[1, 0]]),
        (True, lambda x: x[torch.tensor([1, 0])]),
        (True, lambda x: x.copy_(torch.zeros(4))),
        (False, lambda x: torch.arange(3).to(x.device, non_blocking=True)),
        (False, lambda x: x.copy_(torch.zeros(4), non_blocking=True)),
        (False, lambda x: x.to(x.device, torch.float64).to(torch.float32)),
        (False, lambda x: x[torch.arange(3, device=x.device)] + x.new_full((3,), 2.0) + torch.tensor(1.0)),
        (False, lambda x: x[1:3].clone()),
    ],
)
def test_copies_for_which_the_host_waits_are_refused(there, waits, operation):
    x = torch.ones(4, device=there)
    if waits:
        with pytest.raises(RuntimeError, match='waits for the device'), NoWaiting(there):
            operation(x)
        operation(x)
    else:
        with NoWaiting(there):
            operation(x)


def test_afterwards_all_is_as_before():
    compiled = ext_loader.load_ext('_ext', ['nms'])
    autocast, nms = torch.autocast, compiled.nms
    with elsewhere() as there:
        assert compiled.nms is not nms
    assert torch.autocast is autocast
    assert compiled.nms is nms
    assert not torch._C._only_lift_cpu_tensors()
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.ones(2, device=there)


@pytest.mark.long
@pytest.mark.parametrize(('family', 'make'), [('RetinaNet', shapes_config), ('PSPNet', streets_config)])
def test_a_whole_training_there_and_its_resumption_end_with_the_weights_of_the_cpus(tmp_path, family, make):
    """All kinds of sources, an average of mmengine's, evaluation and checkpoints; no tensor is left on the host."""

    def trained(folder):
        folder.mkdir()
        config = make(folder, of_all_sources(folder, family))
        config.train_cfg.val_interval = config.default_hooks.checkpoint.interval = 2
        config.custom_hooks = [dict(type='EMAHook')]
        runner = Runner.from_cfg(config)
        runner.train()
        yield runner.model.state_dict()
        config.update(
            resume=True, load_from=str(folder / 'work' / 'iter_2.pth'), experiment_name='resumed' + folder.name
        )
        resumed = Runner.from_cfg(config)
        resumed.train()
        yield resumed.model.state_dict()

    expected, resumed = trained(tmp_path / 'here')
    with elsewhere() as there:
        for found in trained(tmp_path / 'there'):
            assert {value.device for value in found.values()} == {there}
            for name, value in found.items():
                assert torch.equal(value.cpu(), expected[name]), name
    assert all(torch.equal(value, expected[name]) for name, value in resumed.items())
