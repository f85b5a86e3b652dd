"""A model's own normalization: of a batch that another one's preprocessor has normalized, and of images as they were loaded."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from mmengine.model import BaseDataPreprocessor
from torch import nn


class Renormalize:
    """Turn a batch that one data preprocessor normalized into what another would have made of it.

    ``x * scale + shift`` per channel, channels swapped where the two orders differ, padding set to the target's
    padding value again.
    """

    def __init__(self, scale: torch.Tensor, shift: torch.Tensor, swap: bool, pad_value: float):
        self.scale, self.shift, self.swap, self.pad_value = scale, shift, swap, pad_value

    @classmethod
    def between(cls, source: nn.Module, target: nn.Module) -> 'Renormalize | None':
        """None where both normalize alike; a target without normalization of its own takes the source's."""
        # a semi-supervised model of mmdet holds that of the detector inside it
        source, target = (getattr(each, 'data_preprocessor', each) for each in (source, target))
        if type(target) is BaseDataPreprocessor:
            return None
        (mean_s, std_s, swap_s), (mean_t, std_t, swap_t) = normalization(source), normalization(target)
        swap = swap_s != swap_t
        if swap:  # the source's values, in the target's channel order
            mean_s, std_s = mean_s.flip(0), std_s.flip(0)
        pads = [padding(each) for each in (source, target)]
        if not swap and torch.equal(mean_s, mean_t) and torch.equal(std_s, std_t) and pads[0] == pads[1]:
            return None
        return cls(std_s / std_t, (mean_s - mean_t) / std_t, swap, pads[1])

    def apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.scale, self.shift = function(self.scale), function(self.shift)

    def __call__(self, inputs: torch.Tensor, data_samples: list | None) -> torch.Tensor:
        if self.swap:
            inputs = inputs.flip(1)
        inputs = inputs * self.scale + self.shift
        for image, sample in zip(inputs, data_samples or ()):
            height, width = sample.metainfo.get('img_shape', inputs.shape[2:])[:2]
            image[:, height:] = self.pad_value
            image[:, :, width:] = self.pad_value
        return inputs


class Normalize:
    """Images as they were loaded, as a data preprocessor makes a batch of them: normalized, then padded right and below.

    Args:
        preprocessor: Of the model that sees them.
        other: The preprocessor whose normalization is taken where that one has none of its own.
    """

    def __init__(self, preprocessor: nn.Module, other: nn.Module):
        preprocessor, other = (getattr(each, 'data_preprocessor', each) for each in (preprocessor, other))
        taken = other if type(preprocessor) is BaseDataPreprocessor else preprocessor
        self.mean, self.std, self.swap = normalization(taken)
        self.pad_value = padding(taken)

    def __call__(self, images: Sequence[torch.Tensor], size: Sequence[int], device: torch.device) -> torch.Tensor:
        """A batch, (B, 3, height, width), of images, (H, W, 3) each, which are no larger."""
        if self.mean.device != device:
            self.mean, self.std = self.mean.to(device), self.std.to(device)
        batch = []
        for each in images:
            image = each.to(device, non_blocking=True).permute(2, 0, 1)
            image = ((image.flip(0) if self.swap else image).float() - self.mean) / self.std
            height, width = image.shape[1:]
            batch.append(F.pad(image, (0, size[1] - width, 0, size[0] - height), value=self.pad_value))
        return torch.stack(batch)


def padding(preprocessor: nn.Module) -> float:
    """The value of padding, behind the normalization."""
    return float(getattr(preprocessor, 'pad_value', getattr(preprocessor, 'pad_val', 0)))  # mmseg: pad_val


def normalization(preprocessor: BaseDataPreprocessor) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Mean and standard deviation, (3, 1, 1), and whether the channels of the loaded image are swapped."""
    # mmengine and mmdet keep the flag private, mmseg does not
    swap = getattr(preprocessor, '_channel_conversion', getattr(preprocessor, 'channel_conversion', False))
    if getattr(preprocessor, '_enable_normalize', False):
        mean, std = preprocessor.mean.reshape(-1, 1, 1), preprocessor.std.reshape(-1, 1, 1)
        return mean.expand(3, 1, 1).cpu(), std.expand(3, 1, 1).cpu(), bool(swap)
    return torch.zeros(3, 1, 1), torch.ones(3, 1, 1), bool(swap)
