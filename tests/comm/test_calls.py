"""Calls between ranks, from any thread, of any tensors: replies, failures, and replies that come late."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import hpcpar
from hpcpar.comm import CallExchange, Communicator, ServedCall
from hpcpar.errors import CommunicatorFreedError, MismatchError, StalledError
from tests.threads import in_threads

ECHO, FAIL, MUTE, ADD = range(4)


def answer(call: ServedCall, held: list[ServedCall]) -> None:
    procedure, number = call.words
    if procedure == FAIL:
        call.fail(f"no {number}: ü")
    elif procedure == MUTE:
        held.append(call)
    elif procedure == ADD:
        call.reply([tensor + number for tensor in call.tensors])
    else:
        call.reply(call.tensors)


class Served:
    """Serves calls from a thread, or in the waits of the program."""

    needed_by_others = False

    def __init__(self, calls: CallExchange) -> None:
        self.calls = calls
        self.held: list[ServedCall] = []

    def progress(self) -> None:
        for call in self.calls.take():
            answer(call, self.held)
        self.calls.progress()

    def release(self) -> None:
        while self.held:
            self.held.pop().reply([torch.zeros(1)])


@contextmanager
def exchange(comm: Communicator, *, threaded: bool = True) -> Iterator[tuple[CallExchange, Served]]:
    """A call exchange that is served on every rank inside of the block; its end is collective."""
    calls = CallExchange(comm)
    served = Served(calls)
    stop = threading.Event()

    def serve() -> None:
        while not stop.wait(0.0002):
            served.progress()

    thread = threading.Thread(target=serve)
    if threaded:
        thread.start()
    else:
        hpcpar.comm.progress.ENGINE.add(served)
    try:
        yield calls, served
        comm.Barrier()
    finally:
        stop.set()
        if threaded:
            thread.join()
        hpcpar.comm.progress.ENGINE.discard(served)
    calls.free()


@pytest.mark.parametrize("threaded", [True, False], ids=["thread", "cooperative"])
def test_tensors_of_any_kind_come_back_from_every_rank(comm: Communicator, threaded: bool) -> None:
    tensors = [
        torch.arange(6, dtype=torch.float64).reshape(2, 3).T,
        torch.randn(3, 4).to(torch.bfloat16),
        torch.tensor([True, False]),
        torch.zeros(0, 5),
        torch.tensor(7, dtype=torch.int16),
        torch.randn(4, dtype=torch.complex64).conj(),
        torch.randn(2, 2).expand(3, 2, 2),
        torch.randn(3, requires_grad=True),
    ]
    with exchange(comm, threaded=threaded) as (calls, _):
        for dest in range(comm.size):
            replies = calls.call(dest, (ECHO, 0), tensors).wait()
            assert len(replies) == len(tensors)
            for reply, tensor in zip(replies, tensors, strict=True):
                assert reply.dtype == tensor.dtype
                assert torch.equal(reply, tensor)


def test_large_tensors_travel_to_all_ranks_at_once(comm: Communicator) -> None:
    with exchange(comm) as (calls, _):
        x = torch.randn(300_000)
        under_way = [calls.call(dest, (ADD, dest), [x, x + 1]) for dest in range(comm.size)]
        for dest, call in enumerate(under_way):
            first, second = call.wait()
            assert torch.equal(first, x + dest)
            assert torch.equal(second, x + 1 + dest)


def test_many_threads_of_all_ranks_call_at_once(comm: Communicator) -> None:
    with exchange(comm) as (calls, _):

        def work(thread: int) -> None:
            for turn in range(10):
                x = torch.full((thread + 1, 3), float(turn))
                call = calls.call((thread + turn) % comm.size, (ADD, thread), [x])
                assert torch.equal(call.wait()[0], x + thread)

        in_threads(6, work)


def test_many_calls_are_under_way_and_end_in_any_order(comm: Communicator) -> None:
    with exchange(comm) as (calls, _):
        dest = (comm.rank + 1) % comm.size
        under_way = [calls.call(dest, (ADD, n), [torch.ones(n)]) for n in range(200)]
        for n, call in reversed(list(enumerate(under_way))):
            assert torch.equal(call.wait()[0], torch.ones(n) + n)
            assert call.test()
        assert calls.all_answered()


def test_tags_are_used_again_but_never_twice_at_once(comm: Communicator) -> None:
    with exchange(comm) as (calls, _):
        calls._tags = 6
        for n in range(12):
            assert calls.call(0, (ADD, n), [torch.zeros(1)]).wait()[0] == n
        under_way = [calls.call(0, (ADD, n), [torch.zeros(1)]) for n in range(5)]
        assert len({call.tag for call in under_way}) == 5
        with pytest.raises(hpcpar.errors.HpcparError, match="at most 5 calls"):
            calls.call(0, (ECHO, 0), [])
        assert [call.wait()[0].item() for call in under_way] == list(range(5))


def test_failure_comes_back_as_text(comm: Communicator) -> None:
    with exchange(comm) as (calls, _):
        call = calls.call(comm.size - 1, (FAIL, 3), [torch.ones(2)])
        assert call.wait() == []
        assert call.failure == "no 3: ü"


def test_late_reply_of_an_abandoned_call_is_taken_by_no_other(comm: Communicator) -> None:
    with exchange(comm) as (calls, served):
        calls._tags = 4
        with pytest.raises(StalledError) as caught:
            calls.call(0, (MUTE, 0), [torch.ones(1000)]).wait(timeout_s=0.05)
        assert caught.value.waiting_for == (0,)
        for n in range(8):
            assert calls.call(0, (ADD, n), [torch.ones(1)]).wait()[0] == n + 1
        assert not calls.all_answered()
        comm.Barrier()
        served.release()
        comm.Barrier()
        # One more round trip behind the late reply.
        calls.call(0, (ECHO, 0), []).wait()
        hpcpar.comm.wait_for_peers(calls.all_answered, comm, lambda: ("late reply", [0]))


def test_call_that_says_too_much_is_refused_before_it_is_sent(comm: Communicator) -> None:
    with exchange(comm) as (calls, _):
        with pytest.raises(MismatchError, match="must fit 256 words"):
            calls.call(0, (ECHO, 0), [torch.zeros(1, 1, 1)] * 60)
        with pytest.raises(RuntimeError):
            calls.call(0, (ECHO, 0), [torch.ones(1), torch.eye(2).to_sparse()])
        assert calls.all_answered()
        assert calls.call(0, (ADD, 1), [torch.zeros(1)]).wait()[0] == 1


def test_replies_that_cannot_be_sent_leave_the_call_to_be_failed(comm: Communicator) -> None:
    with exchange(comm) as (calls, served):
        call = calls.call(comm.rank, (MUTE, 0), [])
        hpcpar.comm.wait_for_peers(lambda: bool(served.held), comm, lambda: ("call", []))
        with pytest.raises(MismatchError, match="must fit"):
            served.held[0].reply([torch.zeros(1)] * 200)
        served.held.pop().fail("x" * 100_000)
        assert call.wait() == []
        assert call.failure is not None
        assert set(call.failure) == {"x"}


def test_exchange_is_not_used_after_free(comm: Communicator) -> None:
    calls = CallExchange(comm)
    calls.free()
    with pytest.raises(CommunicatorFreedError):
        calls.call(0, (ECHO, 0), [])


def test_all_ranks_hear_each_others_farewell(comm: Communicator) -> None:
    calls = CallExchange(comm)
    farewell = calls.farewell()
    hpcpar.comm.wait_for_peers(farewell.is_over, comm, lambda: ("farewell", farewell.missing))
    assert farewell.missing == []
    calls.free()
