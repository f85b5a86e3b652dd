"""Every method, stopped and resumed: what it keeps is in the checkpoint, and nothing else counts."""

import pytest
import torch
from mmengine.logging import MessageHub

from mmkd.testing.gpu.cases import batch_of, build, method_cases, total

STEPS, STOPPED = 6, 3
"""Each phase of MasKD and FreeKD has one of the steps before and after; MatchingGuided assigns in the steps 0, 2 and 4."""
CASES = {name: case for name, *case in method_cases(quick=False)}


def trained(model, steps):
    """The losses of each step; random numbers are those of the step, as the runner draws them."""
    found = []
    for step in steps:
        MessageHub.get_current_instance().update_info('iter', step)
        torch.manual_seed(step)
        losses = model(**batch_of(model, step), mode='loss')
        found.append({key: torch.as_tensor(value).detach() for key, value in losses.items() if '.' in key})
        parameters = [each for each in model.parameters() if each.requires_grad]
        gradients = torch.autograd.grad(
            total({key: value for key, value in losses.items() if 'loss' in key}), parameters, allow_unused=True
        )
        scale = 0.1 / torch.stack([each.norm() for each in gradients if each is not None]).norm()
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    parameter.sub_(scale * gradient)
    return found


@pytest.mark.long
@pytest.mark.parametrize('name', CASES)
def test_a_resumed_method_goes_on_as_if_it_never_stopped(name):
    with_all = build(*CASES[name], torch.device('cpu'))
    trained(with_all, range(STOPPED))
    state = {key: value.clone() for key, value in with_all.state_dict().items()}
    expected = trained(with_all, range(STOPPED, STEPS))
    resumed = build(*CASES[name], torch.device('cpu'))
    resumed.load_state_dict(state)
    found = trained(resumed, range(STOPPED, STEPS))
    for of_step, other in zip(found, expected, strict=True):
        assert of_step.keys() == other.keys()
        for key, value in other.items():
            assert torch.equal(of_step[key], value), key
    for key, value in with_all.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key
