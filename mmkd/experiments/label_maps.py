"""What segmentors make of a validation set: IoU by class and by image, and pictures of their label maps."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from mmengine.dataset import pseudo_collate
from mmseg.evaluation import IoUMetric
from mmseg.registry import DATASETS
from tqdm import tqdm

from mmkd.experiments.pictures import colored, jpeg, mistakes, palette
from mmkd.experiments.runs import Run, fastest, trained_model


def class_areas(found: torch.Tensor, labels: torch.Tensor, classes: int, ignored: int = 255) -> np.ndarray:
    """Pixels of each class in a label map and in the right one: both, either, in the first, in the second; (4, classes)."""
    return torch.stack(IoUMetric.intersect_and_union(found, labels, classes, ignored)).numpy()


def class_ious(areas: np.ndarray) -> np.ndarray:
    """IoU of each class, of what :func:`class_areas` counted; NaN where neither map has it."""
    with np.errstate(invalid='ignore'):
        return areas[0] / areas[1]


class LabelMaps:
    """The label maps of several models on the validation images, each model with the pipeline of its own config.

    Args:
        runs: What each is called, and its run; the first one's data set has the ground truth and the classes.
        evaluators: mmengine's, by model: they are given its predictions, too.
    """

    measure, share = 'IoU', 100.0
    amount = 'pixels'
    by_image_is = 'the mean IoU of the classes that are in the image'
    note = 'Ignored pixels are black. Last: where each model is wrong, in red.'

    def __init__(self, runs: Mapping[str, Run], evaluators: Mapping = {}):
        self.runs = runs
        self.datasets = {name: DATASETS.build(run.read().val_dataloader.dataset) for name, run in runs.items()}
        first = next(iter(self.datasets.values()))
        self.meta = dict(first.metainfo)
        self.classes = list(self.meta['classes'])
        self.colors = palette(len(self.classes), self.meta.get('palette'))
        for each in evaluators.values():
            each.dataset_meta = self.meta
        self.ignored = getattr(first, 'ignore_index', 255)
        self.models = {name: trained_model(run, fastest()) for name, run in runs.items()}
        self.areas = {}
        for name in runs:
            areas = []
            for index in tqdm(range(len(first)), desc=f'label maps of {name}', unit='image', mininterval=1):
                sample = self.datasets[name][index]
                result = self._predict(name, sample)
                if name in evaluators:
                    evaluators[name].process([result], sample)
                areas.append(class_areas(_map(result), _truth(sample), len(self.classes), self.ignored))
            self.areas[name] = np.array(areas)

    @torch.no_grad()
    def _predict(self, name: str, sample: dict):
        return self.models[name].test_step(pseudo_collate([sample]))[0]

    def amounts(self) -> list[str]:
        """How much of the ground truth each class is."""
        pixels = next(iter(self.areas.values()))[:, 3].sum(0)
        return [f'{100 * each / max(pixels.sum(), 1):.1f} %' for each in pixels]

    def by_class(self) -> dict[str, np.ndarray]:
        """IoU of each class, in percent."""
        return {name: 100 * class_ious(areas.sum(0)) for name, areas in self.areas.items()}

    def by_image(self) -> dict[str, np.ndarray]:
        """Of each image :attr:`by_image_is`, in percent."""
        scores = {}
        for name, areas in self.areas.items():
            there = np.where(areas[:, 3] > 0, class_ious(areas.transpose(1, 0, 2)), np.nan)
            scores[name] = np.array([100 * np.nanmean(row) if np.isfinite(row).any() else np.nan for row in there])
        return scores

    def title(self, index: int) -> str:
        """The name of an image's file."""
        return Path(next(iter(self.datasets.values())).get_data_info(index)['img_path']).name

    def panels(self, index: int) -> dict[str, str]:
        """Pictures of an image, as data URLs by title."""
        samples = {name: self.datasets[name][index] for name in self.runs}
        first = next(iter(samples.values()))
        labels = _truth(first).numpy()
        image = as_rgb(first['inputs'])
        if image.shape[:2] != labels.shape:  # shown to the model at another size
            rows, columns = (np.arange(size) * given // size for size, given in zip(labels.shape, image.shape))
            image = image[rows][:, columns]
        found = {name: _map(self._predict(name, sample)).numpy() for name, sample in samples.items()}
        maps = {
            'ground truth': labels,
            **{name: np.where(labels == self.ignored, labels, each) for name, each in found.items()},
        }
        pictures = {'image': image, **{name: colored(each, self.colors, self.ignored) for name, each in maps.items()}}
        for name, each in found.items():
            pictures[f'{name}: wrong'] = mistakes(image, labels, each, self.ignored)
        return {title: jpeg(picture) for title, picture in pictures.items()}

    def classes_in(self, index: int) -> list[int]:
        """The classes in the ground truth of an image."""
        return np.flatnonzero(next(iter(self.areas.values()))[index, 3]).tolist()


def as_rgb(inputs: torch.Tensor) -> np.ndarray:
    """An image as mmcv loads it, (C, H, W) in BGR, to be shown: (H, W, 3) in RGB; of more channels the first three."""
    image = inputs.permute(1, 2, 0).numpy()
    return (image[..., 2::-1] if image.shape[-1] >= 3 else image[..., :1].repeat(3, -1)).clip(0, 255).astype(np.uint8)


def _map(result) -> torch.Tensor:
    return result.pred_sem_seg.data[0].cpu()


def _truth(sample: dict) -> torch.Tensor:
    return sample['data_samples'].gt_sem_seg.data[0]
