"""Buckets summed inside a node by a group of torch: here by gloo on the host, in the place of NCCL."""

from __future__ import annotations

import os

import pytest
import torch

from hpcpar.comm import BucketLayout, Communicator, DeviceGroup, Reducer, make_device_group
from hpcpar.comm import reducer as reducer_module
from hpcpar.comm.staging import Staging
from tests.nn.training import assert_replicas_equal, pretended_nodes

pytestmark = pytest.mark.mpi

LAYOUTS = [BucketLayout(torch.float32, 500), BucketLayout(torch.bfloat16, 64), BucketLayout(torch.float64, 3)]


class SeparateStaging(Staging):
    """As of a bucket on a device."""

    def __init__(self, storage: torch.Tensor, device: torch.device) -> None:
        super().__init__(storage, device, separate=True)


def fill(reducer: Reducer, comm: Communicator) -> None:
    for bucket, flat in enumerate(reducer.flats):
        flat.fill_(comm.rank + bucket)
        reducer.publish(bucket)


@pytest.mark.parametrize("ranks_per_node", [1, 2, 3, None])
@pytest.mark.parametrize("thread", [False, True], ids=["hooks", "thread"])
def test_what_stays_within_the_node_goes_by_the_group(
    comm: Communicator, ranks_per_node: int | None, thread: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reducer_module, "Staging", SeparateStaging)
    with pretended_nodes(comm, ranks_per_node) as nodes:
        reducer = Reducer(nodes, LAYOUTS)
        group = DeviceGroup(nodes.node, "gloo")
        group.carry(reducer)
        reducer.use_progress_thread(thread)
        ours = nodes.node_map.ranks_of(nodes.node_rank)
        for within_node in (True, False, True, True):
            reducer.begin(within_node=within_node)
            fill(reducer, nodes)
            reducer.wait_all()
            ranks = ours if within_node else range(nodes.size)
            for bucket, flat in enumerate(reducer.flats):
                expected = torch.full_like(flat, sum(ranks) / len(ranks) + bucket)
                torch.testing.assert_close(flat, expected)
            assert_replicas_equal(nodes.node if within_node else nodes, reducer.flats)
        reducer.free()
        group.free()


def test_buckets_within_the_node_are_not_copied_to_the_host(
    comm: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reducer_module, "Staging", SeparateStaging)
    with pretended_nodes(comm, 2) as nodes:
        reducer = Reducer(nodes, LAYOUTS)
        host = reducer._transport
        group = DeviceGroup(nodes.node, "gloo")
        group.carry(reducer)
        reducer.begin(within_node=nodes.num_nodes > 1)
        fill(reducer, nodes)
        reducer.wait_all()
        assert nodes.num_nodes == 1 or all(not storage.any() for storage in host.storage)
        reducer.free()
        group.free()


def test_buckets_on_the_host_stay_in_shared_memory(comm: Communicator) -> None:
    with pretended_nodes(comm, 2) as nodes:
        reducer = Reducer(nodes, LAYOUTS)
        group = DeviceGroup(nodes.node, "gloo")
        group.carry(reducer)
        started: list[torch.Tensor] = []
        group.start = started.append  # type: ignore[method-assign, assignment]
        reducer.begin(within_node=True)
        fill(reducer, nodes)
        reducer.wait_all()
        assert not started
        reducer.free()
        group.free()


def test_the_file_that_ranks_meet_in_is_removed(comm: Communicator) -> None:
    group = DeviceGroup(comm.node, "gloo")
    folder = getattr(group, "_folder", None)
    assert (folder is not None) is (comm.node.size > 1)
    group.free()
    comm.Barrier()
    assert folder is None or not os.path.exists(folder)


def test_ranks_on_the_host_have_no_group(comm: Communicator) -> None:
    assert make_device_group(comm.node, torch.device("cpu")) is None


@pytest.mark.cuda
def test_ranks_that_share_a_gpu_have_none_either(comm: Communicator) -> None:
    group = make_device_group(comm.node, torch.device("cuda", 0))
    assert (group is None) is (comm.node.size > 1)
