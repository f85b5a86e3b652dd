"""Images of a folder, without labels."""

from pathlib import Path
from typing import Any

from mmengine.dataset import BaseDataset
from PIL import Image

from mmkd.errors import ConfigError
from mmkd.registry import DATASETS

SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')


@DATASETS.register_module()
class Images(BaseDataset):
    """All images below a folder, for detectors as for segmentors; ``mmkd.Unlabelled`` stands where their labels are loaded.

    Args:
        data_prefix: ``dict(img_path=FOLDER)``, below ``data_root`` where that is given.
        metainfo: The classes of the labelled data, ``dict(classes=...)``, with which it is concatenated.
        **options: mmengine's own, such as ``pipeline``, ``data_root`` and ``indices``.

    Raises:
        ConfigError: if there is no image.

    Example:
        >>> unlabelled = dict(
        ...     type='mmkd.Images',
        ...     data_prefix=dict(img_path='data/unlabelled'),
        ...     metainfo=metainfo,
        ...     pipeline=[dict(type='LoadImageFromFile'), dict(type='mmkd.Unlabelled'), ...])
    """

    def __init__(self, data_prefix: dict, metainfo: dict | None = None, **options: Any):
        super().__init__(data_prefix=data_prefix, metainfo=metainfo, **options)

    def load_data_list(self) -> list[dict]:
        """The images in the order of their paths, as mmdet and mmseg describe one."""
        folder = Path(self.data_prefix['img_path'])
        paths = sorted(path for path in folder.rglob('*') if path.suffix.lower() in SUFFIXES)
        if not paths:
            raise ConfigError(f'data_prefix.img_path: {folder.absolute()} has no image ({", ".join(SUFFIXES)})')
        return [self._describe(index, path) for index, path in enumerate(paths)]

    @staticmethod
    def _describe(index: int, path: Path) -> dict:
        with Image.open(path) as image:  # reads its header alone
            width, height = image.size
        return dict(
            img_path=str(path), img_id=index, width=width, height=height, instances=[], seg_fields=[], seg_map_path=None
        )
