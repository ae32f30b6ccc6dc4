"""Lower-case methods: Python objects, as with mpi4py."""

from __future__ import annotations

import operator

import pytest
import torch
from mpi4py import MPI

from hpcpar.comm import Communicator, wait_all
from hpcpar.errors import MismatchError

pytestmark = pytest.mark.mpi


def thing(rank: int) -> dict[str, object]:
    return {"rank": rank, "text": "x" * rank, "nested": [(rank, None)], "long": list(range(5000 * rank))}


def neighbours(comm: Communicator) -> tuple[int, int]:
    return (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size


def test_objects_travel_point_to_point(comm: Communicator) -> None:
    left, right = neighbours(comm)
    status = MPI.Status()
    request = comm.isend(thing(comm.rank), right, 4)
    assert comm.recv(left, 4, status) == thing(left)
    assert (status.source, status.tag) == (left, 4)
    request.wait()
    assert comm.sendrecv(thing(comm.rank), right, 1, left, 1) == thing(left)
    if comm.rank == 0:
        for rank in range(1, comm.size):
            comm.send(rank, rank)
    else:
        assert comm.recv() == comm.rank


def test_received_object_comes_from_wait_each_time(comm: Communicator) -> None:
    left, right = neighbours(comm)
    requests = [comm.irecv(left, tag) for tag in (1, 2)]
    sends = [comm.isend(tag, right, tag) for tag in (2, 1)]
    wait_all([*requests, *sends])
    assert [request.wait() for request in requests] == [1, 2]
    assert [request.Wait() for request in requests] == [1, 2]
    assert all(request.test() for request in requests)


def test_long_object_needs_no_receiver_in_mpi_at_once(comm: Communicator) -> None:
    left, right = neighbours(comm)
    values = torch.arange(400_000)
    received = comm.sendrecv(values + comm.rank, right, 0, left)
    assert torch.equal(received, values + left)


def test_objects_may_be_exchanged_with_plain_mpi4py(comm: Communicator) -> None:
    left, right = neighbours(comm)
    request = comm.mpi.isend(thing(comm.rank), right, 2)
    assert comm.recv(left, 2) == thing(left)
    request.wait()
    ours = comm.isend(thing(comm.rank), right, 3)
    assert comm.mpi.recv(source=left, tag=3) == thing(left)
    ours.wait()


def test_null_rank_sends_none(comm: Communicator) -> None:
    assert comm.recv(MPI.PROC_NULL) is None
    comm.send("lost", MPI.PROC_NULL)


def test_collectives_of_objects(comm: Communicator) -> None:
    rank, size, root = comm.rank, comm.size, comm.size - 1
    everything = [thing(other) for other in range(size)]
    assert comm.bcast(thing(rank), root) == thing(root)
    assert comm.bcast(None if rank != root else "from root", root) == "from root"
    assert comm.allgather(thing(rank)) == everything
    assert comm.gather(thing(rank), root) == (everything if rank == root else None)
    assert comm.scatter(everything if rank == root else None, root) == thing(rank)
    assert comm.alltoall([(rank, other) for other in range(size)]) == [(other, rank) for other in range(size)]


def test_reductions_of_objects_are_in_rank_order(comm: Communicator) -> None:
    rank, size = comm.rank, comm.size
    words = [str(other) for other in range(size)]
    assert comm.allreduce(str(rank)) == "".join(words)
    assert comm.allreduce(rank, MPI.MAX) == size - 1
    assert comm.allreduce(rank + 1, operator.mul) == torch.arange(1, size + 1).prod()
    assert comm.reduce(str(rank), root=size - 1) == ("".join(words) if rank == size - 1 else None)
    assert comm.scan(str(rank)) == "".join(words[: rank + 1])
    assert comm.exscan(str(rank)) == ("".join(words[:rank]) if rank else None)


def test_wrong_scatter_raises_everywhere(comm: Communicator) -> None:
    with pytest.raises(MismatchError, match=f"scatter must get {comm.size} objects"):
        comm.scatter(["too many"] * (comm.size + 1) if comm.rank == 0 else None)
    with pytest.raises(MismatchError, match="alltoall must get"):
        comm.alltoall([])
    with pytest.raises(MismatchError, match="root of bcast"):
        comm.bcast(1, root=comm.size)
    assert comm.allreduce(1) == comm.size


def test_objects_are_chunked(chunked: Communicator) -> None:
    left, right = neighbours(chunked)
    assert chunked.sendrecv(thing(chunked.rank), right, 0, left) == thing(left)
    assert chunked.allgather(thing(chunked.rank)) == [thing(rank) for rank in range(chunked.size)]
    assert chunked.bcast(thing(3) if chunked.rank == 0 else None) == thing(3)


def test_messages_of_objects_and_tensors_do_not_mix(comm: Communicator) -> None:
    left, right = neighbours(comm)
    requests = [comm.isend("object", right, 1), comm.Isend(torch.ones(2), right, 2)]
    received = torch.zeros(2)
    comm.Recv(received, left, 2)
    assert comm.recv(left, 1) == "object"
    assert received.tolist() == [1.0, 1.0]
    wait_all(requests)
