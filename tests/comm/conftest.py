"""Communicators of special make."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import hpcpar
from tests.agreement import FAILED


@pytest.fixture
def chunked(request: pytest.FixtureRequest) -> Iterator[hpcpar.comm.Communicator]:
    """All ranks, with an MPI that counts to seven."""
    from mpi4py import MPI

    mpi_comm = MPI.COMM_WORLD.Dup()
    communicator = hpcpar.comm.Communicator(mpi_comm, count_limit=7)
    yield communicator
    if request.node.stash.get(FAILED, False):
        return
    communicator.Free()
    mpi_comm.Free()
