"""Requests: both spellings deliver, nothing is freed too early, and deadlines name who is missing."""

from __future__ import annotations

import gc
import time

import pytest
import torch
from mpi4py import MPI

from hpcpar.comm import Communicator, wait_all
from hpcpar.errors import StalledError
from tests.comm.samples import channels_last, every_other, noise, same

pytestmark = pytest.mark.mpi

MANY = 300_000  # elements: far beyond what any MPI sends eagerly


def neighbours(comm: Communicator) -> tuple[int, int]:
    return (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size


@pytest.mark.parametrize("spelling", ["Wait", "wait", "Test", "test"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_spelling_delivers_staged_results(
    comm: Communicator, spelling: str, dtype: torch.dtype
) -> None:
    left, right = neighbours(comm)
    values = [noise(dtype, (2, 3, 4, 5), rank) for rank in range(comm.size)]
    targets = [every_other(noise(dtype, (2, 3, 4, 5), 50)), channels_last(noise(dtype, (2, 3, 4, 5), 51))]
    sums = [every_other(torch.zeros(7, dtype=dtype)), torch.zeros(7, dtype=dtype)]
    requests = [comm.Irecv(targets[0], left), comm.Ibcast(values[0] if comm.rank == 0 else targets[1])]
    requests += [comm.Iallreduce(torch.ones(7, dtype=dtype), total) for total in sums]
    requests.append(comm.Isend(values[comm.rank], right))
    for request in requests:
        call = getattr(request, spelling)
        while call() is not True:
            pass
        assert call() is True  # once more is harmless
    assert same(targets[0], values[left])
    assert comm.rank == 0 or same(targets[1], values[0])
    assert all(total.tolist() == [comm.size] * 7 for total in sums)


def test_staged_result_arrives_at_completion_and_once(comm: Communicator) -> None:
    target = every_other(torch.zeros(4))
    request = comm.Irecv(target, comm.rank)
    comm.Send(torch.ones(4), comm.rank)
    request.wait()
    target.fill_(5.0)
    request.wait()
    request.test()
    assert target.tolist() == [5.0] * 4


@pytest.mark.parametrize("make", [torch.clone, every_other])
def test_dropped_send_keeps_its_buffer(comm: Communicator, make) -> None:
    left, right = neighbours(comm)
    comm.Isend(make(noise(torch.float32, (MANY,), comm.rank)), right, 1)
    gc.collect()
    overwriting = [torch.full((MANY,), float("nan")) for _ in range(8)]
    comm.Barrier()  # the message has not been asked for yet
    received = torch.empty(MANY)
    comm.Recv(received, left, 1)
    assert same(received, noise(torch.float32, (MANY,), left))
    assert overwriting[-1].isnan().all()
    comm.Barrier()


def test_dropped_receive_writes_into_memory_that_still_exists(comm: Communicator) -> None:
    left, right = neighbours(comm)
    comm.Irecv(torch.empty(MANY), left, 1)
    comm.Irecv(every_other(torch.empty(MANY)), left, 1)
    gc.collect()
    others = [torch.full((MANY,), 7.0) for _ in range(8)]
    wait_all([comm.Isend(torch.zeros(MANY), right, 1) for _ in range(2)])
    comm.Barrier()
    assert all((other == 7.0).all() for other in others)


def test_request_in_a_cycle_is_collected_safely(comm: Communicator) -> None:
    """The collector may run a request's finalizer at any allocation, also inside of the engine."""
    left, right = neighbours(comm)
    for number in range(50):
        cycle: list[object] = [comm.Isend(torch.full((10,), float(number)), right, 2)]
        cycle.append(cycle)
    del cycle
    gc.collect()
    received = torch.empty(10)
    for number in range(50):
        comm.Recv(received, left, 2)
        assert received.tolist() == [number] * 10


def test_wait_all_takes_any_mixture(comm: Communicator) -> None:
    left, right = neighbours(comm)
    received, total = every_other(torch.zeros(5)), torch.ones(5, dtype=torch.float16)
    with comm.Dup() as other:
        wait_all(
            request
            for request in (
                comm.Irecv(received, left),
                other.Ibarrier(),
                comm.Iallreduce(MPI.IN_PLACE, total),
                comm.Isend(torch.arange(5.0), right),
                comm.irecv(left, 9),
                comm.isend("object", right, 9),
            )
        )
    assert received.tolist() == [0, 1, 2, 3, 4]
    assert total.tolist() == [comm.size] * 5
    wait_all([])


def test_receive_deadline_names_the_source_and_can_be_waited_out(comm: Communicator) -> None:
    left, right = neighbours(comm)
    received = every_other(torch.zeros(3))
    request = comm.Irecv(received, left, 5)
    with pytest.raises(
        StalledError, match=rf"Irecv must end within 0.1 s.*rank {comm.rank} of.*waits for rank {left}\."
    ) as caught:
        request.wait(timeout=0.1)
    assert (caught.value.operation, caught.value.waiting_for) == ("Irecv", (left,))
    with pytest.raises(StalledError) as caught:
        wait_all([comm.Ibarrier(), request], timeout=0.5)
    assert (caught.value.operation, caught.value.waiting_for) == ("Irecv", (left,))
    comm.Barrier()
    wait_all([comm.Isend(torch.arange(3.0), right, 5), request])
    assert received.tolist() == [0.0, 1.0, 2.0]


def test_receive_from_anybody_has_a_deadline_too(comm: Communicator) -> None:
    request = comm.Irecv(torch.zeros(3))
    with pytest.raises(StalledError, match="waits for any rank") as caught:
        request.wait(timeout=0.1)
    assert caught.value.waiting_for == ()
    comm.Barrier()
    wait_all([comm.Isend(torch.zeros(3), neighbours(comm)[1]), request])


@pytest.mark.parametrize("call", ["Recv", "Sendrecv", "recv"])
def test_blocking_receive_that_gave_up_takes_no_later_message(
    comm: Communicator, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    left, right = neighbours(comm)
    received = torch.zeros(3)
    monkeypatch.setenv("HPCPAR_TIMEOUT_S", "0.2")
    with pytest.raises(StalledError) as caught:
        if call == "Sendrecv":
            comm.Sendrecv(torch.zeros(3), MPI.PROC_NULL, 0, received, left, 1)
        elif call == "Recv":
            comm.Recv(received, left, 1)
        else:
            comm.recv(left, 1)
    assert (caught.value.operation, caught.value.waiting_for) == (call, (left,))
    monkeypatch.setenv("HPCPAR_TIMEOUT_S", "30")
    comm.Barrier()
    if call == "recv":
        comm.isend([1.0, 2.0, 3.0], right, 1)
        assert comm.recv(left, 1) == [1.0, 2.0, 3.0]
    else:
        comm.Isend(torch.tensor([1.0, 2.0, 3.0]), right, 1)
        comm.Recv(received, left, 1)
        assert received.tolist() == [1.0, 2.0, 3.0]


def test_send_deadline_names_the_destination(comm: Communicator) -> None:
    left, right = neighbours(comm)
    request = comm.Isend(torch.ones(MANY), right, 4)
    if comm.size > 1:
        with pytest.raises(StalledError) as caught:
            request.wait(timeout=0.1)
        assert (caught.value.operation, caught.value.waiting_for) == ("Isend", (right,))
    comm.Barrier()
    received = torch.zeros(MANY)
    comm.Recv(received, left, 4)
    request.wait()
    assert (received == 1.0).all()


def test_timeout_of_zero_means_never(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCPAR_TIMEOUT_S", "0")
    if comm.rank == 0:
        time.sleep(0.3)
    comm.Barrier()


# ---- who is late for a collective --------------------------------------------------------------------------

LATE_S = 1.2
PATIENCE_S = 0.6


@pytest.fixture
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCPAR_TIMEOUT_S", str(PATIENCE_S))


def start_barrier(comm: Communicator):
    return comm.Ibarrier()


def start_ordered(comm: Communicator):
    return comm.Iallreduce(torch.ones(30).half(), torch.empty(30).half())


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("start", [start_barrier, start_ordered])
def test_late_rank_is_named_by_all_others(comm: Communicator, start, short_patience: None) -> None:
    late = comm.size - 1
    comm.Barrier()
    if comm.rank == late:
        time.sleep(LATE_S)
        start(comm).wait(timeout=30)
        return
    request = start(comm)
    with pytest.raises(StalledError, match=f"waits for rank {late}\\.") as caught:
        request.wait()
    assert caught.value.waiting_for == (late,)
    request.wait(timeout=30)  # it comes at last


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("elements", [10, 100_000])
def test_blocking_collective_has_a_deadline(comm: Communicator, short_patience: None, elements: int) -> None:
    late, values = 0, torch.ones(elements)
    comm.Barrier()
    if comm.rank == late:
        time.sleep(LATE_S)
    else:
        with pytest.raises(StalledError) as caught:
            comm.Allreduce(MPI.IN_PLACE, values.clone())
        assert (caught.value.operation, caught.value.waiting_for) == ("Allreduce", (late,))
    # What the others have started must be met; on rank 0 as a barrier where the call was to be blocking.
    if comm.rank == late:
        request = comm.Ibarrier() if values.nbytes >= 2**16 else comm.Iallreduce(values, values.clone())
        request.wait(timeout=30)


@pytest.mark.mpi(min_size=3)
def test_rank_that_waits_for_an_earlier_collective_is_not_late(
    comm: Communicator, short_patience: None
) -> None:
    """Rank 0 has started two, the others one; all wait for the first, in which one rank is missing."""
    late = comm.size - 1
    comm.Barrier()
    if comm.rank == late:
        time.sleep(LATE_S)
        requests = [comm.Ibarrier(), comm.Ibarrier()]
    else:
        requests = [comm.Ibarrier()] + ([comm.Ibarrier()] if comm.rank == 0 else [])
        with pytest.raises(StalledError) as caught:
            requests[0].wait()
        assert caught.value.waiting_for == (late,)
        if comm.rank != 0:
            requests.append(comm.Ibarrier())
    wait_all(requests, timeout=30)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("call", ["Split", "Dup"])
def test_making_communicators_has_a_deadline(comm: Communicator, short_patience: None, call: str) -> None:
    late = comm.size - 1
    comm.Barrier()
    if comm.rank == late:
        time.sleep(LATE_S)
        comm.Ibarrier().wait(timeout=30)
        return
    with pytest.raises(StalledError) as caught:
        getattr(comm, call)()
    assert (caught.value.operation, caught.value.waiting_for) == (call, (late,))
