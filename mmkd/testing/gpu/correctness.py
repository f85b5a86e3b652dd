"""Whether the device computes what the CPU does, in every precision, and never waits in the step."""

import contextlib
import copy
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from mmcv import ops
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor

from mmkd.distillers.generic import matching_guided
from mmkd.errors import first_line
from mmkd.sources import Peer
from mmkd.taps import Taps, tensors
from mmkd.testing.device import NoWaiting
from mmkd.testing.gpu.cases import (
    SEEDS,
    batch_of,
    build,
    build_like,
    compare,
    evaluate,
    finite,
    method_cases,
    prepare,
    require_plain,
    source_cases,
    total,
)
from mmkd.testing.gpu.section import Cases, Finding, Setting, Skip

# Relative differences, see `compare`. Values and gradients are those of ten and more layers in float32.
SAME_LOSS, SAME_GRADIENT = 1e-4, 5e-3
# Of a loss under autocast to that in float32: fp16 has 11 bits, bf16 has 8.
CLOSE = {'float16': 0.01, 'bfloat16': 0.05}
SELECTS = ('GID', 'Mimic', 'QuantizationMimic', 'Chen', 'GDetKD', 'HEAD')
"""Methods that choose slots or regions by scores, or draw regions: rounding chooses others, so the value is another's."""


def environment(setting: Setting) -> Cases:
    """mmcv's compiled ops on the device, against the CPU."""

    def agrees(run: Callable[[Any], Any]) -> Callable[[], Finding]:
        def check() -> Finding:
            try:
                found = run(setting.device)
            except RuntimeError as error:
                if 'not found' in str(error) or 'not compiled' in str(error):
                    raise Skip(f'missing: {first_line(error)}') from None
                raise
            difference = float((found.cpu() - run(torch.device('cpu'))).abs().max())
            return Finding(f'{difference:.1e}', 'at most 1e-4 from the CPU', difference <= 1e-4)

        return check

    random = torch.Generator().manual_seed(0)
    image, weight = torch.randn(2, 8, 32, 32, generator=random), torch.randn(8, 8, 3, 3, generator=random) / 8
    offset, mask = torch.randn(2, 18, 32, 32, generator=random), torch.rand(2, 9, 32, 32, generator=random)
    rois = torch.tensor([[0, 1.5, 2.5, 20.0, 30.0], [1, 3.0, 4.0, 31.0, 17.0]])
    boxes = torch.rand(200, 4, generator=random) * 50
    boxes[:, 2:] += boxes[:, :2] + 5
    scores = torch.rand(200, generator=random)

    def deformed(device: Any) -> Any:
        return ops.deform_conv2d(*(each.to(device) for each in (image, offset, weight)), 1, 1)

    def modulated(device: Any) -> Any:
        return ops.modulated_deform_conv2d(
            *(each.to(device) for each in (image, offset, mask, weight, torch.zeros(8))), 1, 1
        )

    yield 'roi_align', agrees(lambda device: ops.roi_align(image.to(device), rois.to(device), 7, 1.0, 2, 'avg', True))
    yield 'nms', agrees(lambda device: ops.nms(boxes.to(device), scores.to(device), 0.5)[0])
    yield 'deform_conv2d', agrees(deformed)
    yield 'modulated_deform_conv2d', agrees(modulated)


