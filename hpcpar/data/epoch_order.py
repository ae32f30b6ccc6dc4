"""The order of an epoch: blocks are shuffled, then samples within windows of some blocks.

Reading single samples of a chunked file is slow, for each costs a whole chunk. So what is read are blocks of
whole chunks, in random order, and samples mix within a window of blocks, which is as much as memory holds::

    file       [ block 0 | block 1 | block 2 | block 3 | block 4 | block 5 ]
    blocks       4    0   |  5    2   |  1    3          a permutation for each epoch
    windows    [ window 0 | window 1  | window 2 ]       the samples in each are permuted again

The sequence of all windows is the global order of the epoch. It depends on seed, epoch, blocks and the size
of a window, and not on the number of ranks: so an epoch can be interrupted and continued by another number.

Each random draw has a generator of its own, made from (seed, epoch, window); the global ones are not used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hpcpar.data.shares import Span

__all__ = ["EpochOrder", "IntArray", "Interleave", "ReadTask"]

IntArray = npt.NDArray[np.intp]
_BLOCKS, _SAMPLES = 1, 2  # first word of the seeds, so that no two draws have the same


@dataclass(frozen=True)
class Interleave:
    """Every ``parts``-th group of ``group`` samples, from group ``part``: what one of some workers takes."""

    part: int
    parts: int
    group: int

    def count(self, samples: int) -> int:
        """How many of a sequence of samples that is."""
        rounds, rest = divmod(samples, self.parts * self.group)
        return rounds * self.group + min(max(rest - self.part * self.group, 0), self.group)

    def select(self, first: int, rows: IntArray) -> IntArray:
        """Those of ``rows`` that it is, where ``rows[0]`` has the number ``first`` in the sequence."""
        numbers = np.arange(first, first + len(rows)) // self.group
        chosen: IntArray = rows[numbers % self.parts == self.part]
        return chosen


@dataclass(frozen=True)
class ReadTask:
    """A part of a window: what to read, and in which order to hand it out.

    Attributes
    ----------
    blocks
        ``(start, stop, row)``: the samples ``start`` to ``stop - 1`` are for the rows from ``row``.
    rows
        Rows in the order of the epoch.
    samples
        The numbers of the same samples in the data.
    """

    blocks: list[tuple[int, int, int]]
    rows: IntArray
    samples: IntArray


class EpochOrder:
    """The global order of the samples in one epoch. Local.

    Parameters
    ----------
    bounds
        Where blocks begin, and where the last one ends, in samples.
    window_blocks
        Blocks in a window.
    shuffle
        Whether to shuffle; else the order is that of the data.
    seed, epoch
        What the permutations are made from.
    """

    def __init__(
        self, bounds: npt.NDArray[np.int64], window_blocks: int, *, shuffle: bool, seed: int, epoch: int
    ) -> None:
        self._bounds, self._window_blocks, self._shuffle = bounds, window_blocks, shuffle
        self._seed, self._epoch = seed, epoch
        blocks = len(bounds) - 1
        self._blocks = self._generator(_BLOCKS).permutation(blocks) if shuffle else np.arange(blocks)
        sizes = np.diff(bounds)[self._blocks]
        ends = np.concatenate(([0], np.cumsum(sizes)))
        self._starts = np.append(ends[:-1:window_blocks], ends[-1])  # of windows, in positions
        self.largest_window = int(np.diff(self._starts).max(initial=0))

    def tasks(self, spans: Sequence[Span], interleave: Interleave | None = None) -> Iterator[ReadTask]:
        """The reads that bring the samples at positions ``spans``, in the order of the spans. Local."""
        passed = 0
        for start, end in spans:
            while start < end:
                window = int(np.searchsorted(self._starts, start, side="right")) - 1
                first, last = int(self._starts[window]), int(self._starts[window + 1])
                stop = min(end, last)
                task = self._task(window, start - first, stop - first, passed, interleave)
                if len(task.rows):
                    yield task
                passed, start = passed + stop - start, stop

    def _task(self, window: int, low: int, high: int, passed: int, interleave: Interleave | None) -> ReadTask:
        blocks = self._blocks[window * self._window_blocks : (window + 1) * self._window_blocks]
        starts, stops = self._bounds[blocks], self._bounds[blocks + 1]
        offsets = np.concatenate(([0], np.cumsum(stops - starts)))  # where each block is in the slot
        if self._shuffle:
            rows = self._generator(_SAMPLES, window).permutation(int(offsets[-1]))[low:high]
        else:
            rows = np.arange(low, high)
        if interleave is not None:
            rows = interleave.select(passed, rows)
        places = np.searchsorted(offsets, rows, side="right") - 1
        needed = np.unique(places)
        needed = needed[np.argsort(starts[needed])]  # disks like to go forward
        reads = [(int(starts[at]), int(stops[at]), int(offsets[at])) for at in needed]
        return ReadTask(reads, rows, starts[places] + rows - offsets[places])

    def _generator(self, *words: int) -> Any:
        return np.random.default_rng([words[0], self._seed, self._epoch, *words[1:]])
