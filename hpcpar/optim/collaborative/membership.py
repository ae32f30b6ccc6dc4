"""Membership: one rank's place in the collaboration, between its row and the secretary's decisions.

It says what this rank does next, and changes nothing but the row::

                  round due                 decision: a member             sums are applied
    accumulating ----------->  joined  ---------------------->  averaging -----------------> accumulating
         ^                       |                                                           (next round)
         |      state loaded     |  decision: not a member, or others have a newer version
         +--------------------  behind
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hpcpar.comm import Bulletin
from hpcpar.optim.collaborative.progress import Column, Numbers, is_due
from hpcpar.optim.collaborative.secretary import Decision, Secretary

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["Membership"]


class Membership:
    """What this rank says about itself, and what the others and the secretary say. Collective to make.

    Parameters
    ----------
    comm
        The ranks.
    target
        Samples that make a round due.
    averaging_timeout_s
        How long a round waits for those who are late; ``None``: until they come.
    threaded
        Whether the secretary has a thread; by default where MPI allows it.
    """

    def __init__(
        self,
        comm: Communicator,
        target: int,
        averaging_timeout_s: float | None,
        *,
        threaded: bool | None = None,
    ) -> None:
        self._rank, self._target = comm.rank, target
        self._row = np.zeros(len(Column))
        secretary = Secretary(comm.size, target, averaging_timeout_s)
        first = Decision.first(comm.size).to_numbers()
        self._bulletin = Bulletin(comm, self._row, secretary.decide, first, threaded=threaded)

    # What is known ---------------------------------------------------------------------------------------

    @property
    def rows(self) -> Numbers:
        """Of all ranks, as last heard. Local."""
        return self._bulletin.rows

    @property
    def decision(self) -> Decision:
        """The last that was heard. Local."""
        return Decision.from_numbers(self._bulletin.decision)

    @property
    def version(self) -> int:
        """Of the parameters of this rank, which is the round that it is at. Local."""
        return int(self._row[Column.ROUND])

    @property
    def newest_version(self) -> int:
        """The newest that is known of. Local."""
        return int(self.rows[:, Column.ROUND].max())

    @property
    def is_behind(self) -> bool:
        """Whether others have a newer version, or make one without this rank. Local."""
        decision = self.decision
        if self._is_current(decision):
            return not decision.members[self._rank]
        return self.newest_version > self.version

    @property
    def is_due(self) -> bool:
        """Whether the round that this rank is at is to be joined: it has its samples, or others join. Local.

        A rank that has left begins no round, so a loop up to some step ends with that step.
        """
        has_left = bool(self._row[Column.LEFT])
        return is_due(self.rows, self.version, float("inf") if has_left else self._target)

    @property
    def is_next_due(self) -> bool:
        """Whether the round after the one under way has its samples too. Local."""
        rows = self.rows
        ahead = rows[rows[:, Column.ROUND] == self.version, Column.AHEAD].sum()
        after = rows[rows[:, Column.ROUND] == self.version + 1, Column.SAMPLES].sum()
        return bool(ahead + after >= self._target)

    @property
    def has_joined(self) -> bool:
        """Whether this rank has joined a round and not ended it. Local."""
        return bool(self._row[Column.JOINED])

    @property
    def is_decided(self) -> bool:
        """Whether the round that this rank has joined begins, with or without it. Local."""
        return self._is_member() or self.is_behind

    def members(self) -> list[int] | None:
        """The members of the round that this rank has joined; ``None`` when it is none of them. Local."""
        return np.flatnonzero(self.decision.members).tolist() if self._is_member() else None

    def missing(self) -> list[int]:
        """Ranks that have not joined this rank's round. Local."""
        rows = self.rows
        joined = (rows[:, Column.JOINED] > 0) & (rows[:, Column.ROUND] == self.version)
        return np.flatnonzero(~joined).tolist()

    def donor(self) -> int | None:
        """Who answers this rank's last request for a state; itself if it has the newest. Local."""
        decision = self.decision
        if decision.asked[self._rank] != self._row[Column.ASKED] or decision.donors[self._rank] < 0:
            return None
        return int(decision.donors[self._rank])

    # What this rank says ---------------------------------------------------------------------------------

    def look(self) -> None:
        """Take in what is new. Local, never waits."""
        self._bulletin.progress()

    def report(self, samples: int, rate: float) -> None:
        """Say how many samples there are for the next round that this rank can join. Local."""
        self._row[Column.AHEAD if self.has_joined else Column.SAMPLES] = samples
        self._row[Column.RATE] = rate
        self._post()

    def join(self) -> None:
        """Be ready for the round, with the samples that were reported. Local."""
        self._row[Column.JOINED] = 1
        self._post(urgent=True)

    def leave_round(self, samples: int) -> None:
        """Have these samples again, after a round that began without this rank. Local."""
        self._row[Column.JOINED] = self._row[Column.AHEAD] = 0
        self._row[Column.SAMPLES] = samples

    def advance(self, version: int, step: int, samples: int, *, anew: bool = False) -> None:
        """Be at a round, after the one before or after a state was loaded. Local.

        Parameters
        ----------
        version, step
            Of the parameters.
        samples
            For the round.
        anew
            Whether rounds of this number that were decided before do not count, as after a return to an
            older state.
        """
        self._row[Column.ROUND], self._row[Column.STEP] = version, step
        self._row[Column.SAMPLES], self._row[Column.AHEAD] = samples, 0
        decision = self.decision
        if anew or decision.round < version:  # else that round takes place without this rank
            self._row[Column.ACTED] = decision.number
        self._row[Column.JOINED] = self._row[Column.WANTS] = 0
        self._post(urgent=True)

    def ask(self, lowest_version: int) -> int:
        """Ask for a state, or anew for one from another donor; the number of the request. Local."""
        self._row[Column.WANTS] = 1 + lowest_version
        self._row[Column.ASKED] += 1
        self._post(urgent=True)
        return int(self._row[Column.ASKED])

    def need_nothing(self) -> None:
        """Take a request back. Local."""
        self._row[Column.WANTS] = 0
        self._post(urgent=True)

    def leave(self) -> None:
        """Contribute nothing more. Local."""
        self._row[Column.LEFT] = 1
        self._post(urgent=True)

    def stop(self) -> None:
        """End the secretary's thread, since the job fails. Local."""
        self._bulletin.stop()

    def close(self) -> None:
        """Give communicator and thread back, when all have left. Collective."""
        self._bulletin.close()

    def _post(self, *, urgent: bool = False) -> None:
        self._bulletin.post(self._row, urgent=urgent)

    def _is_current(self, decision: Decision) -> bool:
        """Whether a decision is on this rank's round, and this rank has not acted on it."""
        return decision.round == self.version and decision.number > self._row[Column.ACTED]

    def _is_member(self) -> bool:
        decision = self.decision
        return self._is_current(decision) and bool(decision.members[self._rank])
