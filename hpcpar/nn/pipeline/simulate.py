"""When would every action of a schedule run? Simulated from a few costs, without any computing.

A rank works through its list, and starts an action when the last one has ended and its inputs are there::

    F(s, m)       after F(s - 1, m)                        + message, if that is on another rank
    B/I(s, m)     after F(s, m) and B/I(s + 1, m)          + message, if that is on another rank
    W(s, m)       after I(s, m)

The lists fix all orders, so that an action's start is a longest path through these arrows, and no clock is
needed: each rank is led along its list until an input is missing, and again when that input is made. Every
action is looked at once or twice, however many there are. When no rank can go on and a list is not at its
end, the ranks wait for each other in a circle: a deadlock, which the real run would be caught in too.

A message costs time between two ranks and nothing on either, and any number of them may be under way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from hpcpar.errors import ScheduleError
from hpcpar.nn.pipeline.schedule import Action, Kind, Schedule, positive
from hpcpar.nn.pipeline.timeline import Span, Timeline

__all__ = ["Simulation", "simulate"]

Costs = float | Sequence[float]


@dataclass(frozen=True)
class Simulation:
    """How a schedule would run.

    Parameters
    ----------
    makespan
        Seconds from the first action's start to the last one's end.
    busy
        Seconds in which each rank works.
    bubble
        Share of all ranks' time in which they are idle.
    peak_activations
        For each rank the most pairs of stage and microbatch of which it holds activations at once: from the
        start of the forward to the end of the backward, or of ``W`` where that is split. One where there
        are no backwards to keep anything for.
    timeline
        All actions with their times.
    """

    makespan: float
    busy: tuple[float, ...]
    bubble: float
    peak_activations: tuple[int, ...]
    timeline: Timeline

    @property
    def efficiency(self) -> float:
        """Share of all ranks' time in which they work."""
        return 1 - self.bubble


def simulate(
    schedule: Schedule,
    *,
    forward: Costs = 1.0,
    backward_input: Costs = 1.0,
    backward_weight: Costs = 1.0,
    message: float = 0.0,
    max_activations: int | Sequence[int] | None = None,
    forward_only: bool = False,
) -> Simulation:
    """Work out when every action would run. **Local.**

    Parameters
    ----------
    schedule
        What the ranks do.
    forward, backward_input, backward_weight
        Seconds for one microbatch on a stage: one number for all stages, or one per stage. A whole backward
        takes the time of its two parts.
    message
        Seconds that an activation or a gradient takes to another rank.
    max_activations
        How many pairs of stage and microbatch a rank has memory for: one number for all ranks, or one per
        rank.
    forward_only
        Whether the schedule has no backwards.

    Raises
    ------
    ScheduleError
        When the schedule is incomplete, contradicts itself, deadlocks, or needs more memory than there is.
    """
    schedule.check(forward_only=forward_only)
    inputs = _per_stage("backward_input", backward_input, schedule.stages)
    weights = _per_stage("backward_weight", backward_weight, schedule.stages)
    costs = {
        Kind.FORWARD: _per_stage("forward", forward, schedule.stages),
        Kind.BACKWARD: [i + w for i, w in zip(inputs, weights, strict=True)],
        Kind.BACKWARD_INPUT: inputs,
        Kind.BACKWARD_WEIGHT: weights,
    }
    peaks = _peak_activations(schedule, _per_rank(max_activations, schedule.ranks), forward_only)
    timeline = Timeline(_Run(schedule, costs, _seconds("message", message)).spans(), schedule.ranks)
    busy = tuple(math.fsum(costs[a.kind][a.stage] for a in row) for row in schedule.actions)
    makespan = timeline.makespan
    idle = 1 - sum(busy) / (schedule.ranks * makespan) if makespan else 0.0
    return Simulation(makespan, busy, max(idle, 0.0), peaks, timeline)


