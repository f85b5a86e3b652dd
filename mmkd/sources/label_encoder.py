"""Labels as a source: an encoder draws them and makes a pyramid of the drawing.

Hao et al., "LabelEnc: A New Intermediate Supervision Method for Object Detection", ECCV 2020, arXiv 2007.03282.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from mmengine.model import BaseModel, BaseModule
from torch import nn

from mmkd.errors import ConfigError
from mmkd.hosts.detection.ground_truth import ground_truth, ground_truth_labels
from mmkd.hosts.detection.second_pass import check_heads, classes_of, losses_of_maps, refuse_partly_labelled
from mmkd.registry import SOURCES
from mmkd.sources.source import Kept, Source
from mmkd.taps import Taps
from mmkd.weights import fetch, read_file

HEADS = ('rpn_head', 'roi_head', 'bbox_head')


def draw(
    boxes: torch.Tensor,
    labels: torch.Tensor,
    valid: torch.Tensor,
    classes: int,
    shape: Sequence[int],
    brightness: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""A map for each class, on which its objects are pyramids that fall off from their centers.

    .. math:: M_{b c y x} = \max_{k: c_k = c} a_k \, p_k \, [p_k \ge 1/2], \qquad
        p_k = 1 - \max(|x - x_k| / w_k, |y - y_k| / h_k)

    with (x_k, y_k), w_k and h_k the center and sides of box k in pixels, so that p is 1 in the center and 1/2 on the border.

    Args:
        boxes: (B, K, 4), xyxy in pixels.
        labels: (B, K), classes from 0.
        valid: (B, K), False for a box that is not there.
        classes: C, how many there are.
        shape: H and W, the padded input's.
        brightness: (B, K), a. Default None: 1 for all.

    Returns:
        (B, C, H, W), 0 where there is no object, at most 1.
    """

    def along(first: torch.Tensor, last: torch.Tensor, pixels: int) -> torch.Tensor:
        position = torch.arange(pixels, device=boxes.device, dtype=boxes.dtype)
        distance = (position - ((first + last) / 2)[..., None]).abs()
        return distance / (last - first).clamp(min=1e-6)[..., None]

    rows = along(boxes[..., 1], boxes[..., 3], shape[0])
    columns = along(boxes[..., 0], boxes[..., 2], shape[1])
    height = 1 - torch.maximum(rows[..., :, None], columns[..., None, :])  # (B, K, H, W)
    height = height * ((height >= 0.5) & valid[..., None, None])
    if brightness is not None:
        height = height * brightness[..., None, None]
    index = labels[..., None, None].expand_as(height)
    return height.new_zeros(len(boxes), classes, *shape).scatter_reduce(1, index, height, 'amax')


