"""The bulletin: what every rank says about itself, and what one of them decides from it, without waiting.

Each rank has a *row* of numbers that describes its state. It posts the row whenever that has changed. The
*secretary*, a role on rank 0, collects the rows, asks the program's ``decide`` what follows from them, and
sends the *board*, all rows and the decision, to everybody::

    rank 1  row ---->  secretary on rank 0: rows -> decide(rows) -> decision   ---- board ---->  rank 1
    rank 2  row ---->  (a thread of its own)                                   ---- board ---->  rank 2

The secretary touches no tensors and has a thread of its own where MPI allows that, so that nobody is held up
when rank 0 computes. Otherwise it works in every wait of rank 0 and whenever rank 0 looks at its bulletin.

Invariants:

* Rows are states and not events: a newer one says all that an older one said, and one that is skipped is no
  loss. The same holds for boards.
* Nobody waits here, and a rank that has been stopped piles up no messages: both ends number what they have
  received, and stop sending after a few that were not. A new decision may overtake this a little, since the
  ranks that it concerns are waiting for it.
* A changed decision goes out at once, changed rows at most every 20 ms.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hpcpar.comm.mpi import MPI, threads_allowed
from hpcpar.comm.peers import acknowledged_deaths
from hpcpar.comm.progress import ENGINE

if TYPE_CHECKING:
    from mpi4py import MPI as MPITypes

    from hpcpar.comm.communicator import Communicator

__all__ = ["Bulletin", "Decide"]

Numbers = NDArray[np.float64]
Decide = Callable[[Numbers, float], Numbers]
"""From rows, shape (ranks, columns), and a monotonic clock in seconds, the decision. Never waits."""

_ROW, _BOARD = 0, 1  # tags
_TURN_S = 0.001
_IDLE_TURN_S = 0.005
_BUSY_S = 0.05  # after a change another one is likely
_NEWS_S = 0.02
_MOST_UNSEEN = 2
_MOST_UNSEEN_DECISIONS = 4
_MOST_UNHEARD = 4


class Bulletin:
    """Rows of numbers from all ranks, and a decision about them. Collective to make and to close.

    Parameters
    ----------
    comm
        The ranks.
    first_row
        What every rank's row is in the beginning; the same on every rank.
    decide
        Called on rank 0, in the secretary's thread, when rows have changed and every 20 ms.
    first_decision
        The decision in the beginning; later ones have its length.
    threaded
        Whether the secretary has a thread; by default where MPI allows it.

    Attributes
    ----------
    rows : numpy.ndarray
        What was heard last, float64, shape (ranks, columns); of this rank, what it posted last.
    decision : numpy.ndarray
        What was decided last, as far as is known here.
    """

    def __init__(
        self,
        comm: Communicator,
        first_row: Numbers,
        decide: Decide,
        first_decision: Numbers,
        *,
        threaded: bool | None = None,
    ) -> None:
        self._comm = comm
        self._mpi: MPITypes.Intracomm = comm.mpi.Dup()
        self.rows = np.tile(np.asarray(first_row, dtype=np.float64), (comm.size, 1))
        self.decision = np.array(first_decision, dtype=np.float64)
        self._sent: list[tuple[MPITypes.Request, Numbers]] = []
        self._rows_sent = self._rows_heard = self._boards_seen = self._boards_acknowledged = 0
        self._is_posted = True
        self._secretary: _Secretary | None = None
        if comm.rank == 0:
            wanted = threads_allowed() if threaded is None else threaded
            self._secretary = _Secretary(self._mpi, self.rows, decide, self.decision)
            self._secretary.start(threaded=wanted and comm.size > 1)

    def post(self, row: Numbers, *, urgent: bool = False) -> None:
        """Say how this rank is now. Local, never waits.

        Parameters
        ----------
        row
            The new row.
        urgent
            Send it although the secretary has not taken in the ones before. For what this rank then waits
            for, so that it cannot happen often.
        """
        if not np.array_equal(row, self.rows[self._comm.rank]):
            self.rows[self._comm.rank] = row
            self._is_posted = False
        self.progress(urgent=urgent)

    def progress(self, *, urgent: bool = False) -> None:
        """Take in the newest board, and send what is posted. Local, never waits; by one thread."""
        if self._secretary is not None:
            own = None if self._is_posted else self.rows[0].copy()
            self._is_posted = True
            self.rows[1:], self.decision = self._secretary.visit(own)
            return
        self._receive()
        unheard = self._rows_sent - self._rows_heard
        acknowledges = self._boards_seen - self._boards_acknowledged >= _MOST_UNSEEN
        if acknowledges or (not self._is_posted and (urgent or unheard < _MOST_UNHEARD)):
            self._send_row()

    def stop(self) -> None:
        """End the secretary's work, for a job that fails; the others learn nothing more from it. Local."""
        if self._secretary is not None:
            self._secretary.stop()

    def close(self) -> None:
        """Receive what is left, and give the communicator back. Collective.

        For ranks that have agreed to post no more, for instance by a decision.
        """
        self._comm.Barrier()
        self.stop()
        boards = self._secretary.boards_sent if self._secretary is not None else []
        table = self._comm.allgather((self._rows_sent, list(boards)))
        if self._secretary is not None:
            self._secretary.receive_rest([rows for rows, _ in table])
        else:
            while self._boards_seen < table[0][1][self._comm.rank]:
                self._receive()
        MPI.Request.Waitall([request for request, _ in self._sent])
        self._mpi.Free()

    def _receive(self) -> None:
        """The newest of the boards that have arrived."""
        board = np.empty(1 + self.decision.size + self.rows.size)
        newest = None
        with suppress(MPI.Exception):  # of a dead secretary nothing comes; the waits notice
            while (message := self._mpi.Improbe(0, _BOARD)) is not None:
                message.Recv([board, MPI.DOUBLE])
                self._boards_seen += 1
                newest = board
        if newest is None:
            return
        self._rows_heard = int(newest[0])
        self.decision = newest[1 : 1 + self.decision.size].copy()
        rows = newest[1 + self.decision.size :].reshape(self.rows.shape)
        rows[self._comm.rank] = self.rows[self._comm.rank]
        self.rows = rows

    def _send_row(self) -> None:
        self._sent = [(request, words) for request, words in self._sent if not request.Test()]
        words = np.concatenate(([float(self._boards_seen)], self.rows[self._comm.rank]))
        with suppress(MPI.Exception):
            self._sent.append((self._mpi.Isend([words, MPI.DOUBLE], 0, _ROW), words))
        self._rows_sent += 1
        self._boards_acknowledged = self._boards_seen
        self._is_posted = True


