"""States of sharded optimizers: whole on every rank, for the plain optimizer and any number of ranks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hpcpar.checkpoint.state_file import read_state, write_state
from hpcpar.comm import Communicator
from hpcpar.errors import CheckpointError
from hpcpar.optim import ShardedOptimizer
from tests.nn.training import (
    assert_close,
    assert_replicas_equal,
    local_part,
    make_batches,
    mlp,
    pretended_nodes,
    train,
    wrap,
)

pytestmark = pytest.mark.mpi

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (torch.optim.AdamW, {"lr": 0.02, "amsgrad": True}),
    "SGD": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "Adafactor": (torch.optim.Adafactor, {"lr": 0.05}),
}


def assert_states_close(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert got["state"].keys() == expected["state"].keys()
    for index, state in expected["state"].items():
        assert {k for k in got["state"][index] if k != "master"} == set(state)
        for name, value in state.items():
            torch.testing.assert_close(got["state"][index][name], value)
    for mine, theirs in zip(got["param_groups"], expected["param_groups"], strict=True):
        assert mine["params"] == theirs["params"]
        assert mine["lr"] == theirs["lr"]


@pytest.mark.parametrize("name", KINDS)
def test_a_state_goes_to_the_plain_optimizer_and_comes_back(comm: Communicator, name: str) -> None:
    kind, options = KINDS[name]
    batches, net = make_batches(comm, 6), mlp()
    twin = copy.deepcopy(net)
    plain = kind(twin.parameters(), **options)
    train(twin, plain, batches[:2])
    model = wrap(net, comm)
    optimizer = ShardedOptimizer(model, kind, comm, **options)
    train(model, optimizer, [local_part(comm, *batch) for batch in batches[:2]])
    state = optimizer.state_dict()
    assert_states_close(state, plain.state_dict())

    other = kind(twin.parameters(), **{**options, "lr": 1.0})  # sharded -> plain
    other.load_state_dict(state)
    assert other.param_groups[0]["lr"] == options["lr"]
    train(twin, other, batches[2:4])
    train(model, optimizer, [local_part(comm, *batch) for batch in batches[2:4]])
    assert_close(net, twin)
    optimizer.free()

    again = ShardedOptimizer(model, kind, comm, **{**options, "lr": 1.0})  # plain -> sharded
    again.load_state_dict(other.state_dict())
    train(twin, other, batches[4:])
    train(model, again, [local_part(comm, *batch) for batch in batches[4:]])
    assert_close(net, twin)
    assert_states_close(again.state_dict(), other.state_dict())
    again.free()
    model.free()


@pytest.mark.parametrize("name", KINDS)
def test_training_goes_on_on_another_number_of_ranks(comm: Communicator, name: str, tmp_path: Path) -> None:
    kind, options = KINDS[name]
    path = Path(comm.bcast(str(tmp_path / "state.h5"), 0))
    batches, net = make_batches(comm, 4), mlp()
    twin = copy.deepcopy(net)
    plain = kind(twin.parameters(), **options)
    train(twin, plain, batches)
    model = wrap(net, comm)
    optimizer = ShardedOptimizer(model, kind, comm, **options)
    train(model, optimizer, [local_part(comm, *batch) for batch in batches[:2]])
    state = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    if comm.rank == 0:
        write_state(path, state)
    optimizer.free()
    model.free()
    comm.Barrier()
    fewer = comm.Split(0 if comm.rank < max(1, comm.size - 1) else 1, comm.rank)
    assert fewer is not None
    saved, resumed = read_state(path), mlp(seed=9)
    resumed.load_state_dict(saved["model"])
    model = wrap(resumed, fewer)
    optimizer = ShardedOptimizer(model, kind, fewer, **options)
    optimizer.load_state_dict(saved["optimizer"])
    for x, y in batches[2:]:
        rows = x.shape[0] // fewer.size * fewer.size
        if rows != x.shape[0]:  # uneven: one whole batch on each rank has the same mean
            train(model, optimizer, [(x, y)])
        else:
            train(model, optimizer, [local_part(fewer, x, y)])
    assert_close(resumed, twin)
    optimizer.free()
    model.free()
    fewer.Free()


def test_the_same_state_whatever_the_nodes(comm: Communicator) -> None:
    batches = make_batches(comm, 3)
    states = []
    for ranks_per_node in (None, 1, 2):
        with pretended_nodes(comm, ranks_per_node) as nodes:
            net = mlp()
            model = wrap(net, nodes)
            optimizer = ShardedOptimizer(model, torch.optim.AdamW, nodes, lr=0.02)
            if states:
                optimizer.load_state_dict(states[-1])
            train(model, optimizer, [local_part(comm, *batch) for batch in batches])
            train(model, optimizer, [local_part(comm, *batch) for batch in batches])
            states.append(optimizer.state_dict())
            tensors = [v for state in states[-1]["state"].values() for v in state.values()]
            assert_replicas_equal(comm, tensors)
            optimizer.free()
            model.free()


def test_masters_come_back_with_all_their_digits(comm: Communicator) -> None:
    batches = make_batches(comm, 4, dtype=torch.bfloat16)
    net = mlp(torch.bfloat16)
    model = wrap(net, comm)
    optimizer = ShardedOptimizer(model, torch.optim.AdamW, comm, lr=1e-4)
    train(model, optimizer, [local_part(comm, *batch) for batch in batches])
    state = optimizer.state_dict()
    optimizer.free()
    optimizer = ShardedOptimizer(model, torch.optim.AdamW, comm, lr=1e-4)
    optimizer.load_state_dict(state)
    for index, again in optimizer.state_dict()["state"].items():
        assert torch.equal(again["master"], state["state"][index]["master"])
        assert not torch.equal(again["master"], again["master"].bfloat16().float())
    del state["state"][0]["master"]  # of a plain optimizer: the parameters are all there is
    optimizer.load_state_dict(state)
    first = optimizer.state_dict()["state"][0]["master"]
    assert torch.equal(first, net[0].weight.float())
    plain = torch.optim.AdamW(copy.deepcopy(net).parameters())
    plain.load_state_dict(state)
    plain.step()
    optimizer.free()
    model.free()


@pytest.mark.parametrize("attached", [True, False])
def test_what_an_eight_bit_wire_keeps_back_is_part_of_the_state(comm: Communicator, attached: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 400), nn.Tanh(), nn.Linear(400, 3))
    batches = make_batches(comm, 3, dtype=torch.float32)
    with pretended_nodes(comm, 1) as nodes:
        model = wrap(net, nodes, wire_dtype=torch.int8)
        source: Any = model if attached else net
        options: Any = {} if attached else {"wire_dtype": torch.int8}
        make: Any = lambda: ShardedOptimizer(source, torch.optim.AdamW, nodes, lr=0.02, **options)  # noqa: E731
        optimizer = make()
        train(model, optimizer, [local_part(comm, *batch) for batch in batches])
        state = optimizer.state_dict()
        assert "residuals" in state or comm.size == 1
        if comm.size > 1:
            assert any(bool(residual.any()) for residual in state["residuals"].values())
        optimizer.free()
        optimizer = make()
        optimizer.load_state_dict(state)
        again = optimizer.state_dict().get("residuals", {})
        for number, residual in state.get("residuals", {}).items():
            torch.testing.assert_close(again[number], residual)
        optimizer.free()
        model.free()


def test_a_state_of_other_parameters_is_refused_by_name(comm: Communicator) -> None:
    net = mlp()
    optimizer = ShardedOptimizer(net, torch.optim.AdamW, comm)
    other = torch.optim.AdamW([nn.Parameter(torch.zeros(3))])
    with pytest.raises(CheckpointError, match=r"with \[6\] parameters, got \[1\]"):
        optimizer.load_state_dict(other.state_dict())
    wrong = torch.optim.AdamW([nn.Parameter(torch.zeros(2, 2)) for _ in range(6)])
    sum(p.sum() for group in wrong.param_groups for p in group["params"]).backward()
    wrong.step()
    with pytest.raises(CheckpointError, match="must have the same shape"):
        optimizer.load_state_dict(wrong.state_dict())
    optimizer.free()
