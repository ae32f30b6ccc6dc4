"""HPCPAR_DEBUG=1: ranks that are about to do different things say so instead of hanging."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from mpi4py import MPI

from hpcpar.comm import Communicator
from hpcpar.comm.debug import call_site, compare
from hpcpar.errors import MismatchError

pytestmark = pytest.mark.mpi(min_size=2)


@pytest.fixture(autouse=True)
def debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCPAR_DEBUG", "1")


def zeros(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(count, dtype=dtype)


Call = Callable[[Communicator], object]

# What most ranks do, what the last rank does, and what the error tells of both.
DIFFERENCES: dict[str, tuple[Call, Call, str, str]] = {
    "operation": (
        lambda c: c.Allreduce(zeros(4), zeros(4)),
        lambda c: c.Barrier(),
        "Allreduce torch.float32 4 SUM",
        "Barrier",
    ),
    "dtype": (
        lambda c: c.Allreduce(zeros(4), zeros(4)),
        lambda c: c.Allreduce(zeros(4, torch.float16), zeros(4, torch.float16)),
        "Allreduce torch.float32 4",
        "Allreduce torch.float16 4",
    ),
    "count": (
        lambda c: c.Bcast(zeros(4)),
        lambda c: c.Bcast(zeros(5)),
        "Bcast torch.float32 4 0",
        "Bcast torch.float32 5 0",
    ),
    "root": (
        lambda c: c.Bcast(zeros(4), 0),
        lambda c: c.Bcast(zeros(4), 1),
        "Bcast torch.float32 4 0",
        "Bcast torch.float32 4 1",
    ),
    "operator": (
        lambda c: c.Iallreduce(zeros(4), zeros(4), MPI.MAX),
        lambda c: c.Iallreduce(zeros(4), zeros(4), MPI.MIN),
        "Allreduce torch.float32 4 MAX",
        "Allreduce torch.float32 4 MIN",
    ),
    "block": (
        lambda c: c.Gather(zeros(2), zeros(2 * c.size)),
        lambda c: c.Gather(zeros(3), None),
        "Gather torch.float32 2 0",
        "Gather torch.float32 3 0",
    ),
    "communicator": (
        lambda c: c.Dup(),
        lambda c: c.Split(0),
        "Dup",
        "Split",
    ),
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_difference_raises_the_same_error_everywhere(comm: Communicator, what: str) -> None:
    most, last, text_of_most, text_of_last = DIFFERENCES[what]
    odd = comm.size - 1
    with pytest.raises(MismatchError) as caught:
        (last if comm.rank == odd else most)(comm)
    text = str(caught.value)
    assert re.search(f"{re.escape(text_of_most)}.*on rank 0 at ", text)
    assert re.search(f"{re.escape(text_of_last)}.*on rank {odd} at ", text)
    sites = re.findall(r"test_debug\.py:(\d+)", text)
    assert len(sites) == 2
    assert sites[0] != sites[1]
    assert f"(rank {comm.rank} of {comm.size})" in text
    comm.Barrier()  # no rank has done its half of anything


def test_difference_far_down_a_long_list_is_found(comm: Communicator) -> None:
    counts = (*[7] * 1000, comm.rank)
    with pytest.raises(MismatchError, match=r"Allgatherv.*checksum.*test_debug\.py:\d+.*test_debug\.py:\d+"):
        compare(comm, "Allgatherv", (counts,))
    compare(comm, "Allgatherv", (counts[:-1],))


def test_equal_calls_go_through(comm: Communicator) -> None:
    total = zeros(4)
    comm.Allreduce(torch.ones(4), total)
    comm.Allgatherv(zeros(2), [zeros(2 * comm.size), [2] * comm.size])
    assert comm.allgather(comm.rank) == list(range(comm.size))
    assert total.tolist() == [comm.size] * 4


def test_call_site_is_outside_of_hpcpar() -> None:
    assert re.search(r"test_debug\.py:\d+$", call_site())
