"""Sums of 16-bit floats: float32 inside, rank order, the same bits everywhere, whatever else is going on."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from mpi4py import MPI
from torch import Tensor

from hpcpar.comm import Communicator, wait_all
from hpcpar.comm.mpi import threads_allowed
from hpcpar.comm.ordered_reduction import combine_in_order, prefixes_in_order, slice_bounds
from tests.comm.samples import HALVES, NARROW, bits, same

pytestmark = pytest.mark.mpi


def awkward(dtype: torch.dtype, count: int, rank: int, size: int) -> Tensor:
    """Values of which large ones cancel between the first and the last rank: every other order shows."""
    generator = torch.Generator().manual_seed(rank)
    small = torch.randn(count, generator=generator) * 2.0 ** torch.randint(
        -8, 0, (count,), generator=generator
    )
    large = 2.0**14 * (1 + torch.arange(count) % 3)
    return (small + large * {0: 1.0, size - 1: -1.0}.get(rank, 0.0) * (size > 1)).to(dtype)


def in_one_process(rows: list[Tensor]) -> Tensor:
    total = rows[0].float()
    for row in rows[1:]:
        total = total + row.float()
    return total.to(rows[0].dtype)


def test_sum_is_accumulated_in_float32(comm: Communicator) -> None:
    """In bfloat16 256 + 1 is 256, and every further 1 would be lost as well."""
    mine = torch.full((10,), 256.0 if comm.rank == 0 else 1.0, dtype=torch.bfloat16)
    comm.Allreduce(MPI.IN_PLACE, mine)
    expected = torch.tensor(256.0 + comm.size - 1).bfloat16().item()
    assert mine.tolist() == [expected] * 10
    if comm.size > 2:
        assert expected > 256.0


@pytest.mark.parametrize("dtype", HALVES)
def test_sum_is_in_rank_order_and_bitwise_equal_on_all_ranks(comm: Communicator, dtype: torch.dtype) -> None:
    rows = [awkward(dtype, 1001, rank, comm.size) for rank in range(comm.size)]
    expected = in_one_process(rows)
    if comm.size > 2:  # with two ranks there is one order only
        assert not same(in_one_process([rows[0], rows[-1], *rows[1:-1]]), expected)
    received = torch.empty(1001, dtype=dtype)
    comm.Allreduce(rows[comm.rank], received)
    assert same(received, expected)
    everywhere = torch.empty(comm.size, bits(received).numel(), dtype=torch.uint8)
    comm.Allgather(bits(received), everywhere)
    assert all(torch.equal(row, everywhere[0]) for row in everywhere)
    assert same(combine_in_order(torch.stack(rows), MPI.SUM), expected)


def test_overflow_inside_the_sum_is_not_an_overflow(comm: Communicator) -> None:
    values = [60000.0] * (comm.size - 1) + [-60000.0 * max(comm.size - 2, 0)]
    mine = torch.tensor([values[comm.rank] if comm.size > 1 else 60000.0]).clamp(-65504, 65504).half()
    rows = torch.tensor(values).clamp(-65504, 65504).half()
    comm.Allreduce(MPI.IN_PLACE, mine)
    if comm.size > 1:
        assert mine.item() == rows.float().sum().half().item()


def test_nan_and_infinity_pass(comm: Communicator) -> None:
    for dtype in HALVES:
        mine = torch.tensor([1.0, 2.0, 3.0], dtype=dtype)
        if comm.rank == comm.size - 1:
            mine[0], mine[1] = float("nan"), float("inf")
        for op in (MPI.SUM, MPI.MAX, MPI.PROD):
            received = torch.empty_like(mine)
            comm.Allreduce(mine, received, op)
            assert received[0].isnan()
            assert received[1].isinf()
            assert received[2].isfinite()


def test_prefixes_are_sums_of_the_first_rows() -> None:
    rows = torch.stack([awkward(torch.bfloat16, 50, rank, 4) for rank in range(4)])
    for count, prefix in enumerate(prefixes_in_order(rows, MPI.SUM), 1):
        assert same(prefix, in_one_process(list(rows[:count])))


def test_reducing_does_not_change_the_contributions() -> None:
    rows = torch.ones(3, 4)
    combine_in_order(rows, MPI.SUM)
    prefixes_in_order(rows, MPI.SUM)
    assert torch.equal(rows, torch.ones(3, 4))


@pytest.mark.parametrize("count", [0, 1, 2, 7, 64, 1000])
@pytest.mark.parametrize("parts", [1, 2, 3, 7])
@pytest.mark.parametrize("align", [1, 16])
def test_slices_cover_everything_once(count: int, parts: int, align: int) -> None:
    bounds = slice_bounds(count, parts, align)
    assert len(bounds) == parts
    assert [index for start, end in bounds for index in range(start, end)] == list(range(count))
    assert all(start % align == 0 or start == count for start, _ in bounds)
    sizes = [end - start for start, end in bounds]
    assert max(sizes) - min(sizes) <= 2 * align - 1


# ---- several at once ---------------------------------------------------------------------------------------


def started(comm: Communicator, number: int, dtype: torch.dtype = torch.bfloat16):
    """An Iallreduce under way, and what it must give."""
    rows = [awkward(dtype, 100 + number, rank + number, comm.size) for rank in range(comm.size)]
    received = torch.empty_like(rows[0])
    return comm.Iallreduce(rows[comm.rank], received), received, in_one_process(rows)


def test_waiting_in_another_order_on_every_rank(comm: Communicator) -> None:
    operations = [started(comm, number, NARROW[number % 2]) for number in range(8)]
    order = operations[2 * comm.rank :] + operations[: 2 * comm.rank]
    for request, _, _ in order if comm.rank % 2 else reversed(order):
        request.wait()
    assert all(same(received, expected) for _, received, expected in operations)


def test_between_other_collectives(comm: Communicator) -> None:
    first = started(comm, 1)
    native = torch.full((5,), float(comm.rank))
    comm.Allreduce(MPI.IN_PLACE, native)
    second = started(comm, 2)
    everyone = comm.allgather(comm.rank)
    wait_all([second[0], first[0]])
    assert everyone == list(range(comm.size))
    assert native.tolist() == [sum(range(comm.size))] * 5
    assert all(same(received, expected) for _, received, expected in (first, second))


def wait_in_barrier(other: Communicator) -> None:
    other.Barrier()


def wait_in_receive(other: Communicator) -> None:
    other.Recv(torch.empty(1), source=0, tag=3)


def wait_for_an_object(other: Communicator) -> None:
    assert other.recv(source=0, tag=3) is None


def poll_a_request(other: Communicator) -> None:
    request = other.Ibarrier()
    while not request.test():
        pass


@pytest.mark.parametrize(
    "wait_elsewhere", [wait_in_barrier, wait_in_receive, wait_for_an_object, poll_a_request]
)
def test_progress_is_made_by_whoever_waits_for_something_else(
    comm: Communicator, wait_elsewhere: Callable[[Communicator], None]
) -> None:
    """Rank 0 first finishes the reduction; until then all others wait on another communicator."""
    with comm.Dup() as other:
        request, received, expected = started(comm, 5)
        if comm.rank == 0:
            request.wait()
            for rank in range(1, comm.size):
                if wait_elsewhere is wait_in_receive:
                    other.Send(torch.zeros(1), rank, 3)
                elif wait_elsewhere is wait_for_an_object:
                    other.send(None, rank, 3)
            if wait_elsewhere in (wait_in_barrier, poll_a_request):
                other.Barrier()
        else:
            wait_elsewhere(other)
            request.wait()
        assert same(received, expected)


def test_dropped_reduction_still_serves_the_others(comm: Communicator) -> None:
    with comm.Dup() as other:
        request, received, expected = started(comm, 3)
        if comm.rank == comm.size - 1:
            del request
            other.Barrier()
        else:
            request.wait()
            assert same(received, expected)
            other.Barrier()
    comm.Barrier()


def test_dropped_reduction_is_completed_before_its_communicator_is_freed(comm: Communicator) -> None:
    other = comm.Dup()
    _, received, expected = started(other, 3)
    other.Free()
    assert same(received, expected)
    comm.Barrier()


def test_two_threads_may_wait_at_once(comm: Communicator) -> None:
    if not threads_allowed():
        pytest.skip("MPI grants no MPI_THREAD_MULTIPLE")
    failures: list[BaseException] = []

    def work(mine: Communicator, first: int) -> None:
        try:
            for number in range(first, first + 15):
                request, received, expected = started(mine, number)
                request.wait()
                assert same(received, expected)
        except BaseException as error:
            failures.append(error)

    with comm.Dup() as other:
        thread = threading.Thread(target=work, args=(other, 20))
        thread.start()
        work(comm, 0)
        thread.join()
        assert not failures
