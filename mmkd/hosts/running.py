"""Run a model of mmdet or mmseg no further than needed."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from mmengine.structures import BaseDataElement, InstanceData
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmkd.data.domains import is_unlabelled
from mmkd.errors import ConfigError
from mmkd.hosts.segmentation.heads import logits_layer
from mmkd.taps import Taps

Found = TypeVar('Found')
SIZES = ('img_shape', 'pad_shape', 'batch_input_shape')
"""What of a sample's meta data is in pixels of the input."""


class CannotRun(ConfigError):
    """A network does not run over an image of this size, or not as far as a layer."""


class Probe(Taps):
    """The taps of :func:`probe`."""

    random: bool = False
    """Whether the forward pass drew random numbers, so that no two passes are alike."""


def run(
    model: BaseModel, layers: Sequence[str], inputs: torch.Tensor, data_samples: list | None, trains: bool = False
) -> None:
    """One forward pass of a mmdet or mmseg model, no further than needed for ``layers``; no loss, no assignment.

    With ``trains`` its modules are called as often as when it is trained.
    """
    names = [layer.partition(':')[0] for layer in layers]
    heads = list(dict.fromkeys(name.partition('.')[0] for name in names))
    heads = [head for head in heads if head not in ('backbone', 'neck')]
    if not heads:
        model.extract_feat(inputs)
    elif hasattr(model, 'decode_head'):
        _run_segmentor(model, heads, names, inputs, data_samples, trains)
    elif set(heads) <= {'rpn_head', 'bbox_head'} and not hasattr(model, 'forward_transformer'):
        # called as in training, as modules: mmdet's tensor mode calls `head.forward`, past the hooks
        features = model.extract_feat(inputs)
        for head in heads:
            getattr(model, head)(features)
    else:
        model(inputs, data_samples, mode='tensor')


def _run_segmentor(
    model: BaseModel,
    heads: Sequence[str],
    names: Sequence[str],
    inputs: torch.Tensor,
    data_samples: list | None,
    trains: bool,
) -> None:
    """The backbone and neck of a mmseg model, and those of its heads and their stages that are wanted.

    mmseg's own tensor mode never runs an auxiliary head. Heads are called as in training, by their ``forward``: a hook
    on a head itself would not fire there either. Of a cascade mmseg calls each head but the last once more in training,
    for what the next one takes in.
    """
    features = model.extract_feat(inputs)
    for name in heads:
        head = getattr(model, name)
        if not isinstance(head, nn.ModuleList):
            _run_head(head, features, data_samples)
            continue
        wanted = [each.split('.')[1:2] for each in names if each.partition('.')[0] == name]
        last = max(int(stage[0]) if stage else len(head) - 1 for stage in wanted)
        output = None
        for index, stage in enumerate(head[: last + 1]):
            if name != 'decode_head':
                stage.forward(features)
                continue
            for _ in range(2 if trains and index < len(head) - 1 else 1):
                following = stage.forward(features) if output is None else stage.forward(features, output)
            output = following


def _run_head(head: BaseModel, features: Sequence[torch.Tensor], data_samples: list | None) -> None:
    if 'batch_data_samples' in inspect.signature(head.forward).parameters:  # MaskFormer and its kin
        # mmseg writes this size into the samples in the head's own loss and prediction
        metas = [
            {**sample.metainfo, 'batch_input_shape': sample.metainfo['img_shape']} for sample in data_samples or ()
        ]
        head(features, [BaseDataElement(metainfo=meta) for meta in metas])
    else:
        head.forward(features)


@torch.no_grad()
def probe(
    model: nn.Module,
    layers: Sequence[str],
    batch: int = 1,
    size: tuple[int, int] = (256, 256),
    trains: bool = False,
    memory_format: torch.memory_format = torch.contiguous_format,
    name: str = 'model',
) -> Probe:
    """Taps of one forward pass over random images, (batch, 3, H, W), for shapes and checks at build time.

    Batch-norm statistics, training modes and random states stay as they were.

    Raises:
        CannotRun: with the model's own error.
        ConfigError: if the model is trained on several branches of images at once, as mmdet's semi-supervised ones are.
    """
    if trains and hasattr(model.data_preprocessor, 'data_preprocessor'):
        raise ConfigError(
            f'{name}: {type(model).__name__} is trained on several branches of images at once; distil the model inside it'
        )
    device = next(model.parameters()).device
    samples = [empty_sample(size).to(device) for _ in range(batch)]
    try:
        with (
            modes_kept(model),
            torch.random.fork_rng([device] if device.type == 'cuda' else []),
            Probe(model, layers, images=batch) as taps,
        ):
            model.eval()
            if layers:
                images = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))
                images = images.to(device, memory_format=memory_format)
                before = _random_state(device)
                run(model, layers, images, samples, trains)
                taps.random = not torch.equal(before, _random_state(device))
    except ConfigError:
        raise
    except Exception as error:  # whatever a model of somebody else's raises
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CannotRun(
            f'{name}: {type(model).__name__} cannot be run as far as {", ".join(map(repr, layers))} over images of '
            f'{size[0]}x{size[1]} ({type(error).__name__}: {reason}); tap other layers'
        ) from error
    return taps


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards each module is in training or in eval mode as before."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def predict(model: BaseModel, inputs: torch.Tensor, data_samples: list, size: Sequence[int]) -> list:
    """What a mmdet or mmseg model says of a batch, in pixels of images of another size.

    mmdet's suppression of overlapping boxes waits for the device.

    Args:
        model: In eval mode.
        inputs: Images as it takes them, (B, 3, H, W).
        data_samples: With the sizes of these images; they stay as they are.
        size: Height and width of the batch in whose pixels the answer is.

    Returns:
        For each image boxes, scores and labels of a detector, or class logits of a segmentor, (K, height, width).
    """
    if hasattr(model, 'decode_head'):
        whole = tuple(inputs.shape[2:])
        metas = [dict(each.metainfo, img_shape=whole, ori_shape=whole, pad_shape=whole) for each in data_samples]
        logits = model.inference(inputs, metas).float()
        if logits.shape[2:] != tuple(size):
            logits = F.interpolate(logits, tuple(size), mode='bilinear', align_corners=False)
        return list(logits)
    found = model.predict(inputs, [each.new() for each in data_samples], rescale=False)
    answers = []
    for each in (sample.pred_instances for sample in found):
        boxes = getattr(each.bboxes, 'tensor', each.bboxes)  # mmdet has types of its own for them
        if inputs.shape[2:] != tuple(size):
            boxes = boxes * boxes.new_tensor([size[1] / inputs.shape[3], size[0] / inputs.shape[2]] * 2)
        answers.append(InstanceData(bboxes=boxes, scores=each.scores, labels=each.labels))
    return answers


