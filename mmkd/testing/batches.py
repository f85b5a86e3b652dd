"""Random batches for tests and benchmarks."""

import torch
from mmengine.structures import InstanceData, PixelData
from torch import nn


def random_batch(
    model: nn.Module, shape: tuple[int, int, int, int], objects: int = 4, seed: int = 0
) -> dict[str, list]:
    """A batch as a data loader yields it, before the data preprocessor.

    Args:
        model: A detector or segmentor, for its number of classes.
        shape: (B, 3, H, W).
        objects: Boxes per image, for a detector; labelled rectangles per image, for a segmentor, whose pixels are
            ignored elsewhere. 0 for images without any.
        seed: The random seed.

    Returns:
        ``inputs``, a list of uint8 images, and ``data_samples``.
    """
    make = _segmentation if hasattr(model, 'decode_head') else _detection
    return make(model, shape, objects, torch.Generator().manual_seed(seed))


def _segmentation(model: nn.Module, shape: tuple[int, ...], objects: int, random: torch.Generator) -> dict[str, list]:
    from mmseg.structures import SegDataSample

    from mmkd.hosts.segmentation.heads import decode_head

    head = decode_head(model)
    batch, channels, height, width = shape
    inputs, data_samples = [], []
    for index in range(batch):
        inputs.append(torch.randint(0, 256, (channels, height, width), dtype=torch.uint8, generator=random))
        labels = torch.full((1, height, width), head.ignore_index)
        for _ in range(objects):
            top, left = (int(torch.randint(0, side // 2, (), generator=random)) for side in (height, width))
            label = torch.randint(0, head.num_classes, (), generator=random)
            labels[:, top : top + height // 2, left : left + width // 2] = label
        domain = 'target' if index % 2 else 'source'  # for methods that read it
        sample = SegDataSample(metainfo=dict(img_shape=(height, width), ori_shape=(height, width), domain=domain))
        sample.gt_sem_seg = PixelData(data=labels)
        data_samples.append(sample)
    return {'inputs': inputs, 'data_samples': data_samples}


def _detection(detector: nn.Module, shape: tuple[int, ...], objects: int, random: torch.Generator) -> dict[str, list]:
    from mmdet.structures import DetDataSample

    batch, channels, height, width = shape
    head = detector.roi_head.bbox_head if hasattr(detector, 'roi_head') else detector.bbox_head
    inputs, data_samples = [], []
    for index in range(batch):
        inputs.append(torch.randint(0, 256, (channels, height, width), dtype=torch.uint8, generator=random))
        size = torch.tensor([width, height])
        first = torch.rand(objects, 2, generator=random) * 0.7 * size
        sides = (0.05 + 0.25 * torch.rand(objects, 2, generator=random)) * size
        labels = torch.randint(0, head.num_classes, (objects,), generator=random)
        sample = DetDataSample(
            metainfo=dict(
                img_id=index, img_shape=(height, width), ori_shape=(height, width), scale_factor=(1.0, 1.0), flip=False
            )
        )
        sample.gt_instances = InstanceData(bboxes=torch.cat([first, first + sides], 1), labels=labels)
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
        data_samples.append(sample)
    return {'inputs': inputs, 'data_samples': data_samples}
