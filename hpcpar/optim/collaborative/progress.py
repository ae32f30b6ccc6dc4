"""The state of the collaboration: the row of each rank, and what users see of it.

A row is one line of the bulletin (:class:`hpcpar.comm.Bulletin`). *Rounds* are numbered from 0: round *k*
turns version *k* of the replicas into version *k* + 1, and a rank is *at* round *k* while it has version *k*.
A round whose gradients have overflowed counts as a round, but not as a step of the optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from hpcpar.optim.collaborative.accumulation import Totals

__all__ = [
    "CollaborationState",
    "Column",
    "TrainingState",
    "describe_round",
    "is_due",
    "summarize",
    "training_states",
]

Numbers = NDArray[np.float64]


class Column(IntEnum):
    """What a row says, place by place; truths are 0 or 1."""

    ROUND = 0
    """The version of parameters that the rank has."""
    STEP = 1
    """Optimizer steps that have led to it."""
    SAMPLES = 2
    """Accumulated for this round; final once the rank has joined."""
    AHEAD = 3
    """Accumulated for the next round, while this one is under way behind (delayed averaging)."""
    RATE = 4
    """Samples per second that it computes."""
    JOINED = 5
    """Whether it waits for the decision on the members of this round."""
    ACTED = 6
    """Number of the last decision that it has carried out, or that was before the state it has loaded."""
    WANTS = 7
    """1 + the lowest version that it asks for; 0: it needs no state."""
    ASKED = 8
    """Number of times that it has asked for a state."""
    LEFT = 9
    """Whether it contributes nothing more of its own."""


@dataclass(frozen=True)
class TrainingState:
    """What one rank has said about itself.

    Attributes
    ----------
    rank : int
        Which.
    optimizer_step : int
        Global steps in its parameters.
    samples_accumulated : int
        Towards the next one.
    samples_per_second : float
        Average of what it computes; zero for a rank that only assists.
    is_joining : bool
        Whether it waits for an averaging round.
    has_left : bool
        Whether it is in ``shutdown()``.
    """

    rank: int
    optimizer_step: int
    samples_accumulated: int
    samples_per_second: float
    is_joining: bool
    has_left: bool


@dataclass(frozen=True)
class CollaborationState:
    """What all ranks together have accumulated, as far as is known on this one.

    Attributes
    ----------
    optimizer_step : int
        Global steps of the newest parameters.
    samples_accumulated : int
        By all ranks towards the next step.
    target_batch_size : int
        Samples that make a step due.
    num_peers : int
        Ranks.
    num_contributors : int
        Those among them with samples of their own for the next step.
    samples_per_second : float
        Of all ranks together.
    eta_next_step : float
        Seconds until the target is reached at this rate; infinite when nobody computes. An estimate, on
        which nothing depends.
    """

    optimizer_step: int
    samples_accumulated: int
    target_batch_size: int
    num_peers: int
    num_contributors: int
    samples_per_second: float
    eta_next_step: float

    @property
    def ready_for_step(self) -> bool:
        """Whether the next step is due. Local."""
        return self.samples_accumulated >= self.target_batch_size


def training_states(rows: Numbers) -> list[TrainingState]:
    """The rows by name. Local."""
    return [
        TrainingState(
            rank=rank,
            optimizer_step=int(row[Column.STEP]),
            samples_accumulated=int(row[Column.SAMPLES] + row[Column.AHEAD]),
            samples_per_second=float(row[Column.RATE]),
            is_joining=bool(row[Column.JOINED]),
            has_left=bool(row[Column.LEFT]),
        )
        for rank, row in enumerate(rows)
    ]


def summarize(rows: Numbers, target: int) -> CollaborationState:
    """All rows together. Local."""
    newest = rows[rows[:, Column.ROUND] == rows[:, Column.ROUND].max()]
    samples = int(newest[:, Column.SAMPLES].sum())
    rate = float(newest[newest[:, Column.LEFT] == 0.0, Column.RATE].sum())
    missing = max(target - samples, 0)
    return CollaborationState(
        optimizer_step=int(newest[0, Column.STEP]),
        samples_accumulated=samples,
        target_batch_size=target,
        num_peers=len(rows),
        num_contributors=int((newest[:, Column.SAMPLES] > 0).sum()),
        samples_per_second=rate,
        eta_next_step=0.0 if not missing else missing / rate if rate > 0.0 else float("inf"),
    )


def is_due(rows: Numbers, number: int, target: float) -> bool:
    """Whether the ranks at a round have the samples for it, or one of them has found so. Local.

    Samples only grow while a rank is at a round, so what is due by old rows is due by newer ones.
    """
    at = rows[rows[:, Column.ROUND] == number]
    return bool(at[:, Column.SAMPLES].sum() >= target or at[:, Column.JOINED].any())


def describe_round(state: CollaborationState, step: int, totals: Totals, members: int, seconds: float) -> str:
    """A line about a round that has just ended. Local.

    Parameters
    ----------
    state
        Afterwards.
    step
        Global steps.
    totals, members, seconds
        Of the round.
    """
    failed = " is not made, since gradients have overflowed" if totals.has_overflowed else ""
    return (
        f"global step {step}{failed}: {totals.samples} samples, {members} ranks, "
        f"{state.samples_per_second:.1f} samples/s, averaged in {seconds:.3f} s, "
        f"next in {state.eta_next_step:.1f} s"
    )
