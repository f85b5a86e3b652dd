"""Another image of a sample, for a teacher: the same one before strong augmentation, or a thermal or depth image beside it.

In a config: ``mmkd.KeepView`` or ``mmkd.LoadView`` in the pipelines of all training data, the view's name in the ``meta_keys``
of their last transform, and ``view='weak'`` beside the teacher's ``config``.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mmkd.errors import ConfigError
from mmkd.registry import TRANSFORMS


class View:
    """An image on its way from the pipeline to a teacher, in the meta data of its sample, where it is never copied.

    Args:
        image: (H, W, 3), as it was loaded.
    """

    def __init__(self, image: np.ndarray):
        self.image = torch.from_numpy(np.ascontiguousarray(image))

    def __deepcopy__(self, memo: dict) -> 'View':
        return self

    def __repr__(self) -> str:
        return f'{type(self).__name__}({"x".join(map(str, self.image.shape))})'


def check_name(view: object) -> str:
    """A view's name.

    Raises:
        ConfigError: for what is none.
    """
    if not isinstance(view, str) or not view.isidentifier() or view in ('img', 'domain'):
        raise ConfigError(f"view={view!r}: expected a name of your own for the image, such as 'weak' or 'thermal'")
    return view


@TRANSFORMS.register_module()
class KeepView:
    """Keeps a copy of the image as it is at this point of the pipeline, for a teacher with ``view='weak'``.

    Behind all that moves pixels (``Resize``, ``RandomFlip``, ``RandomCrop``) and before what changes colours, such as
    ``PhotoMetricDistortion``: so both images have one geometry, and the student's alone is distorted. The pipeline's last
    transform has to hand it on: ``dict(type='PackDetInputs', meta_keys=(..., 'weak'))``.

    Args:
        view: Its name. Default ``'weak'``.

    Raises:
        ConfigError: for what is no name.
    """

    def __init__(self, view: str = 'weak'):
        self.view = check_name(view)

    def __call__(self, results: dict) -> dict:
        results[self.view] = View(results['img'].copy())  # some transforms write into the image
        return results

    def __repr__(self) -> str:
        return f'{type(self).__name__}(view={self.view!r})'


@TRANSFORMS.register_module()
class LoadView:
    """Loads another image of the sample, such as a thermal one, for a teacher with ``view='thermal'``.

    Stands behind ``LoadImageFromFile``; what moves pixels has to move both images then, :class:`Both`. It has to be of the
    size of the image, pixel for pixel.

    Args:
        view: Its name.
        replace: What of the image's path is something else in that of the other one: ``{'/rgb/': '/thermal/', '.jpg': '.png'}``.
        **options: Of mmcv's ``LoadImageFromFile``, which loads it with 3 channels.

    Raises:
        ConfigError: for what is no name, a path in which nothing is replaced, and an image of another size.
    """

    def __init__(self, view: str, replace: Mapping[str, str], **options: Any):
        from mmcv.transforms import LoadImageFromFile  # what mmdet and mmseg need anyway; the core does not

        self.view = check_name(view)
        if not isinstance(replace, Mapping) or not replace:
            raise ConfigError(f"replace={replace!r}: expected parts of paths, such as {{'/rgb/': '/thermal/'}}")
        self.replace = dict(replace)
        self._load = LoadImageFromFile(**options)

    def __call__(self, results: dict) -> dict:
        path = results['img_path']
        for part, other in self.replace.items():
            if part not in path:
                raise ConfigError(f'LoadView: replace has {part!r}, which is not in {path}')
            path = path.replace(part, other)
        if not os.path.exists(path) and self._load.backend_args is None:
            raise ConfigError(f'LoadView: {path} does not exist; correct replace={self.replace}')
        image = self._load(dict(img_path=path))['img']
        if image.shape[:2] != results['img'].shape[:2]:
            (height, width), own = image.shape[:2], results['img'].shape
            raise ConfigError(
                f'LoadView: {path} is {width}x{height}, and the image {own[1]}x{own[0]}; they have to be of one size'
            )
        results[self.view] = View(image)
        return results

    def __repr__(self) -> str:
        return f'{type(self).__name__}(view={self.view!r}, replace={self.replace})'


@TRANSFORMS.register_module()
class Both:
    """Transforms the image and a view of it alike, with the same random numbers: flipped both, or none.

    For transforms of mmcv, mmdet and mmseg that keep what they draw (mmcv's ``cache_randomness``); others are refused by
    mmcv, or move both differently, such as mosaics, which mix other images in. mmcv's ``TransformBroadcaster`` would do
    the same for images without labels: it moves boxes once for each image, and keeps the keys of its mapping alone.

    Args:
        view: The name of the view.
        transforms: Those that move pixels, in their order.

    Raises:
        ConfigError: for what is no name, no list, and images without the view.
    """

    def __init__(self, view: str, transforms: Sequence[Mapping]):
        from mmcv.transforms import Compose

        self.view = check_name(view)
        if isinstance(transforms, Mapping) or not transforms:
            raise ConfigError(
                f"transforms={transforms!r}: expected a list, such as [dict(type='RandomFlip', prob=0.5)]"
            )
        self.transforms = Compose(transforms)

    def __call__(self, results: dict) -> dict | None:
        from mmcv.transforms.utils import cache_random_params

        if self.view not in results:
            raise ConfigError(f'Both: the image has no view {self.view!r}; mmkd.LoadView before it loads one')
        view = {key: results[key] for key in ('img_shape', 'ori_shape') if key in results}
        view['img'] = results[self.view].image.numpy()
        with cache_random_params(self.transforms):
            found = self.transforms(results)
            if found is not None:  # else another sample takes its place
                found[self.view] = View(self.transforms(view)['img'])
        return found

    def __repr__(self) -> str:
        return f'{type(self).__name__}(view={self.view!r}, transforms={self.transforms})'


def views_of(data_samples: Sequence | None, view: str, source: str = 'teacher') -> list[torch.Tensor]:
    """The views of a batch's images, (H, W, 3) each.

    Args:
        data_samples: The batch's.
        view: Its name.
        source: What the option of who sees it is called, for errors.

    Raises:
        ConfigError: for an image that has none, or one of another size than it.
    """
    found = []
    for sample in data_samples or ():
        each = sample.metainfo.get(view)
        where = sample.metainfo.get('img_path', 'an image')
        if not isinstance(each, View):
            raise ConfigError(
                f"{source}: {where} has no view {view!r}; put dict(type='mmkd.KeepView', view={view!r}) into the pipelines of "
                f'all training data, and {view!r} into the meta_keys of their last transform'
            )
        (height, width), own = each.image.shape[:2], tuple(sample.metainfo['img_shape'][:2])
        if (height, width) != own:
            raise ConfigError(
                f'{source}: the view {view!r} of {where} is {width}x{height}, and the image {own[1]}x{own[0]}; what moves pixels '
                f'belongs before KeepView, or into mmkd.Both, and not into batch_augments'
            )
        found.append(each.image)
    return found
