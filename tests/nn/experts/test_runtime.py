"""Runtimes: threads that serve pools, end when told to, and are not ended by anything else."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch

from hpcpar.errors import HpcparError
from hpcpar.nn.experts.runtime import Runtime
from hpcpar.nn.experts.task_pool import TaskPool
from tests.nn.experts.pools import Recorder, passive, rows

pytestmark = pytest.mark.local


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def pool(recorder: Recorder) -> Iterator[TaskPool]:
    with TaskPool(recorder, name="threaded", max_batch_size=8, timeout=0.01) as pool:
        yield pool


def test_pool_starts_its_thread_with_the_first_task(recorder: Recorder) -> None:
    names = {thread.name for thread in threading.enumerate()}
    with TaskPool(recorder, name="lazy", max_batch_size=8, timeout=0.01) as pool:
        assert {thread.name for thread in threading.enumerate()} == names
        assert pool.submit_task(rows(1)).result(10).item() == 2
        assert recorder.threads == {"hpcpar-lazy"}
    assert "hpcpar-lazy" not in {thread.name for thread in threading.enumerate()}


def test_many_threads_get_their_own_answers(pool: TaskPool, recorder: Recorder) -> None:
    def ask(number: int) -> bool:
        task = torch.full((number % 11, 1), 100.0 + number)
        return torch.equal(pool.submit_task(task).result(30), task * 2)

    with ThreadPoolExecutor(8) as executor:
        assert all(executor.map(ask, range(200)))
    stats = pool.stats()
    assert stats.rows == sum(number % 11 for number in range(200))
    assert max(recorder.sizes) == stats.largest_batch <= 8


def test_timeout_sends_a_small_batch_off(recorder: Recorder) -> None:
    with TaskPool(recorder, name="small", min_batch_size=8, max_batch_size=8, timeout=0.02) as pool:
        assert pool.submit_task(rows(1)).result(10).item() == 2


def test_failure_does_not_end_the_thread(pool: TaskPool) -> None:
    for _ in range(3):
        with pytest.raises(ValueError, match="unlucky"):
            pool.submit_task(rows(13)).result(10)
        assert pool.submit_task(rows(1)).result(10).item() == 2


def test_system_exit_of_the_function_does_not_end_the_thread() -> None:
    def leave(x: torch.Tensor) -> torch.Tensor:
        if x.item() == 13:
            raise SystemExit(1)
        return x

    with TaskPool(leave, name="exit", max_batch_size=1, timeout=0.0) as pool:
        assert isinstance(pool.submit_task(rows(13)).exception(10), SystemExit)
        assert pool.submit_task(rows(1)).result(10).item() == 1


def test_shutdown_finishes_what_is_queued(recorder: Recorder) -> None:
    pool = TaskPool(recorder, name="last", min_batch_size=8, max_batch_size=8, timeout=math.inf)
    futures = [pool.submit_task(rows(value)) for value in range(3)]
    pool.shutdown()
    assert [future.result(0).item() for future in futures] == [0, 2, 4]
    pool.shutdown()
    pool.shutdown(wait=False)
    with pytest.raises(HpcparError, match="after its shutdown"):
        pool.submit_task(rows(1))
    with pytest.raises(HpcparError, match="after its shutdown"):
        pool.try_submit(rows(1))


def test_shutdown_of_a_passive_pool_finishes_in_the_caller(recorder: Recorder) -> None:
    pool = passive(recorder, min_batch_size=4)
    future = pool.submit_task(rows(1))
    pool.shutdown()
    assert future.result(0).item() == 2
    assert recorder.threads == {threading.current_thread().name}


def test_shutdown_from_within_a_callback_does_not_hang(recorder: Recorder) -> None:
    pool = TaskPool(recorder, name="self", max_batch_size=8, timeout=0.0)
    ended: Future[None] = Future()

    def end(_: Future[Any]) -> None:
        pool.shutdown()
        ended.set_result(None)

    pool.submit_task(rows(1)).add_done_callback(end)
    ended.result(10)


def test_one_runtime_serves_several_pools_oldest_first() -> None:
    order: list[str] = []
    begun, released = threading.Event(), threading.Event()

    def first(x: torch.Tensor) -> torch.Tensor:
        order.append("first")
        begun.set()
        released.wait(10)
        return x

    def second(x: torch.Tensor) -> torch.Tensor:
        order.append("second")
        return x + 1

    pools = [passive(first, max_batch_size=1), passive(second, max_batch_size=1)]
    with Runtime(pools):
        pools[0].submit_task(rows(1))
        assert begun.wait(10)
        futures = [pools[place].submit_task(rows(1)) for place in (1, 0, 1)]
        released.set()
        for future in futures:
            future.result(10)
    assert order == ["first", "second", "first", "second"]


def test_runtime_finishes_its_pools_at_shutdown(recorder: Recorder) -> None:
    pools = [passive(recorder, min_batch_size=4, timeout=math.inf) for _ in range(2)]
    runtime = Runtime(pools)
    futures = [pool.submit_task(rows(1)) for pool in pools]
    runtime.shutdown()
    assert all(future.done() for future in futures)
