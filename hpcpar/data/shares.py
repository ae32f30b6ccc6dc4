"""Shares: which samples of an epoch each rank takes, and what is left of the epoch after an interruption.

An epoch is one global order of all samples, the same for every number of ranks. Work that remains is a list
of half-open spans of positions in it; each rank takes one of nearly equal contiguous pieces. Three ranks that
stop after two samples each, and two that go on::

    positions        0  1  2  3  4  5  6  7  8  9
    3 ranks        [ 0  0  0  0 | 1  1  1 | 2  2  2 ]      pieces of 4, 3 and 3
    taken            x  x         x  x      x  x           two by each
    spans left           [2   4)       [6 7)     [9 10)
    2 ranks                0  0         1         1        pieces of 2 and 2

Invariant: the pieces of all ranks are the remaining work, each position once; sizes differ by one at most,
and the larger pieces come first. So the same number of ranks, after equally many samples each, gets back
exactly the ends of its own pieces, and continues in the order in which it would have gone on.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Cursor", "Progress", "Span", "check_state", "count", "cut", "piece", "remaining", "whole_number"]

Span = tuple[int, int]


def count(spans: Iterable[Span]) -> int:
    """Positions in spans. Local."""
    return sum(end - start for start, end in spans)


def cut(spans: Iterable[Span], first: int, last: int) -> list[Span]:
    """The spans of the positions numbered ``first`` to ``last - 1`` among those in ``spans``. Local."""
    found: list[Span] = []
    passed = 0
    for start, end in spans:
        low, high = max(first - passed, 0), min(last - passed, end - start)
        if low < high:
            found.append((start + low, start + high))
        passed += end - start
    return found


def piece(spans: Sequence[Span], rank: int, ranks: int) -> list[Span]:
    """The share of one of ``ranks`` ranks. Local."""
    share, larger = divmod(count(spans), ranks)
    first = rank * share + min(rank, larger)
    return cut(spans, first, first + share + (rank < larger))


def remaining(spans: Sequence[Span], ranks: int, taken: int) -> list[Span]:
    """What is left when each of ``ranks`` has taken the first ``taken`` positions of its piece. Local.

    A rank whose piece is shorter has taken all of it.
    """
    share, larger = divmod(count(spans), ranks)
    left: list[Span] = []
    for rank in range(ranks):
        first, size = rank * share + min(rank, larger), share + (rank < larger)
        left += cut(spans, first + min(taken, size), first + size)
    return list(_merged(left))


def _merged(spans: Iterable[Span]) -> Iterator[Span]:
    """The same positions in the same order, with neighbours joined."""
    last: Span | None = None
    for span in spans:
        if last is None:
            last = span
        elif last[1] == span[0]:
            last = (last[0], span[1])
        else:
            yield last
            last = span
    if last is not None:
        yield last


@dataclass
class Cursor:
    """How far one iteration has come: of the positions in ``spans``, ``taken`` have been handed out."""

    spans: list[Span]
    taken: int = 0


class Progress:
    """Where a rank is in its epochs.

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
        self._spans: list[Span] = [(0, length)]  # of all ranks, at the last start
        self._cursor: Cursor | None = None

    def set_epoch(self, epoch: int) -> bool:
        """Go to the beginning of another epoch; nothing happens if it is this one. Whether it is another."""
        if whole_number("the epoch", epoch) == self.epoch:
            return False
        self.epoch, self._spans, self._cursor = epoch, [(0, self.length)], None
        return True

    def begin(self) -> Cursor:
        """An iteration starts: at what was loaded the first time, at the beginning of the epoch later on."""
        if self._cursor is not None:
            self._spans = [(0, self.length)]
        self._cursor = Cursor(self.share())
        return self._cursor

    def share(self) -> list[Span]:
        """The positions of this rank that the iteration in progress has, or the next one will have."""
        return piece(self._spans, self.rank, self.ranks)

    def state(self, samples: int | None = None) -> dict[str, Any]:
        """The epoch and what is left of it, after ``samples`` of each rank, or those handed out here."""
        taken = self._cursor.taken if self._cursor is not None else 0
        if samples is not None:
            taken = whole_number("samples", samples)
        return {
            "epoch": self.epoch,
            "spans": [list(span) for span in self._spans],
            "ranks": self.ranks,
            "taken": taken,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go to where :meth:`state` was taken, by this or another number of ranks."""
        spans = [(int(start), int(end)) for start, end in state["spans"]]
        ordered = all(start < end for start, end in spans) or self.length == 0
        if not ordered or any(start < 0 or end > self.length for start, end in spans):
            raise ValueError(f"the spans of a state must lie in 0 to {self.length}, got {spans}")
        if int(state["ranks"]) < 1 or int(state["taken"]) < 0:
            raise ValueError(f"a state must be of at least 1 rank, got {state['ranks']} and {state['taken']}")
        self.epoch = int(state["epoch"])
        self._spans = remaining(spans, int(state["ranks"]), int(state["taken"]))
        self._cursor = None


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


def whole_number(subject: str, value: object, least: int = 0) -> int:
    """A whole number of any type, Python's, numpy's or torch's, as an int. Local.

    Raises
    ------
    ValueError
        When it is another thing, or too small.
    """
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = least - 1
    if number < least:
        raise ValueError(f"{subject} must be a whole number from {least}, got {value!r}")
    return number
