"""Progress: where a rank is in its epochs, and the states from which any number of ranks go on.

An epoch is a list of spans of positions that all ranks share (:mod:`hpcpar.data.shares`), and how many each
has taken since. Ranks go in step, and then that is one number. In their last step pieces end: a last, smaller
batch counts as a whole one and the end of an iteration as the largest piece, so that the number is the same
on all ranks after every step. Where ranks go at paces of their own it takes one number for each, which only
all ranks together can tell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from hpcpar.comm import agree, check_alike
from hpcpar.data.shares import Span, count, in_step, piece, remaining, sizes, whole_number

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["Cursor", "Progress", "check_state", "gather_taken", "numbers_of_ranks"]


@dataclass
class Cursor:
    """How far one iteration has come.

    Attributes
    ----------
    spans
        The positions that this rank hands out.
    most
        How many the largest piece of any rank has.
    taken
        How many have been handed out, counted as on all ranks: see the top of this module.
    ended
        Whether the iteration has come to its end.
    """

    spans: list[Span]
    most: int
    taken: int = 0
    ended: bool = False

    def advance(self, samples: int, *, whole_only: bool = False) -> None:
        """``samples`` more were handed out; what is left is dropped if ``whole_only`` and it is less."""
        self.taken = min(self.taken + samples, self.most)
        if whole_only and self.most - self.taken < samples:
            self.taken = self.most

    def end(self) -> None:
        """There is nothing more."""
        self.taken, self.ended = self.most, True


class Progress:
    """Where a rank is in its epochs.

    A place that was loaded holds until an iteration has come to its end there, or :meth:`set_epoch` goes to
    another epoch. An iteration that was given up before its end, such as a look at the first batch, does not
    use it up.

    Parameters
    ----------
    length
        Samples in an epoch, of all ranks.
    rank, ranks
        This rank, and how many there are.
    """

    def __init__(self, length: int, rank: int, ranks: int) -> None:
        self.length, self.rank, self.ranks = length, rank, ranks
        self.epoch = 0
        self._spans = self._whole()  # of all ranks, where an iteration begins
        self._cursor: Cursor | None = None

    def set_epoch(self, epoch: int) -> bool:
        """Go to the beginning of another epoch; nothing happens if it is this one. Whether it is another."""
        number = whole_number("the epoch", epoch)
        if number == self.epoch:
            return False
        self.epoch, self._spans, self._cursor = number, self._whole(), None
        return True

    def restart(self) -> None:
        """Go to the beginning of this epoch."""
        self._spans, self._cursor = self._whole(), None

    def begin(self, *, keep: bool = False) -> Cursor:
        """An iteration starts, at what was loaded, or at the beginning of the epoch.

        Parameters
        ----------
        keep
            Whether what was loaded holds even after an iteration has come to its end: in a worker process,
            which may be ahead of the others and of the one that trains.
        """
        if self._cursor is not None and self._cursor.ended and not keep:
            self._spans = self._whole()
        spans = piece(self._spans, self.rank, self.ranks)
        self._cursor = Cursor(spans, most=sizes(count(self._spans), self.ranks)[0])
        return self._cursor

    def share(self) -> list[Span]:
        """The positions of this rank that the iteration in progress has, or else the next one will have."""
        ended = self._cursor is not None and self._cursor.ended
        return piece(self._whole() if ended else self._spans, self.rank, self.ranks)

    def place(self) -> list[str]:
        """Where the last iteration began, to be compared between ranks."""
        return [f"epoch {self.epoch}", f"spans {self._spans}"]

    def taken(self, samples: int | None = None) -> int:
        """How many this rank has taken, ``samples`` or those handed out here, counted as on all ranks."""
        if samples is None:
            return 0 if self._cursor is None else self._cursor.taken
        number = whole_number("samples", samples)
        shares = sizes(count(self._spans), self.ranks)
        return shares[0] if number and number >= shares[self.rank] else number

    def own_taken(self, samples: int | None = None) -> int:
        """The same, as it is for this rank."""
        return min(self.taken(samples), sizes(count(self._spans), self.ranks)[self.rank])

    def state(self, taken: int | Sequence[int]) -> dict[str, Any]:
        """The epoch and what is left of it, after ``taken`` of each rank, one number or one for each."""
        if not isinstance(taken, int):
            step = in_step(taken, sizes(count(self._spans), self.ranks))
            taken = list(taken) if step is None else step
        return {
            "epoch": self.epoch,
            "spans": [list(span) for span in self._spans],
            "ranks": self.ranks,
            "taken": taken,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go to where :meth:`state` was taken, by this or another number of ranks.

        Raises
        ------
        ValueError
            When it is no such state; nothing has changed then.
        """
        spans = [(int(start), int(end)) for start, end in state["spans"]]
        apart = all(start < end for start, end in spans) and all(a[1] <= b[0] for a, b in pairwise(spans))
        if not apart or (spans and (spans[0][0] < 0 or spans[-1][1] > self.length)):
            raise ValueError(
                f"the spans of a state must lie in 0 to {self.length} one behind the other, got {spans}"
            )
        ranks = whole_number("the ranks of a state", state["ranks"], 1)
        taken = numbers_of_ranks(state["taken"], ranks)
        self.epoch = whole_number("the epoch of a state", state["epoch"])
        self._spans = remaining(spans, ranks, taken)
        self._cursor = None

    def _whole(self) -> list[Span]:
        return [(0, self.length)] if self.length else []


def gather_taken(
    comm: Communicator | None, ranks: int, subject: str, look: Callable[[], tuple[list[str], int]]
) -> list[int]:
    """How many samples each rank has taken. Collective.

    Parameters
    ----------
    comm
        The ranks; None for this process alone.
    ranks
        How many share the work.
    subject
        Of errors.
    look
        Gives where this rank's iteration began, in lines, and how many it has taken since.

    Raises
    ------
    ValueError
        On the rank where ``look`` raises it.
    RuntimeError
        When this is a copy that was pickled.
    MismatchError
        On all others then, and on all when iterations did not begin at the same place.
    """
    if ranks == 1:
        return [look()[1]]
    if comm is None:
        raise RuntimeError(f"{subject} must be gathered by the object that was given comm, got a copy of it")
    lines, taken = agree([comm], subject, look)
    check_alike(comm, subject, lines)
    return list(comm.allgather(taken))


def check_state(
    subject: str, state: Mapping[str, Any], own: Mapping[str, Any], varying: Sequence[str]
) -> None:
    """Refuse a state of other data or another order. Local.

    Parameters
    ----------
    subject
        Of the error.
    state
        What is to be loaded.
    own
        What an equal object's state would contain; entries named in ``varying`` may differ.

    Raises
    ------
    ValueError
        When an entry is missing, or one that must be the same is not.
    """
    missing = [key for key in own if key not in state]
    if missing:
        raise ValueError(f"the state for {subject} must have {list(own)}, got none of {missing}")
    for key in own:
        if key not in varying and state[key] != own[key]:
            raise ValueError(
                f"the state for {subject} must be of the same data in the same order, got {key} "
                f"{state[key]!r} where it has {own[key]!r}. Make it with the options it was saved with"
            )


def numbers_of_ranks(given: Any, ranks: int) -> int | list[int]:
    """What ranks have taken by a state: one number for all, or one for each. Local."""
    subject = "what ranks have taken in a state"
    if not isinstance(given, (list, tuple)):
        return whole_number(subject, given)
    each = [whole_number(subject, own) for own in given]
    if len(each) != ranks:
        raise ValueError(f"{subject} must be one number, or {ranks}, got {each}")
    return each
