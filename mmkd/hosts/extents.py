"""Which part of a batch's maps is image, and not padding."""

from collections.abc import Sequence

import torch


def image_parts(data_samples: Sequence | None, feature: torch.Tensor) -> torch.Tensor:
    """The part of a map's height and width that an image takes, from its upper left corner.

    Args:
        data_samples: The batch's, whose meta data say how large each image is, and how large with padding. An image without
            them, and all where this is None, has no padding.
        feature: (B, ...), for the number of images and the device.

    Returns:
        (B, 2), height and width, above 0 and up to 1.
    """
    parts = [(1.0, 1.0)] * len(feature)
    for index, sample in enumerate(data_samples or ()):
        meta = sample.metainfo
        padded = meta.get('batch_input_shape', meta.get('pad_shape'))
        if padded is not None and 'img_shape' in meta:
            height, width = (min(a / b, 1.0) for a, b in zip(meta['img_shape'][:2], padded[:2]))
            parts[index] = height, width
    return torch.tensor(parts).to(feature.device, feature.dtype, non_blocking=True)
