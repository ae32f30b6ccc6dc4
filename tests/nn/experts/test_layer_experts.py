"""Experts of a layer are saved one by one, and training goes on with them on another number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hpcpar.checkpoint import load_experts, save_experts
from hpcpar.comm import Communicator
from hpcpar.errors import CheckpointError, MismatchError
from hpcpar.nn import DataParallel, MixtureOfExperts, layer_experts
from hpcpar.optim import DataParallelOptimizer
from tests.nn.experts.mixtures import FEATURES, expert, gate

ROWS = 5


@pytest.fixture
def folder(comm: Communicator, tmp_path: Path) -> Path:
    return Path(comm.bcast(str(tmp_path), 0))


def make(comm: Communicator, experts: int = 3) -> nn.Sequential:
    layer = MixtureOfExperts(gate(experts), [expert(e) for e in range(experts)], comm)
    return nn.Sequential(nn.Identity(), layer)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, ranks: int) -> None:
    """One step on the mean over ``ranks`` parts of the sum of squares."""
    optimizer.zero_grad()
    (model(x).square().sum() / ranks).backward()
    optimizer.step()


def batch(comm: Communicator, step: int) -> Tensor:
    torch.manual_seed(100 + step)
    return torch.randn(comm.size, ROWS, FEATURES, dtype=torch.float64)


def test_training_goes_on_in_one_process(comm: Communicator, folder: Path) -> None:
    net = make(comm)
    model = DataParallel(net, comm)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for step in range(3):
        train(model, optimizer, batch(comm, step)[comm.rank], 1)
        if step == 1:
            save_experts(folder, layer_experts(model, optimizer), comm)
            rest = {name: value.clone() for name, value in net.state_dict().items() if "expert" not in name}
            moments = {
                key: value.clone() if isinstance(value, Tensor) else value
                for key, value in optimizer.state[net[1].gate.weight].items()
            }
    alone = comm.Split(comm.rank)
    assert alone is not None
    whole = make(alone)
    twin = torch.optim.AdamW(whole.parameters(), lr=0.05)
    load_experts(folder, layer_experts(whole, twin), alone)
    whole.load_state_dict({**whole.state_dict(), **rest})
    twin.state[whole[1].gate.weight] = moments
    train(whole, twin, batch(comm, 2).flatten(0, 1), comm.size)
    mine = dict(net.named_parameters())
    for name, parameter in whole.named_parameters():
        if name in mine:
            torch.testing.assert_close(mine[name], parameter, rtol=1e-9, atol=1e-12, msg=name)
    comm.Barrier()


def test_uids_are_the_same_wrapped_or_not(comm: Communicator) -> None:
    net = make(comm)
    mine = sorted(layer_experts(net))
    assert mine == sorted(layer_experts(DataParallel(net, comm)))
    everywhere = {uid for part in comm.allgather(mine) for uid in part}
    assert everywhere == {"1.expert.0", "1.expert.1", "1.expert.2"}
    assert "expert.0" in {uid for part in comm.allgather(sorted(layer_experts(net[1]))) for uid in part}


def test_state_without_an_optimizer_does_not_load_into_one(comm: Communicator, folder: Path) -> None:
    net = make(comm)
    save_experts(folder, layer_experts(net), comm)
    load_experts(folder, layer_experts(net), comm)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(CheckpointError, match="optimizer"):
        load_experts(folder, layer_experts(net, optimizer), comm)
    comm.Barrier()


def test_state_of_another_expert_is_refused(comm: Communicator) -> None:
    (one, *_) = layer_experts(make(comm)).values()
    with pytest.raises(MismatchError, match="same names and shapes"):
        one.load_full_state({"model": {"weight": torch.zeros(2)}, "optimizer": None})


def test_steps_that_an_overlapping_optimizer_owes_are_in_the_state(comm: Communicator) -> None:
    net = make(comm)
    optimizer = DataParallelOptimizer(torch.optim.SGD(net.parameters(), lr=0.1))
    model = DataParallel(net, comm, optimizer=optimizer)
    before = {uid: each.get_full_state()["model"] for uid, each in layer_experts(net).items()}
    train(model, optimizer, batch(comm, 0)[comm.rank], 1)
    after = {uid: each.get_full_state()["model"] for uid, each in layer_experts(model, optimizer).items()}
    settled = {name: parameter.detach().clone() for name, parameter in net[1].experts.named_parameters()}
    for uid, state in after.items():
        for name, value in state.items():
            assert torch.equal(value, settled[f"{uid.rpartition('.')[2]}.{name}"])
    assert any(
        not torch.equal(before[uid][name], value)
        for uid, state in after.items()
        for name, value in state.items()
    )
