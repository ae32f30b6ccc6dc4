"""Nodes, rails and grids: real ones cannot be had in a test, pretended ones can."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from mpi4py import MPI

from hpcpar.comm import Communicator, NodeMap, ProcessGrid
from hpcpar.errors import TopologyError

pytestmark = pytest.mark.mpi


@pytest.fixture
def mpi_comm() -> Iterator[MPI.Intracomm]:
    duplicate = MPI.COMM_WORLD.Dup()
    yield duplicate
    duplicate.Free()


@pytest.fixture(params=[1, 2, 3])
def per_node(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("HPCPAR_RANKS_PER_NODE", str(request.param))
    return request.param


def test_one_machine_is_one_node(mpi_comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HPCPAR_RANKS_PER_NODE", raising=False)
    with Communicator(mpi_comm) as comm:
        assert (comm.num_nodes, comm.node_rank) == (1, 0)
        assert comm.node is comm
        assert (comm.rail.size, comm.rail.rank, comm.rail.num_nodes) == (1, 0, 1)


def test_pretended_nodes_have_their_ranks_and_rails(mpi_comm: MPI.Intracomm, per_node: int) -> None:
    with Communicator(mpi_comm) as comm:
        everyone = range(comm.size)
        assert comm.num_nodes == -(-comm.size // per_node)
        assert comm.node_rank == comm.rank // per_node
        assert comm.node.rank == comm.rank % per_node
        assert comm.node.allgather(comm.rank) == [r for r in everyone if r // per_node == comm.node_rank]
        assert comm.rail.allgather(comm.rank) == [r for r in everyone if r % per_node == comm.node.rank]
        assert comm.rail.rank == comm.node_rank
        # A node is one node, and the ranks of a rail are on as many nodes.
        assert (comm.node.num_nodes, comm.node.node) == (1, comm.node)
        assert (comm.rail.num_nodes, comm.rail.rail) == (comm.rail.size, comm.rail)
        assert comm.node.rail.size == 1
        assert comm.rail.node.size == 1


def test_node_and_rail_together_reach_everybody(mpi_comm: MPI.Intracomm, per_node: int) -> None:
    """The first rail has a rank of every node, so sums over nodes and then over it are complete."""
    with Communicator(mpi_comm) as comm:
        total = torch.tensor([2.0**comm.rank])
        comm.node.Allreduce(MPI.IN_PLACE, total)
        if comm.node.rank == 0:
            comm.rail.Allreduce(MPI.IN_PLACE, total)
        comm.node.Bcast(total)
        assert total.item() == 2**comm.size - 1


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "²", " 2"])
@pytest.mark.parametrize("where", ["everywhere", "last rank"])
def test_wrong_number_raises_on_every_rank(
    mpi_comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch, text: str, where: str
) -> None:
    monkeypatch.setenv(
        "HPCPAR_RANKS_PER_NODE", text if where == "everywhere" or mpi_comm.rank == mpi_comm.size - 1 else "1"
    )
    with pytest.raises(TopologyError, match=r"HPCPAR_RANKS_PER_NODE must be a positive number.*on rank"):
        Communicator(mpi_comm)


def test_split_keeps_pretended_nodes(mpi_comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even and odd ranks; also in reverse, where nodes are numbered by whose rank comes first."""
    monkeypatch.setenv("HPCPAR_RANKS_PER_NODE", "2")
    with Communicator(mpi_comm) as comm:
        monkeypatch.setenv("HPCPAR_RANKS_PER_NODE", "1")  # read when the first one was made, and never again
        for sign in (1, -1):
            with comm.Split(comm.rank % 2, sign * comm.rank) as half:
                members = [rank for rank in range(comm.size) if rank % 2 == comm.rank % 2][::sign]
                assert half.allgather(comm.rank) == members
                nodes = list(dict.fromkeys(rank // 2 for rank in members))
                assert half.num_nodes == len(nodes)
                assert half.node_rank == nodes.index(comm.rank // 2)
        with comm.Dup() as same:
            assert (same.num_nodes, same.node_rank) == (comm.num_nodes, comm.node_rank)
            assert same.node.allgather(comm.rank) == comm.node.allgather(comm.rank)


def test_node_map_numbers_nodes_by_their_first_rank() -> None:
    nodes = NodeMap((0, 1, 0, 2, 1, 1))
    assert nodes.num_nodes == 3
    assert [nodes.local_index(rank) for rank in range(6)] == [0, 0, 1, 0, 1, 2]
    assert nodes.ranks_of(1) == [1, 4, 5]
    assert nodes.smallest_node == 1
    assert nodes.restrict([4, 3, 1]).nodes == (0, 1, 0)


# ---- grids -------------------------------------------------------------------------------------------------


def shapes_of(size: int) -> list[dict[str, int]]:
    return [
        {"data": size},
        {"data": -1},
        {"data": 1, "pipeline": size},
        {"data": -1, "pipeline": 1, "expert": 1},
        {"data": -1, "pipeline": 2} if size % 2 == 0 else {"data": 1, "pipeline": -1},
        {"data": 2, "pipeline": -1, "expert": 1} if size % 2 == 0 else {"data": size, "pipeline": -1},
    ]


def test_grid_arranges_ranks_with_the_last_axis_fastest(comm: Communicator) -> None:
    for axes in shapes_of(comm.size):
        with ProcessGrid(comm, **axes) as grid:
            assert list(grid.shape) == list(axes)
            assert torch.tensor(list(grid.shape.values())).prod() == comm.size
            positions = torch.arange(comm.size).view(*grid.shape.values())
            assert positions[tuple(grid.coordinates.values())] == comm.rank
            for axis, name in enumerate(axes):
                line = list(grid.coordinates.values())
                members = [*line[:axis], slice(None), *line[axis + 1 :]]
                communicator = getattr(grid, name)
                assert (communicator.size, communicator.rank) == (grid.shape[name], grid.coordinates[name])
                assert communicator.allgather(comm.rank) == positions[tuple(members)].tolist()


@pytest.mark.parametrize(
    ("axes", "text"),
    [
        ({}, "at least one axis"),
        ({"data": 0}, "must be positive"),
        ({"data": -2}, "must be positive"),
        ({"data": -1, "pipeline": -1}, "one may be -1"),
        ({"data": 99}, "must multiply to"),
        ({"data": 99, "pipeline": -1}, "must multiply to"),
        ({"shape": -1}, "must not be named"),
        ({"free": -1}, "must not be named"),
    ],
)
def test_grid_that_does_not_fit_is_a_clear_error(comm: Communicator, axes: dict[str, int], text: str) -> None:
    with pytest.raises(TopologyError, match=text):
        ProcessGrid(comm, **axes)


def test_grid_tells_its_axes_when_asked_for_another(comm: Communicator) -> None:
    with ProcessGrid(comm, data=-1, pipeline=1) as grid:
        with pytest.raises(AttributeError, match="has the axes data, pipeline, not 'tensor'"):
            grid.tensor  # noqa: B018
        data = grid.data
    assert data.is_freed
    grid.free()
    assert not comm.is_freed
