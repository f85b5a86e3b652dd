"""Training on labelled and unlabelled images at once, of one domain or of two: a source and a target.

In a config: a ``ConcatDataset`` of both, ``mmkd.DomainSampler`` as its sampler, and ``mmkd.Unlabelled`` in the unlabelled
ones' pipeline; see ``configs/dakd_deeplabv3.py``. No ``custom_imports`` line is needed.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from mmengine.dataset import InfiniteSampler
from mmengine.dist import sync_random_seed
from torch.utils.data import ConcatDataset, Sampler

from mmkd.classes import index_of
from mmkd.errors import ConfigError
from mmkd.registry import DATA_SAMPLERS, TRANSFORMS
from mmkd.values import is_whole

TARGET = 'target'


@TRANSFORMS.register_module()
class Unlabelled:
    """Makes an image an unlabelled one; stands where ``LoadAnnotations`` stands in a pipeline.

    No label is read, nor needs to exist. The image's ``domain`` becomes ``'target'``, which the pipeline's last transform has
    to hand on: ``dict(type='PackSegInputs', meta_keys=(..., 'domain'))``, or ``PackDetInputs`` alike.

    **Detection** (mmdet's data sets): it has no boxes, and none of the student's own losses, so that its objects are no
    background; it is learnt from by distillation alone.

    **Segmentation**: every pixel gets the label that losses ignore. ``RandomCrop`` needs no ``cat_max_ratio`` after it, which
    would look for classes ten times in vain. mmseg's ``CrossEntropyLoss`` divides by ignored pixels as well: the heads need
    ``loss_decode=dict(avg_non_ignore=True)``, lest half a batch of target images halves the source's loss.

    Args:
        ignore_index: The label of all pixels, 0 to 255. Default 255, as mmseg's heads ignore.

    Raises:
        ConfigError: for a label that a uint8 map cannot hold.
    """

    def __init__(self, ignore_index: int = 255):
        if not isinstance(ignore_index, int) or not 0 <= ignore_index <= 255:
            raise ConfigError(f'ignore_index={ignore_index!r}: expected a label of 0 to 255')
        self.ignore_index = ignore_index

    def __call__(self, results: dict) -> dict:
        results['domain'] = TARGET
        if 'instances' in results:  # mmdet's
            from mmdet.structures.bbox import HorizontalBoxes  # segmentation needs no mmdet

            results['gt_bboxes'] = HorizontalBoxes(np.zeros((0, 4), np.float32))
            results['gt_bboxes_labels'] = np.zeros(0, np.int64)
            results['gt_ignore_flags'] = np.zeros(0, bool)
        else:
            results['gt_seg_map'] = np.full(results['img'].shape[:2], self.ignore_index, np.uint8)
            results.setdefault('seg_fields', []).append('gt_seg_map')
        return results

    def __repr__(self) -> str:
        return f'{type(self).__name__}(ignore_index={self.ignore_index})'


@TRANSFORMS.register_module()
class LabelledFor:
    """Says that an image is labelled for some classes alone; stands behind ``LoadAnnotations`` in a pipeline.

    The student's own losses then say nothing of the others there: their objects are no background, and teachers can supply them
    (see :mod:`mmkd.hosts.partial_labels`). The pipeline's last transform has to hand it on:
    ``dict(type='PackDetInputs', meta_keys=(..., 'labelled_for'))``. A two-stage detector's RPN knows no classes, and takes
    unlabelled objects for background all the same.

    Args:
        classes: Their names, or indices.
        class_names: Those of all classes of the data set, where it is labelled for more: the boxes of the others are then taken
            out, as if it were not. Default None: it has no others.

    Raises:
        ConfigError: for none, and for a class that is not among ``class_names``.
    """

    def __init__(self, classes: Sequence[str | int], class_names: Sequence[str] | None = None):
        if isinstance(classes, str) or not classes:
            raise ConfigError(f"classes={classes!r}: expected a list of classes, such as ('car', 'person')")
        self.classes = tuple(classes)
        self.kept: list[int] | None = None
        if class_names is not None:
            self.kept = [index_of(each, class_names, 'LabelledFor', 'data set') for each in classes]

    def __call__(self, results: dict) -> dict:
        results['labelled_for'] = self.classes
        if self.kept is not None:
            if 'gt_bboxes_labels' not in results:
                raise ConfigError(
                    'LabelledFor: class_names takes out boxes of other classes, and there are none; put it behind '
                    'LoadAnnotations(with_bbox=True), or leave class_names out'
                )
            kept = np.isin(results['gt_bboxes_labels'], self.kept)
            for key in ('gt_bboxes', 'gt_bboxes_labels', 'gt_ignore_flags', 'gt_masks'):
                if key in results:
                    results[key] = results[key][kept]
        return results

    def __repr__(self) -> str:
        return f'{type(self).__name__}(classes={self.classes})'


@DATA_SAMPLERS.register_module()
class DomainSampler(Sampler):
    """Indices of images of each domain in turn, without an end: source, target, source, target, ...

    With one of each, a batch of even size is half source and half target, whatever the numbers of images; with
    ``ratio=[1, 4]`` a batch of five has four of the target. Each domain has an order of its
    own and starts again when it is used up; of each, every process takes other images, as with mmengine's
    ``InfiniteSampler``. (Sampling the alternation itself so would give one process the source and the next the target.)

    Args:
        dataset: A ``ConcatDataset`` of the domains; the data loader fills it in.
        ratio: How many images of each domain come in turn. Default None: one of each.
        shuffle: Whether each domain is in random order, a new one each time. Default True.
        seed: The same on all processes. Default None: a random one.

    Raises:
        ConfigError: if the dataset is no ``ConcatDataset``, one of its parts is empty, or the ratio is not of as many.

    Example:
        >>> train_dataloader = dict(
        ...     batch_size=4,
        ...     sampler=dict(type='mmkd.DomainSampler'),
        ...     dataset=dict(type='ConcatDataset', datasets=[source, target]))
    """

    def __init__(
        self,
        dataset: ConcatDataset,
        ratio: Sequence[int] | None = None,
        shuffle: bool = True,
        seed: int | None = None,
    ):
        if not isinstance(dataset, ConcatDataset):
            raise ConfigError(
                f'DomainSampler: dataset is a {type(dataset).__name__}; expected '
                f"dict(type='ConcatDataset', datasets=[source, target])"
            )
        self.sizes = [len(domain) for domain in dataset.datasets]
        if not all(self.sizes):
            raise ConfigError(
                f'DomainSampler: the domains have {self.sizes} images; one has none, check its data_prefix'
            )
        self.ratio = [1] * len(self.sizes) if ratio is None else list(ratio)
        if len(self.ratio) != len(self.sizes) or not all(is_whole(each) and each >= 1 for each in self.ratio):
            raise ConfigError(
                f'DomainSampler: ratio={ratio!r}: expected a positive whole number for each of the {len(self.sizes)} domains'
            )
        self.dataset = dataset
        self.shuffle = shuffle
        self.seed = sync_random_seed() if seed is None else seed

    def __iter__(self) -> Iterator[int]:
        domains = [
            iter(InfiniteSampler(domain, self.shuffle, self.seed + index))
            for index, domain in enumerate(self.dataset.datasets)
        ]
        starts = [sum(self.sizes[:index]) for index in range(len(self.sizes))]
        while True:
            for start, domain, number in zip(starts, domains, self.ratio):
                for _ in range(number):
                    yield start + next(domain)

    def __len__(self) -> int:
        """The number of images of all domains."""
        return sum(self.sizes)


def is_unlabelled(sample: Any) -> bool:
    """Whether a data sample is of an image without labels, as :class:`Unlabelled` marks it."""
    return sample.metainfo.get('domain') == TARGET


def split_domains(data_samples: Sequence | None) -> tuple[list[int], list[int]]:
    """Which images of a batch are of the source and which of the target, from their meta data alone.

    Raises:
        ConfigError: if there are none of one of the two.
    """
    unlabelled = [is_unlabelled(sample) for sample in data_samples or []]
    source = [index for index, each in enumerate(unlabelled) if not each]
    target = [index for index, each in enumerate(unlabelled) if each]
    if not source or not target:
        raise ConfigError(
            f'a batch has {len(source)} source and {len(target)} target images, and some of both are needed on each GPU: use '
            f"sampler=dict(type='mmkd.DomainSampler') with an even batch_size, and in the target's pipeline "
            f"dict(type='mmkd.Unlabelled') and dict(type='PackSegInputs', meta_keys=(..., 'domain'))"
        )
    return source, target
