"""Read amplification: how much all ranks together read of the files, as a multiple of what is in them.

The order of an epoch does not depend on the number of ranks, so a rank's share begins and ends somewhere
within a window, of which its neighbour reads blocks, too::

    windows   [  0  1  2  3  |  4  5  6  7  |  8  9 10 11  ]     blocks, of which samples mix
    shares    [        rank 0       |        rank 1        ]     both read blocks 4 to 7

Windows of W of B blocks cost up to W / B of the data for each rank. Many ranks, or little data, ask for small
windows, or for memory that a node's ranks share.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["read_amplification"]

FloatArray = npt.NDArray[np.float64]


def read_amplification(samples: int, blocks: int, window_blocks: int, ranks: int, *, shuffle: bool) -> float:
    """Samples that ranks read in an epoch, by samples that there are. Local.

    It is what is to be expected over many epochs, for blocks of one size.

    Parameters
    ----------
    samples, blocks
        What the data has.
    window_blocks
        Blocks in a window.
    ranks
        How many share the epoch.
    shuffle
        Whether samples mix in windows.
    """
    if samples == 0:
        return 1.0
    size = samples / blocks
    window = size * min(window_blocks if shuffle else 1, blocks)
    share, larger = divmod(samples, ranks)
    numbers = np.arange(ranks + 1)
    edges = numbers * share + np.minimum(numbers, larger)
    first, last = edges[:-1] // window, np.ceil(edges[1:] / window) - 1
    inside = first == last
    head, tail = np.minimum(edges[1:], (first + 1) * window) - edges[:-1], edges[1:] - last * window
    holds = np.minimum(window, samples - np.stack((first, last)) * window)  # the last window may be smaller
    read = _touched(head, holds[0], size) + np.where(inside, 0, _touched(tail, holds[1], size))
    read += np.maximum(last - first - 1, 0) * window
    return float(read[edges[1:] > edges[:-1]].sum() / samples)


def _touched(taken: FloatArray, window: FloatArray, size: float) -> FloatArray:
    """Samples in the blocks of a window of which one is among ``taken`` that were drawn from it."""
    missed: FloatArray = np.clip(1 - size / np.maximum(window, size), 0, 1) ** np.maximum(taken, 0)
    return window * (1 - missed)
