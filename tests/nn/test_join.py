"""Joining: ranks with unequal numbers of batches train as one process with the batches that there are."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hpcpar
from hpcpar.comm import Communicator
from hpcpar.errors import MismatchError
from hpcpar.optim import DataParallelOptimizer
from tests.nn.training import FEATURES, assert_close, assert_replicas_equal, mlp, pretended_nodes, wrap

pytestmark = pytest.mark.mpi

PLANS: list[list[list[int]]] = [
    [[4, 3], [2, 2, 5], [1], [3, 3]],  # rows of each batch of each rank
    [[], [2, 3], [1, 1, 2], []],
    [[3, 4, 2], [], [], []],
    [[], [], [], []],
]


def batch_of(rank: int, step: int, rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    values = torch.randn(rows, FEATURES + 3, generator=generator, dtype=torch.float64)
    return values[:, :FEATURES], values[:, FEATURES:]


def reference_of(net: nn.Module, plan: Sequence[Sequence[int]], average: str, optimizer: Any) -> nn.Module:
    """Every step averages over the ranks that still have batches, or over their rows."""
    reference = copy.deepcopy(net)
    optimizer = optimizer(reference.parameters())
    for step in range(max(map(len, plan))):
        present = {rank: rows[step] for rank, rows in enumerate(plan) if step < len(rows)}
        total = sum(present.values()) if average == "samples" else len(present)
        optimizer.zero_grad()
        for rank, rows in present.items():
            x, y = batch_of(rank, step, rows)
            share = (rows if average == "samples" else 1) / total
            (share * (reference(x) - y).square().sum(1).mean()).backward()
        optimizer.step()
    return reference


@pytest.mark.parametrize("average", ["ranks", "samples"])
@pytest.mark.parametrize("plan", PLANS)
def test_uneven_batches_train_as_one_process(comm: Communicator, plan: list[list[int]], average: str) -> None:
    plan = plan[: comm.size]

    def momentum(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)

    reference = reference_of(mlp(), plan, average, momentum)
    for transport in ("auto", "mpi"):
        for stepped, overlap in ((True, False), (False, False), (True, True)):
            net = mlp()
            optimizer: Any = momentum(net.parameters())
            options = {}
            if overlap:
                optimizer = options["optimizer"] = DataParallelOptimizer(optimizer)
            model = wrap(net, comm, transport=transport, **options)
            with model.join(average, **({"optimizer": optimizer} if stepped else {})):
                for step, rows in enumerate(plan[comm.rank]):
                    x, y = batch_of(comm.rank, step, rows)
                    optimizer.zero_grad()
                    (model(x) - y).square().sum(1).mean().backward()
                    optimizer.step()
            if overlap:
                optimizer.finish()
            assert_close(net, reference, (transport, stepped, overlap))
            assert_replicas_equal(comm, net.parameters())
            if stepped and not overlap:
                momenta = [
                    optimizer.state[p]["momentum_buffer"] for p in net.parameters() if optimizer.state[p]
                ]
                assert_replicas_equal(comm, momenta)
            model.free()


def test_joining_while_progress_is_measured(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial ends, collectively, while some ranks have run out of batches."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    net = mlp()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    model = wrap(net, comm, progress="auto", transport="mpi")
    with model.join(optimizer=optimizer):
        for step in range(4 + 9 * (comm.rank == comm.size - 1)):
            optimizer.zero_grad()
            x, y = batch_of(comm.rank, step, 3)
            (model(x) - y).square().mean().backward()
            optimizer.step()
    for step in range(12):
        x, y = batch_of(comm.rank, step, 3)
        (model(x) - y).square().mean().backward()
    assert_replicas_equal(comm, net.parameters())
    model.free()


def test_training_goes_on_after_joining(comm: Communicator) -> None:
    net, reference = mlp(), mlp()
    model = wrap(net, comm)
    with model.join("samples"):
        for step in range(comm.rank):
            x, y = batch_of(comm.rank, step, 2)
            (model(x) - y).square().mean().backward()
    model.zero_grad()
    reference.load_state_dict(net.state_dict())
    for rank in range(comm.size):
        x, y = batch_of(rank, 9, 2 + rank)
        ((reference(x) - y).square().mean() / comm.size).backward()
    x, y = batch_of(comm.rank, 9, 2 + comm.rank)
    (model(x) - y).square().mean().backward()
    for mine, other in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    model.free()


def test_buffers_are_those_of_the_rank_that_trained_longest(comm: Communicator) -> None:
    net = nn.Sequential(mlp(), nn.BatchNorm1d(3).double())
    model = wrap(net, comm, broadcast_buffers=True)
    with model.join():
        for step in range(comm.rank):
            model(batch_of(comm.rank, step, 4)[0]).sum().backward()
    assert int(net[1].num_batches_tracked) == comm.size - 1
    assert_replicas_equal(comm, net.buffers())
    model.free()


def test_several_nodes_join_too(comm: Communicator) -> None:
    plan = PLANS[1][: comm.size]
    reference = reference_of(mlp(), plan, "samples", torch.optim.SGD)
    with pretended_nodes(comm, 2) as nodes:
        net = mlp()
        optimizer = torch.optim.SGD(net.parameters())
        model = wrap(net, nodes)
        with model.join("samples"):
            for step, rows in enumerate(plan[comm.rank]):
                x, y = batch_of(comm.rank, step, rows)
                optimizer.zero_grad()
                (model(x) - y).square().sum(1).mean().backward()
                optimizer.step()
        model.free()
    assert_close(net, reference)


def test_unknown_average_is_refused(comm: Communicator) -> None:
    model = wrap(mlp(), comm)
    with pytest.raises(MismatchError, match="average must be"), model.join("weights"):
        pass
    model.free()


def test_samples_of_steps_before_the_join_do_not_count(comm: Communicator) -> None:
    torch.manual_seed(3)
    net = torch.nn.Linear(4, 1).double()
    model = hpcpar.nn.DataParallel(net, comm)
    data = torch.randn(3, 40, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for x in data[:2]:  # steps of unequal batches, whose sizes must be forgotten
        model(x[: comm.rank + 1]).mean().backward()
    model.zero_grad()
    start = sum(range(comm.rank + 1))
    mine = data[2][start : start + comm.rank + 1]
    with model.join(average="samples"):
        model(mine).pow(2).mean().backward()
        mean = [p.grad.clone() for p in net.parameters()]
    model.free()
    net.zero_grad()
    net(data[2][: sum(range(comm.size + 1))]).pow(2).mean().backward()
    for got, parameter in zip(mean, net.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-12, atol=1e-12)


def test_copy_joins_before_its_first_forward(comm: Communicator) -> None:
    model = hpcpar.nn.DataParallel(torch.nn.Linear(2, 1), comm)
    twin = copy.deepcopy(model)
    with twin.join():
        for _ in range(comm.rank + 1):
            twin(torch.ones(1, 2)).sum().backward()
    twin.free()
    model.free()
