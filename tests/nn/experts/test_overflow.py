"""An overflow in one expert skips the step on all ranks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hpcpar.comm import Communicator
from hpcpar.errors import MismatchError
from hpcpar.nn import DataParallel, MixtureOfExperts, agree_on_overflow
from tests.nn.experts.mixtures import FEATURES, expert, gate, rows_of


@pytest.mark.parametrize("overflows", [False, True])
def test_all_ranks_step_or_none(comm: Communicator, overflows: bool) -> None:
    trunk = nn.Linear(FEATURES, FEATURES)
    layer = MixtureOfExperts(gate(4, torch.float32), [expert(e, dtype=torch.float32) for e in range(4)], comm)
    model = DataParallel(nn.Sequential(trunk, layer), comm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    x, mine = rows_of(comm, [4, 2])
    scaler.scale(model(x[mine].float()).square().sum()).backward()
    if overflows and comm.rank == comm.size - 1:
        for parameter in layer.experts.parameters():
            assert parameter.grad is not None
            parameter.grad.fill_(float("inf"))
    before = trunk.weight.detach().clone()
    with pytest.raises(MismatchError, match="unscale_ first"):
        agree_on_overflow(scaler, optimizer, comm)
    scaler.unscale_(optimizer)
    assert agree_on_overflow(scaler, optimizer, comm) == overflows
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(trunk.weight, before) == overflows
    assert scaler.get_scale() == (4.0 if overflows else 8.0)
    model.free()


def test_disabled_scaler_never_skips(comm: Communicator) -> None:
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    assert not agree_on_overflow(scaler, optimizer, comm)
