"""The schedules that hpcpar makes itself, by name.

Stage ``s`` lives on rank ``s % ranks``; with two ``chunks``, rank 0 of four has the stages 0 and 4. When a
forward takes one unit of time and a backward two, which all of these assume, every rank idles for::

    gpipe        3 (p - 1)        all forwards, then all backwards       holds m microbatches
    1f1b         3 (p - 1)        forwards and backwards in turn         holds p, fewer on later ranks
    interleaved  3 (p - 1) / v    1f1b, with v smaller stages per rank   holds up to p (1 + 1/v)
    zero_bubble  (p - 1) / v      either, with every backward cut in two holds as many on all ranks

Here p is the number of ranks, v of chunks, m of microbatches, at least p, and for interleaved a multiple of
p; and a unit, of time or of memory, is one microbatch on all stages of a rank.

Invariant: every schedule from here passes its check and runs to its end, for any numbers of at least 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from hpcpar.errors import ScheduleError
from hpcpar.nn.pipeline.list_scheduling import Progress, list_schedule
from hpcpar.nn.pipeline.schedule import Action, Kind, Schedule, positive

__all__ = ["SCHEDULE_NAMES", "build_schedule"]

Rows = list[list[Action]]


def build_schedule(
    name: str, ranks: int, microbatches: int, chunks: int = 1, *, max_in_flight: int | None = None
) -> Schedule:
    """Make a schedule. **Local.**

    Parameters
    ----------
    name
        - ``"gpipe"``: all forwards, then all backwards, both from microbatch 0 on (Huang et al. 2019).
        - ``"1f1b"``: a backward as soon as there is one, so that a rank holds activations of no more
          microbatches than stages follow (Narayanan et al. 2019). With chunks the same as interleaved.
        - ``"interleaved"``: a rank goes through its stages with groups of ``ranks`` microbatches, which cuts
          the time at the ends, when ranks are idle, by ``chunks`` (Narayanan et al. 2021).
        - ``"zero_bubble"``: the order of 1f1b or interleaved with every backward cut in two; the gradients of
          parameters, which no rank waits for, fill the idle time (ZB-H1 of Qi et al. 2023).
    ranks, microbatches
        How many.
    chunks
        Stages per rank.
    max_in_flight
        For ``zero_bubble``: of how many pairs of stage and microbatch a rank may hold activations at once.
        By default as many as rank 0 of 1f1b or interleaved does, which is ``ranks`` with one chunk; more of
        them hide the time that messages take.

    Raises
    ------
    ScheduleError
        When there is no such schedule, a number is not an integer of at least 1, or ``max_in_flight`` is
        below ``chunks``, or given with another schedule.
    """
    if name not in _BUILDERS:
        raise ScheduleError(f"name of a schedule must be one of {', '.join(_BUILDERS)}, got {name!r}")
    shape = _Shape(
        positive("ranks", ranks), positive("microbatches", microbatches), positive("chunks", chunks)
    )
    if max_in_flight is not None:
        max_in_flight = positive("max_in_flight", max_in_flight)
    if max_in_flight is not None and name != "zero_bubble":
        raise ScheduleError(
            f"max_in_flight must be left out with {name}, got {max_in_flight}. Use zero_bubble"
        )
    if max_in_flight is not None and max_in_flight < chunks:
        raise ScheduleError(f"max_in_flight must be at least chunks, {chunks}, got {max_in_flight}")
    return _BUILDERS[name](shape, max_in_flight)


class _Shape:
    """How many ranks, microbatches and chunks, and what follows from it."""

    def __init__(self, ranks: int, microbatches: int, chunks: int) -> None:
        self.ranks, self.microbatches, self.chunks = ranks, microbatches, chunks
        self.placement = [stage % ranks for stage in range(ranks * chunks)]
        self.stages_of = [range(rank, ranks * chunks, ranks) for rank in range(ranks)]

    def warm_up(self, rank: int) -> int:
        """How many forwards a rank does before its first backward comes, less one."""
        after = self.ranks - rank - 1
        depth = after if self.chunks == 1 else 2 * after + (self.chunks - 1) * self.ranks
        return min(depth, self.microbatches * self.chunks - 1)


def _gpipe(shape: _Shape, max_in_flight: int | None) -> Schedule:
    rows: Rows = []
    for stages in shape.stages_of:
        row = _all(Kind.FORWARD, stages, range(shape.microbatches))
        rows.append(row + _all(Kind.BACKWARD, reversed(stages), range(shape.microbatches)))
    return Schedule(rows, "gpipe")


def _all(kind: Kind, stages: Iterable[int], microbatches: Iterable[int]) -> list[Action]:
    numbers = list(microbatches)
    return [Action(kind, stage, microbatch) for stage in stages for microbatch in numbers]


# ---- one forward, one backward -----------------------------------------------------------------------------


def _one_forward_one_backward(shape: _Shape, max_in_flight: int | None) -> Schedule:
    name = "1f1b" if shape.chunks == 1 else "interleaved"
    rows = _interleaved_rows(shape)
    if shape.chunks == 1 or shape.microbatches % shape.ranks == 0:
        return Schedule(rows, name)
    # A last group of fewer microbatches makes the ranks wait for each other, for long or for ever. So the
    # rows become wishes: a rank does what it can, in the order of its row where possible, in its memory.
    limits = [shape.warm_up(rank) + 1 for rank in range(shape.ranks)]
    places = _places(rows)
    return list_schedule(
        shape.placement,
        shape.microbatches,
        priority=lambda action, progress: places[action],
        duration=lambda action: 2 if action.kind is Kind.BACKWARD else 1,
        admit=lambda action, progress: _has_room(shape, action.stage, progress, limits),
        name=name,
    )


def _interleaved_rows(shape: _Shape) -> Rows:
    """Warm-up, then forwards and backwards in turn, then the backwards that are left.

    The forwards of a rank go through its stages with the first ``ranks`` microbatches, then with the next
    ones, the last being fewer, perhaps; its backwards go through its stages in the opposite direction::

        stages 0 and 2, two ranks    0F0 0F1 2F0 2F1   0F2 0F3 2F2 2F3
                                     2B0 2B1 0B0 0B1   2B2 2B3 0B2 0B3
    """
    rows: Rows = []
    for rank, stages in enumerate(shape.stages_of):
        forwards: list[Action] = []
        backwards: list[Action] = []
        for first in range(0, shape.microbatches, shape.ranks):
            group = range(first, min(first + shape.ranks, shape.microbatches))
            forwards += _all(Kind.FORWARD, stages, group)
            backwards += _all(Kind.BACKWARD, reversed(stages), group)
        warm_up = shape.warm_up(rank)
        row = forwards[:warm_up]
        for index, backward in enumerate(backwards):
            row += [*forwards[warm_up + index : warm_up + index + 1], backward]
        rows.append(row)
    return rows


def _places(rows: Rows) -> dict[Action, int]:
    return {action: place for row in rows for place, action in enumerate(row)}


def _has_room(shape: _Shape, stage: int, progress: Progress, limits: list[int]) -> bool:
    """Whether a rank may hold one more microbatch for a stage.

    A place is kept free for each of its other stages that holds none. Without it, the first stage would take
    all places, and the next one, whose end they wait for, none. So the limits must be ``chunks`` at least.
    """
    rank = shape.placement[stage]
    held = [progress.held(other) for other in shape.stages_of[rank]]
    empty = held.count(0) - (progress.held(stage) == 0)
    return sum(held) + empty < max(limits[rank], shape.chunks)


# ---- zero bubble -------------------------------------------------------------------------------------------


def _zero_bubble(shape: _Shape, max_in_flight: int | None) -> Schedule:
    """The rows of 1f1b as wishes again, with a ``W`` where nothing of theirs can be done, or memory wants it.

    A rank does what it can in the order of its row, and a ``W`` when it can do nothing of that. Forwards go
    no further ahead of backwards than in 1f1b, unless there is more memory. One rule more: a rank that has
    fewer microbatches in flight than it would have in 1f1b, and no memory for the next, does a ``W`` before
    all else. For all later ranks live on its forwards.

    With costs of one for F, I and W, and as many microbatches as ranks, the last rank has no idle time from
    its first forward on, so that no schedule of these microbatches is shorter.
    """
    own = [shape.warm_up(rank) + 1 for rank in range(shape.ranks)]  # what 1f1b would have in flight
    limit = max(own) if max_in_flight is None else max_in_flight
    limits = [limit] * shape.ranks
    places = _places(_interleaved_rows(shape))

    def in_flight(rank: int, progress: Progress) -> int:
        return sum(progress.in_flight(stage) for stage in shape.stages_of[rank])

    def admit(action: Action, progress: Progress) -> bool:
        rank = shape.placement[action.stage]
        ahead = max(limit - max(own), 0)
        few = in_flight(rank, progress) < own[rank] + ahead or progress.held(action.stage) == 0
        return few and _has_room(shape, action.stage, progress, limits)

    def priority(action: Action, progress: Progress) -> tuple[int, int]:
        rank = shape.placement[action.stage]
        if action.kind is not Kind.BACKWARD_WEIGHT:
            kind = Kind.FORWARD if action.kind is Kind.FORWARD else Kind.BACKWARD
            return 1, places[Action(kind, action.stage, action.microbatch)]
        some_left = any(progress.forwards[stage] < shape.microbatches for stage in shape.stages_of[rank])
        behind = some_left and in_flight(rank, progress) < min(own[rank], limit)
        urgent = behind and not _has_room(shape, action.stage, progress, limits)
        return (0 if urgent else 3), action.microbatch

    return list_schedule(
        shape.placement,
        shape.microbatches,
        priority=priority,
        split=[range(shape.microbatches)] * len(shape.placement),
        admit=admit,
        name="zero_bubble",
    )


_BUILDERS: Mapping[str, Callable[[_Shape, int | None], Schedule]] = {
    "gpipe": _gpipe,
    "1f1b": _one_forward_one_backward,
    "interleaved": _one_forward_one_backward,
    "zero_bubble": _zero_bubble,
}

SCHEDULE_NAMES = tuple(_BUILDERS)
