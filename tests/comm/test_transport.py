"""Transports: every rank's bucket becomes the sum times the scale, in the same bits on all ranks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hpcpar.comm import BucketLayout, Communicator
from hpcpar.comm.partition import even_partition
from hpcpar.comm.progress import Patience, wait_until
from hpcpar.comm.transport import (
    MessageTransport,
    SharedMemoryTransport,
    SingleTransport,
    Transport,
    add_in_order,
    segment_layout,
)
from tests.nn.training import assert_replicas_equal, pretended_nodes

pytestmark = pytest.mark.mpi

Make = Callable[..., Transport]
KINDS: dict[str, tuple[int | None, Make]] = {
    "messages": (None, MessageTransport),
    "shared memory": (None, SharedMemoryTransport),
    "nodes of one": (1, SharedMemoryTransport),
    "nodes of two": (2, SharedMemoryTransport),
    "nodes of three": (3, SharedMemoryTransport),
}
SIZES = (0, 1, 63, 64, 65, 1000, 100_003)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def contents(layout: BucketLayout, rank: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(layout.numel + 1000 * step + rank)
    return torch.randn(layout.numel, generator=generator, dtype=torch.float64).to(layout.dtype)


def reduce(
    transport: Transport,
    layouts: list[BucketLayout],
    rank: int,
    step: int,
    scale: float,
    *,
    within_node: bool = False,
) -> None:
    for bucket, layout in enumerate(layouts):
        transport.storage[bucket].copy_(contents(layout, rank, step))
        transport.publish(bucket, step, scale, within_node=within_node)
    left = set(range(len(layouts)))

    def done() -> bool:
        left.difference_update([b for b in sorted(left) if transport.advance(b, step)])
        return not left

    wait_until(done, Patience("the test", missing=tuple, where=f"rank {rank}"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wire_dtype", [None, torch.bfloat16])
def test_sums_of_every_size_and_dtype(comm: Communicator, kind: str, wire_dtype: torch.dtype | None) -> None:
    ranks_per_node, make = KINDS[kind]
    layouts = [BucketLayout(dtype, size) for dtype in DTYPES for size in SIZES]
    with pretended_nodes(comm, ranks_per_node) as nodes:
        transport = make(nodes, layouts, wire_dtype)
        for step in (1, 2, 3):
            scale = 1.0 / comm.size
            reduce(transport, layouts, comm.rank, step, scale)
            for bucket, layout in enumerate(layouts):
                parts = [contents(layout, rank, step).double() for rank in range(comm.size)]
                narrow = layout.dtype.itemsize == 2 or (wire_dtype is not None and kind != "shared memory")
                tolerance = {"rtol": 2e-2, "atol": 2e-2} if narrow else {"rtol": 1e-5, "atol": 1e-5}
                expected = torch.stack(parts).sum(0) * scale
                torch.testing.assert_close(transport.storage[bucket].double(), expected, **tolerance)
            assert_replicas_equal(comm, transport.storage, (kind, step))
            delivered = [transport.delivered(rank, 0, step) for rank in range(comm.size)]
            assert all(verdict is not False for verdict in delivered)
            assert (None in delivered) == (kind == "messages" or nodes.num_nodes > 1)
        comm.Barrier()
        transport.free()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wire_dtype", [None, torch.bfloat16])
def test_a_partitioned_bucket_gives_each_rank_the_sum_of_its_part(
    comm: Communicator, kind: str, wire_dtype: torch.dtype | None
) -> None:
    ranks_per_node, make = KINDS[kind]
    layouts = [BucketLayout(dtype, size) for dtype in DTYPES for size in (0, 65, 1000, 10_003)]
    with pretended_nodes(comm, ranks_per_node) as nodes:
        partitions = [even_partition(layout, nodes.node_map) for layout in layouts]
        transport = make(nodes, layouts, wire_dtype, partitions)
        for step in (1, 2, 3):
            reduce(transport, layouts, comm.rank, step, 0.5)
            for bucket, layout in enumerate(layouts):
                start, end = partitions[bucket].bounds[comm.rank]
                parts = [contents(layout, rank, step).double() for rank in range(comm.size)]
                narrow = layout.dtype.itemsize == 2 or (wire_dtype is not None and kind != "shared memory")
                tolerance = {"rtol": 2e-2, "atol": 2e-2} if narrow else {"rtol": 1e-5, "atol": 1e-5}
                expected = torch.stack(parts).sum(0)[start:end] * 0.5
                torch.testing.assert_close(
                    transport.storage[bucket][start:end].double(), expected, **tolerance
                )
        comm.Barrier()
        transport.free()


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_within_the_node_sums_its_ranks_only(comm: Communicator, kind: str) -> None:
    ranks_per_node, make = KINDS[kind]
    layouts = [BucketLayout(torch.float64, size) for size in SIZES]
    with pretended_nodes(comm, ranks_per_node) as nodes:
        transport = make(nodes, layouts, torch.bfloat16)
        for step, within_node in enumerate((True, False, True, True, False), start=1):
            reduce(transport, layouts, comm.rank, step, 1.0, within_node=within_node)
            members = nodes.node_map.ranks_of(nodes.node_rank) if within_node else range(comm.size)
            tolerance = {} if within_node else {"rtol": 2e-2, "atol": 2e-2}
            for bucket, layout in enumerate(layouts):
                expected = torch.stack([contents(layout, rank, step) for rank in members]).sum(0)
                torch.testing.assert_close(transport.storage[bucket], expected, **tolerance)
        comm.Barrier()
        transport.free()


def test_inside_a_node_narrow_types_are_summed_in_float32_and_rounded_once(comm: Communicator) -> None:
    layouts = [BucketLayout(torch.bfloat16, 5000), BucketLayout(torch.float16, 5000)]
    transport = SharedMemoryTransport(comm, layouts, None)
    reduce(transport, layouts, comm.rank, 1, 0.3)
    for bucket, layout in enumerate(layouts):
        total = torch.zeros(layout.numel)
        for rank in range(comm.size):
            total += contents(layout, rank, 1)
        assert torch.equal(transport.storage[bucket], (total * 0.3).to(layout.dtype))
    comm.Barrier()
    transport.free()


def test_one_rank_only_scales() -> None:
    transport = SingleTransport([BucketLayout(torch.float32, 3)])
    transport.storage[0].fill_(4.0)
    transport.publish(0, 1, 0.5)
    assert transport.advance(0, 1)
    assert transport.storage[0].tolist() == [2.0] * 3


def test_segments_do_not_share_cache_lines() -> None:
    layouts = [
        BucketLayout(torch.float32, 5),
        BucketLayout(torch.bfloat16, 33),
        BucketLayout(torch.float64, 0),
    ]
    offsets, nbytes = segment_layout(layouts)
    assert offsets == [0, 64, 192, 192]
    assert nbytes == 192 + 64 * 6


def test_sum_in_order_is_the_sum_from_first_to_last() -> None:
    for count in (1, 2, 3, 4):
        parts = [torch.randn(100) for _ in range(count)]
        expected = parts[0].clone()
        for part in parts[1:]:
            expected += part
        assert torch.equal(add_in_order(parts, torch.empty(128)), expected)
