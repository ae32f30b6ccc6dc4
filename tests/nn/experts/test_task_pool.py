"""Task pools: every task gets its own rows, in batches that are formed as promised, whatever others do."""

from __future__ import annotations

import math
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any

import pytest
import torch

from hpcpar.errors import HpcparError, MismatchError
from hpcpar.nn.experts.task_pool import Request
from hpcpar.nn.pipeline.randomness import mix
from tests.nn.experts.pools import Recorder, passive, rows, run_all

pytestmark = pytest.mark.local


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


# ---- answers -----------------------------------------------------------------------------------------------


def test_each_task_gets_its_own_rows(recorder: Recorder) -> None:
    pool = passive(recorder)
    tasks = [rows(1), rows(2, 3), rows(4), rows(5, 6)]
    futures = [pool.submit_task(task) for task in tasks]
    run_all(pool)
    for task, future in zip(tasks, futures, strict=True):
        assert torch.equal(future.result(0), task * 2)
    assert recorder.sizes == [4, 2]


def test_result_has_the_structure_of_the_function() -> None:
    pool = passive(lambda x, y: (x + y, None, x.sum(1)))
    futures = [pool.submit_task(rows(n), rows(n)) for n in range(2)]
    run_all(pool)
    total, nothing, summed = futures[1].result(0)
    assert nothing is None and total.tolist() == [[2.0]] and summed.tolist() == [1.0]


def test_function_may_return_a_list() -> None:
    pool = passive(lambda x: [x, None])
    futures = [pool.submit_task(rows(1)), pool.submit_task(torch.ones(9, 1))]
    run_all(pool)
    assert futures[0].result(0) == [rows(1), None]
    assert len(futures[1].result(0)[0]) == 9


