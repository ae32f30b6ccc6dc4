"""The server: many callers at once, experts that fail, blocks that end in one way or another."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hpcpar
from hpcpar.comm import Communicator
from hpcpar.errors import HpcparError, MismatchError, RankFailedError, RemoteExpertError
from hpcpar.nn.experts.backend import ExpertBackend
from hpcpar.nn.experts.client import RemoteExpert
from hpcpar.nn.experts.descriptor import BatchTensorDescriptor
from hpcpar.nn.experts.network import ExpertNetwork
from hpcpar.nn.experts.server import ExpertServer
from tests.nn.experts.serving import WIDTH, backend, backends_of, expert
from tests.threads import in_threads

DOUBLE = torch.float64
THREADED = pytest.mark.parametrize("threaded", [None, False], ids=["thread", "cooperative"])


def x_of(rows: int = 4, **options: Any) -> Tensor:
    return torch.randn(rows, WIDTH, **{"dtype": DOUBLE, **options})


def untrained(uid: str, module: nn.Module, **options: Any) -> ExpertBackend:
    schema = BatchTensorDescriptor(WIDTH, dtype=DOUBLE)
    return ExpertBackend(uid, module, None, args_schema=schema, outputs_schema=schema, **options)


class Sometimes(nn.Module):
    """Raises for an infinity, and otherwise for NaN."""

    def forward(self, x: Tensor) -> Tensor:
        if x.isinf().any():
            raise ValueError("the tenth call")
        if x.isnan().any():
            raise SystemExit("not a number")
        return x * 2


class Slow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.02)
        return x + 1


# ---- many callers ------------------------------------------------------------------------------------------


@THREADED
def test_all_ranks_train_experts_of_all_ranks_at_once(comm: Communicator, threaded: bool | None) -> None:
    """Sums of gradients commute, so that the order in which requests come does not matter."""
    uids = [f"expert.{i}" for i in range(2 * comm.size)]
    steps = 4
    rows = steps * comm.size * 3  # all examples that an expert gets make one update
    served = backends_of(comm, uids, expert, samples_per_update=rows)
    data = torch.randn(comm.size, steps, 3, WIDTH, dtype=DOUBLE)
    with ExpertServer(comm, served, threaded=threaded) as server:
        assert server.uids == tuple(sorted(uids))
        experts = [RemoteExpert(uid, comm) for uid in uids]
        for x in data[comm.rank]:
            sum(remote(x).square().sum() for remote in experts).backward()
    for uid, own in served.items():
        reference = expert(uids.index(uid))
        optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
        reference(data.reshape(-1, WIDTH)).square().sum().backward()
        optimizer.step()
        assert own.get_stats() == {"updates": 1, "examples_processed": rows}
        for ours, theirs in zip(own.expert.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_threads_of_each_rank_call_many_experts(comm: Communicator) -> None:
    uids = [f"e.{i}" for i in range(16)]
    served = backends_of(comm, uids, expert)
    references = [expert(place) for place in range(16)]
    inputs = torch.randn(8, 10, 3, WIDTH, dtype=DOUBLE)
    with ExpertServer(comm, served):

        def work(thread: int) -> None:
            for turn, x in enumerate(inputs[thread]):
                place = (5 * thread + turn) % 16
                remote = RemoteExpert(uids[place], comm).eval()
                leaf = x.clone().requires_grad_()
                y = remote(leaf)
                y.sum().backward()
                torch.testing.assert_close(y, references[place](x))
                assert leaf.grad is not None

        in_threads(8, work)


def test_slow_expert_with_a_small_queue_lets_its_callers_wait(comm: Communicator) -> None:
    served = {"slow": untrained("slow", Slow(), max_batch_size=2, max_queued=2)} if comm.rank == 0 else {}
    with ExpertServer(comm, served):
        held = []

        def work(thread: int) -> None:
            for _ in range(3):
                x = x_of(2)
                assert torch.equal(RemoteExpert("slow", comm)(x), x + 1)
                if served:
                    held.append(served["slow"].get_pools()[0]._queued)

        in_threads(4, work)
        assert all(rows <= 2 for rows in held)


# ---- experts that fail -------------------------------------------------------------------------------------


def test_expert_that_raises_hurts_nobody_else(comm: Communicator) -> None:
    served = {"odd": untrained("odd", Sometimes()), "good": backend("good", expert(1))}
    with ExpertServer(comm, served if comm.rank == 0 else {}):
        odd, good = RemoteExpert("odd", comm), RemoteExpert("good", comm).eval()
        failures = 0
        for number in range(20):
            x = x_of()
            try:
                # A failed batch of several requests is run again one by one: only this one fails.
                asked = x + float("inf") if number % 10 == 9 else x
                assert torch.equal(odd(asked), 2 * x)
            except RemoteExpertError as error:
                failures += 1
                text = str(error)
                assert f"expert 'odd' must answer, got an exception on rank 0 of {comm.size}" in text
                assert "ValueError: the tenth call" in text
                assert "in forward" in text
            assert torch.equal(good(x), expert(1)(x))
        assert failures == 2


def test_expert_that_tries_to_exit_does_not_end_the_service(comm: Communicator) -> None:
    with ExpertServer(comm, {"odd": untrained("odd", Sometimes())} if comm.rank == 0 else {}):
        if comm.rank == comm.size - 1:
            odd = RemoteExpert("odd", comm)
            with pytest.raises(RemoteExpertError, match="SystemExit: not a number"):
                odd(torch.full((2, WIDTH), torch.nan, dtype=DOUBLE))
            x = x_of()
            assert torch.equal(odd(x), 2 * x)


# ---- entering ----------------------------------------------------------------------------------------------


def test_second_server_on_a_communicator_is_refused_on_all_ranks(comm: Communicator) -> None:
    with ExpertServer(comm, {"e": backend("e", expert(1))} if comm.rank == 0 else {}) as server:
        for second in (server, ExpertServer(comm)):
            with pytest.raises(MismatchError, match="one ExpertServer at a time"), second:
                pass
        with comm.Dup() as other, ExpertServer(other):
            assert ExpertNetwork.of(other).records == {}
        assert RemoteExpert("e", comm).eval()(x_of()).shape == (4, WIDTH)


@pytest.mark.parametrize("uid", ["", "two words", "a..b", ".a"])
def test_bad_uid_on_one_rank_is_refused_on_all(comm: Communicator, uid: str) -> None:
    place = comm.size - 1
    served = {uid: backend("e", expert(1))} if comm.rank == place else {}
    with pytest.raises(MismatchError, match=rf"uid must be words.*\(rank {place} of {comm.size}\)"):
        ExpertServer(comm, served).__enter__()
    with ExpertServer(comm):
        pass


@pytest.mark.mpi(min_size=2)
def test_uid_on_two_ranks_that_are_no_replicas_is_refused(comm: Communicator) -> None:
    with pytest.raises(MismatchError, match="must be served by the 1 rank"):
        ExpertServer(comm, {"e": backend("e", expert(1))} if comm.rank < 2 else {}).__enter__()
    with pytest.raises(HpcparError):
        ExpertNetwork.of(comm)


@THREADED
def test_no_experts_anywhere(comm: Communicator, threaded: bool | None) -> None:
    with ExpertServer(comm, {}, threaded=threaded) as server:
        assert server.uids == ()
        assert server.poll() is False
        with pytest.raises(RemoteExpertError, match="No rank serves any expert"):
            RemoteExpert("e", comm)


# ---- leaving -----------------------------------------------------------------------------------------------


@THREADED
def test_one_block_after_the_other_with_the_same_backends(comm: Communicator, threaded: bool | None) -> None:
    served = {"e": backend("e", expert(1))} if comm.rank == 0 else {}
    server = ExpertServer(comm, served, threaded=threaded)
    for turn in range(3):
        with server:
            if comm.rank == comm.size - 1:
                remote = RemoteExpert("e", comm)
                remote(x_of()).sum().backward()
                assert remote.get_stats()["updates"] == turn + 1
    with pytest.raises(HpcparError):
        ExpertNetwork.of(comm)


def test_end_of_the_block_waits_for_calls_of_other_threads(comm: Communicator) -> None:
    results: list[Tensor] = []
    x = x_of(2)
    with ExpertServer(comm, {"slow": untrained("slow", Slow())} if comm.rank == 0 else {}):
        remote = RemoteExpert("slow", comm)
        thread = threading.Thread(target=lambda: results.append(remote(x)))
        thread.start()
        network = ExpertNetwork.of(comm)
        hpcpar.comm.wait_for_peers(lambda: network._busy > 0 or bool(results), comm, lambda: ("start", []))
    thread.join()
    assert torch.equal(results[0], x + 1)


def test_end_of_the_block_waits_for_replies_that_nobody_waits_for(comm: Communicator) -> None:
    with ExpertServer(comm, {"slow": untrained("slow", Slow())} if comm.rank == 0 else {}):
        with pytest.raises(hpcpar.errors.StalledError):
            RemoteExpert("slow", comm, forward_timeout=0.001)(x_of())
        network = ExpertNetwork.of(comm)
    assert network.calls._open == {}


@THREADED
@pytest.mark.mpi(min_size=2)
def test_exception_inside_of_the_block_reaches_all_ranks(comm: Communicator, threaded: bool | None) -> None:
    served = {"e": backend("e", expert(1))} if comm.rank == 0 else {}
    caught: BaseException | None = None
    try:
        with ExpertServer(comm, served, threaded=threaded):
            RemoteExpert("e", comm).eval()(x_of())
            if comm.rank == comm.size - 1:
                raise KeyError("lost")
    except (KeyError, RankFailedError) as error:
        caught = error
    if comm.rank == comm.size - 1:
        assert isinstance(caught, KeyError)
    else:
        assert isinstance(caught, RankFailedError)
        assert caught.ranks == (comm.size - 1,)
        assert "KeyError: 'lost', inside of `with ExpertServer`" in str(caught)
    with ExpertServer(comm, served, threaded=threaded):  # and the same backends can be served again
        assert RemoteExpert("e", comm).eval()(x_of()).shape == (4, WIDTH)


# ---- without a thread --------------------------------------------------------------------------------------


@pytest.mark.mpi(min_size=2)
def test_poll_serves_between_the_programs_own_work(comm: Communicator) -> None:
    with ExpertServer(
        comm, {"e": backend("e", expert(1))} if comm.rank == 0 else {}, threaded=False
    ) as server:
        answered = comm.mpi.Ibarrier() if comm.rank == 0 else None
        if comm.rank > 0:
            for _ in range(5):
                RemoteExpert("e", comm)(x_of()).sum().backward()
            answered = comm.mpi.Ibarrier()
            answered.Wait()
        worked = 0
        while answered is not None and not answered.Test():
            worked += server.poll()
        assert comm.rank > 0 or worked >= 5


def test_threads_where_mpi_has_none_are_refused(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpcpar.nn.experts.server.threads_allowed", lambda: False)
    with pytest.raises(MismatchError, match="MPI_THREAD_MULTIPLE"):
        ExpertServer(comm, threaded=True).__enter__()
    with ExpertServer(comm) as server:
        assert server._threads is False
