"""The trial of the progress thread: the same verdict on every rank, the faster way wins."""

from __future__ import annotations

import pytest
import torch

from hpcpar.comm import BucketLayout, Communicator, Reducer
from hpcpar.nn import progress_trial
from hpcpar.nn.progress_trial import ProgressTrial

pytestmark = pytest.mark.mpi


class Clock:
    """Time passes by ``tick_s`` at each look, which depends on whether the reducer has its thread."""

    def __init__(self, hooks_s: float, thread_s: float) -> None:
        self.now, self.hooks_s, self.thread_s = 0.0, hooks_s, thread_s
        self.reducer: Reducer | None = None

    def perf_counter(self) -> float:
        threaded = self.reducer is not None and self.reducer._thread is not None
        self.now += self.thread_s if threaded else self.hooks_s
        return self.now


@pytest.mark.parametrize(("hooks_s", "thread_s"), [(1.0, 2.0), (2.0, 1.0)])
def test_faster_way_on_rank_0_wins_everywhere(
    comm: Communicator, hooks_s: float, thread_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if comm.rank:
        hooks_s, thread_s = thread_s, hooks_s  # what other ranks measure does not count
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4 if comm.rank == 0 else 1)
    clock = Clock(hooks_s, thread_s)
    monkeypatch.setattr(progress_trial, "time", clock)
    reducer = clock.reducer = Reducer(comm, [BucketLayout(torch.float32, 10)])
    trial = ProgressTrial(reducer, "auto")
    for _ in range(30):
        trial.begin_step()
        reducer.begin()
        reducer.publish(0)
        reducer.wait_all()
    verdicts = comm.allgather(reducer._thread is not None)
    reducer.free()
    chosen_by_rank_0 = comm.bcast(thread_s < hooks_s, 0)
    assert verdicts == [chosen_by_rank_0 and comm.size > 1] * comm.size


def test_one_core_means_hooks_without_a_trial(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1 if comm.rank == 0 else 8)
    reducer = Reducer(comm, [BucketLayout(torch.float32, 10)])
    trial = ProgressTrial(reducer, "auto")
    for _ in range(30):
        trial.begin_step()
    assert reducer._thread is None
    reducer.free()
