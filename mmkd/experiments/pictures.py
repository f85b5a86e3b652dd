"""Pictures of predictions: boxes drawn on images, label maps in colors, and where they are wrong."""

import base64
import colorsys
import io
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from PIL import Image

WRONG = (200, 30, 30)


def palette(count: int, given: Sequence[Sequence[int]] | None = None) -> np.ndarray:
    """A color for each of ``count`` classes, (count, 3) of 0 to 255: the data's own where there is one for each class."""
    if given is not None and len(given) == count:
        return np.array(given, np.uint8).reshape(count, 3)
    name = 'tab10' if count <= 10 else 'tab20'
    if count <= 20:
        colors = colormaps[name](np.arange(count))[:, :3]
    else:  # hues that are far from their neighbors', by the golden ratio, in three shades
        colors = np.array([colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.85, (0.95, 0.65, 0.8)[i % 3]) for i in range(count)])
    return (255 * colors).round().astype(np.uint8).reshape(count, 3)


def draw_boxes(
    axis: Axes,
    image: np.ndarray,
    boxes: torch.Tensor,
    texts: Sequence[str],
    colors: Sequence[Sequence[int]],
    size: float = 5.5,
) -> None:
    """Draw an image, (H, W, 3) in RGB, with boxes of left, top, right and bottom in its pixels, and a text at each."""
    axis.imshow(image)
    axis.set(xticks=[], yticks=[])
    for (left, top, right, bottom), text, color in zip(boxes.tolist(), texts, colors):
        shade = tuple(float(each) / 255 for each in color)
        axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, ec=shade, lw=size / 4))
        ink = 'black' if np.dot(shade, (0.3, 0.6, 0.1)) > 0.6 else 'white'
        box = dict(facecolor=shade, alpha=0.75, pad=0.5, lw=0)
        inside = max(top, 0.04 * len(image))
        axis.text(left, inside, text, color=ink, fontsize=size, va='bottom', bbox=box, clip_on=True)


def colored(labels: np.ndarray, colors: np.ndarray, ignored: int = 255) -> np.ndarray:
    """A label map (H, W) in the classes' colors, (H, W, 3); ignored pixels are black."""
    picture = colors[np.where(labels == ignored, 0, labels)]
    picture[labels == ignored] = 0
    return picture


def mistakes(image: np.ndarray, labels: np.ndarray, found: np.ndarray, ignored: int = 255) -> np.ndarray:
    """The image (H, W, 3) in pale gray, red where the label map ``found`` is wrong, black where it is ignored."""
    picture = np.repeat(160 + image.mean(-1, keepdims=True) * 0.3, 3, -1).astype(np.uint8)
    picture[found != labels] = WRONG
    picture[labels == ignored] = 0
    return picture


def jpeg(picture: np.ndarray, width: int = 480) -> str:
    """A picture (H, W, 3) as a data URL, no wider than ``width``; one that is smaller is enlarged by whole numbers."""
    image = Image.fromarray(picture)
    if image.width > width:
        image = image.resize((width, max(1, round(image.height * width / image.width))), Image.Resampling.BILINEAR)
    elif width >= 2 * image.width:
        times = width // image.width
        image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, 'JPEG', quality=88)
    return f'data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}'
