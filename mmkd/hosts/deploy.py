"""A plain model as one file that needs neither mmdet nor mmseg, ONNX or torch.export's, compared with the model itself."""

import copy
import inspect
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.model import BaseModel
from mmengine.registry import DATASETS
from mmengine.utils import is_installed
from torch import nn
from torch.nn import functional as F

from mmkd.errors import ConfigError, describe
from mmkd.hosts.datasets import type_name

TOLERANCE = 1e-4
"""How far an output may be from torch's, as a share of its largest value there; float32 kernels differ by some 1e-6."""
MMDEPLOY = (
    'convert the plain pair, which is written without this option, with mmdeploy (github.com/open-mmlab/mmdeploy)'
)
SUFFIXES = {'onnx': '.onnx', 'torch_export': '.pt2'}

Run = Callable[[torch.Tensor], Sequence[np.ndarray]]


class Deployed(nn.Module):
    """What of a model goes into a file: images in, tensors out, no lists, no data samples.

    ``forward`` takes images as the model's ``data_preprocessor`` gives them, (N, 3, H, W), and returns a tuple whose names
    are ``outputs``:

    - of a segmentor ``logits``, (N, classes, H, W), at the images' size, from the whole image at once;
    - of a one-stage detector what its head puts out, as ``cls_score_0``, ``cls_score_1``, ..., ``bbox_pred_0``, ..., one
      for each level, (N, channels, h, w), as the head's own ``forward`` has them;
    - of a detector whose head decodes as mmdet's ``BaseDenseHead`` or ``GFLHead`` does also ``boxes``, (N, priors, 4): left,
      top, right and bottom in pixels of the image, cut at its border; and ``scores``, (N, priors, classes):
      probabilities, times the centerness if there is one. Neither a threshold nor NMS has been applied.

    Args:
        model: Of mmdet or mmseg, in eval mode.
        size: Height and width of the images; there is no other afterwards.
        option: What it is for; errors begin with it.

    Raises:
        ConfigError: if the model is of another kind.
    """

    def __init__(self, model: BaseModel, size: tuple[int, int], option: str = '--onnx'):
        super().__init__()
        self.model = model
        self.size = size
        self.option = option
        self.decodes = False
        self.outputs = ['logits']
        kind = type(model).__name__
        if hasattr(model, 'roi_head') or hasattr(model, 'rpn_head'):
            raise ConfigError(f'{option}: {kind} has a second stage, which is not exported; {MMDEPLOY}')
        if hasattr(model, 'decode_head') and hasattr(model, 'encode_decode'):
            return
        head = getattr(model, 'bbox_head', None)
        if not hasattr(head, 'predict_by_feat') or hasattr(model, 'mask_head'):
            raise ConfigError(f'{option}: {kind} is neither a segmentor nor a one-stage detector of boxes; {MMDEPLOY}')
        with torch.no_grad():
            try:
                levels = head(model.extract_feat(torch.zeros(1, 3, *size)))
                maps = [
                    len(each) for each in levels if all(each[0].ndim == each[i].ndim == 4 for i in range(len(each)))
                ]
            except Exception as error:  # whatever a head of another interface raises
                raise ConfigError(
                    f'{option}: {kind} does not run over {size[0]} x {size[1]} pixels as a one-stage detector does '
                    f'({describe(error)}); {MMDEPLOY}'
                ) from error
        if len(maps) != len(levels):
            raise ConfigError(f"{option}: {type(head).__name__}'s outputs are not one map for each level; {MMDEPLOY}")
        given, trained = (
            list(inspect.signature(each).parameters) for each in (head.predict_by_feat, head.loss_by_feat)
        )
        given = [own if own != 'score_factors' else name for own, name in zip(given, trained)][: len(maps)]
        names = [re.sub('(?<=ness)es$|s$', '', name) for name in given]  # cls_scores, bbox_preds, centernesses
        self.outputs = [f'{name}_{level}' for name, count in zip(names, maps, strict=True) for level in range(count)]
        self.decodes = _decodes(head) and len(maps) <= 3
        if self.decodes:
            self.outputs += ['boxes', 'scores']

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.outputs == ['logits']:
            return (self.model.encode_decode(image, [dict(img_shape=self.size)]),)
        levels = self.model.bbox_head(self.model.extract_feat(image))
        decoded = _decode(self.model.bbox_head, levels, self.size) if self.decodes else ()
        return (*(each for maps in levels for each in maps), *decoded)


def _decodes(head: nn.Module) -> bool:
    """Whether a head decodes its outputs as :func:`_decode` does."""
    from mmdet.models.dense_heads import GFLHead
    from mmdet.models.dense_heads.base_dense_head import BaseDenseHead

    kind: Any = type(head)
    return (
        isinstance(head, BaseDenseHead)
        and kind.predict_by_feat is BaseDenseHead.predict_by_feat
        and kind._predict_by_feat_single in (BaseDenseHead._predict_by_feat_single, GFLHead._predict_by_feat_single)
        and not getattr(getattr(head, 'loss_cls', None), 'custom_cls_channels', False)
    )


