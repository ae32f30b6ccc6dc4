"""How an :class:`~hpcpar.data.H5Dataset` reads: its options, checked once and compared between ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import h5py

from hpcpar.comm import threads_allowed
from hpcpar.data.h5_files import Layout
from hpcpar.data.shares import whole_number

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["ReadOptions"]

_WINDOW_BYTES = 64 << 20
_WINDOWS, _WINDOW_BLOCKS = 32, 4


@dataclass(frozen=True)
class ReadOptions:
    """See :class:`~hpcpar.data.H5Dataset`, whose parameters they are."""

    shuffle: bool
    seed: int
    block_size: int | None
    window_blocks: int | None
    batch_size: int | None
    buffers: int
    cache: str | None
    driver: str | None

    def check(self, comm: Communicator | None) -> None:
        """Refuse what makes no sense. Local.

        Raises
        ------
        ValueError
            Naming the option.
        """
        for name in ("block_size", "window_blocks", "batch_size"):
            value = getattr(self, name)
            if value is not None:
                whole_number(name, value, 1)
        whole_number("seed", self.seed)
        whole_number("buffers", self.buffers, 2)
        if self.cache not in (None, "node"):
            raise ValueError(f"cache must be None or 'node', got {self.cache!r}")
        if self.driver is not None:
            self._check_driver(comm)

    def lines(self) -> list[str]:
        """What must be the same on all ranks, to be compared. Local."""
        return [
            f"{name}={getattr(self, name)!r}"
            for name in ("shuffle", "seed", "block_size", "window_blocks", "cache", "driver")
        ]

    def window(self, layout: Layout, blocks: int) -> int:
        """Blocks in a window of a layout that is cut into ``blocks``. Local.

        Parts of a window that belong to different ranks make both read its blocks. With a 32nd of the data in
        each, that is little on a few ranks; large data has windows far smaller than that.
        """
        if self.window_blocks is not None:
            return self.window_blocks
        block_bytes = layout.samples * layout.sample_bytes // max(blocks, 1)
        most = max(_WINDOW_BYTES // max(block_bytes, 1), 1)
        return min(max(blocks // _WINDOWS, _WINDOW_BLOCKS), most)

    def _check_driver(self, comm: Communicator | None) -> None:
        if self.driver != "mpio":
            raise ValueError(f"driver must be None or 'mpio', got {self.driver!r}")
        if self.cache is not None:
            raise ValueError("cache and driver must not be used together, got both")
        if not h5py.get_config().mpi:
            raise ValueError(
                "driver='mpio' must have an h5py that was built with parallel HDF5, got one without. Leave "
                "it out: ranks read well without it; or build h5py with HDF5_MPI=ON"
            )
        if comm is None:
            raise ValueError("driver='mpio' must have the communicator of the ranks that read, got None")
        if not threads_allowed():
            raise ValueError("driver='mpio' must have MPI_THREAD_MULTIPLE, got an MPI library without it")
