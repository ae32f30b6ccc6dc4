"""How one bucket is summed over the ranks: through shared memory, or by MPI's own messages.

A :class:`Transport` holds the flat storage of all buckets on this rank and answers three questions of the
reducer: *publish* (this rank's contents are final), *advance* (do what can be done now; is the sum there?)
and *delivered* (who has not delivered yet?). It never waits.

Shared memory, here for two nodes of two ranks, bucket cut into one slice per local index::

        node 0                            node 1
    rank 0  [a0|a1]                   rank 2  [c0|c1]          filled[r][b] = step  on both boards
    rank 1  [b0|b1]                   rank 3  [d0|d1]
    rank 0: a0+b0  ---- rail 0 Iallreduce ----  rank 2: c0+d0   each owner sums its slice in rank order,
    rank 1: a1+b1  ---- rail 1 Iallreduce ----  rank 3: c1+d1   then the rails reduce all slices at once
    rank 0 writes slice 0 into both segments, rank 1 slice 1    reduced[r][b] = step

Invariant (who may touch a segment now): before ``filled[r][b] = s`` only rank *r*. From then on rank *i* of
the node alone touches slice *i* of all segments, until it raises ``reduced[i][b] = s``. When all owners
have, segment *r* belongs to rank *r* again. A rank that is a step ahead writes only what is its own, so no
barrier is needed between steps.

A bucket may have a :class:`~hpcpar.comm.partition.Partition`: each rank then gets the sum of its own part
only, so that nothing is copied back, and rails scatter in place of reducing. And a step may stay *within the
node*: then rails are left out.

Each element is summed once per node, in one place and in rank order, and copied: replicas are bitwise
equal. 16-bit sums are accumulated in float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from hpcpar.comm.bucket import BucketLayout
from hpcpar.comm.buffers import accumulation_dtype
from hpcpar.comm.ordered_reduction import slice_bounds
from hpcpar.comm.partition import Partition
from hpcpar.comm.shared_memory import CACHE_LINE_BYTES, FlagBoard, SharedWindow
from hpcpar.comm.wire import Wire
from hpcpar.comm.wire_reduction import WireReduction
from hpcpar.comm.wire_scatter import WireScatter

if TYPE_CHECKING:
    from hpcpar.comm.communicator import Communicator

__all__ = ["MessageTransport", "SharedMemoryTransport", "SingleTransport", "Transport"]

_CACHE_BYTES = 512 * 1024  # a block of every segment together, to stay in a second-level cache
_SMALLEST_BLOCK_BYTES = 64 * 1024
_ALIGN_ELEMENTS = 64

Partitions = Sequence["Partition | None"]


class Transport(ABC):
    """Sums buckets over the ranks of a communicator; see the module's description."""

    storage: list[torch.Tensor]
    _wire: Wire | None = None

    @abstractmethod
    def publish(self, bucket: int, step: int, scale: float, *, within_node: bool = False) -> None:
        """Declare this rank's contents of ``bucket`` final for ``step``. In index order on every rank.

        The result will be the sum over all ranks, or those of this node, times ``scale``, which is the same
        on all of them.
        """

    @abstractmethod
    def advance(self, bucket: int, step: int) -> bool:
        """Go on with a published bucket; whether ``storage`` holds the result now."""

    @abstractmethod
    def delivered(self, rank: int, bucket: int, step: int) -> bool | None:
        """Whether ``rank`` has done its part of ``bucket``; ``None`` when that cannot be seen from here."""

    def owes(self, rank: int, bucket: int, step: int) -> str:
        """What ``rank`` has yet to do for ``bucket``, in words; empty when unknown or nothing. Local."""
        return ""

    def outstanding(self, bucket: int) -> torch.Tensor:
        """What rounding on the wire has kept back of a bucket on this rank, as long as the bucket. Local."""
        result = torch.zeros(self.storage[bucket].numel(), dtype=self.storage[bucket].dtype)
        kept = None if self._wire is None else self._wire.outstanding(bucket)
        if kept is not None:
            result[slice(*self._slice_bounds(bucket))] = kept
        return result

    def load_outstanding(self, bucket: int, total: torch.Tensor) -> None:
        """Keep this rank's share of ``total``, which is the sum over all ranks. Local."""
        if self._wire is not None:
            self._wire.load_outstanding(bucket, total[slice(*self._slice_bounds(bucket))])

    def _slice_bounds(self, bucket: int) -> tuple[int, int]:
        """What this rank sends of a bucket."""
        return 0, self.storage[bucket].numel()

    def free(self) -> None:
        """Give back what was allocated. Collective."""
        self.storage = []