def values(setting: Setting) -> Cases:
    """Losses and gradients of every method and kind of source: the device against the CPU, float32 without TF32.

    Median over three batches of the largest difference, relative to each tensor's largest value.
    The dry run has a CPU alone: there it is oneDNN's convolutions against torch's own, which round otherwise.
    """

    def same(student: dict, teacher: Any, distillers: dict) -> Callable[[], Finding]:
        def check() -> Finding:
            exact = prepare(build(student, teacher, distillers, torch.device('cpu')))
            other = build_like(exact, student, teacher, distillers, setting.device)
            differences = []
            for seed in SEEDS:
                expected = evaluate(exact, seed)
                with without_tf32() if setting.device.type == 'cuda' else torch.backends.mkldnn.flags(enabled=False):
                    found = evaluate(other, seed)
                if not finite([*found[0].values(), *found[1].values()]):
                    raise ArithmeticError('a loss or a gradient is not finite')
                differences.append([compare(*each) for each in zip(found, expected)])
            loss, gradient = (statistics.median(each) for each in zip(*differences))
            return Finding(
                f'losses {loss:.1e}, gradients {gradient:.1e}',
                f'{SAME_LOSS:g}, {SAME_GRADIENT:g}',
                loss <= SAME_LOSS and gradient <= SAME_GRADIENT,
                dict(differences=differences),
            )

        return check

    for name, *case in (*method_cases(setting.quick), *source_cases(setting.quick)):
        yield name, same(*case)


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def waiting(setting: Setting) -> Cases:
    """Reading sources, distillers and the backward pass of their losses, with every wait for the device an error.

    The backward pass as far as the tapped tensors; behind them is the student's own. Not in it: the student's forward pass
    with mmdet's assigners, samplers and losses; what else of mmdet's waits by itself: the forward pass of a Peer, which is a
    training step, the losses of a head that is run once more, and the RoI extractor that pools a teacher's regions; and what is
    computed on the processor once in many steps, the assignment of channels.
    """

    def never_waits(student: dict, teacher: Any, distillers: dict) -> Callable[[], Finding]:
        def check() -> Finding:
            model = build(student, teacher, distillers, setting.device)
            guard, forward = NoWaiting(setting.device), model.distillers.forward
            read: list[torch.Tensor] = []
            paused: Counter[str] = Counter()

            def may_wait(owner: Any, name: str, what: str) -> Any:
                stock = getattr(owner, name)

                def call(*args: Any, **options: Any) -> Any:
                    paused[what] += 1
                    with guard.paused():
                        return stock(*args, **options)

                return mock.patch.object(owner, name, call)

            @contextlib.contextmanager
            def guarded() -> Iterator[None]:
                head = model.decode_head if hasattr(model, 'decode_head') else getattr(model, 'bbox_head', None)
                with contextlib.ExitStack() as stack:
                    stack.enter_context(may_wait(SingleRoIExtractor, 'forward', "mmdet's RoI extractor"))
                    stack.enter_context(may_wait(matching_guided, 'assign', 'the assignment of channels'))
                    owner = next((each for each in type(head).__mro__ if 'loss_by_feat' in vars(each)), None)
                    if owner is not None:
                        stack.enter_context(may_wait(owner, 'loss_by_feat', f"{owner.__name__}'s losses"))
                    stack.enter_context(guard)
                    yield

            def distill_guarded(own: Taps, knowledge: dict[str, Taps | None], samples: list) -> dict:
                for taps in (own, *filter(None, knowledge.values())):
                    found = [taps.per_call(layer) for layer, calls in taps.calls.items() if calls]
                    read.extend(each for each in tensors(found) if each.requires_grad)
                with guarded():
                    return forward(own, knowledge, samples)

            def read_guarded(function: Callable) -> Callable:
                def call(*args: Any) -> Any:
                    with guarded():
                        return function(*args)

                return call

            for seed in (0, 1):  # what is made once, and kept, may wait
                evaluate(model, seed)
            # an instance's attribute is called in place of its class's method
            model.distillers.forward = distill_guarded
            peers = [source for source in model.sources.values() if isinstance(source, Peer)]
            for source in set(model.sources.values()) - set(peers):
                source.read = read_guarded(source.read)
            for seed in (0, 1):
                read.clear()
                losses = model(**batch_of(model, seed), mode='loss')
                of_methods = {key: losses[key] for key in losses if key.startswith(tuple(model.distillers))}
                loss = total({key: value for key, value in of_methods.items() if '.loss' in key})
                with guard:
                    torch.autograd.grad(loss, [*read, *model.distillers.parameters()], allow_unused=True)
            apart = [f'{number} calls of {what} in two steps' for what, number in paused.items()]
            apart += ["the peer's training step"] * bool(peers)
            return Finding('never waits' + ''.join(f'; apart from {each}' for each in apart), 'no wait')

        return check

    for name, *case in (*method_cases(setting.quick), *source_cases(setting.quick)):
        yield name, never_waits(*case)


def precision(setting: Setting) -> Cases:
    """Losses of every method under autocast, against float32 on the same device; and steps with a gradient scaler."""

    def close(student: dict, teacher: Any, distillers: dict, dtype: str) -> Callable[[], Finding]:
        def check() -> Finding:
            require_plain(student, dtype, setting)
            exact = prepare(build(student, teacher, distillers, setting.device))
            model = build_like(exact, student, teacher, distillers, setting.device)
            differences, ok = [], True
            for seed in SEEDS:
                expected, _ = evaluate(exact, seed)
                with torch.autocast(setting.device.type, getattr(torch, dtype)):
                    found, gradients = evaluate(model, seed)
                ok = ok and finite([*found.values(), *gradients.values()])
                differences.append(compare(found, expected))
            difference = statistics.median(differences)
            selects = any(spec['type'] in SELECTS for spec in distillers.values())
            bound = 'finite' if selects else f'finite, {CLOSE[dtype]:g}'
            text = f'losses {difference:.1e}' if ok else 'not finite'
            return Finding(text, bound, ok and (selects or difference <= CLOSE[dtype]), dict(differences=differences))

        return check

    def scaled(student: dict, teacher: Any, distillers: dict) -> Callable[[], Finding]:
        def check() -> Finding:
            require_plain(student, 'float16' if setting.device.type == 'cuda' else 'bfloat16', setting)
            model = build(student, teacher, distillers, setting.device)
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
            scaler = torch.amp.GradScaler(setting.device.type)
            before = [each.detach().clone() for each in model.parameters()]
            batch, taken = batch_of(model), 0
            for index in range(5 if setting.quick else 20):
                torch.manual_seed(index)
                with torch.autocast(setting.device.type, torch.float16 if setting.device.type == 'cuda' else None):
                    loss, _ = model.parse_losses(model(**copy.deepcopy(batch), mode='loss'))
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scale = scaler.get_scale()
                scaler.step(optimizer)
                scaler.update()
                taken += scaler.get_scale() >= scale
            moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
            ok = moved and taken > 0 and finite(model.parameters())
            return Finding(f'{taken} of {index + 1} steps taken, scale {scaler.get_scale():g}', 'weights change', ok)

        return check

    dtypes = ('bfloat16',) if setting.quick else ('float16', 'bfloat16')
    for name, *case in method_cases(setting.quick):
        for dtype in dtypes:
            yield f'{name}, {dtype}', close(*case, dtype)
    for name, *case in method_cases(setting.quick):
        if name in ('RetinaNet: gid', 'GFL: ld', 'Faster R-CNN: chen', 'PSPNet: skd', 'PSPNet: cirkd'):
            yield f'{name}, GradScaler', scaled(*case)
