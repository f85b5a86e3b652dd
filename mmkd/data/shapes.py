"""A generated detection data set in COCO's layout: textured shapes on textured backgrounds.

    python -m mmkd.data.shapes data/shapes

writes ``train/*.jpg``, ``val/*.jpg`` and ``annotations/{train,val}.json``, which mmdet's ``CocoDataset`` and
``CocoMetric`` read as they are. The same arguments give the same images.
"""

import argparse
import json
from pathlib import Path

import cv2
import numpy as np

from mmkd import cli
from mmkd.errors import ConfigError

CLASSES = ('circle', 'square', 'triangle', 'star', 'ring', 'cross')
SPLITS = {'train': 1000, 'val': 200}


def generate(
    root: str | Path, size: int = 160, splits: dict[str, int] | None = None, seed: int = 0, most_objects: int = 6
) -> Path:
    """Write the data set, unless it is there already.

    Objects overlap, later ones on top; an object is annotated with the box and area of what can be seen of it, and left
    out if that is less than a third of it. Sizes are log-uniform between 8 % and 76 % of the image side.

    Args:
        root: The folder to write to.
        size: Side of the square images in pixels.
        splits: Number of images per split. Default 1000 for training and 200 for validation.
        seed: The random seed; each image has its own stream, so more images leave the first ones as they are.
        most_objects: Each image has one to this many objects.

    Returns:
        The root.

    Raises:
        ConfigError: if something else was generated there.
    """
    root = Path(root)
    for split, (name, number) in enumerate((splits or SPLITS).items()):
        annotation_file = root / 'annotations' / f'{name}.json'
        made_from = {'size': size, 'images': number, 'seed': seed, 'most_objects': most_objects}
        if annotation_file.is_file():  # written last: its images are complete
            found = json.loads(annotation_file.read_text())['info'].get('made_from')
            if found == made_from:
                continue
            raise ConfigError(
                f'{annotation_file}: made from {found}, not from {made_from}; remove {root} to make it anew'
            )
        (root / name).mkdir(parents=True, exist_ok=True)
        images: list[dict] = []
        annotations: list[dict] = []
        for index in range(number):
            image, objects = draw(np.random.default_rng((seed, split, index)), size, most_objects)
            file_name = f'{index:06d}.jpg'
            if not cv2.imwrite(str(root / name / file_name), image, [cv2.IMWRITE_JPEG_QUALITY, 92]):
                raise OSError(f'could not write {root / name / file_name}')
            images.append({'id': index, 'file_name': file_name, 'width': size, 'height': size})
            for label, box, area in objects:
                annotations.append(
                    {
                        'id': len(annotations) + 1,
                        'image_id': index,
                        'category_id': label + 1,
                        'bbox': box,
                        'area': area,
                        'iscrowd': 0,
                    }
                )
        categories = [{'id': label + 1, 'name': name, 'supercategory': 'shape'} for label, name in enumerate(CLASSES)]
        annotation_file.parent.mkdir(exist_ok=True)
        content = {'images': images, 'annotations': annotations, 'categories': categories}
        info = {'description': 'generated shapes', 'made_from': made_from}
        annotation_file.write_text(json.dumps({'info': info, **content}))
    return root


def draw(rng: np.random.Generator, size: int, most_objects: int) -> tuple[np.ndarray, list[tuple[int, list[int], int]]]:
    """One image, (size, size, 3) uint8, and its objects: label, box as x, y, width, height, visible area."""
    image = texture(rng, size)
    owner = np.full((size, size), -1)
    drawn = []
    for index in range(rng.integers(1, most_objects + 1)):
        label = int(rng.integers(len(CLASSES)))
        radius = size * float(np.exp(rng.uniform(np.log(0.04), np.log(0.38))))
        center = rng.uniform(0.1 * size, 0.9 * size, 2)
        coverage = coverage_of(CLASSES[label], center, radius, float(rng.uniform(-0.4, 0.4)), size)
        image = image + coverage[..., None] * (texture(rng, size) - image)
        mask = coverage > 0.5
        owner[mask] = index
        drawn.append((label, int(mask.sum())))
    image = image + rng.normal(0, 6, image.shape)
    objects = []
    for index, (label, whole) in enumerate(drawn):
        rows, columns = np.nonzero(owner == index)
        if len(rows) < max(12, whole / 3):
            continue
        left, top = int(columns.min()), int(rows.min())
        box = [left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top]
        objects.append((label, box, len(rows)))
    return image.clip(0, 255).astype(np.uint8), objects


def texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """A random color with blotches and, half the time, stripes; (size, size, 3) float."""
    color = rng.uniform(20, 235, 3)
    cells = int(rng.integers(3, 24))
    blotches = cv2.resize(rng.normal(0, 1, (cells, cells, 3)), (size, size), interpolation=cv2.INTER_CUBIC)
    image = color + blotches * rng.uniform(5, 30)
    if rng.random() < 0.5:
        angle, period = rng.uniform(0, np.pi), rng.uniform(4, 24)
        y, x = np.mgrid[:size, :size]
        wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / period)
        image = image + wave[..., None] * rng.uniform(-35, 35, 3)
    return image


def coverage_of(shape: str, center: np.ndarray, radius: float, tilt: float, size: int) -> np.ndarray:
    """How much of each pixel the shape covers, (size, size), 0 to 1."""
    canvas = np.zeros((size, size), np.uint8)
    fraction = 4  # bits of sub-pixel position

    def fixed(points: np.ndarray) -> np.ndarray:
        return np.round(points * 2**fraction).astype(np.int32)

    def polygon(angles: np.ndarray, radii: np.ndarray | float) -> None:
        points = center + np.stack([np.cos(angles + tilt), np.sin(angles + tilt)], 1) * np.reshape(radii, (-1, 1))
        cv2.fillPoly(canvas, [fixed(points)], 255, cv2.LINE_AA, fraction)

    def disc(of_radius: float, value: int) -> None:
        cv2.circle(
            canvas, tuple(fixed(center).tolist()), int(fixed(np.array(of_radius))), value, -1, cv2.LINE_AA, fraction
        )

    up = -np.pi / 2
    if shape == 'circle':
        disc(radius, 255)
    elif shape == 'ring':
        disc(radius, 255)
        disc(radius * 0.55, 0)
    elif shape == 'square':
        polygon(np.pi / 4 + np.arange(4) * np.pi / 2, radius)
    elif shape == 'triangle':
        polygon(up + np.arange(3) * 2 * np.pi / 3, radius)
    elif shape == 'star':
        polygon(up + np.arange(10) * np.pi / 5, radius * np.where(np.arange(10) % 2, 0.42, 1.0))
    else:  # cross: the twelve corners of a plus
        arm = 0.33
        corners = np.array([(1, arm), (1, -arm), (arm, -arm), (arm, -1), (-arm, -1), (-arm, -arm)])
        corners = np.concatenate([corners, -corners])
        polygon(np.arctan2(corners[:, 1], corners[:, 0]), radius * np.hypot(*corners.T))
    return canvas / 255.0


def main() -> None:
    parser = argparse.ArgumentParser(description='Write the generated "shapes" detection data set in COCO format.')
    parser.add_argument('root', nargs='?', default='data/shapes')
    args = parser.parse_args()
    with cli.clear_errors():
        print(f'shapes data set: {generate(args.root)}')


if __name__ == '__main__':
    main()
