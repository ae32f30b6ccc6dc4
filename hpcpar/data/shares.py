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
from collections.abc import Iterable, Iterator, Sequence

__all__ = ["Span", "count", "cut", "in_step", "piece", "remaining", "sizes", "whole_number"]

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


def sizes(positions: int, ranks: int) -> list[int]:
    """How large the pieces of all ranks are. Local."""
    share, larger = divmod(positions, ranks)
    return [share + (rank < larger) for rank in range(ranks)]


def in_step(taken: Sequence[int], shares: Sequence[int]) -> int | None:
    """How many each rank has taken if it is the same number, up to the ends of their shares. Local.

    Parameters
    ----------
    taken, shares
        One for each rank.

    Returns
    -------
    int or None
        None where ranks have taken unequally many.
    """
    most = max(taken)
    return most if all(own == min(most, share) for own, share in zip(taken, shares, strict=True)) else None


def remaining(spans: Sequence[Span], ranks: int, taken: int | Sequence[int]) -> list[Span]:
    """What is left when each of ``ranks`` has taken the first ``taken`` positions of its piece. Local.

    A rank whose piece is shorter has taken all of it. ``taken`` is one number for all, or one for each.
    """
    each = [taken] * ranks if isinstance(taken, int) else taken
    left: list[Span] = []
    first = 0
    for own, size in zip(each, sizes(count(spans), ranks), strict=True):
        left += cut(spans, first + min(own, size), first + size)
        first += size
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