class _Run:
    """One simulation under way."""

    def __init__(self, schedule: Schedule, costs: dict[Kind, list[float]], message_s: float) -> None:
        self._schedule = schedule
        self._placement = schedule.placement
        self._costs = costs
        self._message_s = message_s
        self._next = [0] * schedule.ranks  # place of each rank's next action in its list
        self._free_s = [0.0] * schedule.ranks
        self._end_s: dict[tuple[bool, int, int], float] = {}  # forward or not, stage, microbatch
        self._waiting: dict[tuple[bool, int, int], int] = {}  # the rank that goes on when this is done

    def spans(self) -> tuple[Span, ...]:
        """The actions with their times; raises when the ranks do not come to their ends."""
        spans: list[Span] = []
        ready = list(range(self._schedule.ranks))
        while ready:
            rank = ready.pop()
            row = self._schedule.actions[rank]
            while self._next[rank] < len(row):
                action = row[self._next[rank]]
                start_s = self._start(rank, action)
                if start_s is None:
                    break
                spans.append(self._finish(rank, action, start_s))
                waiting = self._waiting.pop(_made_by(action), None)
                ready += [] if waiting is None else [waiting]
        if any(place < len(row) for place, row in zip(self._next, self._schedule.actions, strict=True)):
            raise ScheduleError(self._describe_deadlock())
        return tuple(spans)

    def _start(self, rank: int, action: Action) -> float | None:
        """When the action starts; None, and the rank waits, when one of its inputs is not there."""
        start_s = self._free_s[rank]
        for needed in _needs(action, len(self._placement)):
            end_s = self._end_s.get(needed)
            if end_s is None:
                self._waiting[needed] = rank
                return None
            start_s = max(start_s, end_s + self._message_s * (self._placement[needed[1]] != rank))
        return start_s

    def _finish(self, rank: int, action: Action, start_s: float) -> Span:
        end_s = start_s + self._costs[action.kind][action.stage]
        self._next[rank] += 1
        self._free_s[rank] = end_s
        if action.kind is not Kind.BACKWARD_WEIGHT:
            self._end_s[_made_by(action)] = end_s
        return Span(rank, start_s, end_s, str(action), action.kind.value, action.stage, action.microbatch)

    def _describe_deadlock(self) -> str:
        waits = [self._describe_wait(rank, needed) for needed, rank in self._waiting.items()]
        return f"a schedule must not deadlock, got one in which {'; '.join(sorted(waits))}"

    def _describe_wait(self, rank: int, needed: tuple[bool, int, int]) -> str:
        is_forward, stage, microbatch = needed
        owner = self._placement[stage]
        kinds = (Kind.FORWARD,) if is_forward else (Kind.BACKWARD, Kind.BACKWARD_INPUT)
        wanted = next(a for k in kinds if self._schedule.position(a := Action(k, stage, microbatch)))
        at, blocker = (self._schedule.actions[r][self._next[r]] for r in (rank, owner))
        behind = "cannot start either" if blocker == wanted else f"has behind {blocker}"
        return f"rank {rank} waits at {at} for {wanted}, which rank {owner} {behind}"


def _made_by(action: Action) -> tuple[bool, int, int]:
    return action.kind is Kind.FORWARD, action.stage, action.microbatch


def _needs(action: Action, stages: int) -> Iterator[tuple[bool, int, int]]:
    """What must have been made before: activations (true) and gradients (false) of stage and microbatch.

    A rank's own forward before its backward, and I before W, need no look: check() saw to their order.
    """
    if action.kind is Kind.FORWARD and action.stage > 0:
        yield True, action.stage - 1, action.microbatch
    if action.kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT) and action.stage < stages - 1:
        yield False, action.stage + 1, action.microbatch


def _peak_activations(schedule: Schedule, limits: Sequence[float], forward_only: bool) -> tuple[int, ...]:
    """The most activations that each rank holds at once; their times do not matter, only the order."""
    peaks = []
    for rank, row in enumerate(schedule.actions):
        held = peak = 0
        for action in row:
            if action.kind is Kind.FORWARD:
                held += 1
                peak = max(peak, held)
                if held > limits[rank]:
                    raise ScheduleError(
                        f"rank {rank} must hold activations of at most {limits[rank]:g} microbatches, got "
                        f"{held} at {action}"
                    )
                held -= forward_only  # nothing is kept for a backward that never comes
            elif action.kind is not Kind.BACKWARD_INPUT:
                held -= 1
        peaks.append(peak)
    return tuple(peaks)


# ---- arguments ---------------------------------------------------------------------------------------------


def _seconds(name: str, value: object) -> float:
    try:
        seconds = math.nan if isinstance(value, (bool, str)) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ScheduleError(f"{name} must be a number of seconds of at least 0, got {value!r}")
    return seconds


def _listed(value: object) -> list[object] | None:
    """The elements of a sequence or an array of one axis; ``None`` for a number."""
    return list(value) if isinstance(value, Iterable) and getattr(value, "ndim", True) else None


def _per_stage(name: str, value: Costs, stages: int) -> list[float]:
    costs = _listed(value)
    if costs is None:
        return [_seconds(name, value)] * stages
    if len(costs) != stages:
        raise ScheduleError(f"{name} must have one number per stage, {stages}, got {len(costs)}")
    return [_seconds(f"{name} of stage {stage}", cost) for stage, cost in enumerate(costs)]


def _per_rank(value: int | Sequence[int] | None, ranks: int) -> list[float]:
    if value is None:
        return [math.inf] * ranks
    limits = _listed(value)
    if limits is None:
        limits = [value] * ranks
    if len(limits) != ranks:
        raise ScheduleError(f"max_activations must have one number per rank, {ranks}, got {len(limits)}")
    return [float(positive("max_activations", limit)) for limit in limits]