def answering_layers(model: BaseModel) -> list[str] | None:
    """The layers by which a mmdet or mmseg model predicts; None where they cannot be tapped."""
    if hasattr(model, 'decode_head'):
        return [logits_layer(model)]
    if hasattr(model, 'roi_head'):
        heads = model.roi_head.bbox_head
        stages = [f'.{index}' for index in range(len(heads))] if isinstance(heads, nn.ModuleList) else ['']
        return ['rpn_head', *(f'roi_head.bbox_head{stage}' for stage in stages)]
    return None if hasattr(model, 'forward_transformer') else ['bbox_head']


def empty_sample(size: tuple[int, int]) -> BaseDataElement:
    """What detectors ask of an image: its sizes, no objects, and proposals, here its own borders twice, for Fast R-CNN."""
    sample = BaseDataElement(
        metainfo=dict(img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size, scale_factor=(1.0, 1.0))
    )
    sample.gt_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    sample.proposals = InstanceData(bboxes=torch.tensor([[0.0, 0.0, size[1], size[0]]] * 2))
    return sample


def without_labels(model: nn.Module, data_samples: list | None) -> list[int]:
    """Which images of a batch a model's own loss must not see, as they have no labels.

    A segmentor's may, as each of their pixels has the label that it ignores.
    """
    return [] if hasattr(model, 'decode_head') else unlabelled(data_samples)


def unlabelled(data_samples: list | None) -> list[int]:
    """Which images of a batch have no labels."""
    return [index for index, sample in enumerate(data_samples or ()) if is_unlabelled(sample)]


def scaled(size: Sequence[int], scale: float) -> tuple[int, int]:
    """Height and width of an image at another scale, whole pixels."""
    return round(size[0] * scale), round(size[1] * scale)


def scaled_samples(data_samples: list | None, scale: float) -> list | None:
    """What a model asks of images at another scale: the samples with other sizes, their objects as they are."""
    if scale == 1 or not data_samples:
        return data_samples
    found = []
    for sample in data_samples:
        sizes = {key: scaled(sample.metainfo[key], scale) for key in SIZES if key in sample.metainfo}
        found.append(sample.new(metainfo={**sample.metainfo, **sizes}))
    return found


def _random_state(device: torch.device) -> torch.Tensor:
    own = [torch.cuda.get_rng_state(device)] if device.type == 'cuda' else []
    return torch.cat([torch.get_rng_state(), *own])


def sizes_to_probe(models: Iterable[nn.Module]) -> list[tuple[int, int]]:
    """Heights and widths to try, smallest first: some models run over large images alone, or over those of one size."""
    sizes = [(256, 256)]
    for model in models:
        own = getattr(model.data_preprocessor, 'size', None)
        if own is not None:
            sizes.append((own, own) if isinstance(own, int) else tuple(own))
    return list(dict.fromkeys([*sizes, (512, 512)]))


def at_first_size(sizes: Sequence[tuple[int, int]], attempt: Callable[[tuple[int, int]], Found]) -> Found:
    """What ``attempt`` returns for the first size at which all models run.

    Raises:
        CannotRun: of the last size, if there is none.
    """
    for size in sizes[:-1]:
        try:
            return attempt(size)
        except CannotRun:
            continue
    return attempt(sizes[-1])


@contextmanager
def counted_once(module: nn.Module) -> Iterator[None]:
    """Inside, batch norms do what they do in their mode, and their running statistics stay: of what is run a second time."""
    norms = [each for each in module.modules() if isinstance(each, _BatchNorm) and each.track_running_stats]
    try:
        for each in norms:
            each.track_running_stats = False
        yield
    finally:
        for each in norms:
            each.track_running_stats = True
