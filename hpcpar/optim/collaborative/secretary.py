"""The secretary's judgement: who averages with whom, who gives whom a state, when all may leave.

A pure function of the rows, the clock, and what was decided before; it runs on rank 0 inside of the bulletin
(:mod:`hpcpar.comm.bulletin`) and knows nothing of MPI or tensors.

*Rounds.* A rank that finds a round due joins it and waits. When everybody who is expected has joined, or the
first to come has waited for ``averaging_timeout``, the secretary names the members: those who have joined::

    rank 0   joins 7 .......... members 0 1 2
    rank 1      joins 7 ....... members 0 1 2
    rank 2            joins 7 . members 0 1 2
    rank 3   (stopped)                             is at 7 still: behind; loads a state when it comes back

Expected are all ranks but those that a round has left out and that have not come back since. A rank that is
loading a state is expected again.

Invariants:

* Members of decision *n* act on it before any of them can join another round, so that every member learns
  of it, though only the last decision is on the board.
* A join counts only from a rank that has acted on the last decision or is past its round; so a rank that
  joins a round that was decided without it joins nothing.
* Samples are counted by rows, never by the clock. The timeout only chooses who is waited for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hpcpar.optim.collaborative.progress import Column, Numbers, is_due

__all__ = ["Decision", "Secretary"]

_HEAD = 5


@dataclass(frozen=True)
class Decision:
    """What the secretary says.

    Attributes
    ----------
    number : int
        Counts the rounds that were decided; 0 before the first.
    round : int
        The one that was decided last, -1 before the first.
    due : int
        The round that is due, -1 if none is.
    all_left : bool
        Whether nobody contributes any more and no round is open: everybody may leave.
    members : numpy.ndarray
        Of ``round``: a truth for each rank.
    donors : numpy.ndarray
        For each rank, who gives it a state: a rank, itself if it has the newest already; -1: nobody yet.
    asked : numpy.ndarray
        The request of each rank that ``donors`` answers.
    """

    number: int
    round: int
    due: int
    all_left: bool
    members: Numbers
    donors: Numbers
    asked: Numbers

    @classmethod
    def first(cls, size: int) -> Decision:
        """Nothing is decided yet. Local."""
        return cls(0, -1, -1, False, np.zeros(size), np.full(size, -1.0), np.zeros(size))

    @classmethod
    def from_numbers(cls, numbers: Numbers) -> Decision:
        """The inverse of :meth:`to_numbers`. Local."""
        number, round_, due, all_left, size = (int(word) for word in numbers[:_HEAD])
        members, donors, asked = numbers[_HEAD:].reshape(3, size)
        return cls(number, round_, due, bool(all_left), members, donors, asked)

    def to_numbers(self) -> Numbers:
        """For the bulletin. Local."""
        head = [self.number, self.round, self.due, self.all_left, len(self.members)]
        return np.concatenate((np.array(head, dtype=np.float64), self.members, self.donors, self.asked))


class Secretary:
    """Decides about rounds and states. Local.

    Parameters
    ----------
    size
        Ranks.
    target
        Samples that make a round due.
    averaging_timeout_s
        How long the first that joined a round waits for the others; ``None``: until they come.
    """

    def __init__(self, size: int, target: int, averaging_timeout_s: float | None) -> None:
        self._target, self._timeout_s = target, averaging_timeout_s
        self._number, self._round = 0, -1
        self._members = np.zeros(size)
        self._absent = np.zeros(size, dtype=bool)
        self._first_joined_s: float | None = None
        self._donors = np.full(size, -1.0)
        self._asked = np.zeros(size)
        self._last_donor = 0

    def decide(self, rows: Numbers, now_s: float) -> Numbers:
        """The decision that follows from the rows, as numbers. Local, never waits."""
        newest = int(rows[:, Column.ROUND].max())
        joined = self._joined(rows, newest)
        self._absent &= ~((rows[:, Column.WANTS] > 0) | (rows[:, Column.ROUND] > self._round))
        if self._is_complete(joined, now_s):
            self._number += 1
            self._round = newest
            self._members = joined.astype(np.float64)
            self._absent = ~joined
            self._first_joined_s = None
        self._assign_donors(rows, newest)
        due = newest if is_due(rows, newest, self._target) else -1
        return Decision(
            self._number, self._round, due, self._all_left(rows), self._members, self._donors, self._asked
        ).to_numbers()

    def _joined(self, rows: Numbers, newest: int) -> np.ndarray:
        has_acted = (rows[:, Column.ACTED] >= self._number) | (rows[:, Column.ROUND] > self._round)
        joined = (rows[:, Column.JOINED] > 0) & (rows[:, Column.ROUND] == newest) & has_acted
        return np.asarray(joined)

    def _is_complete(self, joined: np.ndarray, now_s: float) -> bool:
        """Whether the round that these have joined begins now."""
        if not joined.any():
            self._first_joined_s = None
            return False
        if self._first_joined_s is None:
            self._first_joined_s = now_s
        if (joined | self._absent).all():
            return True
        return self._timeout_s is not None and now_s - self._first_joined_s >= self._timeout_s

    def _assign_donors(self, rows: Numbers, newest: int) -> None:
        """Give every request that has none yet a donor with the newest version, in rotation."""
        wants = rows[:, Column.WANTS] > 0
        if not wants.any():
            return
        has_newest = rows[:, Column.ROUND] == newest
        open_ = wants & (rows[:, Column.ASKED] > self._asked) & (rows[:, Column.WANTS] <= newest + 1)
        keeps_own = (self._donors == np.arange(len(rows))) & (rows[:, Column.ASKED] == self._asked)
        givers = has_newest & (~wants | keeps_own)
        sources = open_ & has_newest
        if sources.any() and not givers.any():  # all that could give are asking: one of them need not
            source = self._next_after(sources)
            self._answer(source, source, rows)
            open_[source], givers[source] = False, True
        for rank in np.flatnonzero(open_):
            others = givers.copy()
            others[rank] = False
            if others.any():
                self._last_donor = self._next_after(others)
                self._answer(int(rank), self._last_donor, rows)

    def _answer(self, rank: int, donor: int, rows: Numbers) -> None:
        self._donors = self._donors.copy()  # decisions that were handed out keep theirs
        self._asked = self._asked.copy()
        self._donors[rank] = donor
        self._asked[rank] = rows[rank, Column.ASKED]

    def _next_after(self, eligible: np.ndarray) -> int:
        """The first eligible rank behind the last donor, in a circle."""
        size = len(eligible)
        return min(np.flatnonzero(eligible).tolist(), key=lambda rank: (rank - self._last_donor - 1) % size)

    def _all_left(self, rows: Numbers) -> bool:
        same = (rows[:, Column.ROUND] == rows[0, Column.ROUND]).all()
        idle = not (rows[:, Column.JOINED].any() or rows[:, Column.WANTS].any())
        left = rows[:, Column.LEFT].all()
        return bool(left and same and idle)