class _Secretary:
    """The role on rank 0: receives rows, decides, sends boards. A lock lets threads take turns."""

    def __init__(self, mpi: MPITypes.Intracomm, rows: Numbers, decide: Decide, decision: Numbers) -> None:
        self._mpi, self._decide = mpi, decide
        self._rows, self._decision = rows.copy(), decision.copy()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._sent: list[tuple[MPITypes.Request, Numbers]] = []
        self._rows_received = [0] * mpi.size
        self.boards_sent = [0] * mpi.size
        self._boards_seen = [0] * mpi.size
        self._owes_rows = [False] * mpi.size
        self._owes_decision = [False] * mpi.size
        self._changed = True
        self._next_decision_s = self._next_news_s = self._busy_until_s = 0.0

    needed_by_others = False

    def start(self, *, threaded: bool) -> None:
        """Work from now on, in a thread or in the waits of this process."""
        if threaded:
            self._thread = threading.Thread(target=self._run, name="hpcpar-secretary", daemon=True)
            self._thread.start()
            atexit.register(self.stop)  # a program may end without closing; MPI must not end under the thread
        elif self._mpi.size > 1:
            ENGINE.add(self)

    def stop(self) -> None:
        """Work no more; a second call is fine."""
        self._stopping.set()
        ENGINE.discard(self)
        atexit.unregister(self.stop)
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def visit(self, own_row: Numbers | None) -> tuple[Numbers, Numbers]:
        """Hand in the row of rank 0, let the secretary work; the rows of the others and the decision."""
        with self._lock:
            if own_row is not None:
                self._rows[0] = own_row
                self._note_change(0)
            if not self._stopping.is_set():
                self._turn()
            return self._rows[1:].copy(), self._decision.copy()

    def progress(self) -> None:
        """Work once, unless another thread does; for the progress engine."""
        if self._lock.acquire(blocking=False):
            try:
                self._turn()
            finally:
                self._lock.release()

    def receive_rest(self, rows_sent: list[int]) -> None:
        """Take in what was sent and never received, and see that all boards have left. All have met."""
        for rank in range(1, self._mpi.size):
            while self._rows_received[rank] < rows_sent[rank]:
                self._listen()
        MPI.Request.Waitall([request for request, _ in self._sent])

    def _run(self) -> None:
        while not self._stopping.wait(_TURN_S if time.monotonic() < self._busy_until_s else _IDLE_TURN_S):
            with self._lock:
                self._turn()

    def _turn(self) -> None:
        """Receive, decide, send; never waits."""
        now = time.monotonic()
        self._listen()
        if self._changed or now >= self._next_decision_s:
            self._next_decision_s = now + _NEWS_S
            decision = self._decide(self._rows, now)
            if not np.array_equal(decision, self._decision):
                self._decision = decision
                self._owes_decision = [True] * self._mpi.size
            self._changed = False
        has_news = now >= self._next_news_s
        if has_news:
            self._next_news_s = now + _NEWS_S
        for rank in range(1, self._mpi.size):
            unseen = self.boards_sent[rank] - self._boards_seen[rank]
            if (self._owes_decision[rank] and unseen < _MOST_UNSEEN_DECISIONS) or (
                has_news and self._owes_rows[rank] and unseen < _MOST_UNSEEN
            ):
                self._send_board(rank)

    def _listen(self) -> None:
        status = MPI.Status()
        words = np.empty(1 + self._rows.shape[1])
        while True:
            try:
                message = self._mpi.Improbe(MPI.ANY_SOURCE, _ROW, status)
                if message is None:
                    return
                message.Recv([words, MPI.DOUBLE])
            except MPI.Exception as error:  # with fault tolerance MPI tells of deaths; the waits notice, too
                acknowledged_deaths(self._mpi, error)
                return
            source = status.source
            self._rows_received[source] += 1
            self._boards_seen[source] = int(words[0])
            if not np.array_equal(self._rows[source], words[1:]):
                self._rows[source] = words[1:]
                self._note_change(source)

    def _note_change(self, source: int) -> None:
        """Also for the source itself, which so hears that its row has arrived."""
        self._changed = True
        self._busy_until_s = time.monotonic() + _BUSY_S
        self._owes_rows = [True] * self._mpi.size

    def _send_board(self, rank: int) -> None:
        self._sent = [(request, board) for request, board in self._sent if not request.Test()]
        board = np.concatenate(([float(self._rows_received[rank])], self._decision, self._rows.ravel()))
        with suppress(MPI.Exception):  # who is dead need not know
            self._sent.append((self._mpi.Isend([board, MPI.DOUBLE], rank, _BOARD), board))
        self.boards_sent[rank] += 1
        self._owes_rows[rank] = self._owes_decision[rank] = False