class Block(nn.Module):
    """A bottleneck of a ResNet, without batch norms: 1x1, 3x3 and 1x1 convolutions beside a way around them.

    Args:
        inputs: Channels that go in.
        outputs: Channels that come out; a quarter of them between.
        stride: Of the 3x3 convolution and of the way around.
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        hidden = max(outputs // 4, 1)
        self.inside = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 3, stride=stride, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, outputs, 1),
        )
        same = inputs == outputs and stride == 1
        self.around = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return (self.inside(maps) + self.around(maps)).relu()


class LabelPyramid(BaseModel):
    """Boxes and their classes as a pyramid, in the shapes that a detector's neck puts out.

    :func:`draw`, a convolution of 7x7, six blocks and a neck of the detector's form. In training each box has a random
    brightness, min(1, 2u) with u from 0 to 1.

    Args:
        classes: How many there are.
        neck: The detector's FPN of four inputs, which is copied and begins anew.
    """

    def __init__(self, classes: int, neck: nn.Module):
        super().__init__()
        first, second, third, fourth = neck.in_channels
        self.classes = classes
        half = max(first // 2, 1)
        self.stem = nn.Conv2d(classes, half, 7, stride=2, padding=3)
        self.stages = nn.ModuleList(
            [
                Block(half, first, 2),
                nn.Sequential(Block(first, second, 2), Block(second, second, 1)),
                nn.Sequential(Block(second, third, 2), Block(third, third, 1)),
                Block(third, fourth, 2),
            ]
        )
        self.neck = copy.deepcopy(neck)
        for module in self.neck.modules():
            if isinstance(module, BaseModule):
                module.is_init = False
            if hasattr(module, 'reset_parameters'):
                module.reset_parameters()
        self.pyramid = nn.Identity()

    def forward(self, inputs: torch.Tensor, data_samples: list | None = None, mode: str = 'tensor') -> tuple:
        """The pyramid, (B, C, H, W) a level; of the images their size alone matters."""
        boxes, valid = ground_truth(data_samples or [])
        brightness = (2 * torch.rand(valid.shape, device=boxes.device)).clamp(max=1) if self.training else None
        labels = ground_truth_labels(data_samples or [])
        maps = self.stem(draw(boxes, labels, valid, self.classes, inputs.shape[2:], brightness))
        levels = []
        for stage in self.stages:
            maps = stage(maps)
            levels.append(maps)
        return self.pyramid(self.neck(levels))


@SOURCES.register_module()
class LabelEncoder(Source):
    """The labels of a batch as a pyramid, ``'pyramid'``, which the student's own heads can read.

    Without ``checkpoint`` the encoder is trained along, as an auto-encoder of labels: the student's heads read its maps,
    and their losses are logged as ``<name>.loss``. It is trained by the same optimizer, is in the checkpoint as
    ``sources.<name>.*``, and ``mmkd export`` leaves it out. With the checkpoint of such a training it is frozen, and a student
    of the same detector may ``inherit`` its neck, and the heads that have learnt to read it.

    Args:
        student: The student; filled in.
        checkpoint: Of a training with a ``LabelEncoder``. Default None: it is trained.
        interval: See :class:`mmkd.sources.source.Source`, as ``begin`` and ``end``.
        begin: Default 0.
        end: Default None.

    Raises:
        ConfigError: for a student that has no heads behind an FPN of four inputs.

    Example:
        >>> teacher = dict(type='LabelEncoder')  # the first training
        >>> teacher = dict(type='LabelEncoder', checkpoint='work_dirs/first/epoch_16.pth')  # the second
        >>> inherit = ['neck', 'bbox_head']  # of the second
        >>> distillers = dict(labelenc=dict(type='LabelEnc'))  # of both
    """

    def __init__(
        self,
        student: nn.Module,
        checkpoint: str | None = None,
        interval: int = 1,
        begin: int = 0,
        end: int | None = None,
    ):
        super().__init__(interval, begin, end)
        check_heads(student, 'LabelEncoder')
        if len(getattr(student.neck, 'in_channels', ())) != 4:
            raise ConfigError(
                f'{type(student).__name__}: LabelEncoder needs a neck with four inputs, at strides of 4 to 32, such as an FPN '
                f'behind a ResNet, found {type(student.neck).__name__}'
            )
        self.checkpoint, self._loaded = checkpoint, False
        self.has_gradient, self.frozen = checkpoint is None, checkpoint is not None
        self.trains_heads = not self.frozen
        self.model = LabelPyramid(classes_of(student), student.neck)
        if not self.frozen:
            self.kept = Kept(self.model, trained=True)
            return
        for head in HEADS:  # which the student may inherit
            if hasattr(student, head):
                self.model.add_module(head, copy.deepcopy(getattr(student, head)))
        self.model.eval().requires_grad_(False)

    def load(self, device: torch.device | str = 'cpu', then: Callable[[nn.Module], None] | None = None) -> None:
        if self._loaded:
            return
        self._loaded, self.loaded_alone = True, then is None
        if self.checkpoint is None:
            self.model.init_weights()
        else:
            self._read(self.checkpoint)
        if then is not None:
            then(self.model)
        self.model.to(device)

    def _read(self, checkpoint: str) -> None:
        what = f'{self.name}.checkpoint'
        path = fetch(checkpoint, what, missing='')
        content = read_file(path, what)
        state = content.get('state_dict', content) if isinstance(content, dict) else {}
        own = self.model.state_dict()
        heads = {key: state[key] for key in own if key.startswith(HEADS) and key in state}
        found: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in state.items():
            source, _, name = key.partition('.model.')
            if source.startswith('sources.') and name in own:
                found.setdefault(source, dict(heads))[name] = value
        fits = [
            each
            for each in found.values()
            if each.keys() == own.keys() and all(each[key].shape == own[key].shape for key in own)
        ]
        if len(fits) != 1:
            raise ConfigError(
                f"{what} {path}: holds {len(fits)} label encoders that fit this student's classes, neck and heads; expected what "
                f"a training of it with teacher=dict(type='LabelEncoder') ended with"
            )
        self.model.load_state_dict(fits[0])

    def accept_current_weights(self, device: torch.device | str = 'cpu') -> None:
        """Take the weights as they are for the trained ones, random ones too: for measurements and tests."""
        self._loaded = True
        self.model.to(device)

    def apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.frozen and self._loaded:
            self.model._apply(function)

    def read(self, student: nn.Module, inputs: torch.Tensor, data_samples: list | None) -> tuple[Taps, dict]:
        if self.frozen and not self._loaded:
            raise ConfigError(
                f'{self.name}: its weights are not loaded yet; call init_weights() of the student before training'
            )
        refuse_partly_labelled(data_samples)
        with torch.set_grad_enabled(self.has_gradient), Taps(self.model, self.layers, images=len(inputs)) as taps:
            maps = self.model(inputs, data_samples)
        if self.frozen:
            return taps, {}
        samples = data_samples or []
        any_object = ground_truth(samples).valid.any()
        return taps, {'loss': any_object * losses_of_maps(student, maps, samples)}
