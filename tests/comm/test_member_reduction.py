"""Sums over some ranks, while the others do something else."""

from __future__ import annotations

import itertools

import pytest
import torch

from hpcpar.comm import Communicator, MemberReduction
from tests.comm.samples import same

pytestmark = pytest.mark.mpi


def contribution(rank: int, dtype: torch.dtype, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return (torch.randn(count, generator=generator, dtype=torch.float64) * 100).to(dtype)


def in_one_process(members: list[int], dtype: torch.dtype, count: int) -> torch.Tensor:
    wide = torch.float32 if dtype is torch.bfloat16 else dtype
    total = contribution(members[0], dtype, count).to(wide)
    for rank in members[1:]:
        total = total + contribution(rank, dtype, count).to(wide)
    return total.to(dtype)


def test_every_set_of_members(comm: Communicator) -> None:
    reduction = MemberReduction(comm, "sum")
    kinds = [
        (torch.float64, 37),
        (torch.float32, 1),
        (torch.int64, 5),
        (torch.bfloat16, 64),
        (torch.float32, 0),
    ]
    for length in range(1, comm.size + 1):
        for chosen in itertools.combinations(range(comm.size), length):
            members = list(chosen)
            if comm.rank not in members:
                continue
            flats = [contribution(comm.rank, dtype, count) for dtype, count in kinds]
            reduction.start(flats, members)
            reduction.wait()
            assert reduction.is_done()
            for flat, (dtype, count) in zip(flats, kinds, strict=True):
                assert same(flat, in_one_process(members, dtype, count))
    comm.Barrier()
    reduction.free()


def test_sums_are_looked_at_without_waiting(comm: Communicator) -> None:
    reduction = MemberReduction(comm, "sum")
    flats = [torch.ones(10), torch.full((3,), 2.0)]
    reduction.start(flats, list(range(comm.size)))
    while not reduction.is_done():
        pass
    assert flats[0].tolist() == [float(comm.size)] * 10
    assert flats[1].tolist() == [2.0 * comm.size] * 3
    comm.Barrier()
    reduction.free()
