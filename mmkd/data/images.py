"""Images of a folder, without labels."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.dataset import BaseDataset
from mmengine.registry import DefaultScope
from PIL import Image

from mmkd.errors import ConfigError
from mmkd.hosts.datasets import dataset_class, type_name
from mmkd.registry import DATASETS

SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')


@DATASETS.register_module()
class Images(BaseDataset):
    """All images below a folder, for detectors as for segmentors; ``mmkd.Unlabelled`` stands where their labels are loaded.

    Args:
        data_prefix: ``dict(img_path=FOLDER)``, below ``data_root`` where that is given.
        like: The type of the labelled data with which it is concatenated, ``'CocoDataset'``, whose classes and palette it has.
        metainfo: As the labelled data have it, ``dict(classes=...)``.
        **options: mmengine's own, such as ``pipeline``, ``data_root`` and ``indices``.

    Raises:
        ConfigError: if there is no image, or no such type.

    Example:
        >>> unlabelled = dict(
        ...     type='mmkd.Images',
        ...     like='CocoDataset',
        ...     data_prefix=dict(img_path='data/unlabelled'),
        ...     metainfo=metainfo,
        ...     pipeline=[dict(type='LoadImageFromFile'), dict(type='mmkd.Unlabelled'), ...])
    """

    def __init__(self, data_prefix: dict, like: str | None = None, metainfo: dict | None = None, **options: Any):
        packs = [type_name(step) for step in options.get('pipeline') or () if isinstance(step, Mapping)]
        self._detects = 'PackDetInputs' in packs
        known: dict[str, Any] = {}
        if like is not None:
            scope = DefaultScope.get_current_instance()
            kind = dataset_class(dict(type=like), scope and scope.scope_name)
            if kind is None:
                raise ConfigError(f'like={like!r}: there is no such data set')
            known = {**kind.METAINFO, **({} if self._detects else dict(label_map=None, reduce_zero_label=False))}
        super().__init__(data_prefix=data_prefix, metainfo={**known, **(metainfo or {})}, **options)

    def load_data_list(self) -> list[dict]:
        """The images in the order of their paths, as mmdet and mmseg describe one."""
        folder = Path(self.data_prefix['img_path'])
        paths = sorted(path for path in folder.rglob('*') if path.suffix.lower() in SUFFIXES)
        if not paths:
            raise ConfigError(f'data_prefix.img_path: {folder.absolute()} has no image ({", ".join(SUFFIXES)})')
        return [self._describe(index, path) for index, path in enumerate(paths)]

    def _describe(self, index: int, path: Path) -> dict:
        with Image.open(path) as image:  # reads its header alone
            width, height = image.size
        found = dict(img_path=str(path), img_id=index, width=width, height=height)
        return {**found, 'instances': []} if self._detects else {**found, 'seg_map_path': None, 'seg_fields': []}