class SingleTransport(Transport):
    """One rank: nothing to do but to scale."""

    def __init__(self, layouts: Sequence[BucketLayout]) -> None:
        self.storage = [torch.zeros(layout.numel, dtype=layout.dtype) for layout in layouts]

    def publish(self, bucket: int, step: int, scale: float, *, within_node: bool = False) -> None:
        """Nothing to add."""
        scale_by(self.storage[bucket], scale)

    def advance(self, bucket: int, step: int) -> bool:
        """The sum over one rank is there."""
        return True

    def delivered(self, rank: int, bucket: int, step: int) -> bool:
        """Nobody is late."""
        return True


class MessageTransport(Transport):
    """MPI's ``Iallreduce`` over all ranks, one per bucket.

    Parameters
    ----------
    comm
        A communicator on which nobody else starts collectives, neither on its nodes.
    layouts
        The buckets.
    wire_dtype
        Narrower type to send in, ``None`` for the bucket's own.
    partitions
        Of each bucket, ``None`` where every rank wants all of it.
    pinned
        Page-lock the storage, for buckets that are copied from and to a GPU.
    """

    def __init__(
        self,
        comm: Communicator,
        layouts: Sequence[BucketLayout],
        wire_dtype: torch.dtype | None,
        partitions: Partitions | None = None,
        *,
        pinned: bool = False,
    ) -> None:
        self._comm = comm
        self._partitions = partitions or [None] * len(layouts)
        self._wire: Wire = Wire(comm, layouts, wire_dtype)
        self.storage = [
            torch.zeros(layout.numel, dtype=layout.dtype, pin_memory=pinned) for layout in layouts
        ]
        self._flights: dict[int, WireReduction | WireScatter] = {}

    def publish(self, bucket: int, step: int, scale: float, *, within_node: bool = False) -> None:
        """Start the message; scaled before it leaves, so that a 16-bit sum does not overflow."""
        flat, partition = self.storage[bucket], self._partitions[bucket]
        scale_by(flat, scale)
        if within_node:
            self._flights[bucket] = WireReduction(self._comm.node, flat, None)
        elif partition is not None:
            self._flights[bucket] = self._wire.scatter(bucket, flat, partition.bounds)
        else:
            self._flights[bucket] = self._wire.reduce(bucket, flat)

    def advance(self, bucket: int, step: int) -> bool:
        """Look whether it has arrived."""
        if not self._flights[bucket].test():
            return False
        del self._flights[bucket]
        return True

    def delivered(self, rank: int, bucket: int, step: int) -> bool | None:
        """MPI does not tell."""
        return None


