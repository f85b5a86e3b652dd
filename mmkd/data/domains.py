"""Training on two domains at once: labelled images of a source, unlabelled ones of a target.

In a config: a ``ConcatDataset`` of both, ``mmkd.DomainSampler`` as its sampler, and ``mmkd.Unlabelled`` in the target's
pipeline; see ``configs/dakd_deeplabv3.py``. No ``custom_imports`` line is needed.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from mmengine.dataset import InfiniteSampler
from mmengine.dist import sync_random_seed
from torch.utils.data import ConcatDataset, Sampler

from mmkd.errors import ConfigError
from mmkd.registry import DATA_SAMPLERS, TRANSFORMS

TARGET = 'target'


@TRANSFORMS.register_module()
class Unlabelled:
    """Makes an image one of the unlabelled target domain; stands where ``LoadAnnotations`` stands in a pipeline.

    Every pixel gets the label that losses ignore, and no label file is read, nor needs to exist. The image's ``domain``
    becomes ``'target'``, which the pipeline's last transform has to hand on:
    ``dict(type='PackSegInputs', meta_keys=(..., 'domain'))``. ``RandomCrop`` needs no ``cat_max_ratio`` after it, which
    would look for classes ten times in vain.

    mmseg's ``CrossEntropyLoss`` divides by ignored pixels as well: the student's heads need
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
        results['gt_seg_map'] = np.full(results['img'].shape[:2], self.ignore_index, np.uint8)
        results.setdefault('seg_fields', []).append('gt_seg_map')
        results['domain'] = TARGET
        return results

    def __repr__(self) -> str:
        return f'{type(self).__name__}(ignore_index={self.ignore_index})'


@DATA_SAMPLERS.register_module()
class DomainSampler(Sampler):
    """Indices of one image of each domain in turn, without an end: source, target, source, target, ...

    A batch of even size is half source and half target, whatever the numbers of images. Each domain has an order of its
    own and starts again when it is used up; of each, every process takes other images, as with mmengine's
    ``InfiniteSampler``. (Sampling the alternation itself so would give one process the source and the next the target.)

    Args:
        dataset: A ``ConcatDataset`` of the domains; the data loader fills it in.
        shuffle: Whether each domain is in random order, a new one each time. Default True.
        seed: The same on all processes. Default None: a random one.

    Raises:
        ConfigError: if the dataset is no ``ConcatDataset``, or one of its parts is empty.

    Example:
        >>> train_dataloader = dict(
        ...     batch_size=4,
        ...     sampler=dict(type='mmkd.DomainSampler'),
        ...     dataset=dict(type='ConcatDataset', datasets=[source, target]))
    """

    def __init__(self, dataset: ConcatDataset, shuffle: bool = True, seed: int | None = None):
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
        self.dataset = dataset
        self.shuffle = shuffle
        self.seed = sync_random_seed() if seed is None else seed

    def __iter__(self) -> Iterator[int]:
        domains = [
            InfiniteSampler(domain, self.shuffle, self.seed + index)
            for index, domain in enumerate(self.dataset.datasets)
        ]
        starts = [sum(self.sizes[:index]) for index in range(len(self.sizes))]
        for indices in zip(*domains):
            for start, index in zip(starts, indices):
                yield start + index

    def __len__(self) -> int:
        """The number of images of all domains."""
        return sum(self.sizes)


def split_domains(data_samples: Sequence | None) -> tuple[list[int], list[int]]:
    """Which images of a batch are of the source and which of the target, from their meta data alone.

    Raises:
        ConfigError: if there are none of one of the two.
    """
    domains = [sample.metainfo.get('domain') for sample in data_samples or []]
    source = [index for index, domain in enumerate(domains) if domain != TARGET]
    target = [index for index, domain in enumerate(domains) if domain == TARGET]
    if not source or not target:
        raise ConfigError(
            f'a batch has {len(source)} source and {len(target)} target images, and some of both are needed on each GPU: use '
            f"sampler=dict(type='mmkd.DomainSampler') with an even batch_size, and in the target's pipeline "
            f"dict(type='mmkd.Unlabelled') and dict(type='PackSegInputs', meta_keys=(..., 'domain'))"
        )
    return source, target
