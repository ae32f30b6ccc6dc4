"""More elements than a C int counts, for real."""

from __future__ import annotations

import pytest
import torch

from hpcpar.comm import Communicator

pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.large, pytest.mark.timeout_s(900)]

COUNT = 2**31 + 5


def pattern(first: int) -> torch.Tensor:
    """A sequence whose period is prime, so that a shifted or missing chunk shows."""
    values = torch.empty(COUNT, dtype=torch.int8)
    period = (torch.arange(first, first + 251) % 251 - 125).to(torch.int8)
    whole = COUNT // 251 * 251
    values[:whole].view(-1, 251).copy_(period)
    values[whole:] = period[: COUNT - whole]
    return values


def test_broadcast_of_more_than_an_int_counts(comm: Communicator) -> None:
    if comm.size > 2:
        pytest.skip("two ranks show it, and more need more memory")
    buffer = pattern(1) if comm.rank == 0 else torch.zeros(COUNT, dtype=torch.int8)
    comm.Bcast(buffer)
    assert torch.equal(buffer, pattern(1))


def test_messages_of_more_than_an_int_counts(comm: Communicator) -> None:
    if comm.size > 2:
        pytest.skip("two ranks show it, and more need more memory")
    received = torch.zeros(COUNT, dtype=torch.int8)
    comm.Sendrecv(pattern(comm.rank), 1 - comm.rank, 0, received, 1 - comm.rank)
    assert torch.equal(received, pattern(1 - comm.rank))
