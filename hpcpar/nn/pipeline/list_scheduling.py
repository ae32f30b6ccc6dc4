"""List scheduling: a schedule as the diary of ranks that always do the most urgent thing they can.

Simulated time goes from one action's end to the next. Whenever a rank is free, it looks at the first action
that is left of each kind on each of its stages, leaves out those whose inputs are not there and those that it
may not start yet, and starts the one with the smallest priority; when none is left, it sleeps until an end
gives it a new one::

    rank 1, free at time 7      first of each kind     inputs      admitted     priority
                                1F5                    at 6        no: memory
                                1I3                    at 7        yes          1   <- starts
                                1W2                    at 5        yes          3

Forwards of a stage go in the order of the microbatches, and so do its backwards and its ``W``. This is what
excludes deadlocks, whatever the priorities: nothing on any rank comes before the oldest unfinished microbatch
except what is under way. So long as ``admit`` lets a microbatch in where it is the oldest one, the work ends.

Of the times only the order is kept. All ranks compute the same schedule: nothing here is left to chance.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Container, Sequence
from typing import Any

from hpcpar.errors import ScheduleError
from hpcpar.nn.pipeline.schedule import Action, Kind, Schedule

__all__ = ["Progress", "forward_only", "list_schedule"]


class Progress:
    """How many microbatches every stage has started, which is what ``admit`` may look at.

    Parameters
    ----------
    placement
        The rank of each stage.
    """

    def __init__(self, placement: Sequence[int]) -> None:
        stages = len(placement)
        self.forwards = [0] * stages
        self.backwards = [0] * stages  # B and I
        self.released = [0] * stages  # B and W: those of which no activations are held any more

    def in_flight(self, stage: int) -> int:
        """Microbatches that have gone forward through a stage and not back."""
        return self.forwards[stage] - self.backwards[stage]

    def held(self, stage: int) -> int:
        """Microbatches of which a stage holds activations."""
        return self.forwards[stage] - self.released[stage]


def list_schedule(
    placement: Sequence[int],
    microbatches: int,
    *,
    priority: Callable[[Action, Progress], Any],
    split: Sequence[Container[int]] | None = None,
    duration: Callable[[Action], int] = lambda action: 1,
    admit: Callable[[Action, Progress], bool] = lambda action, progress: True,
    backwards: bool = True,
    name: str = "",
) -> Schedule:
    """Make a schedule. **Local.**

    Parameters
    ----------
    placement
        The rank of each stage.
    microbatches
        How many.
    priority
        Of the actions that a rank could start it starts the one for which this is smallest. It may look at
        the progress of that rank's stages.
    split
        For each stage the microbatches whose backward is ``I`` and ``W``; none by default.
    duration
        Ticks that an action takes. Whole numbers, so that what ends together ends together.
    admit
        Whether an action may start; for forwards only. It is asked again when something has changed on its
        rank, so it may look at the progress of that rank's stages, and no other's.
    backwards
        Whether there are any.
    name
        Of the schedule.

    Raises
    ------
    ScheduleError
        When ``admit`` has kept the work from its end.
    """
    work = _Work(placement, microbatches, split or [()] * len(placement), backwards)
    ends: list[tuple[int, int, Action]] = []  # a heap; each rank is in it once at most
    rows: list[list[Action]] = [[] for _ in range(max(placement) + 1)]
    busy = [False] * len(rows)
    awake = set(range(len(rows)))
    now = 0
    while True:
        for rank in sorted(awake):
            ready = [] if busy[rank] else work.ready(rank)
            allowed = [a for a in ready if a.kind is not Kind.FORWARD or admit(a, work.progress)]
            if allowed:
                action = min(allowed, key=lambda a: priority(a, work.progress))
                work.start(action)
                rows[rank].append(action)
                busy[rank] = True
                heapq.heappush(ends, (now + duration(action), rank, action))
        if not ends:
            break
        awake.clear()
        now = ends[0][0]
        while ends and ends[0][0] == now:
            _, rank, action = heapq.heappop(ends)
            busy[rank] = False
            awake |= {rank, *work.finish(action)}
    if not work.done():
        raise ScheduleError(
            "a rule that admits microbatches must admit the oldest one, got one that does not"
        )
    return Schedule(rows, name)


class _Work:
    """What is left to do, and which of it could start now."""

    def __init__(
        self, placement: Sequence[int], microbatches: int, split: Sequence[Container[int]], backwards: bool
    ) -> None:
        self._placement = placement
        self._microbatches = microbatches
        self._backwards = backwards
        self._split = [[m in parts for m in range(microbatches)] for parts in split]
        # The microbatches that wait for their W, of each stage, and how many of these have been started.
        self._weights: list[list[int]] = [[] for _ in placement]
        self._weights_started = [0] * len(placement)
        self._forwards_ended = [0] * len(placement)
        self._backwards_ended = [0] * len(placement)
        self._stages: list[list[int]] = [[] for _ in range(max(placement) + 1)]
        for stage, rank in enumerate(placement):
            self._stages[rank].append(stage)
        self.progress = Progress(placement)

    def ready(self, rank: int) -> list[Action]:
        """The first action of each kind of each stage of a rank, when its inputs are there."""
        ready: list[Action] = []
        last = len(self._placement) - 1
        for stage in self._stages[rank]:
            forward, backward = self.progress.forwards[stage], self.progress.backwards[stage]
            before = self._forwards_ended[stage - 1] if stage > 0 else self._microbatches
            if forward < before:
                ready.append(Action(Kind.FORWARD, stage, forward))
            after = self._backwards_ended[stage + 1] if stage < last else self._microbatches
            if self._backwards and backward < min(self._forwards_ended[stage], after):
                kind = Kind.BACKWARD_INPUT if self._split[stage][backward] else Kind.BACKWARD
                ready.append(Action(kind, stage, backward))
            if self._weights_started[stage] < len(self._weights[stage]):
                microbatch = self._weights[stage][self._weights_started[stage]]
                ready.append(Action(Kind.BACKWARD_WEIGHT, stage, microbatch))
        return ready

    def start(self, action: Action) -> None:
        """Count an action as started."""
        stage = action.stage
        if action.kind is Kind.FORWARD:
            self.progress.forwards[stage] += 1
        elif action.kind is Kind.BACKWARD_WEIGHT:
            self._weights_started[stage] += 1
            self.progress.released[stage] += 1
        else:
            self.progress.backwards[stage] += 1
            self.progress.released[stage] += action.kind is Kind.BACKWARD

    def finish(self, action: Action) -> list[int]:
        """Count an action as ended; returns the ranks that have waited for it, perhaps."""
        stage = action.stage
        if action.kind is Kind.FORWARD:
            self._forwards_ended[stage] += 1
            return list(self._placement[stage + 1 : stage + 2])
        if action.kind is Kind.BACKWARD_WEIGHT:
            return []
        self._backwards_ended[stage] += 1
        if action.kind is Kind.BACKWARD_INPUT:
            self._weights[stage].append(action.microbatch)
        return [self._placement[stage - 1]] if stage > 0 else []

    def done(self) -> bool:
        """Whether everything has been started."""
        finished = self.progress.released if self._backwards else self.progress.forwards
        return all(count == self._microbatches for count in finished)


def forward_only(schedule: Schedule) -> Schedule:
    """The forwards of a schedule, for inference, in an order that keeps all ranks at work. **Local.**

    The result has no backwards: :meth:`~hpcpar.nn.pipeline.schedule.Schedule.check` and
    :func:`~hpcpar.nn.pipeline.simulate.simulate` want ``forward_only=True`` for it.

    Raises
    ------
    ScheduleError
        When a stage has actions on two ranks, or none.
    """
    # The oldest microbatch first: where a rank has several stages, results leave as soon as they can.
    return list_schedule(
        schedule.placement,
        schedule.microbatches,
        priority=lambda action, progress: (action.microbatch, action.stage),
        backwards=False,
        name=f"{schedule.name} forward".strip(),
    )