@pytest.mark.parametrize("count", [0, 1, 4, 5, 8, 11])
def test_task_of_any_size_comes_back_whole(recorder: Recorder, count: int) -> None:
    pool = passive(lambda x: (recorder(x), None))
    x = torch.arange(float(count)).reshape(-1, 1) + 20
    future = pool.submit_task(x)
    run_all(pool)
    result, nothing = future.result(0)
    assert torch.equal(result, x * 2) and nothing is None
    assert recorder.sizes == ([4] * (count // 4) + [count % 4] * (count % 4 > 0) or [0])


def test_cuts_and_seeds_of_a_large_task_do_not_depend_on_the_queue(recorder: Recorder) -> None:
    pool = passive(recorder, with_requests=True)
    pool.submit_task(rows(1), seed=1)
    pool.submit_task(torch.zeros(6, 1), seed=7)
    run_all(pool)
    parts = [request for batch in recorder.requests for request in batch]
    assert parts == [Request(1, 1), Request(4, mix(7, 0)), Request(2, mix(7, 1))]


def test_function_learns_requests_in_row_order(recorder: Recorder) -> None:
    pool = passive(recorder, with_requests=True)
    pool.submit_task(rows(1, 2), seed=5, training=False)
    pool.submit_task(rows(3), training=False)
    pool.process_batch()
    assert recorder.requests == [(Request(2, 5, False), Request(1, None, False))]
    assert recorder.batches[0].tolist() == [[1.0], [2.0], [3.0]]


def test_inputs_come_without_a_graph() -> None:
    pool = passive(lambda x: torch.full_like(x, float(x.requires_grad)))
    future = pool.submit_task(rows(1).requires_grad_())
    run_all(pool)
    assert future.result(0).item() == 0.0


# ---- batches -----------------------------------------------------------------------------------------------


def test_tasks_that_look_different_are_batched_apart(recorder: Recorder) -> None:
    pool = passive(recorder)
    pool.submit_task(torch.zeros(1, 2))
    pool.submit_task(torch.zeros(1, 3))
    pool.submit_task(torch.zeros(1, 2, dtype=torch.float64))
    pool.submit_task(torch.zeros(1, 2), training=False)
    pool.submit_task(torch.zeros(1, 3))
    run_all(pool)
    assert [tuple(batch.shape) for batch in recorder.batches] == [(1, 2), (2, 3), (1, 2), (1, 2)]


def test_oldest_task_decides_whose_turn_it_is(recorder: Recorder) -> None:
    pool = passive(recorder)
    pool.submit_task(torch.zeros(1, 3))  # alone with its shape, and first
    for _ in range(8):
        pool.submit_task(torch.zeros(1, 2))
    run_all(pool)
    assert [tuple(batch.shape) for batch in recorder.batches] == [(1, 3), (4, 2), (4, 2)]


def test_tasks_of_a_key_stay_in_order(recorder: Recorder) -> None:
    pool = passive(recorder)
    for values in ((1, 2, 3), (4, 5), (6,)):  # the 6 would fit beside the first task
        pool.submit_task(rows(*values))
    run_all(pool)
    assert recorder.sizes == [3, 3]
    assert torch.cat(recorder.batches).flatten().tolist() == [1, 2, 3, 4, 5, 6]


def test_batch_is_due_with_min_batch_size_or_after_the_timeout(recorder: Recorder) -> None:
    pool = passive(recorder, min_batch_size=3, timeout=10.0)
    now = time.monotonic()
    assert pool.ready_since(now) is None and pool.due_in(now) is None
    pool.submit_task(rows(1))
    now = time.monotonic()
    assert pool.ready_since(now) is None
    waiting = pool.due_in(now)
    assert waiting is not None and 0 < waiting <= 10
    arrived = pool.ready_since(now + 10)
    assert arrived is not None and arrived <= now
    assert pool.due_in(now + 10) == 0
    pool.submit_task(rows(2, 3))
    assert pool.ready_since(now) == arrived and pool.due_in(now) == 0
    assert recorder.batches == []


def test_key_with_enough_rows_goes_before_one_that_waits_for_more(recorder: Recorder) -> None:
    pool = passive(recorder, min_batch_size=2)
    pool.submit_task(torch.zeros(1, 3))
    pool.submit_task(torch.zeros(2, 2))
    pool.process_batch()
    assert recorder.batches[0].shape == (2, 2)
    assert pool.ready_since(time.monotonic()) is None


def test_process_batch_takes_the_oldest_when_nothing_is_due(recorder: Recorder) -> None:
    pool = passive(recorder, min_batch_size=4)
    future = pool.submit_task(rows(1))
    assert pool.process_batch() and future.done()
    assert not pool.process_batch()


# ---- failures ----------------------------------------------------------------------------------------------


def test_one_bad_task_fails_alone(recorder: Recorder) -> None:
    pool = passive(recorder)
    futures = [pool.submit_task(rows(value)) for value in (1, 13, 3)]
    run_all(pool)
    assert futures[0].result(0).item() == 2 and futures[2].result(0).item() == 6
    with pytest.raises(ValueError, match="unlucky"):
        futures[1].result(0)
    assert recorder.sizes == [3, 1, 1, 1]
    assert pool.stats().failed == 1


def test_large_task_fails_as_a_whole_and_the_rest_of_it_is_not_run(recorder: Recorder) -> None:
    pool = passive(recorder)
    future = pool.submit_task(torch.full((12, 1), 13.0))
    run_all(pool)
    with pytest.raises(ValueError, match="unlucky"):
        future.result(0)
    assert recorder.sizes == [4]


def test_nan_of_one_task_stays_there(recorder: Recorder) -> None:
    pool = passive(recorder)
    futures = [pool.submit_task(rows(value)) for value in (1, math.nan, 3)]
    run_all(pool)
    assert futures[0].result(0).item() == 2 and futures[1].result(0).isnan().all()


@pytest.mark.parametrize("result", [torch.zeros(5, 1), torch.tensor(1.0), None, [torch.zeros(5, 1)]])
def test_function_that_returns_something_else_fails_its_tasks(result: Any) -> None:
    pool = passive(lambda x: result)
    future = pool.submit_task(rows(1))
    run_all(pool)
    with pytest.raises(MismatchError, match="must return"):
        future.result(0)


@pytest.mark.parametrize("tensors", [(), (1.0,), (torch.tensor(1.0),), (torch.zeros(2), torch.zeros(3))])
def test_task_that_is_no_batch_is_refused_at_submission(tensors: tuple[Any, ...]) -> None:
    with pytest.raises(MismatchError):
        passive(lambda x: x).submit_task(*tensors)


def test_check_refuses_at_submission(recorder: Recorder) -> None:
    def check(x: torch.Tensor) -> None:
        if x.shape[1] != 2:
            raise MismatchError("two columns")

    pool = passive(recorder, check=check)
    with pytest.raises(MismatchError, match="two columns"):
        pool.submit_task(torch.zeros(1, 3))
    assert pool.due_in(time.monotonic()) is None


def test_keyboard_interrupt_reaches_task_and_caller() -> None:
    def interrupt(x: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    pool = passive(interrupt)
    future = pool.submit_task(rows(1))
    with pytest.raises(KeyboardInterrupt):
        pool.process_batch()
    assert isinstance(future.exception(0), KeyboardInterrupt)


def test_cancelled_task_is_dropped(recorder: Recorder) -> None:
    pool = passive(recorder)
    futures = [pool.submit_task(rows(value)) for value in range(5)]
    large = pool.submit_task(torch.zeros(9, 1))
    assert futures[1].cancel() and large.cancel()
    run_all(pool)
    assert torch.cat(recorder.batches).flatten().tolist() == [0, 2, 3, 4]
    with pytest.raises(CancelledError):
        futures[1].result(0)
    assert pool.stats().tasks == 4


@pytest.mark.parametrize(
    "options",
    [
        {"min_batch_size": 0},
        {"min_batch_size": 5},
        {"max_batch_size": 0},
        {"max_queued": 0},
        {"timeout": -1.0},
        {"timeout": math.nan},
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(HpcparError, match="must be"):
        passive(lambda x: x, **options)


# ---- the queue's limit -------------------------------------------------------------------------------------


def test_full_queue_pushes_back(recorder: Recorder) -> None:
    pool = passive(recorder, max_queued=3)
    assert pool.try_submit(rows(1, 2)) is not None
    assert pool.try_submit(rows(3, 4)) is None
    assert pool.try_submit(torch.zeros(0, 1)) is not None  # counts as a row
    assert pool.try_submit(torch.zeros(0, 1)) is None
    with ThreadPoolExecutor(1) as executor:
        blocked = executor.submit(pool.submit_task, rows(5))
        assert not blocked.done()
        pool.process_batch()
        future = blocked.result(10)
        pool.process_batch()
        assert future.result(10).item() == 10


def test_task_larger_than_the_queue_is_let_in_alone(recorder: Recorder) -> None:
    pool = passive(recorder, max_queued=3)
    future = pool.try_submit(torch.zeros(9, 1))
    assert future is not None
    assert pool.try_submit(rows(1)) is None
    run_all(pool)
    assert len(future.result(0)) == 9


def test_shutdown_wakes_whoever_waits_for_room(recorder: Recorder) -> None:
    pool = passive(recorder, max_queued=1)
    first = pool.submit_task(rows(1))
    with ThreadPoolExecutor(1) as executor:
        blocked = executor.submit(pool.submit_task, rows(2))
        pool.shutdown(wait=False)
        with pytest.raises(HpcparError, match="shutdown"):
            blocked.result(10)
    with pytest.raises(HpcparError, match="shut down"):
        first.result(0)


# ---- around the queue -------------------------------------------------------------------------------------


def test_listener_hears_of_each_submission(recorder: Recorder) -> None:
    heard: list[int] = []
    pool = passive(recorder)

    def listener() -> None:
        heard.append(1)

    pool.add_listener(listener)
    pool.submit_task(rows(1))
    pool.try_submit(rows(1))
    pool.remove_listener(listener)
    pool.submit_task(rows(1))
    assert len(heard) == 2


def test_stats_count_what_was_run(recorder: Recorder) -> None:
    pool = passive(recorder)
    assert pool.stats().mean_batch_size == 0
    for value in (1, 2, 3):
        pool.submit_task(rows(value, value))
    run_all(pool)
    stats = pool.stats()
    assert (stats.tasks, stats.batches, stats.rows, stats.largest_batch) == (3, 2, 6, 4)
    assert stats.mean_batch_size == 3
    assert 0 < stats.waiting_mean_s <= stats.waiting_max_s and stats.compute_s > 0 and stats.failed == 0
