"""States of collaborative optimizers: on another number of ranks, for plain optimizers, with residuals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from hpcpar.checkpoint.state_file import read_state, write_state
from hpcpar.comm import Communicator
from hpcpar.errors import MismatchError
from hpcpar.optim import CollaborativeOptimizer
from tests.nn.training import FEATURES, assert_close, assert_replicas_equal, mlp, pretended_nodes
from tests.optim.collaborative.scripted import MakeOptimizer, adam, data, mean_loss, momentum

pytestmark = pytest.mark.mpi

SIZES = (4, 8)  # the two batches of a global step, all of rank 0


def train(comm: Communicator, net: nn.Module, opt: CollaborativeOptimizer, steps: range) -> None:
    for step in steps:
        for place, size in enumerate(SIZES if comm.rank == 0 else ()):
            opt.zero_grad()
            mean_loss(net, *data(step, 0, place, size)).backward()
            opt.step(size)
        while opt.local_step == step:
            opt.step_aux()


def reference(make: MakeOptimizer, steps: int) -> nn.Module:
    net = mlp(seed=0)
    plain = make(net.parameters())
    for step in range(steps):
        batches = [data(step, 0, place, size) for place, size in enumerate(SIZES)]
        plain.zero_grad()
        mean_loss(net, *(torch.cat(parts) for parts in zip(*batches, strict=True))).backward()
        plain.step()
    return net


@pytest.mark.parametrize("make", [adam, momentum])
def test_training_goes_on_on_another_number_of_ranks(
    comm: Communicator, tmp_path: Path, make: MakeOptimizer
) -> None:
    path = Path(comm.bcast(str(tmp_path / "state.h5"), 0))
    net = mlp(seed=comm.rank)
    with CollaborativeOptimizer(make(net.parameters()), comm, target_batch_size=sum(SIZES)) as opt:
        train(comm, net, opt, range(2))
        if comm.rank == 0:
            write_state(path, {"model": net.state_dict(), "optimizer": opt.state_dict()})
    comm.Barrier()
    saved = read_state(path)
    plain = make(net.parameters())
    plain.load_state_dict(saved["optimizer"])
    fewer = comm.Split(0 if comm.rank < max(1, comm.size - 1) else 1, comm.rank)
    assert fewer is not None
    resumed = mlp(seed=7)
    resumed.load_state_dict(saved["model"])
    with CollaborativeOptimizer(make(resumed.parameters()), fewer, target_batch_size=sum(SIZES)) as opt:
        opt.load_state_dict(saved["optimizer"])
        assert opt.local_step == 2
        train(fewer, resumed, opt, range(2, 5))
    assert_close(resumed, reference(make, 5))
    fewer.Free()


def test_what_an_eight_bit_wire_keeps_back_goes_with_the_state(comm: Communicator) -> None:
    def make_net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(FEATURES, 400), nn.Tanh(), nn.Linear(400, 3))

    with pretended_nodes(comm, 1) as nodes:
        states = []
        for _ in range(2):
            net = make_net()
            with CollaborativeOptimizer(
                adam(net.parameters()), nodes, target_batch_size=sum(SIZES), wire_dtype=torch.int8
            ) as opt:
                if states:
                    opt.load_residual_state(states[0])
                else:
                    train(nodes, net, opt, range(3))
                    assert_replicas_equal(comm, net.parameters())
                states.append(opt.residual_state())
                with pytest.raises(MismatchError, match="shapes of the trained parameters"):
                    opt.load_residual_state({0: torch.zeros(1)})
        for number, residual in states[0].items():
            assert residual.shape == list(net.parameters())[number].shape
            torch.testing.assert_close(states[1][number], residual)
        assert comm.size == 1 or any(bool(residual.any()) for residual in states[0].values())


def test_there_are_no_residuals_without_eight_bits(comm: Communicator) -> None:
    with CollaborativeOptimizer(adam(mlp().parameters()), comm, target_batch_size=8) as opt:
        assert opt.residual_state() == {}
        opt.load_residual_state({})