class SharedMemoryTransport(Transport):
    """Slices summed in shared memory, and over the rails where there are several nodes.

    Parameters
    ----------
    comm
        All ranks; nobody else starts collectives on its rails.
    layouts
        The buckets.
    wire_dtype
        Narrower type for the rails; shared memory keeps the bucket's own.
    partitions
        Of each bucket, ``None`` where every rank wants all of it.
    pinned
        Page-lock this rank's segment, for buckets that are copied from and to a GPU.
    """

    def __init__(
        self,
        comm: Communicator,
        layouts: Sequence[BucketLayout],
        wire_dtype: torch.dtype | None,
        partitions: Partitions | None = None,
        *,
        pinned: bool = False,
    ) -> None:
        node = comm.node
        self._comm, self._node = comm, node
        self._rail = comm.rail if comm.num_nodes > 1 else None
        # Every node must cut buckets alike, so the smallest node decides how many owners there are.
        self._owners = range(comm.node_map.smallest_node)
        if self._rail is not None and node.rank in self._owners:
            self._wire = Wire(self._rail, layouts, wire_dtype)
        self._partitions = partitions or [None] * len(layouts)
        self._rail_members = [
            rank
            for rank in range(comm.size)
            if comm.node_map.local_index(rank) == node.rank and node.rank in self._owners
        ]
        self._flights: dict[int, WireReduction | WireScatter] = {}
        self._block_bytes = max(_CACHE_BYTES // node.size, _SMALLEST_BLOCK_BYTES)
        self._scratches: dict[torch.dtype, torch.Tensor] = {}
        self._scales = [1.0] * len(layouts)
        self._within_node = [False] * len(layouts)
        self._summed = [0] * len(layouts)  # step of the last sum of my slice
        self._next_rail = 0  # rails start buckets in index order, the same on every node
        offsets, nbytes = segment_layout(layouts)
        self._filled, self._reduced = 0, len(layouts)
        self._window = SharedWindow(node, nbytes, pinned=pinned)
        self._board = FlagBoard(self._window, node, offsets[-1], 2 * len(layouts))
        self.storage = [
            self._window.tensor(node.rank, offset, layout.numel, layout.dtype)
            for offset, layout in zip(offsets, layouts, strict=False)
        ]
        self._slices = [
            self._slice_blocks(bucket, layout, offsets[bucket]) for bucket, layout in enumerate(layouts)
        ]

    def _slice_bounds(self, bucket: int) -> tuple[int, int]:
        """My slice of a bucket."""
        partition = self._partitions[bucket]
        if partition is not None:
            return partition.span(self._rail_members)
        return slice_bounds(self.storage[bucket].numel(), len(self._owners), _ALIGN_ELEMENTS)[self._node.rank]

    def _slice_blocks(self, bucket: int, layout: BucketLayout, offset: int) -> list[list[torch.Tensor]]:
        """My slice of a bucket as cache-sized blocks, each a view into every segment of the node."""
        if self._node.rank not in self._owners:
            return []
        start, end = self._slice_bounds(bucket)
        step = self._block_bytes // layout.dtype.itemsize
        segments = [
            self._window.tensor(rank, offset, layout.numel, layout.dtype)[start:end]
            for rank in range(self._node.size)
        ]
        return [
            list(block) for block in zip(*(torch.split(segment, step) for segment in segments), strict=True)
        ]

    def publish(self, bucket: int, step: int, scale: float, *, within_node: bool = False) -> None:
        """Raise my flag."""
        self._scales[bucket] = scale
        self._within_node[bucket] = within_node
        self._board.raise_flag(self._filled + bucket, step)

    def advance(self, bucket: int, step: int) -> bool:
        """Sum my slice when all have filled, then look whether the other owners have done theirs."""
        if self._summed[bucket] < step:
            self._sum(bucket, step)
        return self._board.all_reached(self._reduced + bucket, step, self._owners)

    def _sum(self, bucket: int, step: int) -> None:
        if bucket in self._flights:
            if self._flights[bucket].test():
                del self._flights[bucket]
                if self._partitions[bucket] is None:
                    self._spread(bucket)
                self._finish(bucket, step)
            return
        crosses = self._rail is not None and not self._within_node[bucket]
        if crosses and bucket != self._next_rail:
            return
        if not self._board.all_reached(self._filled + bucket, step):
            return
        if self._node.rank not in self._owners:
            self._summed[bucket] = step
        else:
            self._sum_slice(bucket, everywhere=not crosses and self._partitions[bucket] is None)
            if crosses:
                self._flights[bucket] = self._depart(bucket)
            else:
                self._finish(bucket, step)
        if crosses:
            self._next_rail = (bucket + 1) % len(self._slices)

    def _sum_slice(self, bucket: int, *, everywhere: bool) -> None:
        """Add up my slice of all segments, into all of them or into my own."""
        me = self._node.rank
        for block in self._slices[bucket]:
            self._sum_block(block, block if everywhere else [block[me]], self._scales[bucket])

    def _depart(self, bucket: int) -> WireReduction | WireScatter:
        """Start to add up the slices of the nodes."""
        assert self._wire is not None
        flat, partition = self._own_slice(bucket), self._partitions[bucket]
        if partition is None:
            return self._wire.reduce(bucket, flat)
        first, _ = self._slice_bounds(bucket)
        parts = [partition.bounds[rank] for rank in self._rail_members]
        return self._wire.scatter(bucket, flat, [(a - first, b - first) for a, b in parts])

    def _sum_block(
        self, block: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], scale: float
    ) -> None:
        """Write the scaled sum of ``block`` to ``targets``, which are some of its tensors."""
        # In place where that is exact and wanted: one pass over memory less than by way of the scratch.
        narrow = accumulation_dtype(block[0].dtype) is not None
        in_place = targets[0] is block[0] and not narrow
        total = add_in_order(block, block[0] if in_place else self._scratch(block[0].dtype))
        scale_by(total, scale)
        for target in targets:
            if target is not total:
                target.copy_(total)

    def _scratch(self, dtype: torch.dtype) -> torch.Tensor:
        """A block in the type that ``dtype`` is summed in; it stays in the cache."""
        if dtype not in self._scratches:
            count = self._block_bytes // dtype.itemsize
            self._scratches[dtype] = torch.empty(count, dtype=accumulation_dtype(dtype) or dtype)
        return self._scratches[dtype]

    def _own_slice(self, bucket: int) -> torch.Tensor:
        start, end = self._slice_bounds(bucket)
        return self.storage[bucket][start:end]

    def _spread(self, bucket: int) -> None:
        """Copy the result, which is in my segment, into the others of the node."""
        for block in self._slices[bucket]:
            own = block[self._node.rank]
            for other in block:
                if other is not own:
                    other.copy_(own)

    def _finish(self, bucket: int, step: int) -> None:
        self._summed[bucket] = step
        self._board.raise_flag(self._reduced + bucket, step)

    def delivered(self, rank: int, bucket: int, step: int) -> bool | None:
        """Read the board for the ranks of this node."""
        members = self._comm.node_map.ranks_of(self._comm.node_rank)
        if rank not in members:
            return None
        local = members.index(rank)
        filled = self._board.read(local, self._filled + bucket) >= step
        return filled and (
            local not in self._owners or self._board.read(local, self._reduced + bucket) >= step
        )

    def owes(self, rank: int, bucket: int, step: int) -> str:
        """Read it off the board."""
        if self.delivered(rank, bucket, step) is not False:
            return ""
        local = self._comm.node_map.local_index(rank)
        if self._board.read(local, self._filled + bucket) < step:
            return f"rank {rank} has not filled it"
        if not self._board.all_reached(self._filled + bucket, step):
            return ""  # it cannot go on before the others
        return f"rank {rank} has not summed its slice of it"

    def free(self) -> None:
        """Free the window."""
        super().free()
        self._slices = []
        self._board.free()
        self._window.free()


def segment_layout(layouts: Sequence[BucketLayout]) -> tuple[list[int], int]:
    """Byte offset of each bucket in a segment and, last, of the flags; and the size of it all. Local."""
    offsets = [0]
    for layout in layouts:
        offsets.append(offsets[-1] + -(-layout.nbytes // CACHE_LINE_BYTES) * CACHE_LINE_BYTES)
    return offsets, offsets[-1] + FlagBoard.nbytes(2 * len(layouts))


def scale_by(flat: torch.Tensor, scale: float) -> None:
    """Multiply in place, unless by one. Local."""
    if scale != 1.0:
        flat.mul_(scale)


def add_in_order(block: Sequence[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
    """Sum equally long flat tensors, first to last, into the beginning of ``out``. Local.

    ``out`` may be the first of them, or a tensor of a wider type.
    """
    total = out if out is block[0] else out[: block[0].numel()]
    if total is not block[0]:
        total.copy_(block[0])
    for part in block[1:]:
        total.add_(part)
    return total
