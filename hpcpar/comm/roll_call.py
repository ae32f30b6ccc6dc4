"""Roll call: who has arrived at the collective that I am waiting in?

MPI does not say which rank is missing from a collective. We ask ourselves, and only when a wait is slow, so
that a fast job pays nothing: every communicator counts its collectives, and a rank that has waited for half
its time limit tells all others the number of the one it is in. Whoever hears that while waiting answers
with its own number at once. At the deadline the missing ranks are those whose last word is of an earlier
collective, or who never spoke: they compute, sleep, are stopped or dead.

The words are single eager messages on the communicator's control channel, so nobody waits to send one. Nobody
need listen to them either, but ``close`` must take in what is left before the communicator is freed: MPI may
give its context to the next communicator, and then a stray word ends up in some receive there.
"""

from __future__ import annotations

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
        A communicator of our own with the same ranks.
    """

    def __init__(self, control: MPITypes.Comm) -> None:
        self._control = control
        self._heard = [-1] * control.size
        self._told = -1
        self._sent: list[tuple[MPITypes.Request, array[int]]] = []
        self._words_sent = 0  # to each other rank
        self._words_received = [0] * control.size

    def tick(self, number: int, waited_s: float, timeout_s: float) -> None:
        """Exchange words while waiting, having entered collective ``number``. Point-to-point, never waits."""
        if (self._listen() or waited_s >= timeout_s / 2) and self._told < number:
            self._tell(number)

    def missing(self, number: int) -> list[int]:
        """Ranks that have not been heard to reach collective ``number``. Local."""
        self._listen()
        return [r for r, last in enumerate(self._heard) if last < number and r != self._control.rank]

    def close(self) -> None:
        """Receive every word that was ever sent. Collective; nobody may tick after this.

        For ranks that have just met: it has no deadline.
        """
        sent = array("q", [0] * self._control.size)
        self._control.Allgather([array("q", [self._words_sent]), MPI.INT64_T], [sent, MPI.INT64_T])
        word = array("q", [0])
        for source, count in enumerate(sent):
            while source != self._control.rank and self._words_received[source] < count:
                self._control.Recv([word, MPI.INT64_T], source, ROLL_CALL_TAG)
                self._take(source, word[0])
        MPI.Request.Waitall([request for request, _ in self._sent])

    def _listen(self) -> bool:
        heard = False
        status = MPI.Status()
        word = array("q", [0])
        # A matched receive: two threads that wait must not both go for the same word.
        while (message := self._control.Improbe(MPI.ANY_SOURCE, ROLL_CALL_TAG, status)) is not None:
            message.Recv([word, MPI.INT64_T])
            self._take(status.source, word[0])
            heard = True
        return heard

    def _take(self, source: int, number: int) -> None:
        self._words_received[source] += 1
        self._heard[source] = max(self._heard[source], number)

    def _tell(self, number: int) -> None:
        self._told = number
        self._words_sent += 1
        self._sent = [(request, word) for request, word in self._sent if not request.Test()]
        word = array("q", [number])
        for rank in range(self._control.size):
            if rank != self._control.rank:
                request = self._control.Isend([word, MPI.INT64_T], rank, ROLL_CALL_TAG)
                self._sent.append((request, word))
