"""How an :class:`~hpcpar.data.H5Dataset` reads: its options, checked once and compared between ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import h5py

from hpcpar.comm import threads_allowed
from hpcpar.data.h5_files import Layout
from hpcpar.data.shares import whole_number

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["ReadOptions"]

_WINDOW_BYTES = 64 << 20
_WINDOWS, _LEAST_BLOCKS, _MOST_BLOCKS = 128, 4, 16


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

    def checked(self, comm: Communicator | None) -> ReadOptions:
        """The same with whole numbers of any type as int; refuse what makes no sense. Local.

        Raises
        ------
        ValueError
            Naming the option.
        """
        numbers: dict[str, Any] = {
            "seed": whole_number("seed", self.seed),
            "buffers": whole_number("buffers", self.buffers, 2),
        }
        for name in ("block_size", "window_blocks", "batch_size"):
            value = getattr(self, name)
            if value is not None:
                numbers[name] = whole_number(name, value, 1)
        if self.cache not in (None, "node"):
            raise ValueError(f"cache must be None or 'node', got {self.cache!r}")
        if self.driver is not None:
            self._check_driver(comm)
        return replace(self, **numbers)

    def lines(self) -> list[str]:
        """What must be the same on all ranks, to be compared. Local."""
        return [
            f"{name}={getattr(self, name)!r}"
            for name in ("shuffle", "seed", "block_size", "window_blocks", "cache", "driver")
        ]

    def window(self, layout: Layout, blocks: int) -> int:
        """Blocks in a window of a layout that is cut into ``blocks``. Local.

        Parts of a window that belong to different ranks make both read its blocks: see
        :mod:`hpcpar.data.amplification`. Hence few blocks, as many as it takes to mix.
        """
        if self.window_blocks is not None:
            return self.window_blocks
        block_bytes = layout.samples * layout.sample_bytes // max(blocks, 1)
        most = max(_WINDOW_BYTES // max(block_bytes, 1), 1)
        return min(max(blocks // _WINDOWS, _LEAST_BLOCKS), _MOST_BLOCKS, most)

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
