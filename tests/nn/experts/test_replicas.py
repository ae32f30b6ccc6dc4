"""Replicas of an expert are trained as one, whoever gets the requests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from hpcpar.checkpoint import load_experts, save_experts
from hpcpar.comm import MPI, Communicator
from hpcpar.errors import MismatchError
from hpcpar.nn.experts.client import RemoteExpert
from hpcpar.nn.experts.server import ExpertServer
from tests.nn.experts.serving import WIDTH, backend, expert

DOUBLE = torch.float64


def data_of(rank: int, steps: int = 3) -> torch.Tensor:
    return torch.randn(steps, 4, WIDTH, dtype=DOUBLE, generator=torch.Generator().manual_seed(rank))


def loss_of(y: torch.Tensor) -> torch.Tensor:
    return y.square().sum()


def equal_on_all(comm: Communicator, module: nn.Module) -> None:
    everybodys = comm.allgather([p.detach() for p in module.parameters()])
    for other in everybodys[1:]:
        assert all(torch.equal(p, q) for p, q in zip(everybodys[0], other, strict=True))


@pytest.mark.parametrize("threaded", [None, False], ids=["thread", "cooperative"])
@pytest.mark.parametrize("callers", ["all", "first"])
def test_one_update_is_the_summed_gradient_of_all_examples(
    comm: Communicator, callers: str, threaded: bool | None
) -> None:
    ranks = range(comm.size) if callers == "all" else [0]
    data = torch.cat([data_of(rank).flatten(0, 1) for rank in ranks])
    # Different at first: all take over the state of the first replica.
    own = backend("e", expert(comm.rank), replicas=comm, samples_per_update=len(data))
    with ExpertServer(comm, {"e": own}, threaded=threaded):
        if comm.rank in ranks:
            remote = RemoteExpert("e", comm)
            for x in data_of(comm.rank):
                loss_of(remote(x)).backward()
    reference = expert(0)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    loss_of(reference(data)).backward()
    optimizer.step()
    assert own.get_stats() == {"updates": 1, "examples_processed": len(data)}
    equal_on_all(comm, own.expert)
    for ours, theirs in zip(own.expert.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_replicas_stay_bitwise_equal_through_many_updates(comm: Communicator) -> None:
    own = backend("e", expert(1), replicas=comm)
    with ExpertServer(comm, {"e": own}):
        remote = RemoteExpert("e", comm)
        for x in data_of(comm.rank, steps=20):
            loss_of(remote(x)).backward()
    equal_on_all(comm, own.expert)
    stats = comm.allgather(own.get_stats())
    assert all(other == stats[0] for other in stats)
    assert stats[0]["examples_processed"] == comm.size * 80
    assert stats[0]["updates"] >= 1


def test_samples_that_make_no_update_wait_for_the_next_block(comm: Communicator) -> None:
    own = backend("e", expert(1), replicas=comm, samples_per_update=8 * comm.size)
    server = ExpertServer(comm, {"e": own})
    for turn in (0, 1):
        with server:
            loss_of(RemoteExpert("e", comm)(data_of(comm.rank)[turn])).backward()
        assert own.get_stats()["updates"] == turn
    assert own.get_stats()["examples_processed"] == 8 * comm.size
    reference = expert(1)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    loss_of(reference(torch.cat([data_of(rank)[:2].flatten(0, 1) for rank in range(comm.size)]))).backward()
    optimizer.step()
    for ours, theirs in zip(own.expert.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_bfloat16_and_running_statistics(comm: Communicator) -> None:
    torch.manual_seed(1)
    module = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)).to(torch.bfloat16)
    own = backend("e", module, dtype=torch.bfloat16, replicas=comm, samples_per_update=4 * comm.size)
    with ExpertServer(comm, {"e": own}):
        loss_of(RemoteExpert("e", comm)(data_of(comm.rank)[0].bfloat16())).backward()
    assert own.get_stats()["updates"] == 1
    equal_on_all(comm, module)
    means = comm.allgather(module[0].running_mean)
    assert all(torch.equal(mean, means[0]) for mean in means)


@pytest.mark.mpi(min_size=3)
def test_callers_without_a_replica_share_them(comm: Communicator) -> None:
    part = comm.Split(0 if comm.rank < 2 else 1, comm.rank)
    served = {"e": backend("e", expert(1), replicas=part)} if comm.rank < 2 else {}
    with ExpertServer(comm, served):
        remote = RemoteExpert("e", comm)
        assert remote.record.ranks == (0, 1)
        loss_of(remote(data_of(comm.rank)[0])).backward()
    if served:
        equal_on_all(part, served["e"].expert)
        assert served["e"].get_stats()["examples_processed"] == 4 * comm.size
    part.Free()


@pytest.mark.mpi(min_size=2)
def test_replicas_that_do_not_fit_are_refused_on_all_ranks(comm: Communicator) -> None:
    with pytest.raises(MismatchError, match=f"by the {comm.size} rank.s. of its `replicas`, got 1"):
        ExpertServer(
            comm, {"e": backend("e", expert(1), replicas=comm)} if comm.rank == 0 else {}
        ).__enter__()
    unlike = nn.Linear(WIDTH, WIDTH, bias=comm.rank == 0, dtype=DOUBLE)
    with pytest.raises(MismatchError, match="replicas of expert 'e' must be alike"):
        ExpertServer(comm, {"e": backend("e", unlike, replicas=comm)}).__enter__()


def test_checkpoint_keeps_what_every_replica_has_accumulated(comm: Communicator, tmp_path: Path) -> None:
    folder = comm.bcast(str(tmp_path), 0)
    own = backend("e", expert(0), replicas=comm, samples_per_update=1000)
    for x in data_of(comm.rank):
        own.backward(x, 2.0 * own.forward(x)[0])
    save_experts(folder, {"e": own}, comm)
    other = backend("e", expert(5), replicas=comm, samples_per_update=1000)
    load_experts(folder, {"e": other}, comm)
    samples = comm.size * data_of(0).flatten(0, 1).shape[0]
    assert comm.allreduce(other.accumulated_samples) == samples
    assert comm.allreduce(other.get_stats()["examples_processed"]) == samples
    mine, theirs = own.take_gradients()[0], other.take_gradients()[0]
    for before, after in zip(mine, theirs, strict=True):
        total, again = before.clone(), after.clone()
        comm.Allreduce(MPI.IN_PLACE, total)
        comm.Allreduce(MPI.IN_PLACE, again)
        torch.testing.assert_close(again, total)
    comm.Barrier()
