"""How the ranks of a save talk: over their communicator, from a thread beside it, or through files.

A save needs four small collectives of objects, ``allgather``, ``gather``, ``scatter`` and ``bcast``. A
:class:`~hpcpar.comm.Communicator` has them, with a deadline. It is good for what takes a moment; but to write
takes as long as it takes, and longer on one rank than on another. So the save itself has a duplicate of the
communicator, on which ranks wait for each other without end, and say so from time to time. In the background
it polls with long pauses. Where MPI does not allow threads, the ranks leave each other files in the folder
that they write to anyway.
"""

from __future__ import annotations

import json
import logging
import pickle
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from hpcpar.comm import MPI, Communicator, world
from hpcpar.comm.mpi import check_launcher
from hpcpar.comm.progress import ENGINE, timeout_from_environment
from hpcpar.errors import CheckpointError, LauncherError

__all__ = [
    "Alone",
    "DuplicateRanks",
    "FolderRanks",
    "Ranks",
    "attempt",
    "attempt_and_tell",
    "described",
    "interrupts_as_they_are",
    "raise_first",
    "ranks_of",
    "together",
]

T = TypeVar("T")

_LOG = logging.getLogger(__name__)
_PAUSES_S = (0.001, 0.05)  # the first, and the longest
_SHORT_PAUSES_S = (20e-6, 0.001)
_GROWTH = 1.2


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
        The first rank's problem, on every rank. One that was interrupted, as by Ctrl-C, raises that.
    """
    with interrupts_as_they_are():
        return attempt(ranks, action)


def attempt(ranks: Ranks, action: Callable[[], T]) -> T:
    """As :func:`together`, but even an interrupt becomes an error, so that ranks can clean up. Collective.

    Raises
    ------
    CheckpointError
        On every rank; an interrupt is its cause, on the rank that had it.
    """
    result, problem, cause = _result_or_problem(action)
    raise_first(ranks.allgather(problem), cause)
    return result[0]


def attempt_and_tell(ranks: Ranks, action: Callable[[], T]) -> list[T]:
    """As :func:`attempt`, for small results: those of all ranks, in the same message. Collective."""
    result, problem, cause = _result_or_problem(action)
    gathered = ranks.allgather((problem, result))
    raise_first([problem for problem, _ in gathered], cause)
    return [result[0] for _, result in gathered]


@contextmanager
def interrupts_as_they_are() -> Iterator[None]:
    """Raise the interrupt that is the cause of a :class:`CheckpointError` in its place. Local."""
    try:
        yield
    except CheckpointError as error:
        cause = error.__cause__
        if cause is not None and not isinstance(cause, Exception):
            raise cause from None
        raise


def _result_or_problem(action: Callable[[], T]) -> tuple[list[T], str | None, BaseException | None]:
    try:
        return [action()], None, None
    except BaseException as error:  # the others must know of a Ctrl-C here, too
        return [], described(error), error


def described(error: BaseException) -> str:
    """An error in one line for all ranks. Local."""
    if isinstance(error, CheckpointError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'} must be readable and writable, got {error.strerror or error}"
    return f"a checkpoint must be made without errors, got {type(error).__name__}: {error}"


def raise_first(problems: Sequence[str | None], cause: BaseException | None = None) -> None:
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


class DuplicateRanks:
    """A duplicate of a communicator, without deadlines. Collective to make and to free.

    Parameters
    ----------
    mpi
        Of the program. All ranks have met here a moment ago, so none is missing.
    beside
        Whether a thread beside the program uses it: then it pauses longer, and leaves alone what the program
        has under way. Otherwise that goes on in each wait, since others may need it to get here.
    """

    def __init__(self, mpi: MPI.Intracomm, *, beside: bool) -> None:
        self._beside = beside
        self._mpi = mpi.Dup()
        self.rank: int = self._mpi.Get_rank()
        self.size: int = self._mpi.Get_size()

    def free(self) -> None:
        """Give the duplicate back. Collective."""
        self._mpi.Free()

    def allgather(self, sendobj: Any) -> list[Any]:
        """As in :class:`Ranks`. Local work comes before it, of any length."""
        self._meet()
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

    def _meet(self) -> None:
        """Tell rank 0 that this rank is here; that one waits for all, and can say who is missing."""
        token = np.zeros(max(1, self.size - 1), dtype=np.uint8)
        if self.rank:
            self._finish(self._mpi.Isend(token[:1], 0))
            return
        waiting = {rank: self._mpi.Irecv(token[rank - 1 : rank], rank) for rank in range(1, self.size)}

        def all_are_here() -> bool:
            for rank in [rank for rank, request in waiting.items() if request.Test()]:
                del waiting[rank]
            return not waiting

        self._poll(all_are_here, lambda: f"{_named(waiting)} of {self.size}")

    def _finish(self, request: MPI.Request) -> None:
        """Not by MPI's own wait, which would take the processor from the training."""
        self._poll(request.Test, lambda: "rank 0, or those that it waits for")

    def _poll(self, done: Callable[[], bool], whom: Callable[[], str]) -> None:
        def look() -> bool:
            if not self._beside:
                ENGINE.advance()
            return done()

        _poll(look, whom, _PAUSES_S if self._beside else _SHORT_PAUSES_S)


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
        _poll(path.exists, lambda: f"rank {rank} of {self.size} to leave {path}", _PAUSES_S)
        return json.loads(path.read_text(encoding="ascii"))

    def _path(self, number: int, rank: int) -> Path:
        return self._folder / f"{self._generation}-talk{number}-rank{rank}.json"


def _poll(done: Callable[[], bool], whom: Callable[[], str], pauses_s: tuple[float, float]) -> None:
    """Wait with pauses that grow, without end: the others may have much to write. But not in silence."""
    start, (pause_s, longest_s) = time.monotonic(), pauses_s
    every_s = timeout_from_environment()
    warn_s = every_s
    while not done():
        time.sleep(pause_s)
        pause_s = min(_GROWTH * pause_s, longest_s)
        waited_s = time.monotonic() - start
        if waited_s > warn_s:
            _LOG.warning("a save waits since %.0f s for %s, and goes on waiting", waited_s, whom())
            warn_s += every_s


def _named(ranks: Iterable[int]) -> str:
    numbers = [str(rank) for rank in ranks]
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}"


def _pack(obj: Any) -> np.ndarray[Any, Any]:
    return np.frombuffer(bytearray(pickle.dumps(obj)), dtype=np.uint8)


def _unpack_all(everything: np.ndarray[Any, Any], counts: np.ndarray[Any, Any]) -> list[Any]:
    return [pickle.loads(part.tobytes()) for part in np.split(everything, np.cumsum(counts)[:-1])]
