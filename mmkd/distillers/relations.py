"""What relations are between: images, cells of a grid, or pixels; the same ones of both networks."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from mmkd.distillers.base import Distiller
from mmkd.distillers.levels import Layer, LevelPairs
from mmkd.errors import ConfigError
from mmkd.hosts.extents import image_parts
from mmkd.taps import Taps
from mmkd.values import is_whole

BETWEEN = ('images', 'cells', 'pixels')


def cell_weights(positions: int, cells: int, part: torch.Tensor) -> torch.Tensor:
    """How much each position of a row counts in each cell, for cells of one length, next to each other.

    Args:
        positions: The length of the row.
        cells: The number of cells.
        part: (B,), the part of the row that they cover, from its begin.

    Returns:
        (B, cells, positions), which sum to 1 in each cell.
    """
    length = (part * positions / cells)[:, None, None]
    begin = torch.arange(cells, device=part.device)[:, None] * length
    position = torch.arange(positions, device=part.device)
    return (torch.minimum(begin + length, position + 1) - torch.maximum(begin, position)).clamp(min=0) / length


def pool_cells(feature: torch.Tensor, size: Sequence[int], parts: torch.Tensor | None = None) -> torch.Tensor:
    """The mean of each cell of a grid; a position on the border of two cells counts in both, by how much of it lies there.

    Two products of matrices: deterministic, also backward, and no loop over images that differ in size.

    Args:
        feature: (B, C, H, W).
        size: Rows and columns of the grid, (h, w).
        parts: (B, 2), the part of height and width that the grid covers; None for all.

    Returns:
        (B, C, h, w).
    """
    if parts is None:
        parts = feature.new_ones(len(feature), 2)
    rows, columns = (cell_weights(feature.shape[2 + d], size[d], parts[:, d])[:, None] for d in (0, 1))
    return rows @ (feature @ columns.mT)


def at_points(feature: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """The map at the position in which each point lies.

    Args:
        feature: (B, C, H, W).
        points: (B, n, 2), from 0 to below 1: a part of the height, and of the width.

    Returns:
        (B, n, C).
    """
    row, column = (
        (part * size).floor().clamp(max=size - 1).long()
        for part, size in zip(points.unbind(2), feature.shape[2:], strict=True)
    )
    place = (row * feature.shape[3] + column)[:, None].expand(-1, feature.shape[1], -1)
    return feature.flatten(2).gather(2, place).transpose(1, 2)


def squared_distances(rows: torch.Tensor) -> torch.Tensor:
    """Squared Euclidean distances of all pairs, (n, D) to (n, n).

    Exactly 0, without gradient, where rows are equal up to rounding.
    By products of vectors, so that memory is n * n and not n * n * D.
    """
    rows = rows - rows.mean(0)
    product = rows @ rows.mT
    square = product.diagonal()
    squares = square[:, None] + square
    distances = squares - 2 * product
    # False for NaN, which stays one
    return distances.masked_fill(distances <= 8 * torch.finfo(rows.dtype).eps * squares, 0.0)


class RelationDistiller(Distiller):
    """Compares relations within each network, level by level; numbers of channels may differ, and nothing is trained beside.

    What the relations are between, all images of a process's batch together:

    ========== ==================================================================================================
    images     whole maps as vectors, of each image one
    cells      means over the cells of a grid of g x g over each image, without its padding
    pixels     positions of each image, drawn at random in each step, without its padding, with replacement; the
               same points of all levels and of both networks
    ========== ==================================================================================================

    ``samples`` bounds how many there are in a batch of B images, whatever B: ``samples // B`` pixels of each image, and
    the g of which g * g is at most that; at least one.

    Args:
        layer: The student's layer, or a list.
        between: ``'images'``, ``'cells'`` or ``'pixels'``.
        samples: Cells or pixels of all images of a process's batch together, see above.
        teacher_layer: The teacher's, where its name differs.
        match: See :class:`mmkd.distillers.levels.LevelPairs`.

    Raises:
        ConfigError: in the first step, if a process's batch has fewer samples than :attr:`least`.
    """

    any_scale = True
    least = 1
    """Samples without which there is nothing to compare; a later batch, the last of an epoch, may have fewer."""

    def __init__(
        self,
        layer: Layer | Sequence[Layer],
        between: str = 'cells',
        samples: int = 64,
        teacher_layer: Layer | Sequence[Layer] | None = None,
        match: str = 'stride',
    ):
        super().__init__()
        if between not in BETWEEN:
            raise ConfigError(f'between={between!r}: expected one of {", ".join(BETWEEN)}')
        if not (is_whole(samples) and samples >= 1):
            raise ConfigError(f'samples={samples!r}: expected a whole number of at least 1')
        self.between, self.samples, self._enough = between, samples, False
        self.levels = LevelPairs(layer, teacher_layer, match=match, same_channels=False)
        self.student_layers, self.teacher_layers = self.levels.student_layers, self.levels.teacher_layers

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        if self.levels.prepare(student, teacher):
            self.student_layers, self.teacher_layers = self.levels.student_layers, self.levels.teacher_layers

    def setup(self, student: Taps, teacher: Taps) -> None:
        self.levels.setup(student, teacher)

    def rows(self, student: Taps, teacher: Taps, data_samples: list | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of each level the embeddings of both, (n, D) and (n, D'); the same n of all levels, the teacher's without gradient."""
        return [(s.flatten(1), t.flatten(1)) for s, t in self.embeddings(student, teacher, data_samples)]

    def embeddings(
        self, student: Taps, teacher: Taps, data_samples: list | None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """As :meth:`rows`, but images are maps, (n, C, H, W)."""
        pairs = self.levels(student, teacher)
        first = pairs[0].teacher
        each = max(self.samples // len(first), 1)
        parts = image_parts(data_samples, first)
        if self.between == 'pixels':
            points = torch.rand(len(first), each, 2, device=first.device) * parts[:, None]

        def embed(feature: torch.Tensor) -> torch.Tensor:
            if self.between == 'images':
                return feature
            if self.between == 'pixels':
                return at_points(feature, points).flatten(0, 1)
            side = math.isqrt(each)
            return pool_cells(feature, (side, side), parts).flatten(2).transpose(1, 2).flatten(0, 1)

        found = [(embed(pair.student), embed(pair.teacher.detach())) for pair in pairs]
        number = len(found[0][1])
        if not self._enough and number < self.least:
            advice = (
                "take between='cells', or a larger train_dataloader.batch_size"
                if self.between == 'images'
                else f'raise samples, found {self.samples}'
            )
            raise ConfigError(
                f'between={self.between!r}: a batch of {len(first)} images has {number} samples, and {type(self).__name__} '
                f'needs {self.least} to relate; {advice}'
            )
        self._enough = True
        return found
