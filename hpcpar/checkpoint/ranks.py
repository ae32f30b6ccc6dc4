"""How the ranks of a save talk: over their communicator, from a thread beside it, or through files.

A save needs four small collectives of objects, ``allgather``, ``gather``, ``scatter`` and ``bcast``. A
:class:`~hpcpar.comm.Communicator` has them. A save in the background must not disturb the program's own
messages: it has a duplicate of the communicator, and polls with long pauses. Where MPI does not allow
threads, the ranks leave each other files in the folder that they write to anyway.
"""

from __future__ import annotations

import json
import pickle
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from hpcpar.comm import MPI, Communicator, world
from hpcpar.comm.mpi import check_launcher
from hpcpar.comm.progress import timeout_from_environment
from hpcpar.errors import CheckpointError, LauncherError, StalledError

__all__ = [
    "Alone",
    "BackgroundRanks",
    "FolderRanks",
    "Ranks",
    "described",
    "raise_first",
    "ranks_of",
    "together",
]

T = TypeVar("T")

_PAUSE_S = 0.001
_LONGEST_PAUSE_S = 0.05


class Ranks(Protocol):
    """What is asked of a communicator here. All methods are collective."""

    @property
    def rank(self) -> int:
        """Number of this rank."""

    @property
    def size(self) -> int:
        """How many there are."""

    def allgather(self, sendobj: Any) -> list[Any]:
        """The objects of all ranks."""

    def gather(self, sendobj: Any, root: int = 0) -> list[Any] | None:
        """The same on ``root``."""

    def scatter(self, sendobj: Sequence[Any] | None, root: int = 0) -> Any:
        """The object of ``root`` for this rank."""

    def bcast(self, obj: Any, root: int = 0) -> Any:
        """The object of ``root``."""


def ranks_of(comm: Communicator | None) -> Communicator | None:
    """Those that save together: the given ones, else the world, ``None`` for a process that is alone.

    Local where one is given or the world is known already. A process that belongs to no job is left without
    MPI.
    """
    if comm is not None:
        return comm
    library = sys.modules.get("mpi4py.MPI")
    if library is None or not library.Is_initialized():
        try:
            check_launcher(1)
        except LauncherError:  # the launcher has started others
            return world()
        return None
    return world()


def together(ranks: Ranks, action: Callable[[], T]) -> T:
    """Do something on every rank that may fail on some; then it fails on all, alike. Collective.

    Raises
    ------
    CheckpointError
        The first rank's problem, on every rank.
    """
    result: list[T] = []
    problem, cause = None, None
    try:
        result.append(action())
    except Exception as error:
        problem, cause = described(error), error
    raise_first(ranks.allgather(problem), cause)
    return result[0]


