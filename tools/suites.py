"""The generated data sets that the demos and the comparison train on, each with its folder of configs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mmkd.data import shapes, streets
from mmkd.hosts.mmengine import CONFIG_ROOT


@dataclass(frozen=True)
class Suite:
    """The configs of ``configs/<name>``, the data they are trained on, and the score that ranks them.

    Args:
        name: Of the folder of configs, and of the data's folder.
        task: What the models do, for titles.
        score: What the score is called.
        key: The score's key in the logs.
        digits: Behind its decimal point.
        images: On which it is measured.
        about: What the score is, a sentence.
        generate: Writes the data unless they are there, and says where.
    """

    name: str
    task: str
    score: str
    key: str
    digits: int
    images: int
    about: str
    generate: Callable[[], str]

    @property
    def configs(self) -> Path:
        return CONFIG_ROOT / self.name


def generate_shapes() -> str:
    return f'{shapes.generate("data/shapes")} (1200 generated images)'


def generate_streets() -> str:
    folders = [streets.generate('data/streets'), streets.generate('data/streets_dusk', light='dusk')]
    return f'{folders[0]} and {folders[1]} (700 generated images each)'


SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            'shapes',
            'detection',
            'AP',
            'coco/bbox_mAP',
            3,
            200,
            'AP is that of COCO, on the 200 validation images of the generated data set "shapes"',
            generate_shapes,
        ),
        Suite(
            'streets',
            'segmentation',
            'mIoU',
            'mIoU',
            2,
            100,
            'mIoU is in percent, over 19 classes, on the 100 validation images of the generated data set "streets"',
            generate_streets,
        ),
    )
}
