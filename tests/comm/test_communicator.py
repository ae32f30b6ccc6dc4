"""What a communicator is: whose MPI communicators it frees, and what it does when it is gone."""

from __future__ import annotations

import copy
import os
import pickle

import pytest
import torch
from mpi4py import MPI

import hpcpar
from hpcpar.comm import Communicator
from hpcpar.errors import CommunicatorFreedError

pytestmark = pytest.mark.mpi


def test_rank_and_size_are_those_of_mpi(comm: Communicator) -> None:
    assert (
        (comm.rank, comm.size) == (comm.mpi.rank, comm.mpi.size) == (MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size)
    )
    assert f"rank {comm.rank} of {comm.size}" in repr(comm)


def test_split_makes_one_per_color_in_the_order_of_keys(comm: Communicator) -> None:
    with comm.Split(comm.rank // 2, -comm.rank) as part:
        members = [rank for rank in range(comm.size) if rank // 2 == comm.rank // 2]
        assert part.allgather(comm.rank) == members[::-1]
        total = torch.ones(3, dtype=torch.bfloat16)
        part.Allreduce(MPI.IN_PLACE, total)
        assert total.tolist() == [len(members)] * 3


def test_rank_without_a_color_gets_none(comm: Communicator) -> None:
    part = comm.Split(MPI.UNDEFINED if comm.rank == 0 else 5, comm.rank)
    assert (part is None) == (comm.rank == 0)
    if part is not None:
        assert part.size == comm.size - 1
        part.Free()
    comm.Barrier()


def test_messages_of_a_duplicate_are_its_own(comm: Communicator) -> None:
    with comm.Dup() as other:
        request = other.Isend(torch.ones(1), comm.rank, 1)
        assert not comm.mpi.Iprobe(MPI.ANY_SOURCE, MPI.ANY_TAG)
        other.Recv(torch.zeros(1), comm.rank, 1)
        request.wait()


def test_our_own_messages_never_meet_a_receive_from_anybody(comm: Communicator) -> None:
    """Ordered reductions and debug checks travel on a communicator of their own."""
    received = torch.zeros(1)
    request = comm.Irecv(received, MPI.ANY_SOURCE, MPI.ANY_TAG)
    total = torch.ones(50, dtype=torch.bfloat16)
    comm.Allreduce(MPI.IN_PLACE, total)
    assert not request.test()
    comm.Barrier()
    hpcpar.comm.wait_all([comm.Isend(torch.ones(1), (comm.rank + 1) % comm.size), request])
    assert received.item() == 1.0


CALLS = {
    "Send": (torch.zeros(1), 0),
    "Irecv": (torch.zeros(1), 0),
    "Bcast": (torch.zeros(1),),
    "Allreduce": (torch.zeros(1), torch.zeros(1)),
    "Allgatherv": (torch.zeros(1), torch.zeros(12)),
    "Alltoallv": (torch.zeros(12), torch.zeros(12)),
    "Reduce_scatter_block": (torch.zeros(12), torch.zeros(12)),
    "Barrier": (),
    "Ibarrier": (),
    "Split": (),
    "Dup": (),
    "send": (1, 0),
    "irecv": (),
    "bcast": (1,),
    "allgather": (1,),
    "abort": (),
}


def test_freed_communicator_raises_on_every_use(comm: Communicator) -> None:
    other = comm.Dup()
    sizes = {"Allgatherv": comm.size, "Alltoallv": comm.size, "Reduce_scatter_block": 1}
    other.Free()
    other.Free()
    other.free()
    assert other.is_freed
    assert "freed" in repr(other)
    for name, arguments in CALLS.items():
        if name in sizes:
            arguments = tuple(
                torch.zeros(n) for n in ((1, comm.size) if name == "Allgatherv" else (comm.size, sizes[name]))
            )
        with pytest.raises(
            CommunicatorFreedError, match=f"must not be used after Free .rank {comm.rank} of {comm.size}"
        ):
            getattr(other, name)(*arguments)
    for name in ("mpi", "node", "rail"):
        with pytest.raises(CommunicatorFreedError):
            getattr(other, name)
    assert (other.rank, other.size) == (comm.rank, comm.size)
    comm.Barrier()


def test_parts_are_freed_with_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCPAR_RANKS_PER_NODE", "1")
    mpi_comm = MPI.COMM_WORLD.Dup()
    with Communicator(mpi_comm) as comm:
        node, rail = comm.node, comm.rail
    assert comm.is_freed
    assert node.is_freed
    assert rail.is_freed
    mpi_comm.Barrier()  # it is the caller's, and still there
    again = Communicator(mpi_comm)
    again.Barrier()
    again.Free()
    mpi_comm.Free()


def test_context_is_left_to_the_process_after_an_error(comm: Communicator) -> None:
    """Other ranks may never come to free theirs, so waiting for them would hide the error."""
    other = comm.Dup()
    with pytest.raises(ZeroDivisionError), other:
        raise ZeroDivisionError
    assert not other.is_freed
    other.Free()


def test_only_an_intracommunicator_can_be_wrapped() -> None:
    for wrong in (None, MPI.COMM_NULL, "world", 3):
        with pytest.raises(TypeError, match="must be an mpi4py intracommunicator"):
            Communicator(wrong)


def test_communicator_is_shared_by_copies_and_never_pickled(comm: Communicator) -> None:
    assert copy.deepcopy({"comm": comm})["comm"] is comm
    with pytest.raises(TypeError, match="must not be pickled"):
        pickle.dumps(comm)


def test_many_communicators_can_be_made_and_freed(comm: Communicator) -> None:
    """Every MPI has a few thousand context numbers: leaking them shows here."""
    for _ in range(60):
        with comm.Dup() as other, other.Split(0) as part:
            assert part.size == comm.size


def test_signs_of_life_do_not_outlive_their_communicator(comm: Communicator) -> None:
    """MPI reuses the context of a freed communicator, with whatever was not received from it."""
    for number in range(3):
        with comm.Dup() as other:
            if other._roll_call is not None and comm.rank % 2 == 0:
                other._roll_call._tell(1000 + number)
    copies = [comm.mpi.Dup() for _ in range(8)]
    comm.Barrier()
    assert not any(copy.Iprobe(MPI.ANY_SOURCE, MPI.ANY_TAG) for copy in copies)
    for duplicate in copies:
        duplicate.Free()
    with comm.Dup() as other:
        other.Barrier()
        if other._roll_call is not None:
            assert other._roll_call.missing(500) == [rank for rank in range(comm.size) if rank != comm.rank]


def test_world_is_one_duplicate_of_all_ranks() -> None:
    world = hpcpar.comm.world()
    assert hpcpar.comm.world() is world
    assert MPI.Comm.Compare(world.mpi, MPI.COMM_WORLD) == MPI.CONGRUENT
    world.Free()
    again = hpcpar.comm.world()
    assert again is not world
    assert again.allreduce(1) == MPI.COMM_WORLD.size
    if "OMP_NUM_THREADS" in os.environ:
        before = torch.get_num_threads()
        again.Free()
        hpcpar.comm.world()
        assert torch.get_num_threads() == before