def described(error: Exception) -> str:
    """An error in one line for all ranks. Local."""
    if isinstance(error, CheckpointError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'} must be readable and writable, got {error.strerror or error}"
    return f"a checkpoint must be made without errors, got {type(error).__name__}: {error}"


def raise_first(problems: Sequence[str | None], cause: Exception | None = None) -> None:
    """Raise the problem of the first rank that has one. Local.

    Raises
    ------
    CheckpointError
        Names the rank, when there are several.
    """
    found = next(((rank, text) for rank, text in enumerate(problems) if text is not None), None)
    if found is not None:
        where = f" (rank {found[0]} of {len(problems)})" if len(problems) > 1 else ""
        raise CheckpointError(f"{found[1]}{where}") from cause


class Alone:
    """One process without a communicator."""

    rank = 0
    size = 1

    def free(self) -> None:
        """Nothing to give back. Local."""

    def allgather(self, sendobj: Any) -> list[Any]:
        """Just this one."""
        return [sendobj]

    def gather(self, sendobj: Any, root: int = 0) -> list[Any] | None:
        """Just this one."""
        return [sendobj]

    def scatter(self, sendobj: Sequence[Any] | None, root: int = 0) -> Any:
        """The only one."""
        return sendobj[0] if sendobj else None

    def bcast(self, obj: Any, root: int = 0) -> Any:
        """The same."""
        return obj


class BackgroundRanks:
    """A duplicate of a communicator, for a thread beside the program. Collective to make and to free.

    Parameters
    ----------
    mpi
        Of the program. All ranks have met here a moment ago, so none is missing.
    """

    def __init__(self, mpi: MPI.Intracomm) -> None:
        self._mpi = mpi.Dup()
        self.rank: int = self._mpi.Get_rank()
        self.size: int = self._mpi.Get_size()

    def free(self) -> None:
        """Give the duplicate back. Collective."""
        self._mpi.Free()

    def allgather(self, sendobj: Any) -> list[Any]:
        """As in :class:`Ranks`."""
        data = _pack(sendobj)
        counts = np.empty(self.size, dtype=np.int64)
        self._finish(self._mpi.Iallgather(np.array([data.size]), counts))
        everything = np.empty(int(counts.sum()), dtype=np.uint8)
        self._finish(self._mpi.Iallgatherv(data, [everything, counts.tolist()]))
        return _unpack_all(everything, counts)

    def gather(self, sendobj: Any, root: int = 0) -> list[Any] | None:
        """As in :class:`Ranks`."""
        data = _pack(sendobj)
        counts = np.zeros(self.size, dtype=np.int64)
        self._finish(self._mpi.Igather(np.array([data.size]), counts, root))
        everything = np.empty(int(counts.sum()), dtype=np.uint8)
        self._finish(self._mpi.Igatherv(data, [everything, counts.tolist()], root))
        return _unpack_all(everything, counts) if self.rank == root else None

    def scatter(self, sendobj: Sequence[Any] | None, root: int = 0) -> Any:
        """As in :class:`Ranks`."""
        parts = [_pack(obj) for obj in sendobj or ()]
        counts = np.array([part.size for part in parts] or [0] * self.size, dtype=np.int64)
        count = np.empty(1, dtype=np.int64)
        self._finish(self._mpi.Iscatter(counts, count, root))
        data = np.empty(int(count[0]), dtype=np.uint8)
        everything = np.concatenate(parts) if parts else np.empty(0, dtype=np.uint8)
        self._finish(self._mpi.Iscatterv([everything, counts.tolist()], data, root))
        return pickle.loads(data.tobytes())

    def bcast(self, obj: Any, root: int = 0) -> Any:
        """As in :class:`Ranks`."""
        data = _pack(obj) if self.rank == root else np.empty(0, dtype=np.uint8)
        count = np.array([data.size])
        self._finish(self._mpi.Ibcast(count, root))
        if self.rank != root:
            data = np.empty(int(count[0]), dtype=np.uint8)
        self._finish(self._mpi.Ibcast(data, root))
        return pickle.loads(data.tobytes())

    def _finish(self, request: MPI.Request) -> None:
        """Not by MPI's own wait, which would take the processor from the training."""
        _poll(request.Test, "a save in the background")


class FolderRanks:
    """Ranks that leave each other files in a folder that all of them see. Local to make.

    Parameters
    ----------
    folder
        Of the checkpoint.
    generation
        Of the save, by which its files are named and in the end removed.
    rank, size
        As in a communicator.
    """

    def __init__(self, folder: Path, generation: str, rank: int, size: int) -> None:
        self._folder, self._generation = folder, generation
        self.rank, self.size = rank, size
        self._round = 0

    def allgather(self, sendobj: Any) -> list[Any]:
        """As in :class:`Ranks`, for objects that JSON knows."""
        self._round += 1
        self._leave(sendobj)
        return [self._take(rank) for rank in range(self.size)]

    def gather(self, sendobj: Any, root: int = 0) -> list[Any] | None:
        """As in :class:`Ranks`."""
        self._round += 1
        self._leave(sendobj)
        return [self._take(rank) for rank in range(self.size)] if self.rank == root else None

    def scatter(self, sendobj: Sequence[Any] | None, root: int = 0) -> Any:
        """As in :class:`Ranks`."""
        return self.bcast(sendobj, root)[self.rank]

    def bcast(self, obj: Any, root: int = 0) -> Any:
        """As in :class:`Ranks`."""
        self._round += 1
        if self.rank == root:
            self._leave(obj)
        return self._take(root)

    def free(self) -> None:
        """Remove this rank's files, except the last, which others may not have read yet. Local."""
        for number in range(1, self._round - 1):
            self._path(number, self.rank).unlink(missing_ok=True)

    def _leave(self, obj: Any) -> None:
        path = self._path(self._round, self.rank)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(obj), encoding="ascii")
        temporary.replace(path)

    def _take(self, rank: int) -> Any:
        path = self._path(self._round, rank)
        _poll(path.exists, f"a save in the background, for {path}")
        return json.loads(path.read_text(encoding="ascii"))

    def _path(self, number: int, rank: int) -> Path:
        return self._folder / f"{self._generation}-talk{number}-rank{rank}.json"


def _poll(done: Callable[[], bool], operation: str) -> None:
    """Wait with pauses that grow."""
    start, pause_s = time.monotonic(), _PAUSE_S
    while not done():
        time.sleep(pause_s)
        pause_s = min(1.2 * pause_s, _LONGEST_PAUSE_S)
        waited_s = time.monotonic() - start
        if waited_s > timeout_from_environment():
            raise StalledError(
                operation,
                (),
                f"{operation} must end within HPCPAR_TIMEOUT_S, got no end after {waited_s:.1f} s",
            )


def _pack(obj: Any) -> np.ndarray[Any, Any]:
    return np.frombuffer(bytearray(pickle.dumps(obj)), dtype=np.uint8)


def _unpack_all(everything: np.ndarray[Any, Any], counts: np.ndarray[Any, Any]) -> list[Any]:
    return [pickle.loads(part.tobytes()) for part in np.split(everything, np.cumsum(counts)[:-1])]
