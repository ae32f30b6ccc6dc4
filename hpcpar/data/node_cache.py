"""All samples in memory, once for each node: read and decompressed once, then shared by the ranks there.

::

    file         [ blocks 0 .. 3 | blocks 4 .. 7 ]
                       |  rank 0       |  rank 1         each rank of a node reads a part of the blocks
    node         [ one shared window with all samples ]  then all of them read all of it

Invariant: ranks write their parts before the barrier and nobody writes after it. The window is rank 0's
segment of its node; a rank that is alone on its node has ordinary memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from hpcpar.comm import agree
from hpcpar.comm.shared_memory import SharedWindow, has_space
from hpcpar.data.h5_files import Array, Layout, OpenFiles
from hpcpar.data.shares import cut

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["NodeCache"]

_ALIGN_BYTES = 64


class NodeCache:
    """The data of a layout in memory, one copy for each node. Collective to make and to free.

    Parameters
    ----------
    comm
        The ranks; it sends on a duplicate. None for this process alone.
    layout
        What to read.
    bounds
        Of the blocks; ranks share the work along them.

    Attributes
    ----------
    arrays : list of numpy.ndarray
        All samples, one array for each field. For reading only.

    Raises
    ------
    OSError
        On every rank, when a node has too little room in ``/dev/shm``.
    MismatchError
        When reading fails on another rank.
    """

    def __init__(self, comm: Communicator | None, layout: Layout, bounds: npt.NDArray[np.int64]) -> None:
        self.arrays: list[Array] = []
        self._window: SharedWindow | None = None
        self._comm = None if comm is None else comm.Dup()
        try:
            self.arrays = self._make_room(layout)
            self._fill(layout, bounds)
        except Exception:  # on all ranks
            self.free()
            raise

    def free(self) -> None:
        """Give the memory back; a second call is fine. Collective."""
        self.arrays = []
        if self._window is not None:
            self._window.free()
            self._window = None
        if self._comm is not None:
            self._comm.Free()
            self._comm = None

    def _make_room(self, layout: Layout) -> list[Array]:
        """Arrays in a window, or in ordinary memory where nobody else would use it."""
        sizes = [layout.samples * field.nbytes for field in layout.fields]
        padded = [-(-size // _ALIGN_BYTES) * _ALIGN_BYTES for size in sizes]
        if self._comm is None:
            return [field.empty(layout.samples) for field in layout.fields]
        node = self._comm.node
        shared = node.size > 1
        mine = sum(padded) if shared and node.rank == 0 else 0
        if not has_space(self._comm, mine):
            raise OSError(
                f"cache='node' must find {sum(padded) / 2**20:.1f} MiB in /dev/shm of every node, got less. "
                f"Enlarge it (docker run --shm-size, or remount), or leave cache out"
            )
        if not shared:
            return [field.empty(layout.samples) for field in layout.fields]
        self._window = SharedWindow(node, mine)
        offsets = np.cumsum([0, *padded[:-1]])
        return [
            self._window.tensor(0, int(offset), size, torch.uint8)
            .numpy()
            .view(field.dtype)
            .reshape(layout.samples, *field.shape)
            for field, offset, size in zip(layout.fields, offsets, sizes, strict=True)
        ]

    def _fill(self, layout: Layout, bounds: npt.NDArray[np.int64]) -> None:
        blocks = len(bounds) - 1
        rank, ranks = (0, 1) if self._comm is None else (self._comm.node.rank, self._comm.node.size)
        # Not cut evenly to the sample but to the block, of which none should be decompressed twice.
        spans = cut([(0, blocks)], blocks * rank // ranks, blocks * (rank + 1) // ranks)

        def read() -> None:
            with OpenFiles(layout) as files:
                for first, last in spans:
                    for start, stop in zip(bounds[first:last], bounds[first + 1 : last + 1], strict=True):
                        files.read(int(start), int(stop), self.arrays, int(start))

        if self._comm is None:
            read()
            return
        agree([self._comm], "cache='node'", read)
        if self._window is not None:
            self._window.sync()
            self._comm.node.Barrier()
            self._window.sync()

    def __reduce__(self) -> Any:
        raise TypeError("a node cache must not be pickled: it is the memory of this node and job")
