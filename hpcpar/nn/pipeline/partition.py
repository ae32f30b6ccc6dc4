"""Partition: which layers make a stage.

::

    costs      4  1  1  1  2  1      three stages
    balance    1  2     3            blocks of 4, 2 and 4: no cut has a largest block below 4

Stages are contiguous, and a pipeline is as slow as its slowest stage, so the largest block is made as small
as possible: exactly, by dynamic programming. Of all such cuts, of which alike layers have many, the one with
the most even numbers of layers is taken, larger stages last: a late stage keeps the activations of fewer
microbatches.
"""

from __future__ import annotations

import operator
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import inf, isfinite

from hpcpar.errors import MismatchError

__all__ = ["balance_layers", "check_balance"]

# Sums of costs in another order differ in their last digits, which must not decide between cuts.
_TOLERANCE = 1e-9


def balance_layers(costs: Sequence[float], parts: int) -> list[int]:
    """Cut layers into contiguous blocks whose largest cost is as small as possible. Local.

    Parameters
    ----------
    costs
        Of the layers in order, in any unit; zero is allowed.
    parts
        Number of blocks; each has at least one layer.

    Returns
    -------
    list of int
        Number of layers of each block.

    Raises
    ------
    MismatchError
        When there are fewer layers than blocks, or a cost is negative or not finite.
    """
    _check_parts(len(costs), parts)
    for layer, cost in enumerate(costs):
        if not isfinite(cost) or cost < 0:
            raise MismatchError(f"the cost of a layer must be zero or more, got {cost} for layer {layer}.")
    sums = [0.0, *accumulate(map(float, costs))]
    return _most_even(sums, parts, _smallest_maximum(sums, parts) * (1 + _TOLERANCE))


def _smallest_maximum(sums: list[float], parts: int) -> float:
    """The cost of the largest block in the best cut; ``sums[i]`` is the cost of the first ``i`` layers."""
    layers = len(sums) - 1
    best = sums[:]  # best[end]: of the first `end` layers, cut into as many blocks as there were rounds
    for blocks in range(2, parts + 1):
        previous, best = best, [inf] * (layers + 1)
        for end in range(blocks, layers + 1):
            # As the last block starts later, it gets cheaper and what is before it dearer: the best start is
            # the first at which the latter weighs more, or the one before.
            starts = range(blocks - 1, end)
            crossing = bisect_left(starts, True, key=lambda start: previous[start] >= sums[end] - sums[start])
            for start in starts[max(0, crossing - 1) : crossing + 1]:
                best[end] = min(best[end], max(previous[start], sums[end] - sums[start]))
    return best[layers]


def _most_even(sums: list[float], parts: int, limit: float) -> list[int]:
    """The cut into blocks of at most ``limit`` with the smallest sum of squared numbers of layers."""
    layers = len(sums) - 1
    best = [0.0] + [inf] * layers
    starts_of: list[list[int]] = []
    for blocks in range(1, parts + 1):
        previous, best = best, [inf] * (layers + 1)
        starts = [0] * (layers + 1)
        for end in range(blocks, layers - parts + blocks + 1):
            for start in range(end - 1, blocks - 2, -1):
                if sums[end] - sums[start] > limit:
                    break
                squares = previous[start] + (end - start) ** 2
                if squares <= best[end]:  # of equal ones the earlier start: larger blocks last
                    best[end], starts[end] = squares, start
        starts_of.append(starts)
    ends = [layers]
    for starts in reversed(starts_of):
        ends.append(starts[ends[-1]])
    return [end - start for start, end in pairwise(reversed(ends))]


def check_balance(balance: Sequence[int], layers: int, parts: int) -> list[int]:
    """A user's numbers of layers for each block, checked. Local.

    Raises
    ------
    MismatchError
        When they are not ``parts`` positive integers that sum to ``layers``.
    """
    _check_parts(layers, parts)
    counts = list(balance)
    if len(counts) != parts:
        raise MismatchError(f"balance must have a number for each of {parts} stages, got {counts}.")
    if any(isinstance(count, bool) or not hasattr(count, "__index__") or count < 1 for count in counts):
        raise MismatchError(f"balance must give at least one layer to each stage, got {counts}.")
    counts = [operator.index(count) for count in counts]
    if sum(counts) != layers:
        raise MismatchError(f"balance must sum to the {layers} layers, got {counts}, which is {sum(counts)}.")
    return counts


def _check_parts(layers: int, parts: int) -> None:
    if parts < 1:
        raise MismatchError(f"a pipeline must have at least one stage, got {parts}.")
    if parts > layers:
        raise MismatchError(
            f"a pipeline must have at least one layer per stage, got {parts} stages for {layers} layers. Use "
            "fewer ranks or chunks."
        )
