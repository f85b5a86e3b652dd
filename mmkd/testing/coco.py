"""A few generated images in COCO's layout, with its 80 categories."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np


def generate(folder: str | Path, sizes: tuple[tuple[int, int], ...] = ((240, 320), (320, 240))) -> str:
    """Write four images each to ``train2017`` and ``val2017``, the last without objects, and their annotations.

    Those of ``train2017`` are in ``unlabeled2017`` as well, without annotations.

    Args:
        folder: Where to.
        sizes: Heights and widths, which the images have in turn.

    Returns:
        The data root, with the slash that COCO's configs end theirs with.
    """
    from mmdet.datasets import CocoDataset  # what needs these data needs mmdet

    folder = Path(folder)
    names = CocoDataset.METAINFO['classes']
    categories = [dict(id=index + 1, name=name) for index, name in enumerate(names)]
    (folder / 'annotations').mkdir(parents=True)
    random = np.random.default_rng(0)
    for split in ('train2017', 'val2017'):
        (folder / split).mkdir()
        images, annotations = [], []
        for index in range(4):
            height, width = sizes[index % len(sizes)]
            name = f'{index:012d}.jpg'
            cv2.imwrite(str(folder / split / name), random.integers(0, 256, (height, width, 3), dtype=np.uint8))
            images.append(dict(id=index, file_name=name, height=height, width=width))
            for _ in range(0 if index == 3 else 4):
                x, y, w, h = (random.uniform(0.05, 0.45, 4) * [width, height, width, height]).tolist()
                box = dict(bbox=[x, y, w, h], area=w * h, segmentation=[], iscrowd=0)
                category = int(random.integers(1, len(names) + 1))
                annotations.append(dict(id=len(annotations) + 1, image_id=index, category_id=category, **box))
            if split == 'train2017':
                (folder / 'unlabeled2017').mkdir(exist_ok=True)
                shutil.copy(folder / split / name, folder / 'unlabeled2017')
        content = dict(images=images, annotations=annotations, categories=categories)
        (folder / 'annotations' / f'instances_{split}.json').write_text(json.dumps(content))
    return f'{folder}/'
