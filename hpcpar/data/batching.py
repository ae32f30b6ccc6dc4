"""From parts of a stream to tensors: each batch is gathered into memory of its own, by one copy.

A batch may begin in one part and end in the next. Copying is what makes it the consumer's: the buffers that
parts lie in are written again as soon as the next part is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from hpcpar.data.block_reader import Part
from hpcpar.data.epoch_order import ReadTask
from hpcpar.data.h5_files import Array, Field

__all__ = ["MemoryParts", "gather"]


class MemoryParts:
    """Parts of data that is all in memory, in the place of a reader. Local.

    Parameters
    ----------
    arrays
        All samples, one array for each field.
    tasks
        Which of them, in which order.
    """

    def __init__(self, arrays: Sequence[Array], tasks: Iterable[ReadTask]) -> None:
        self._arrays, self._tasks = arrays, tasks

    def __iter__(self) -> Iterator[Part]:
        """The parts, in the order of the tasks."""
        for task in self._tasks:
            yield self._arrays, task.samples

    def close(self) -> None:
        """Let go of the memory."""
        self._arrays, self._tasks = [], []


def gather(
    parts: Iterable[Part], fields: Sequence[Field], total: int, size: int, *, pinned: bool
) -> Iterator[list[torch.Tensor]]:
    """Batches of ``size`` samples, the last one of what is left. Local.

    Parameters
    ----------
    parts
        The stream.
    fields
        What a sample consists of.
    total
        Samples in the stream.
    size
        Samples in a batch.
    pinned
        Whether batches are in page-locked memory, from where copies to a GPU are asynchronous.

    Yields
    ------
    list of torch.Tensor
        One for each field, of shape ``(size, *shape of a sample)``, in memory that nobody else uses.
    """
    batch: list[torch.Tensor] = []
    rooms: list[Array] = []
    filled = length = done = 0
    for arrays, rows in parts:
        at = 0
        while at < len(rows):
            if filled == length:
                length, filled = min(size, total - done), 0
                batch = [_room(field, length, pinned) for field in fields]
                rooms = [tensor.numpy() for tensor in batch]
            step = min(len(rows) - at, length - filled)
            for array, room in zip(arrays, rooms, strict=True):
                # "clip" spares numpy a buffer; the rows are in range
                array.take(rows[at : at + step], axis=0, out=room[filled : filled + step], mode="clip")
            at, filled, done = at + step, filled + step, done + step
            if filled == length:
                yield batch


def _room(field: Field, samples: int, pinned: bool) -> torch.Tensor:
    if not pinned:
        return torch.from_numpy(field.empty(samples))
    dtype = torch.from_numpy(np.empty(0, field.dtype)).dtype
    return torch.empty((samples, *field.shape), dtype=dtype, pin_memory=True)
