"""Peers: which ranks have died, and how those that live leave together.

Programs that outlive the death of a rank need two things that MPI's collectives do not give: to know who is
gone, and to meet the others at the end without those. The first is asked of the operating system
(:class:`~hpcpar.comm.node_processes.NodeProcesses`) and learned from errors of MPI, where MPI survives a
death at all. The second is a word from each rank to each other one (:class:`Farewell`)::

    rank 0   farewell to 1, 2    has heard 1, knows that 2 is dead    leaves
    rank 1   farewell to 0, 2    has heard 0, knows that 2 is dead    leaves
    rank 2   dies
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from hpcpar.comm.mpi import MPI
from hpcpar.comm.node_processes import NodeProcesses

if TYPE_CHECKING:
    from mpi4py import MPI as MPITypes

    from hpcpar.comm.communicator import Communicator

__all__ = ["Farewell", "Peers", "acknowledged_deaths"]

logger = logging.getLogger(__name__)

_LOOK_S = 0.3


class Peers:
    """Which ranks of a communicator have died, as far as this rank can tell. Collective to make.

    Parameters
    ----------
    comm
        The ranks.

    Attributes
    ----------
    known_dead : frozenset of int
        Those that were found so far.
    """

    def __init__(self, comm: Communicator) -> None:
        self.known_dead: frozenset[int] = frozenset()
        self._where = comm._where
        self._processes = NodeProcesses(comm)
        self._next_look_s = 0.0
        self._lock = threading.Lock()

    def dead(self) -> frozenset[int]:
        """Those known, after looking for more a few times per second. Local, any thread."""
        now = time.monotonic()
        if now >= self._next_look_s:
            self._next_look_s = now + _LOOK_S
            self._add(self._processes.dead())
        return self.known_dead

    def report(self, rank: int, error: MPITypes.Exception) -> None:
        """MPI cannot reach a rank any more. Local, any thread."""
        if rank not in self.known_dead:
            logger.warning("%s takes rank %d for dead: %s", self._where, rank, error)
            self._add([rank])

    def acknowledge(self, mpi: MPITypes.Intracomm, error: MPITypes.Exception) -> None:
        """Have operations on any source go on after a death (MPI 5, fault tolerance). Local.

        Parameters
        ----------
        mpi
            Of the failed operation, with the same ranks.
        error
            Raised again when it tells of no death.
        """
        self._add(acknowledged_deaths(mpi, error))

    def _add(self, ranks: list[int]) -> None:
        if ranks and not self.known_dead.issuperset(ranks):
            with self._lock:
                self.known_dead = self.known_dead.union(ranks)


def acknowledged_deaths(mpi: MPITypes.Intracomm, error: MPITypes.Exception) -> list[int]:
    """The ranks whose death made an operation on any source fail; the next one goes on without them. Local.

    ``error`` is raised again when it tells of no death.
    """
    if error.Get_error_class() not in (MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING):
        raise error
    mpi.Ack_failed()
    failed, everybody = mpi.Get_failed(), mpi.Get_group()
    dead = MPI.Group.Translate_ranks(failed, list(range(failed.size)), everybody)
    failed.Free()
    everybody.Free()
    return list(dead)


class Farewell:
    """A rank's last word to all others, and theirs to it. Point-to-point with all that live.

    Parameters
    ----------
    mpi
        The ranks.
    peers
        Who is not waited for.
    tag
        That nothing else uses.
    """

    def __init__(self, mpi: MPITypes.Intracomm, peers: Peers, tag: int) -> None:
        self._peers = peers
        self._sends: list[MPITypes.Request] = []
        self._expected: dict[int, MPITypes.Request] = {}
        for rank in range(mpi.size):
            if rank == mpi.rank or rank in peers.dead():
                continue
            try:
                self._expected[rank] = mpi.Irecv([bytearray(), MPI.BYTE], rank, tag)
                self._sends.append(mpi.Isend([bytearray(), MPI.BYTE], rank, tag))
            except MPI.Exception as error:
                peers.report(rank, error)

    def is_over(self) -> bool:
        """Whether all that live have said it. Local, never waits."""
        dead = self._peers.dead()
        for rank, word in list(self._expected.items()):
            try:
                heard = rank in dead or word.Test()
            except MPI.Exception as error:
                self._peers.report(rank, error)
                heard = True
            if heard:
                del self._expected[rank]
        return not self._expected

    @property
    def missing(self) -> list[int]:
        """Ranks that have not said it. Local."""
        return sorted(self._expected)
