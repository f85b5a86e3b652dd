"""A generated segmentation data set in Cityscapes' layout: street scenes with its 19 classes.

    python -m mmkd.data.streets data/streets

writes ``leftImg8bit/{train,val}/{city}/*_leftImg8bit.png`` and ``gtFine/{train,val}/{city}/*_gtFine_labelTrainIds.png``,
which mmseg's ``CityscapesDataset`` and ``IoUMetric`` read as they are. The same arguments give the same images.
"""

import argparse
import json
from pathlib import Path

import cv2
import numpy as np

from mmkd import cli
from mmkd.errors import ConfigError

CLASSES = (
    'road', 'sidewalk', 'building', 'wall', 'fence', 'pole', 'traffic light', 'traffic sign', 'vegetation', 'terrain',
    'sky', 'person', 'rider', 'car', 'truck', 'bus', 'train', 'motorcycle', 'bicycle',
)  # fmt: skip
ID = {name: index for index, name in enumerate(CLASSES)}
IGNORED = 255
SPLITS = {'train': 600, 'val': 100}
LIGHTS = ('day', 'dusk')
CITY = 'streets'
# blue, green, red; what is painted varies around it
COLORS = {
    'road': (112, 108, 106), 'sidewalk': (132, 138, 146), 'terrain': (80, 125, 120), 'vegetation': (50, 95, 65),
    'pole': (95, 95, 95), 'wall': (120, 125, 130), 'fence': (110, 120, 130),
}  # fmt: skip


def generate(
    root: str | Path,
    splits: dict[str, int] | None = None,
    size: tuple[int, int] = (128, 256),
    light: str = 'day',
    seed: int = 0,
) -> Path:
    """Write the data set, unless it is there already.

    Args:
        root: The folder to write to.
        splits: Number of images per split. Default 600 for training and 100 for validation.
        size: Height and width of the images in pixels.
        light: ``'day'``, or ``'dusk'``: another domain, with the same kind of scenes in dark, tinted, noisy images.
        seed: The random seed; each image has its own stream, so more images leave the first ones as they are.

    Returns:
        The root.

    Raises:
        ConfigError: for an unknown light, and if something else was generated there.
    """
    if light not in LIGHTS:
        raise ConfigError(f'light={light!r}: expected one of {LIGHTS}')
    root = Path(root)
    for split, (name, number) in enumerate((splits or SPLITS).items()):
        record = root / f'{name}.json'
        made_from = {'size': list(size), 'images': number, 'light': light, 'seed': seed}
        if record.is_file():  # written last: its images are complete
            found = json.loads(record.read_text())
            if found == made_from:
                continue
            raise ConfigError(f'{record}: made from {found}, not from {made_from}; remove {root} to make it anew')
        folders = [root / kind / name / CITY for kind in ('leftImg8bit', 'gtFine')]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        for index in range(number):
            image, labels = draw(np.random.default_rng((seed, split, index, LIGHTS.index(light))), size, light)
            frame = f'{CITY}_{index:06d}_000019'
            files = (folders[0] / f'{frame}_leftImg8bit.png', folders[1] / f'{frame}_gtFine_labelTrainIds.png')
            for file, content in zip(files, (image, labels)):
                if not cv2.imwrite(str(file), content):
                    raise OSError(f'could not write {file}')
        record.write_text(json.dumps(made_from))
    return root


