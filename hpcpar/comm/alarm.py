"""The alarm: a rank that fails tells the others at once why, wherever they wait.

An exception that nobody catches ends the job (:mod:`~hpcpar.comm.watchdog`). One that the program does catch,
or a slow launcher, would leave the other ranks waiting for messages that nobody sends any more. So a rank
that fails inside an operation of many ranks sounds the alarm: one short message to every other rank. Ranks
that are armed look for it in every wait, now and then, and raise :class:`RankFailedError` with the cause::

    rank 1   stage raises ValueError -- sound --> the same error goes on
    rank 0   waits ... hears ------- RankFailedError: rank 1 of 2 failed ... ValueError ...
    rank 2   waits ... hears ------- RankFailedError

Ranks may belong to several groups (a pipeline, and the replicas of a stage). Who hears the alarm in one
group sounds it in the others, so that it reaches everybody.

Neighbours whose processes have died are noticed in the same looks. An alarm that has been raised or heard
stays so: what was under way cannot be completed, and later steps raise the same error at once.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import numpy as np

from hpcpar.comm.mpi import MPI
from hpcpar.comm.node_processes import NodeProcesses
from hpcpar.comm.peers import acknowledged_deaths
from hpcpar.comm.progress import ENGINE, DescribedPatience, wait_until
from hpcpar.errors import RankFailedError

if TYPE_CHECKING:
    from mpi4py import MPI as MPITypes

    from hpcpar.comm.communicator import Communicator

__all__ = ["Alarm", "wait_for_peers"]

_LOOK_S = 0.02
_LOOK_FOR_DEATHS_S = 0.5
_MOST_BYTES = 3000


class Alarm:
    """Tells the ranks of some communicators that one of them has failed. Collective to make and to free.

    Parameters
    ----------
    comms
        The groups that this rank belongs to; ranks of each make their alarms together and in one order.
    deaths
        Whether the death of a neighbour's process raises the alarm, too.

    Attributes
    ----------
    error : RankFailedError or None
        What was heard.
    """

    def __init__(self, comms: Sequence[Communicator], *, deaths: bool = True) -> None:
        groups = [comm for comm in comms if comm.size > 1]
        self._channels: list[MPITypes.Intracomm] = [comm.mpi.Dup() for comm in groups]
        self._deaths = deaths
        self._processes = [NodeProcesses(comm) for comm in groups] if deaths else []
        self._sent: list[tuple[MPITypes.Request, np.ndarray]] = []
        self._next_look = self._next_death_look = 0.0
        self.error: RankFailedError | None = None
        self._sounded = False

    @property
    def is_quiet(self) -> bool:
        """Whether nobody has failed, as far as is known here. Local."""
        return self.error is None and not self._sounded

    @contextmanager
    def armed(self) -> Iterator[None]:
        """Raise what is heard, in every wait inside the block. Local.

        Raises
        ------
        RankFailedError
            When another rank failed, now or before.
        """
        self._look()
        ENGINE.add(self)
        try:
            yield
        finally:
            ENGINE.discard(self)

    def sound(self, text: str) -> None:
        """Tell all ranks of all groups; the second time, and after hearing one, nothing. Local."""
        if not self.is_quiet:
            return
        self._sounded = True
        for channel in self._channels:
            self._tell(channel, (channel.rank, channel.size), _shortened(text))

    def progress(self) -> None:
        """Look for an alarm, unless that was done a moment ago. Called from waits. Local."""
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + _LOOK_S
            self._look()

    needed_by_others = False

    def free(self) -> None:
        """Give the communicators back, unless unheard words may be left in them. Collective."""
        for channel in self._channels:
            if self.is_quiet:
                channel.Free()
        self._channels, self._processes = [], []

    def _look(self) -> None:
        if self.error is not None:
            raise self.error
        for place, channel in enumerate(self._channels):
            status = MPI.Status()
            try:
                message = channel.Improbe(MPI.ANY_SOURCE, 0, status)
            except MPI.Exception as error:  # with fault tolerance, MPI tells of deaths
                self._hear_of_deaths(channel, acknowledged_deaths(channel, error))
                continue
            if message is not None:
                word = bytearray(status.Get_count(MPI.BYTE))
                message.Recv([word, MPI.BYTE])
                self._hear(place, status.source, *pickle.loads(word))
        now = time.monotonic()
        if now >= self._next_death_look:
            self._next_death_look = now + _LOOK_FOR_DEATHS_S
            self._look_for_deaths()

    def _hear(self, place: int, source: int, origin: tuple[int, int], text: str) -> None:
        for other, channel in enumerate(self._channels):
            if other != place:
                self._tell(channel, origin, text)
        rank, size = origin
        self.error = RankFailedError([rank], f"rank {rank} of {size} failed: {text}")
        raise self.error

    def _look_for_deaths(self) -> None:
        for channel, processes in zip(self._channels, self._processes, strict=False):
            self._hear_of_deaths(channel, processes.dead())

    def _hear_of_deaths(self, channel: MPITypes.Intracomm, dead: list[int]) -> None:
        if dead and self._deaths:
            where = f"rank {channel.rank} of {channel.size}"
            self.error = RankFailedError(dead, f"{where} works with ranks {dead}, whose processes died")
            raise self.error

    def _tell(self, channel: MPITypes.Intracomm, origin: tuple[int, int], text: str) -> None:
        word = np.frombuffer(pickle.dumps((origin, text)), dtype=np.uint8)
        for rank in range(channel.size):
            if rank != channel.rank:
                with suppress(MPI.Exception):  # who is dead need not know
                    self._sent.append((channel.Isend([word, MPI.BYTE], rank, 0), word))


def _shortened(text: str) -> str:
    """What every MPI sends at once: who fails may never call MPI again, to complete a longer message."""
    words = text.encode(errors="replace")
    if len(words) <= _MOST_BYTES:
        return text
    first, last = words[: _MOST_BYTES // 4], words[-_MOST_BYTES // 2 :]
    return f"{first.decode(errors='ignore')}\n[...]\n{last.decode(errors='ignore')}"


def wait_for_peers(
    done: Callable[[], bool], comm: Communicator, describe: Callable[[], tuple[str, Sequence[int]]]
) -> None:
    """Wait until ``done``, for messages that the program has under way itself. Point-to-point.

    Parameters
    ----------
    done
        Polled; it must not wait.
    comm
        The ranks that are waited for.
    describe
        Called at the deadline: what is waited for, and the ranks that owe it.

    Raises
    ------
    StalledError
        At the deadline.
    RankFailedError
        When an armed alarm is heard.
    """
    wait_until(done, DescribedPatience(describe, comm._where))
