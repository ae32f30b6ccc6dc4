"""Shared memory inside a node: MPI-3 windows, and boards of flags in them.

Every rank of a node owns one segment of a window and may read and write all of them as ordinary memory.
Nothing orders these accesses but the flags: a rank writes data, then raises a flag; another sees the flag,
then reads the data. :meth:`SharedWindow.sync` is the memory barrier between the two steps, on both sides;
x86 keeps the order of stores by itself, Arm and Power do not.

A flag has one writer, its owner, so no atomic operation is needed beyond an aligned 8-byte store. Flags
are 64 bytes apart: two ranks never write to one cache line.

Containers often have a small ``/dev/shm``. Pages of a window are only taken when they are first touched,
and a process that finds none left is killed by ``SIGBUS``; so :func:`has_space` asks first, and each rank
touches its whole segment when the window is made (which also places the pages on its own NUMA domain).
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Any

import torch

from hpcpar.comm.mpi import MPI
from hpcpar.errors import CommunicatorFreedError

if TYPE_CHECKING:
    from hpcpar.comm.communicator import Communicator

__all__ = ["CACHE_LINE_BYTES", "FlagBoard", "SharedWindow", "has_space"]

CACHE_LINE_BYTES = 64
_LOG = logging.getLogger(__name__)
_RESERVE_BYTES = 4 << 20


class SharedWindow:
    """Memory that the ranks of a node share, one segment per rank. Collective to make and to free.

    Parameters
    ----------
    node
        Ranks on one node, such as ``comm.node``.
    nbytes
        Size of this rank's segment.
    pinned
        Page-lock this rank's segment, so that copies from and to a GPU are asynchronous. Where the driver
        refuses (a limit on locked memory) copies are slower, not wrong.
    """

    def __init__(self, node: Communicator, nbytes: int, *, pinned: bool = False) -> None:
        info = MPI.Info.Create()
        info.Set("alloc_shared_noncontig", "true")  # page-aligned segments, each on its rank's NUMA domain
        self._window: Any = MPI.Win.Allocate_shared(max(nbytes, CACHE_LINE_BYTES), 1, info, node.mpi)
        info.Free()
        self._window.Lock_all(MPI.MODE_NOCHECK)
        self._segments = [self._window.Shared_query(rank)[0] for rank in range(node.size)]
        self._rank, self._node = node.rank, node
        self._references = self._count_references()
        own = torch.frombuffer(self._segments[node.rank], dtype=torch.uint8).zero_()
        self._pinned = pinned and page_lock(own)
        node.Barrier()

    def tensor(self, rank: int, offset: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """``numel`` elements at ``offset`` bytes in the segment of ``rank``, as a flat tensor. Local."""
        if numel == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self._buffer(rank), dtype=dtype, count=numel, offset=offset)

    def flags(self, rank: int, offset: int, count: int) -> memoryview:
        """``count`` int64 at ``offset`` bytes in the segment of ``rank``. Local."""
        return memoryview(self._buffer(rank)).cast("B")[offset : offset + 8 * count].cast("q")

    def sync(self) -> None:
        """Memory barrier: before raising a flag, and after seeing one. Local."""
        self._window.Sync()

    def free(self) -> None:
        """Give the memory back, unless a tensor of any rank is still on it: then it stays. Collective."""
        if self._window is None:
            return
        stays = self._node.allreduce(self._is_in_use(), MPI.LOR)
        if self._pinned:
            page_unlock(torch.frombuffer(self._segments[self._rank], dtype=torch.uint8))
        self._segments = []
        if not stays:
            self._window.Unlock_all()
            self._window.Free()
        self._window = None

    def _is_in_use(self) -> bool:
        """Whether there are tensors on it: each refers to the segment that it is on."""
        pairs = zip(self._count_references(), self._references, strict=True)
        return any(now > at_first for now, at_first in pairs)

    def _count_references(self) -> list[int]:
        return [sys.getrefcount(segment) for segment in self._segments]

    def _buffer(self, rank: int) -> Any:
        if self._window is None:
            raise CommunicatorFreedError("a shared window must not be used after free()")
        return self._segments[rank]


def page_lock(memory: torch.Tensor) -> bool:
    """Register host memory that CUDA did not allocate with it; whether it agreed. Local."""
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    verdict = int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    if verdict:
        _LOG.warning("CUDA does not page-lock %d bytes (error %d); copies are slower", memory.nbytes, verdict)
    return verdict == 0


def page_unlock(memory: torch.Tensor) -> None:
    """Undo :func:`page_lock`, before the memory goes. Local."""
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    runtime.cudaHostUnregister(memory.data_ptr())


class FlagBoard:
    """A row of int64 flags per rank, written by its rank and read by all. Starts at zero.

    Parameters
    ----------
    window
        Where the rows live, at the same offset in each segment.
    offset
        Of the row, in bytes; a multiple of 64.
    flags
        Flags in a row.
    """

    def __init__(self, window: SharedWindow, node: Communicator, offset: int, flags: int) -> None:
        self._window = window
        self._stride = CACHE_LINE_BYTES // 8
        self._rows = [window.flags(rank, offset, flags * self._stride) for rank in range(node.size)]
        self._own = self._rows[node.rank]

    @staticmethod
    def nbytes(flags: int) -> int:
        """Space that a row takes in a segment."""
        return flags * CACHE_LINE_BYTES

    def raise_flag(self, flag: int, value: int) -> None:
        """Publish ``value``, after everything this rank has written before. Local."""
        self._window.sync()
        self._own[flag * self._stride] = value
        self._window.sync()

    def all_reached(self, flag: int, value: int, ranks: range | None = None) -> bool:
        """Whether the flag of all ``ranks`` is at least ``value``; what they wrote is visible then. Local."""
        at = flag * self._stride
        rows = self._rows if ranks is None else self._rows[ranks.start : ranks.stop]
        for row in rows:
            if row[at] < value:
                return False
        self._window.sync()
        return True

    def read(self, rank: int, flag: int) -> int:
        """The flag of ``rank``. Local."""
        return int(self._rows[rank][flag * self._stride])

    def free(self) -> None:
        """Let go of the window's memory. Local."""
        self._rows = []
        self._own = memoryview(b"")


def has_space(comm: Communicator, nbytes: int) -> bool:
    """Whether every node has room for windows of ``nbytes`` on each of its ranks; one answer. Collective."""
    needed = torch.tensor([nbytes])
    comm.node.Allreduce(MPI.IN_PLACE, needed)
    verdict = torch.tensor([int(_free_bytes() >= int(needed) + _RESERVE_BYTES)])
    comm.Allreduce(MPI.IN_PLACE, verdict, MPI.MIN)
    return bool(verdict)


def _free_bytes() -> int:
    """Free space where MPI puts shared windows; as good as endless when that is not a file system."""
    folder = os.environ.get("OMPI_MCA_osc_sm_backing_directory", "/dev/shm")
    try:
        status = os.statvfs(folder)
    except OSError:
        return 1 << 62
    return status.f_bavail * status.f_frsize