def draw(rng: np.random.Generator, size: tuple[int, int], light: str = 'day') -> tuple[np.ndarray, np.ndarray]:
    """One scene: the image, (height, width, 3) uint8, and its train ids, (height, width) uint8."""
    scene = Scene(rng, 2 * size[0], 2 * size[1])  # at twice the size, then averaged: soft edges
    scene.street()
    scene.borders()
    kinds = ((scene.furniture, 3, 6), (scene.traffic, 2, 5), (scene.pedestrian, 2, 4), (scene.two_wheeler, 1, 3))
    things = [
        (paint, float(np.exp(rng.uniform(np.log(1.1), np.log(4.0)))))
        for paint, least, most in kinds
        for _ in range(rng.integers(least, most + 1))
    ]
    for paint, depth in sorted(things, key=lambda thing: -thing[1]):  # far ones first
        paint(depth)
    image = cv2.resize(scene.image, size[::-1], interpolation=cv2.INTER_AREA)
    labels = scene.labels[::2, ::2].copy()
    edge = max(1, size[0] // 64)  # ignored, as the rectification border and the own car are in Cityscapes
    labels[:edge] = labels[-2 * edge :] = IGNORED
    labels[:, :edge] = labels[:, -edge:] = IGNORED
    image = image * rng.uniform(0.8, 1.15) + rng.normal(0, 5, image.shape)
    if light == 'dusk':
        image = 255 * (image.clip(0, 255) / 255) ** 1.3 * (0.62, 0.5, 0.68) + rng.normal(8, 9, image.shape)
    return image.clip(0, 255).astype(np.uint8), labels


Region = tuple[tuple[slice, slice], np.ndarray]  # a rectangle of the canvas, and a mask in it


class Scene:
    """A canvas in perspective: a straight street that runs to a vanishing point on the horizon.

    A place is given by ``side``, its distance from the street's middle in units of half the road's width, and its
    ``depth``; what is at depth 2 is half as large as at depth 1, which is the lower edge of the image.
    """

    def __init__(self, rng: np.random.Generator, height: int, width: int):
        self.rng = rng
        self.image = np.zeros((height, width, 3), np.float32)
        self.labels = np.full((height, width), IGNORED, np.uint8)
        self.height, self.width = height, width
        self.horizon = height * rng.uniform(0.36, 0.48)
        self.vanishing = width * rng.uniform(0.35, 0.65)
        self.road = width * rng.uniform(0.32, 0.5)
        fine = rng.standard_normal((height, width, 3), np.float32)
        coarse = rng.standard_normal((height // 8, width // 8, 3), np.float32)
        self.grain = 0.6 * fine + cv2.resize(coarse, (width, height))

    def point(self, side: float, depth: float, up: float = 0.0) -> tuple[float, float]:
        """Pixel x and y of a place, ``up`` above the ground in units of the distance from horizon to lower edge."""
        x = self.vanishing + side * self.road / depth
        y = self.horizon + (self.height - self.horizon) * (1 - up) / depth
        return x, y

    def color(self, kind: str | None = None, spread: float = 18) -> np.ndarray:
        """That of a class, or any, with some variation."""
        base = self.rng.uniform(35, 215, 3) if kind is None else np.array(COLORS[kind])
        return base + self.rng.uniform(-spread, spread) + self.rng.uniform(-spread / 2, spread / 2, 3)

    def paint(self, points: list[tuple[float, float]], kind: str, color: np.ndarray, grain: float = 8) -> Region:
        """Fill a polygon; where."""
        corners = np.round(points).astype(np.int32)
        left, top = corners.min(0).clip(0, (self.width, self.height))
        right, bottom = (corners.max(0) + 1).clip(0, (self.width, self.height))
        mask = np.zeros((bottom - top, right - left), np.uint8)
        if mask.size:
            cv2.fillPoly(mask, [corners - (left, top)], 1)
        region = (slice(top, bottom), slice(left, right)), mask.astype(bool)
        self.fill(region, kind, color, grain)
        return region

    def ellipse(self, center: tuple[float, float], radii: tuple[float, float], kind: str, color: np.ndarray) -> None:
        angles = np.linspace(0, 2 * np.pi, 20, endpoint=False)
        self.paint(list(zip(center[0] + radii[0] * np.cos(angles), center[1] + radii[1] * np.sin(angles))), kind, color)

    def box(self, left: float, right: float, top: float, bottom: float, kind: str, color: np.ndarray) -> None:
        self.paint([(left, top), (right, top), (right, bottom), (left, bottom)], kind, color)

    def fill(self, region: Region, kind: str, color: np.ndarray, grain: float) -> None:
        part, mask = region
        self.image[part][mask] = color + grain * self.grain[part][mask]
        self.labels[part][mask] = ID[kind]

    def borders(self) -> None:
        """What stands on both sides of the street, from far to near."""
        kinds = ('building', 'vegetation', 'wall', 'fence', 'nothing')
        for direction in (-1, 1):
            depth = 14.0
            while depth > 1.0:
                near = depth * self.rng.uniform(0.45, 0.75)
                kind = str(self.rng.choice(kinds, p=(0.34, 0.18, 0.16, 0.16, 0.16)))
                if kind != 'nothing':
                    self.facade(kind, direction, depth, near)
                depth = near

    def facade(self, kind: str, direction: int, far: float, near: float) -> None:
        """One stretch of what borders the street."""
        lowest, highest = {'building': (1.2, 2.6), 'vegetation': (0.9, 1.6), 'wall': (0.5, 0.75), 'fence': (0.4, 0.6)}[
            kind
        ]
        up = self.rng.uniform(lowest, highest)
        side = direction * self.rng.uniform(1.75, 2.1)
        beyond = direction * 40.0  # a side that is out of the picture at any depth
        if kind in ('wall', 'fence') and self.rng.random() < 0.7:  # something higher behind it
            self.facade(str(self.rng.choice(('building', 'vegetation'))), direction, far, near)
        corners = [self.point(side, far), self.point(side, far, up), self.point(side, near, up)]
        corners += [self.point(beyond, near, up), self.point(beyond, near), self.point(side, near)]
        if kind == 'building':
            color = self.color(spread=5) * 0.6 + 40
            self.windows(self.paint(corners, kind, color), color)
        elif kind == 'vegetation':
            self.paint(corners, kind, self.color('vegetation'), grain=22)
            x, y = self.point(side, near, up)
            for _ in range(4):  # crowns
                radius = (self.height - self.horizon) / near * self.rng.uniform(0.2, 0.45)
                center = (x + self.rng.normal(0, radius), y + self.rng.normal(0, radius / 3))
                self.ellipse(center, (radius, radius * 0.7), kind, self.color('vegetation'))
        else:
            part, mask = self.paint(corners, kind, self.color(kind), grain=5)
            if kind == 'fence':
                slats = mask & (np.arange(mask.shape[1]) % 8 < 3)
                self.fill((part, slats), kind, self.color(kind) - 45, 5)

    def windows(self, region: Region, color: np.ndarray) -> None:
        """A grid of windows on a facade."""
        part, mask = region
        period = self.rng.integers(14, 30)
        y, x = np.ogrid[: mask.shape[0], : mask.shape[1]]
        grid = (y % period > period * 0.5) & (x % period > period * 0.55)
        self.fill((part, mask & grid), 'building', color + self.rng.uniform(-60, 35), 6)

    def street(self) -> None:
        """Sky, terrain, sidewalks, road and its marks."""
        rows = np.linspace(0, 30, self.height)[:, None, None]
        blue, gray = np.array((225, 185, 150)), np.array((215, 215, 210))
        self.image[:] = blue + (gray - blue) * self.rng.random() + rows + 4 * self.grain
        self.labels[:] = ID['sky']
        verge = 'terrain' if self.rng.random() < 0.6 else 'sidewalk'
        for direction in (-1, 1):
            for kind, inner, outer in ((verge, 1.4, 40.0), ('sidewalk', 1.0, self.rng.uniform(1.4, 1.7))):
                corners = [self.point(direction * side, depth) for side, depth in ((inner, 30), (inner, 0.9))]
                corners += [self.point(direction * side, depth) for side, depth in ((outer, 0.9), (outer, 30))]
                self.paint(corners, kind, self.color(kind), grain=14 if kind == 'terrain' else 6)
        self.paint(
            [self.point(*place) for place in ((-1, 30), (1, 30), (1, 0.9), (-1, 0.9))], 'road', self.color('road')
        )
        white = self.color('road') + 75
        for depth in np.geomspace(1.0, 8.0, 7):
            marks = ((-0.02, depth), (0.02, depth), (0.02, depth * 1.15), (-0.02, depth * 1.15))
            self.paint([self.point(*place) for place in marks], 'road', white)

    def unit(self, depth: float) -> float:
        """Pixels of the distance from horizon to lower edge, at a depth."""
        return (self.height - self.horizon) / depth

    def furniture(self, depth: float) -> None:
        """A pole with a sign, with a traffic light or without, or a tree."""
        side = self.rng.choice((-1, 1)) * self.rng.uniform(1.1, 1.6)
        x, bottom = self.point(side, depth)
        unit = self.unit(depth)
        kind = self.rng.choice(('pole', 'traffic sign', 'traffic light', 'vegetation'), p=(0.15, 0.32, 0.33, 0.2))
        if kind == 'vegetation':
            self.box(x - 0.03 * unit, x + 0.03 * unit, bottom - 0.8 * unit, bottom, kind, self.color(kind) - 20)
            center = (x, bottom - 1.1 * unit)
            self.ellipse(center, (0.35 * unit, 0.45 * unit), kind, self.color(kind))
            return
        top = bottom - unit * self.rng.uniform(1.0, 1.4)
        half = max(2.0, 0.04 * unit)
        self.box(x - half, x + half, top, bottom, 'pole', self.color('pole'))
        if kind == 'traffic sign':
            color = np.array(((40, 40, 190), (180, 90, 30), (40, 190, 210))[self.rng.integers(3)]) + 0.0
            radius = max(4.0, 0.17 * unit)
            if self.rng.random() < 0.5:
                self.ellipse((x, top + radius), (radius, radius), kind, color)
                self.ellipse((x, top + radius), (radius * 0.6, radius * 0.6), kind, color * 0.3 + 150)
            else:
                self.box(x - radius, x + radius, top, top + 1.6 * radius, kind, color)
        elif kind == 'traffic light':
            width, height = max(3.0, 0.1 * unit), max(8.0, 0.36 * unit)
            self.box(x - width, x + width, top, top + height, kind, self.color('pole') - 60)
            lamp = self.rng.integers(3)
            color = np.array(((60, 60, 240), (60, 200, 240), (120, 230, 80))[lamp]) + 0.0
            center = (x, top + height * (0.2 + 0.3 * lamp))
            self.ellipse(center, (width * 0.7, width * 0.7), kind, color)

    def traffic(self, depth: float) -> None:
        """A car, truck, bus or train."""
        kind = str(self.rng.choice(('car', 'truck', 'bus', 'train'), p=(0.58, 0.15, 0.15, 0.12)))
        width, height = {'car': (0.62, 0.42), 'truck': (0.72, 0.85), 'bus': (0.78, 0.9), 'train': (0.85, 1.05)}[kind]
        width, height = (length * self.unit(depth) * self.rng.uniform(0.9, 1.15) for length in (width, height))
        x, bottom = self.point(self.rng.uniform(-0.8, 0.8), depth)
        left, right, top = x - width / 2, x + width / 2, bottom - height
        color, dark, glass = self.color(), self.color('pole') - 65, self.color('pole', 10) - 35
        wheel = 0.12 * height if kind != 'car' else 0.2 * height
        if kind != 'train':
            for place in (left + 0.2 * width, right - 0.2 * width):
                self.ellipse((place, bottom - wheel), (wheel, wheel), kind, dark)
        if kind == 'car':
            self.box(left, right, top + 0.42 * height, bottom - 0.6 * wheel, kind, color)
            roof = [(left + 0.12 * width, top + 0.45 * height), (left + 0.25 * width, top)]
            roof += [(right - 0.25 * width, top), (right - 0.12 * width, top + 0.45 * height)]
            self.paint(roof, kind, color)
            self.box(left + 0.28 * width, right - 0.28 * width, top + 0.1 * height, top + 0.4 * height, kind, glass)
            self.box(left, left + 0.12 * width, top + 0.5 * height, top + 0.6 * height, kind, np.array((90, 90, 230.0)))
            self.box(
                right - 0.12 * width, right, top + 0.5 * height, top + 0.6 * height, kind, np.array((90, 90, 230.0))
            )
        elif kind == 'truck':
            self.box(left, right - 0.28 * width, top, bottom - wheel, kind, color)
            self.box(right - 0.26 * width, right, top + 0.35 * height, bottom - wheel, kind, self.color())
            self.box(right - 0.2 * width, right, top + 0.42 * height, top + 0.6 * height, kind, glass)
        else:
            self.box(left, right, top, bottom - (wheel if kind == 'bus' else 0), kind, color)
            low = 0.55 if kind == 'bus' else 0.42
            for start in np.arange(0.06, 0.9, 0.24):
                pane = (left + start * width, left + (start + 0.18) * width)
                self.box(*pane, top + 0.15 * height, top + low * height, kind, glass)
            if kind == 'train':
                self.box(left, right, top + 0.62 * height, top + 0.74 * height, kind, 255 - color)
                self.box(left, right, bottom - 0.08 * height, bottom, kind, dark)

    def body(self, x: float, bottom: float, height: float, kind: str) -> None:
        """A standing or sitting person."""
        trousers, coat, skin = (
            self.color() * 0.6,
            self.color(),
            np.array((120, 150, 190)) * self.rng.uniform(0.5, 1.1),
        )
        self.box(x - 0.1 * height, x + 0.1 * height, bottom - 0.5 * height, bottom, kind, trousers)
        self.ellipse((x, bottom - 0.62 * height), (0.16 * height, 0.24 * height), kind, coat)
        self.ellipse((x, bottom - 0.91 * height), (0.09 * height, 0.1 * height), kind, skin)

    def pedestrian(self, depth: float) -> None:
        side = self.rng.choice((-1, 1)) * self.rng.uniform(0.7, 1.6)
        x, bottom = self.point(side, depth)
        self.body(x, bottom, self.unit(depth) * self.rng.uniform(0.6, 0.8), 'person')

    def two_wheeler(self, depth: float) -> None:
        """A bicycle or motorcycle, most of them with a rider."""
        x, bottom = self.point(self.rng.uniform(-1.3, 1.3), depth)
        unit = self.unit(depth)
        radius = 0.16 * unit
        kind = str(self.rng.choice(('bicycle', 'motorcycle')))
        if self.rng.random() < 0.7:
            self.body(x, bottom - 1.2 * radius, 0.62 * unit, 'rider')
        dark = self.color('pole') - 55
        for place in (x - 1.5 * radius, x + 1.5 * radius):
            self.ellipse((place, bottom - radius), (radius, radius), kind, dark)
            if kind == 'bicycle':  # as annotated in Cityscapes: the wheel is filled
                self.ellipse((place, bottom - radius), (0.7 * radius, 0.7 * radius), kind, self.color('road'))
        color = self.color()
        if kind == 'bicycle':
            frame = [(x - 1.5 * radius, bottom - radius), (x - 0.4 * radius, bottom - 2.2 * radius)]
            frame += [(x + 1.2 * radius, bottom - 2.2 * radius), (x + 1.5 * radius, bottom - radius)]
            frame += [(x + 0.9 * radius, bottom - 1.8 * radius), (x - 0.2 * radius, bottom - 1.8 * radius)]
            self.paint(frame, kind, color)
        else:
            self.ellipse((x, bottom - 1.4 * radius), (1.6 * radius, 0.75 * radius), kind, color)
            self.box(x + 1.0 * radius, x + 1.3 * radius, bottom - 2.6 * radius, bottom - radius, kind, dark)


def main() -> None:
    parser = argparse.ArgumentParser(
        description='Write the generated "streets" segmentation data set in Cityscapes\' layout.'
    )
    parser.add_argument('root', nargs='?', default='data/streets')
    parser.add_argument('--light', choices=LIGHTS, default='day')
    args = parser.parse_args()
    with cli.clear_errors():
        print(f'streets data set: {generate(args.root, light=args.light)}')


if __name__ == '__main__':
    main()
