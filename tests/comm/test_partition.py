"""Partitions cover every bucket once, in an order that both levels of a reduction can deliver."""

from __future__ import annotations

import pytest
import torch

from hpcpar.comm import (
    BucketLayout,
    Communicator,
    NodeCopy,
    NodeMap,
    even_partition,
    gather_parts,
    plan_buckets,
    whole_tensors,
)
from hpcpar.comm.partition import Partition, owners_in_order
from hpcpar.errors import StalledError
from tests.nn.training import ROUTES, pretended_nodes

MAPS = [(0,), (0, 0, 0), (0, 1, 2), (0, 0, 1, 1), (0, 0, 0, 1), (0, 1, 0, 1), (0, 0, 0, 1, 1)]


def assert_covers(partition: Partition, node_map: NodeMap, numel: int) -> None:
    parts = [partition.bounds[rank] for rank in owners_in_order(node_map)]
    assert [start for start, _ in parts] == [0, *(end for _, end in parts[:-1])]
    assert parts[-1][1] == numel
    others = set(range(len(node_map.nodes))) - set(owners_in_order(node_map))
    assert all(partition.bounds[rank][0] == partition.bounds[rank][1] for rank in others)


@pytest.mark.local
@pytest.mark.parametrize("nodes", MAPS)
@pytest.mark.parametrize("numel", [0, 1, 63, 64, 1000, 100_003])
def test_even_parts_cover_a_bucket(nodes: tuple[int, ...], numel: int) -> None:
    node_map = NodeMap(nodes)
    partition = even_partition(BucketLayout(torch.float32, numel), node_map)
    assert_covers(partition, node_map, numel)
    lengths = [end - start for start, end in partition.bounds if end > start]
    assert not lengths or max(lengths) - min(lengths) <= 64 * (1 + node_map.num_nodes)


@pytest.mark.local
@pytest.mark.parametrize("nodes", MAPS)
def test_whole_tensors_are_never_cut_and_evenly_shared(nodes: tuple[int, ...]) -> None:
    node_map = NodeMap(nodes)
    tensors = [torch.empty(n) for n in (1000, 30, 700, 1, 1, 500, 64, 900, 300, 10)]
    layouts, partitions = whole_tensors(plan_buckets(tensors, 6000), node_map)
    assert len(layouts) > 1
    owned = dict.fromkeys(range(len(nodes)), 0)
    seen = set()
    for layout, partition in zip(layouts, partitions, strict=True):
        assert_covers(partition, node_map, layout.numel)
        for slot in layout.slots:
            holders = [
                rank
                for rank, (start, end) in enumerate(partition.bounds)
                if start <= slot.offset and slot.offset + slot.length <= end and start < end
            ]
            assert len(holders) == 1
            owned[holders[0]] += slot.length
            seen.add(slot.index)
    assert seen == set(range(len(tensors)))
    owners = owners_in_order(node_map)
    assert max(owned[rank] for rank in owners) <= max(1000, 2 * 3507 / len(owners))


@pytest.mark.mpi
def test_parts_reach_everybody(comm: Communicator) -> None:
    layouts = [
        BucketLayout(torch.float64, 1000),
        BucketLayout(torch.bfloat16, 70),
        BucketLayout(torch.int64, 0),
    ]
    partitions = [even_partition(layout, comm.node_map) for layout in layouts]
    flats = [torch.full((layout.numel,), -1.0).to(layout.dtype) for layout in layouts]
    for flat, partition in zip(flats, partitions, strict=True):
        flat[slice(*partition.bounds[comm.rank])] = comm.rank
    gather_parts(comm, range(comm.size), flats, partitions)
    for flat, partition in zip(flats, partitions, strict=True):
        for rank, bounds in enumerate(partition.bounds):
            assert bool((flat[slice(*bounds)] == rank).all())


@pytest.mark.mpi
@pytest.mark.parametrize("route", ROUTES)
def test_what_each_rank_writes_is_seen_by_all_after_leave(comm: Communicator, route: str) -> None:
    ranks_per_node, transport = ROUTES[route]
    layouts = [BucketLayout(torch.float32, 1000), BucketLayout(torch.float64, 131)]
    with pretended_nodes(comm, ranks_per_node) as nodes:
        partitions = [even_partition(layout, nodes.node_map) for layout in layouts]
        copy = NodeCopy(nodes, layouts, partitions, shared=transport != "mpi")
        assert copy.is_shared == (nodes.node_map.largest_node > 1 and transport != "mpi")
        for step in (1, 2, 3):
            copy.enter()
            for flat, partition in zip(copy.flats, partitions, strict=True):
                flat[slice(*partition.bounds[comm.rank])] = 10 * step + comm.rank
            copy.leave()
            for flat, partition in zip(copy.flats, partitions, strict=True):
                for rank, bounds in enumerate(partition.bounds):
                    assert bool((flat[slice(*bounds)] == 10 * step + rank).all())
        copy.free()
        copy.free()


@pytest.mark.mpi
def test_a_rank_that_does_not_come_is_named(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    layouts = [BucketLayout(torch.float32, 100)]
    copy = NodeCopy(comm, layouts, [even_partition(layouts[0], comm.node_map)])
    if comm.size > 1:
        late = comm.size - 1
        if comm.rank != late:
            monkeypatch.setenv("HPCPAR_TIMEOUT_S", "0.3")
            with pytest.raises(
                StalledError, match=rf"beginning of an update.*waits for rank {late}"
            ) as caught:
                copy.enter()
            assert caught.value.waiting_for == (late,)
            monkeypatch.undo()
        comm.Barrier()
    copy.free()
