"""Sums in eight bits: nearly the sum, the same bits on all ranks, and nothing lost but only late."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from hpcpar.comm import BucketLayout, Communicator, Reducer, Slot
from hpcpar.comm.ordered_reduction import slice_bounds
from hpcpar.comm.partition import Partition, even_partition
from hpcpar.comm.progress import Patience, wait_until
from hpcpar.comm.wire import Wire
from tests.nn.training import ROUTES, assert_replicas_equal, pretended_nodes

pytestmark = pytest.mark.mpi

SIZES = (1024, 1025, 3000, 70_000)
DTYPES = (torch.float32, torch.float64)


def layout_of(numel: int, dtype: torch.dtype = torch.float64) -> BucketLayout:
    return BucketLayout(dtype, numel, (Slot(0, 0, numel),))


LAYOUTS = [layout_of(numel, dtype) for dtype in DTYPES for numel in SIZES]


def contents(layout: BucketLayout, rank: int, step: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(layout.numel + 1000 * step + rank)
    return torch.randn(layout.numel, generator=generator, dtype=torch.float64).to(layout.dtype)


def wait(flight: object) -> None:
    wait_until(flight.test, Patience("the test", missing=tuple, where="here"))  # type: ignore[attr-defined]


def total_outstanding(comm: Communicator, wire: Wire, bucket: int, like: torch.Tensor) -> torch.Tensor:
    mine = wire.outstanding(bucket)
    total = torch.zeros_like(like)
    comm.Allreduce(torch.zeros_like(like) if mine is None else mine, total)
    return total


def test_sums_are_close_and_what_is_missing_is_outstanding(comm: Communicator) -> None:
    wire = Wire(comm, LAYOUTS, torch.int8)
    exact = [torch.zeros(layout.numel).double() for layout in LAYOUTS]
    delivered = [torch.zeros(layout.numel).double() for layout in LAYOUTS]
    for step in range(3):
        flats = [contents(layout, comm.rank, step) for layout in LAYOUTS]
        flights = [wire.reduce(bucket, flat) for bucket, flat in enumerate(flats)]
        for bucket, (flight, layout) in enumerate(zip(flights, LAYOUTS, strict=True)):
            wait(flight)
            exact[bucket] += sum(contents(layout, rank, step).double() for rank in range(comm.size))
            delivered[bucket] += flats[bucket]
            late = total_outstanding(comm, wire, bucket, flats[bucket]).double()
            assert 0.0 < (delivered[bucket] - exact[bucket]).abs().max() < 0.05 * comm.size
            tolerance = 1e-12 if layout.dtype is torch.float64 else 1e-5
            torch.testing.assert_close(delivered[bucket] + late, exact[bucket], rtol=0, atol=tolerance)
        assert_replicas_equal(comm, flats, step)


def test_scattered_parts_are_close_and_what_is_missing_is_outstanding(comm: Communicator) -> None:
    wire = Wire(comm, LAYOUTS, torch.int8)
    for bucket, layout in enumerate(LAYOUTS):
        bounds = slice_bounds(layout.numel, comm.size, 10)
        mine = slice(*bounds[comm.rank])
        exact, delivered = torch.zeros(2, layout.numel).double().unbind()
        for step in range(3):
            flat = contents(layout, comm.rank, step)
            wait(wire.scatter(bucket, flat, bounds))
            exact += sum(contents(layout, rank, step).double() for rank in range(comm.size))
            delivered[mine] += flat[mine]
            outside = torch.ones(layout.numel, dtype=torch.bool)
            outside[mine] = False
            assert torch.equal(flat[outside], contents(layout, comm.rank, step)[outside])
        late = total_outstanding(comm, wire, bucket, flat).double()
        assert 0.0 < (delivered - exact)[mine].abs().max() < 0.05 * comm.size
        torch.testing.assert_close((delivered + late)[mine], exact[mine], rtol=0, atol=1e-5)


def test_flags_and_short_and_narrow_tensors_are_exact(comm: Communicator) -> None:
    layouts = [
        BucketLayout(torch.float32, 5000),  # no slots: flags
        layout_of(1023),
        layout_of(5000, torch.int64),
        layout_of(5000, torch.bfloat16),
    ]
    wire = Wire(comm, layouts, torch.int8)
    for bucket, layout in enumerate(layouts):
        flat = torch.arange(layout.numel).remainder(50).to(layout.dtype)
        wait(wire.reduce(bucket, flat))
        assert torch.equal(flat.double(), torch.arange(layout.numel).remainder(50).double() * comm.size)
        assert wire.outstanding(bucket) is None


def tiny_beside_huge(comm: Communicator) -> torch.Tensor:
    flat = torch.full((2048,), 1e-3)
    flat[::256] = 1.0 + comm.rank
    return flat


def test_small_numbers_beside_large_ones_arrive_in_the_end(comm: Communicator) -> None:
    """The scale of a block is about 0.01; without a memory 0.001 is zero for ever."""
    remembering = Wire(comm, [layout_of(2048, torch.float32)], torch.int8)
    sums = {"remembers": torch.zeros(2048), "forgets": torch.zeros(2048)}
    for _ in range(40):
        for name, total in sums.items():
            forgetful = Wire(comm, [layout_of(2048, torch.float32)], torch.int8)
            flat = tiny_beside_huge(comm)
            wait((remembering if name == "remembers" else forgetful).reduce(0, flat))
            total += flat
    tiny = torch.arange(2048) % 256 != 0
    assert not bool(sums["forgets"][tiny].any())
    assert (sums["remembers"][tiny] / (40 * comm.size * 1e-3) - 1.0).abs().max() < 0.5


def test_overflow_on_one_rank_is_nan_for_all_and_does_not_last(comm: Communicator) -> None:
    wire = Wire(comm, [layout_of(4096, torch.float32)], torch.int8)
    flat = torch.randn(4096)
    if comm.rank == comm.size - 1:
        flat[300] = float("inf")
    wait(wire.reduce(0, flat))
    is_bad = torch.zeros(4096, dtype=torch.bool)
    is_bad[256:512] = True
    assert torch.equal(flat.isnan(), is_bad)
    assert_replicas_equal(comm, [flat])
    exact = torch.randn(4096)
    flat = exact.clone()
    wait(wire.reduce(0, flat))
    assert bool(flat.isfinite().all())
    assert (flat - exact * comm.size)[is_bad].abs().max() < 0.05 * comm.size


def shares(comm: Communicator, wire: Wire, total: torch.Tensor) -> Sequence[torch.Tensor]:
    wire.load_outstanding(0, total)
    mine = wire.outstanding(0)
    assert mine is not None
    return comm.allgather(mine)


def test_outstanding_error_moves_to_another_wire(comm: Communicator) -> None:
    wire = Wire(comm, [layout_of(3000)], torch.int8)
    flat = contents(layout_of(3000), comm.rank)
    wait(wire.reduce(0, flat))
    total = total_outstanding(comm, wire, 0, flat)
    other = Wire(comm, [layout_of(3000)], torch.int8)
    moved = shares(comm, other, total)
    torch.testing.assert_close(torch.stack(list(moved)).sum(0), total)
    for part in moved:
        torch.testing.assert_close(part, total / comm.size)
    plain = Wire(comm, [layout_of(3000)], torch.bfloat16)
    plain.load_outstanding(0, total)
    assert plain.outstanding(0) is None


@pytest.mark.parametrize("parted", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_reducer_delivers_late_but_all(comm: Communicator, route: str, parted: bool) -> None:
    """Means over steps with weights, delivered and kept back; on every route, whole and in parts."""
    ranks_per_node, transport = ROUTES[route]
    layouts = [layout_of(20_000), layout_of(5000, torch.float32), BucketLayout(torch.float32, 3)]
    with pretended_nodes(comm, ranks_per_node) as nodes:
        parts: list[Partition | None] = [even_partition(layout, nodes.node_map) for layout in layouts[:2]]
        partitions = [*parts, None] if parted else [None] * 3
        reducer = Reducer(nodes, layouts, transport=transport, wire_dtype=torch.int8, partitions=partitions)
        exact = [torch.zeros(layout.numel).double() for layout in layouts]
        delivered = [torch.zeros(layout.numel).double() for layout in layouts]
        for step in range(3):
            reducer.begin(1.0 + comm.rank)
            for bucket, layout in enumerate(layouts):
                reducer.flats[bucket].copy_(contents(layout, comm.rank, step) * (1.0 + comm.rank))
                reducer.publish(bucket)
            reducer.wait_all()
            for bucket, layout in enumerate(layouts):
                weights = torch.arange(1.0, comm.size + 1.0).double()
                rows = torch.stack([contents(layout, rank, step).double() for rank in range(comm.size)])
                exact[bucket] += (weights[:, None] * rows).sum(0) / weights.sum()
                delivered[bucket] += reducer.flats[bucket]
        kept = reducer.residuals()
        assert_replicas_equal(comm, kept)
        for bucket, partition in enumerate(partitions):
            mine = slice(None) if partition is None else slice(*partition.bounds[comm.rank])
            tolerance = 1e-12 if layouts[bucket].dtype is torch.float64 else 2e-5
            torch.testing.assert_close(
                (delivered[bucket] + kept[bucket])[mine], exact[bucket][mine], rtol=0, atol=tolerance
            )
        is_sent = nodes.num_nodes > 1 or (transport == "mpi" and comm.size > 1)
        assert [bool(residual.any()) for residual in kept] == [is_sent, is_sent, False]
        reducer.load_residuals([2.0 * residual for residual in kept])
        for residual, loaded in zip(kept, reducer.residuals(), strict=True):
            torch.testing.assert_close(loaded, 2.0 * residual)
        reducer.free()
