"""Lowering: from stages as the user cut the model to the smaller ones that its layers can live on.

A layer may have to live on another rank than the rest of its stage, since it shares its parameters with one
there. Then the stage is cut into segments, consecutive smaller stages, each on one rank, and the schedule is
made anew for the longer chain::

    stages     0: rank 0     1: rank 1
    parts      [[0],         [1, 0, 1]]        stage 1 has a layer in its middle that lives on rank 0
    segments   0: rank 0     1: rank 1   2: rank 0   3: rank 1

What was one action becomes one per segment, and a rank does them in the order of the times at which the
actions that they come from start in the given schedule. So 1f1b stays about 1f1b. The longer chain has more
microbatches under way at once: one more may enter it for each segment more, so that no rank starves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from hpcpar.errors import ScheduleError
from hpcpar.nn.pipeline.list_scheduling import Progress, list_schedule
from hpcpar.nn.pipeline.schedule import Action, Kind, Schedule
from hpcpar.nn.pipeline.simulate import simulate

__all__ = ["lower"]


def lower(schedule: Schedule, parts: Sequence[Sequence[int]]) -> Schedule:
    """The schedule for a model whose stages are cut into segments on several ranks. **Local.**

    Parameters
    ----------
    schedule
        One for the whole stages.
    parts
        For each stage the ranks of its segments, along the chain; ``[[0], [1, 0, 1]]``.

    Returns
    -------
    Schedule
        One with the segments as its stages, numbered along the chain; the given one where every stage is of
        one segment on the rank that it was on.

    Raises
    ------
    ScheduleError
        When ``parts`` does not fit the schedule or leaves a rank without a segment, or the schedule is
        incomplete or deadlocks.
    """
    chains = _check_parts(schedule, parts)
    starts = _start_times(schedule)
    if chains == [[rank] for rank in schedule.placement]:
        return schedule
    parents = [stage for stage, chain in enumerate(chains) for _ in chain]
    # In ticks of which the segments of any stage take a whole number.
    ticks = [math.lcm(*map(len, chains)) // len(chains[stage]) for stage in parents]
    limit = _most_in_flight(schedule) + len(parents) - schedule.stages

    def parent(action: Action) -> Action:
        return Action(action.kind, parents[action.stage], action.microbatch)

    def duration(action: Action) -> int:
        return ticks[action.stage] * (2 if action.kind is Kind.BACKWARD else 1)

    def priority(action: Action, progress: Progress) -> tuple[float, int, int]:
        # Of the segments of one parent those first that the parent's own rank would do first.
        forward = action.kind is Kind.FORWARD
        return starts[parent(action)], action.microbatch, action.stage if forward else -action.stage

    return list_schedule(
        [rank for chain in chains for rank in chain],
        schedule.microbatches,
        priority=priority,
        split=[_split_microbatches(schedule, stage) for stage in parents],
        duration=duration,
        admit=lambda action, progress: action.stage > 0 or progress.in_flight(0) < limit,
        name=schedule.name,
    )


def _check_parts(schedule: Schedule, parts: Sequence[Sequence[int]]) -> list[list[int]]:
    if len(parts) != schedule.stages:
        raise ScheduleError(f"parts must have one list per stage, {schedule.stages}, got {len(parts)}")
    for stage, chain in enumerate(parts):
        if not chain:
            raise ScheduleError(f"parts of stage {stage} must have at least one rank, got none")
        for rank in chain:
            if type(rank) is not int or not 0 <= rank < schedule.ranks:
                raise ScheduleError(
                    f"ranks of parts of stage {stage} must be from 0 to {schedule.ranks - 1}, got {rank!r}"
                )
    for rank in range(schedule.ranks):
        if not any(rank in chain for chain in parts):
            raise ScheduleError(f"parts must give every rank a segment, got none for rank {rank}")
    return [list(chain) for chain in parts]


def _start_times(schedule: Schedule) -> dict[Action, float]:
    timeline = simulate(schedule).timeline
    return {Action.parse(span.label): span.start_s for span in timeline.spans}


def _most_in_flight(schedule: Schedule) -> int:
    """The most microbatches that have gone forward through stage 0, and not back, at any time."""
    in_flight = most = 0
    for action in schedule.actions[schedule.placement[0]]:
        if action.stage == 0 and action.kind is Kind.FORWARD:
            in_flight += 1
            most = max(most, in_flight)
        elif action.stage == 0 and action.kind is not Kind.BACKWARD_WEIGHT:
            in_flight -= 1
    return most


def _split_microbatches(schedule: Schedule, stage: int) -> frozenset[int]:
    row = schedule.actions[schedule.placement[stage]]
    return frozenset(a.microbatch for a in row if a.stage == stage and a.kind is Kind.BACKWARD_INPUT)
