"""What methods keep of the teacher's embeddings from step to step: the same on all processes, and in the checkpoint.

A frozen teacher's embeddings never get stale. Each process adds the same number of rows in each step, of which some may be
empty, so that shapes never differ. All processes add the rows of all, in the order of the processes.
"""

import torch
import torch.nn.functional as F
from mmengine.dist import all_gather
from torch import nn


def from_all_processes(rows: torch.Tensor, there: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of all processes, in the order of the processes; all have to call it, with the same shape.

    Args:
        rows: (n, ..., C).
        there: (n, ...) bool, False for an empty row.

    Returns:
        Both, of (processes * n, ...).
    """
    packed = torch.cat([rows, there[..., None].to(rows.dtype)], -1)
    packed = torch.cat(all_gather(packed.contiguous()))
    return packed[..., :-1], packed[..., -1] > 0


class Memory(nn.Module):
    """The teacher's embeddings of regions of the last steps, of all processes; the oldest are overwritten.

    Embeddings are stored as the teacher gave them. In each step each process adds exactly ``per_step`` rows, so that all
    processes gather tensors of one shape: an even choice of its regions if it has more, and rows marked as empty for those
    that are missing if it has fewer. The shape of the buffers does not depend on the number of processes.

    Args:
        size: The number of entries.
        channels: The channels of an embedding.
        per_step: The number of rows that a process adds in a step.
    """

    def __init__(self, size: int, channels: int, per_step: int):
        super().__init__()
        self.per_step = per_step
        self.register_buffer('keys', torch.zeros(size, channels))
        self.register_buffer('filled', torch.zeros(size, dtype=torch.bool))
        self.register_buffer('cursor', torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def add(self, keys: torch.Tensor) -> None:
        """Add regions of this process, (n, channels), and of all others; all have to call it."""
        number = max(len(keys), self.per_step)
        there = F.pad(keys.new_ones(len(keys), dtype=torch.bool), (0, number - len(keys)))
        rows = F.pad(keys, (0, 0, 0, number - len(keys)))
        spread = torch.arange(self.per_step, device=keys.device) * number // self.per_step
        rows, there = from_all_processes(rows[spread], there[spread])
        size = len(self.keys)
        rows, there = rows[-size:], there[-size:]
        place = (self.cursor + torch.arange(len(rows), device=keys.device)) % size
        self.keys.index_copy_(0, place, rows.to(self.keys.dtype))
        self.filled.index_copy_(0, place, there)
        self.cursor.copy_((self.cursor + len(rows)) % size)


@torch.no_grad()
def enqueue(keys: torch.Tensor, count: torch.Tensor, rows: torch.Tensor, there: torch.Tensor) -> None:
    """Append rows to the queue of their class, in place; the oldest are overwritten.

    The result depends on nothing but the arguments.

    Args:
        keys: (K, Q, C), a ring of Q entries for each class.
        count: (K,) int64, how many rows each class has ever had; the next one comes to ``count % Q``.
        rows: (n, K, C), oldest first.
        there: (n, K) bool, False for an empty row, which is left out.
    """
    size, channels = keys.shape[1:]
    there = there.t()
    number = there.sum(1, keepdim=True)
    kept = there & (there.cumsum(1) > number - size)  # of more rows than the ring has places, the last
    # kept rows first, then empty ones: each has a place of its own, to which an empty one writes what is there
    order = (~kept).to(torch.uint8).argsort(dim=1, stable=True)[:, :size]
    start = count[:, None] + (number - size).clamp(min=0)
    place = (start + torch.arange(order.shape[1], device=keys.device)) % size
    order, place = (each[..., None].expand(-1, -1, channels) for each in (order, place))
    new = rows.transpose(0, 1).gather(1, order).to(keys.dtype)
    new = torch.where(kept[..., None].expand(-1, -1, channels).gather(1, order), new, keys.gather(1, place))
    keys.scatter_(1, place, new)
    count += number[:, 0]


class ClassMemory(nn.Module):
    """A queue of the teacher's embeddings for each class, of all processes; the oldest are overwritten.

    Args:
        classes: The number of classes, K.
        size: The number of entries of each class.
        channels: The channels of an embedding.
    """

    def __init__(self, classes: int, size: int, channels: int):
        super().__init__()
        self.register_buffer('keys', torch.zeros(classes, size, channels))
        self.register_buffer('count', torch.zeros(classes, dtype=torch.long))

    def add(self, rows: torch.Tensor, there: torch.Tensor) -> None:
        """Add the rows of this process, (n, K, channels), where ``there``, (n, K), and of all others.

        All have to call it, with the same n.
        """
        enqueue(self.keys, self.count, *from_all_processes(rows.detach(), there))

    def draw(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A random choice of ``number`` entries of each class, at the same places in all of them.

        No place is drawn twice once a queue is full. Before that the places are moved together to the part that is filled,
        so that entries may come more than once; a class without entries has none.

        Returns:
            (K * number, channels), and whether the entry is there, (K * number,) bool.
        """
        classes, size, _ = self.keys.shape
        place = torch.rand(size, device=self.keys.device).argsort()[:number]
        filled = self.count.clamp(max=size)[:, None]
        place = place * filled // size
        drawn = self.keys[torch.arange(classes, device=place.device)[:, None], place]
        return drawn.flatten(0, 1), (filled > 0).expand(-1, number).flatten()