def _decode(head: Any, levels: Sequence, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes and scores of all priors, as mmdet's heads decode them, but for thresholds and NMS."""

    def rows(maps: torch.Tensor, channels: int) -> torch.Tensor:
        return maps.permute(0, 2, 3, 1).reshape(maps.shape[0], -1, channels)  # len() would be a constant of the trace

    sizes = [each.shape[-2:] for each in levels[0]]
    priors = head.prior_generator.grid_priors(sizes, dtype=levels[0][0].dtype, device=levels[0][0].device)
    boxes, scores = [], []
    for index, prior in enumerate(priors):
        found, deltas = levels[0][index], levels[1][index]
        found = rows(found, head.cls_out_channels)
        found = found.sigmoid() if head.use_sigmoid_cls else found.softmax(-1)[..., :-1]
        if len(levels) == 3:
            found = found * rows(levels[2][index], 1).sigmoid()
        if hasattr(head, 'integral'):  # GFL: a distribution for each side
            flat = head.integral(rows(deltas, 4 * (head.reg_max + 1)).flatten(0, 1))
            flat, prior = flat * head.prior_generator.strides[index][0], head.anchor_center(prior)
        else:
            flat = rows(deltas, head.bbox_coder.encode_size).flatten(0, 1)
        repeated = prior.expand(found.shape[0], *prior.shape).flatten(0, 1)
        decoded = head.bbox_coder.decode(repeated, flat, max_shape=size)
        boxes.append(decoded.reshape(found.shape[0], -1, 4))
        scores.append(found)
    return torch.cat(boxes, 1), torch.cat(scores, 1)


def needs(form: str) -> None:
    """Check that the packages for a form, ``'onnx'`` or ``'torch_export'``, are installed.

    Raises:
        ConfigError: with the command that installs them.
    """
    packages = ('onnx', 'onnxruntime', 'onnxscript') if form == 'onnx' else ()
    missing = [each for each in packages if not is_installed(each)]
    if missing:
        raise ConfigError(
            f"--onnx: needs {', '.join(missing)}; pip install 'mmkd[onnx]' or pip install {' '.join(missing)}"
        )


def input_size(config: Config, validation: torch.Tensor | None) -> tuple[int, int]:
    """Height and width for which a model is exported where none are given: those to which the test's images are resized,
    filled up as the model does, or else those of the first validation image.

    Raises:
        ConfigError: if neither is known.
    """
    for part in ('test', 'val'):
        dataset = (config.get(f'{part}_dataloader') or {}).get('dataset') or {}
        for step in reversed(dataset.get('pipeline') or ()):
            scale = step.get('scale')
            if type_name(step) == 'Resize' and isinstance(scale, (tuple, list)) and len(scale) == 2:
                whole = (config.model.get('student') or config.model).get('data_preprocessor') or {}
                divisor = whole.get('pad_size_divisor') or (whole.get('test_cfg') or {}).get('size_divisor') or 1
                height, width = (-(-int(each) // divisor) * divisor for each in (scale[1], scale[0]))
                return height, width
    if validation is None:
        raise ConfigError('--input-shape H W: neither the config nor a validation image says how large images are')
    height, width = validation.shape[-2:]
    return height, width


def validation_image(config: Config, model: BaseModel) -> torch.Tensor | None:
    """The first validation image as the model takes it, (1, 3, H, W); None where the data are not there."""
    try:
        dataset = DATASETS.build(copy.deepcopy(config.val_dataloader.dataset))
        return model.data_preprocessor(pseudo_collate([dataset[0]]), False)['inputs']
    except Exception:  # whatever data that are not there, or not whole, make the data set raise
        return None


def about(model_config: Mapping, meta: Mapping) -> dict[str, str]:
    """What a file should say of its images and classes: ``classes``, ``mean`` and ``std`` as JSON, and ``channels``."""
    given = model_config.get('data_preprocessor') or {}
    found = {key: list(given[key]) for key in ('mean', 'std') if given.get(key) is not None}
    if meta.get('classes'):
        found['classes'] = list(meta['classes'])
    return {key: json.dumps(value) for key, value in found.items()} | {
        'channels': 'RGB' if given.get('bgr_to_rgb') else 'BGR'
    }


def write(form: str, model: Deployed, path: Path, images: Mapping[str, torch.Tensor], opset: int | None = None) -> str:
    """Write a model as ``'onnx'`` or ``'torch_export'``, for any number of images if that works, else for one at a time.

    The file is read again and run on ``images``, and its outputs are compared with the model's.

    Args:
        form: A key of :data:`SUFFIXES`.
        model: What to write.
        path: Of the file.
        images: What to compare on, by name; (N, 3, H, W) each.
        opset: Of ONNX; None for the exporter's own.

    Returns:
        What was compared, a line.

    Raises:
        ConfigError: if it cannot be written, or its outputs are not close. The file is removed then.
    """
    kind, why = type(model.model).__name__, ''
    for batch in (2, 1):  # traced with two images, one is no special case; some models take one at a time only
        compared = images if batch == 2 else {name: each for name, each in images.items() if len(each) == 1}
        try:
            with _quiet(), torch.no_grad():
                run = WRITERS[form](model, torch.randn(batch, 3, *model.size), path, opset)
            return _compare(model, run, compared) + ('' if batch == 2 else '; it takes one image at a time')
        except ConfigError as error:
            path.unlink(missing_ok=True)
            why = str(error)
        except Exception as error:  # whatever an exporter raises
            path.unlink(missing_ok=True)
            why = describe(error)
    raise ConfigError(f'{model.option}: {kind} cannot be exported ({why}); {MMDEPLOY}')


def _program(model: Deployed, image: torch.Tensor) -> Any:
    dynamic = ({0: torch.export.Dim('batch', min=1)},) if len(image) > 1 else None
    return torch.export.export(model, (image,), dynamic_shapes=dynamic)


def _onnx(model: Deployed, image: torch.Tensor, path: Path, opset: int | None) -> Run:
    """By way of torch.export: the older exporter has no pooling to sizes such as PSPNet's. It is there for torch < 2.6."""
    import onnxruntime

    names: dict[str, Any] = dict(input_names=['image'], output_names=model.outputs, opset_version=opset)
    if 'external_data' in inspect.signature(torch.onnx.export).parameters:
        options = dict(dynamo=True, external_data=False, verbose=False)
        torch.onnx.export(_program(model, image), (image,), str(path), **names, **options)
    else:
        axes = {name: {0: 'batch'} for name in ['image', *model.outputs]} if len(image) > 1 else None
        torch.onnx.export(model, (image,), str(path), **names, dynamic_axes=axes)
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    return lambda images: session.run(model.outputs, {'image': images.numpy()})


def _torch_export(model: Deployed, image: torch.Tensor, path: Path, opset: int | None) -> Run:
    torch.export.save(_program(model, image), str(path))
    read = torch.export.load(str(path)).module()
    return lambda images: [each.numpy() for each in read(images)]


WRITERS = {'onnx': _onnx, 'torch_export': _torch_export}


def describe_onnx(path: Path, said: Mapping[str, str]) -> None:
    """Write what :func:`about` says to an ONNX file, as its metadata."""
    import onnx

    content = onnx.load(str(path))
    onnx.helper.set_model_props(content, dict(said))
    onnx.save(content, str(path))


@torch.no_grad()
def _compare(model: Deployed, run: Run, images: Mapping[str, torch.Tensor]) -> str:
    return compare(model.outputs, lambda each: [output.numpy() for output in model(each)], run, images)


@torch.no_grad()
def compare_models(model: BaseModel, other: BaseModel, images: Mapping[str, torch.Tensor]) -> str:
    """As :func:`compare`, of all that two models put out in mmengine's mode ``'tensor'``."""

    def run(of: BaseModel, image: torch.Tensor) -> list[np.ndarray]:
        return [each.numpy() for each in _tensors(of(image, _samples(image), mode='tensor'))]

    names = [f'output {index}' for index in range(len(run(model, next(iter(images.values())))))]
    return compare(names, lambda image: run(model, image), lambda image: run(other, image), images)


def _samples(image: torch.Tensor) -> list:
    """Data samples of images without anything to see, which two-stage detectors want."""
    if not is_installed('mmdet'):
        return []
    from mmdet.structures import DetDataSample

    size = tuple(image.shape[-2:])
    meta = dict(img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size, scale_factor=(1.0, 1.0))
    return [DetDataSample(metainfo=meta) for _ in image]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    for each in value if isinstance(value, (list, tuple)) else ():
        yield from _tensors(each)


def compare(names: Sequence[str], wanted: Run, run: Run, images: Mapping[str, torch.Tensor]) -> str:
    """The largest differences of what two functions make of images, a line.

    Raises:
        ConfigError: if one is larger than :data:`TOLERANCE`.
    """
    largest, relative = 0.0, 0.0
    for name, each in images.items():
        for output, expected, found in zip(names, wanted(each), run(each), strict=True):
            if found.shape != expected.shape:
                raise ConfigError(f'{output} of {name} has the shape {found.shape} instead of {expected.shape}')
            difference = np.abs(found - expected).max(initial=0.0)
            share = difference / max(float(np.abs(expected).max(initial=0.0)), 1e-6)
            if not share <= TOLERANCE:  # NaN is not
                raise ConfigError(f'{output} of {name} differs by {difference:.2g}, {share:.1g} of its largest value')
            largest, relative = max(largest, float(difference)), max(relative, float(share))
    return f"as torch on {', '.join(images)}: largest difference {largest:.1e}, {relative:.1e} of an output's largest value"


def check_images(size: tuple[int, int], validation: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """What files are compared on: one and two random images, and a validation image, cut or filled up to the size."""
    generator = torch.Generator().manual_seed(0)
    images = {
        'a random image': torch.randn(1, 3, *size, generator=generator),
        'two random images': torch.randn(2, 3, *size, generator=generator),
    }
    if validation is not None:
        height, width = validation.shape[-2:]
        images['a validation image'] = F.pad(validation, (0, size[1] - width, 0, size[0] - height))
    return images


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters say of their own insides."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(before)
