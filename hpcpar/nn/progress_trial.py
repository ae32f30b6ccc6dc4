"""``progress="auto"``: is a progress thread worth its core? Measured in the job itself.

A thread helps when messages need attention while the program computes, and hurts when there is no core to
spare for it; which of the two depends on the machine, the MPI and the model. So the first steps are timed
both ways, step to step, which includes everything that the thread disturbs. Rank 0's medians decide, for all
ranks, because half the ranks with a thread would be the worst of both.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Protocol

import torch

from hpcpar.comm import threads_allowed

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["PROGRESS_CHOICES", "ProgressTrial"]

PROGRESS_CHOICES = ("auto", "hooks", "thread")

_WARM_UP = 3
_STEPS = 6


class ThreadSwitch(Protocol):
    """Something whose progress a thread can make: a reducer, the runtime of a pipeline."""

    @property
    def comm(self) -> Communicator:
        """The ranks that decide together."""

    def use_progress_thread(self, wanted: bool) -> None:
        """Start or stop the thread. Local."""


class ProgressTrial:
    """Decides whether something has a progress thread, at once or after a few measured steps.

    Parameters
    ----------
    reducer
        What to switch.
    progress
        ``"hooks"``, ``"thread"``, or ``"auto"``: hooks where a rank has one core or MPI allows one thread,
        else measure.
    """

    def __init__(self, reducer: ThreadSwitch, progress: str) -> None:
        self._reducer = reducer
        self._steps = 0
        self._last = 0.0
        self._times: dict[bool, list[float]] = {False: [], True: []}
        possible = torch.tensor([int(threads_allowed() and torch.get_num_threads() > 1)])
        if progress == "auto":
            reducer.comm.Bcast(possible)
        self._undecided = progress == "auto" and bool(possible) and reducer.comm.size > 1
        if progress == "thread":
            reducer.use_progress_thread(True)

    def begin_step(self) -> None:
        """Called when a reduction begins, by every rank. Collective when a phase ends, Local otherwise."""
        if not self._undecided:
            return
        now = time.perf_counter()
        threaded = self._steps > _WARM_UP + _STEPS
        if self._steps > _WARM_UP and self._steps != _WARM_UP + _STEPS + 1:
            self._times[threaded].append(now - self._last)
        self._last = now
        self._steps += 1
        if self._steps == _WARM_UP + _STEPS + 1:
            self._reducer.use_progress_thread(True)
        if self._steps == _WARM_UP + 2 * _STEPS + 2:
            self._decide()

    def _decide(self) -> None:
        self._undecided = False
        medians = {threaded: statistics.median(times) for threaded, times in self._times.items()}
        verdict = torch.tensor([int(medians[True] < medians[False])])
        self._reducer.comm.Bcast(verdict)
        self._reducer.use_progress_thread(bool(verdict))
