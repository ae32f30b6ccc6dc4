"""One copy for each node of flat tensors of which every rank writes its own part and reads all.

The copy lies in a shared window, so on a node nothing is gathered: what one rank writes, the others see. ::

    node 0   [ part of rank 0 | part of rank 1 ]      written by both, read by both
                   |  rail 0        |  rail 1         parts of other nodes arrive over the rails
    node 1   [ part of rank 2 | part of rank 3 ]

Invariant: between :meth:`enter` and :meth:`leave` each rank writes its own parts and reads nothing else;
outside, everybody reads and nobody writes. So ``enter`` waits until every rank of the node has stopped
reading (it has called ``enter`` too), and ``leave`` until every part is there.

Without room in ``/dev/shm``, or where a node has one rank, every rank holds a copy of its own and ``leave``
gathers the parts by messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import torch

from hpcpar.comm.bucket import BucketLayout
from hpcpar.comm.partition import Partition, gather_parts
from hpcpar.comm.progress import DescribedPatience, wait_until
from hpcpar.comm.shared_memory import FlagBoard, SharedWindow, has_space
from hpcpar.comm.transport import segment_layout
from hpcpar.errors import RankFailedError

if TYPE_CHECKING:
    from hpcpar.comm.communicator import Communicator

__all__ = ["NodeCopy"]

_ENTERED, _LEFT, _WORD, _FLAGS = 0, 1, 2, 3


class NodeCopy:
    """Flat host tensors, one copy of them for each node. Collective to make and to free.

    Parameters
    ----------
    comm
        The ranks. The copy sends on a duplicate.
    layouts, partitions
        The tensors, and who writes which part; the same on every rank.
    shared
        Whether to share memory where ranks share nodes and there is room.

    Attributes
    ----------
    flats : list of torch.Tensor
        The tensors, zero at first.
    is_shared : bool
        Whether the ranks of this node have one copy.
    """

    def __init__(
        self,
        comm: Communicator,
        layouts: Sequence[BucketLayout],
        partitions: Sequence[Partition],
        *,
        shared: bool = True,
    ) -> None:
        self._comm = comm.Dup()
        self._comm.skip_checks()
        self._layouts, self._partitions = list(layouts), list(partitions)
        node = self._comm.node
        self._offsets, nbytes = segment_layout(layouts)
        mine = FlagBoard.nbytes(_FLAGS) + (nbytes if node.rank == 0 else 0)
        wanted = shared and self._comm.node_map.largest_node > 1
        self.is_shared = wanted and has_space(self._comm, mine)
        self._step = 0
        self._window: SharedWindow | None = None
        self._private = np.zeros(0 if self.is_shared else nbytes, dtype=np.uint8)
        if self.is_shared:
            self._window = SharedWindow(node, mine)
            self._board = FlagBoard(self._window, node, 0, _FLAGS)
        self.flats = [self.tensor(bucket, 0, layout.numel) for bucket, layout in enumerate(layouts)]

    def tensor(self, bucket: int, start: int, numel: int) -> torch.Tensor:
        """A stretch of a flat tensor, with a storage of its own on the same memory. Local."""
        dtype = self._layouts[bucket].dtype
        offset = self._offsets[bucket] + start * dtype.itemsize
        if self._window is not None:
            return self._window.tensor(0, FlagBoard.nbytes(_FLAGS) + offset, numel, dtype)
        if numel == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self._private, dtype=dtype, count=numel, offset=offset)

    def enter(self, word: int = 0) -> bool:
        """Wait until nobody reads any more; from now on each rank writes its own parts. Collective.

        Parameters
        ----------
        word
            Of 63 bits, to be compared: a digest of what all ranks must do alike.

        Returns
        -------
        bool
            Whether all ranks of this node that share the copy said the same word; the same on each.

        Raises
        ------
        StalledError
            At the deadline, naming the ranks of this node that have not come.
        """
        self._step += 1
        if not self.is_shared:
            return True
        self._board.raise_flag(_WORD, word)
        self._meet(_ENTERED, "the beginning of an update of shared tensors")
        alike = all(self._board.read(rank, _WORD) == word for rank in range(self._comm.node.size))
        if not alike:  # all have read the words before one of them may raise an alarm about them
            with suppress(RankFailedError):
                self._meet(_LEFT, "the comparison of what ranks do alike")
        return alike

    def leave(self) -> None:
        """Bring all parts together; from now on everybody reads. Collective.

        Raises
        ------
        StalledError
            At the deadline, naming the ranks that have not finished theirs.
        """
        nodes, comm = self._comm.node_map, self._comm
        if not self.is_shared:
            gather_parts(comm, range(comm.size), self.flats, self._partitions)
            return
        local = comm.node.rank
        if comm.num_nodes > 1 and local < nodes.smallest_node:
            members = [rank for rank in range(comm.size) if nodes.local_index(rank) == local]
            gather_parts(comm.rail, members, self.flats, self._partitions)
        self._meet(_LEFT, "the end of an update of shared tensors")

    def free(self) -> None:
        """Give the memory back; tensors on it must not be used any more. Collective."""
        if self._comm.is_freed:
            return
        self._comm.Barrier()
        self.flats = []
        if self._window is not None:
            self._board.free()
            self._window.free()
        self._comm.Free()

    def _meet(self, flag: int, what: str) -> None:
        """Wait for all ranks of the node; what they have written is visible then."""
        if not self.is_shared:
            return
        comm, board, step = self._comm, self._board, self._step
        board.raise_flag(flag, step)

        def missing() -> tuple[str, list[int]]:
            members = comm.node_map.ranks_of(comm.node_rank)
            return what, [rank for local, rank in enumerate(members) if board.read(local, flag) < step]

        wait_until(lambda: board.all_reached(flag, step), DescribedPatience(missing, comm._where))
