"""Roll call: who has arrived at the collective that I am waiting in?

MPI does not say which rank is missing from a collective. We ask ourselves, and only when a wait is slow, so
that a fast job pays nothing: every communicator counts its collectives, and a rank that has waited for half
its time limit tells all others the number of the one it is in. Whoever hears that while waiting answers
with its own number at once. At the deadline the missing ranks are those whose last word is of an earlier
collective, or who never spoke: they compute, sleep, are stopped or dead.

The words are single eager messages on the communicator's control channel, so nobody waits to send one. Some
are never listened to. MPI may give the context of a freed communicator to the next one, words in it included,
so each word carries the number of its roll call beside that of the collective.
"""

from __future__ import annotations

import os
from array import array
from typing import TYPE_CHECKING

from hpcpar.comm.mpi import MPI

if TYPE_CHECKING:
    from mpi4py import MPI as MPITypes

__all__ = ["RollCall", "ROLL_CALL_TAG"]

ROLL_CALL_TAG = 0


class RollCall:
    """Signs of life among the ranks of one communicator.

    Parameters
    ----------
    control
        A communicator of our own with the same ranks. Collective.
    """

    def __init__(self, control: MPITypes.Comm) -> None:
        self._control = control
        self._heard = [-1] * control.size
        self._told = -1
        self._sent: list[tuple[MPITypes.Request, array[int]]] = []
        identity = array("q", os.urandom(8))
        control.Bcast([identity, MPI.INT64_T], 0)
        self._identity = identity[0]

    def tick(self, number: int, waited_s: float, timeout_s: float) -> None:
        """Exchange words while waiting, having entered collective ``number``. Point-to-point, never waits."""
        if (self._listen() or waited_s >= timeout_s / 2) and self._told < number:
            self._tell(number)

    def missing(self, number: int) -> list[int]:
        """Ranks that have not been heard to reach collective ``number``. Local."""
        self._listen()
        return [r for r, last in enumerate(self._heard) if last < number and r != self._control.rank]

    def _listen(self) -> bool:
        heard = False
        status = MPI.Status()
        word = array("q", [0, 0])
        # A matched receive: two threads that wait must not both go for the same word.
        while (message := self._control.Improbe(MPI.ANY_SOURCE, ROLL_CALL_TAG, status)) is not None:
            message.Recv([word, MPI.INT64_T])
            identity, number = word
            if identity == self._identity:
                self._heard[status.source] = max(self._heard[status.source], number)
                heard = True
        return heard

    def _tell(self, number: int) -> None:
        self._told = number
        self._sent = [(request, word) for request, word in self._sent if not request.Test()]
        word = array("q", [self._identity, number])
        for rank in range(self._control.size):
            if rank != self._control.rank:
                request = self._control.Isend([word, MPI.INT64_T], rank, ROLL_CALL_TAG)
                self._sent.append((request, word))
