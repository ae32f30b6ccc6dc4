"""Optimizers over ranks go through a checkpoint, and go on on another number of ranks."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hpcpar.checkpoint import load, save
from hpcpar.comm import MPI, Communicator
from hpcpar.nn import DataParallelMultiGPU
from hpcpar.optim import DASO, CollaborativeOptimizer
from tests.nn.training import FEATURES, assert_close, assert_replicas_equal, mlp, pretended_nodes

pytestmark = pytest.mark.mpi


@pytest.fixture
def folder(comm: Communicator) -> Iterator[Path]:
    """One for all ranks."""
    path = Path(comm.bcast(tempfile.mkdtemp() if comm.rank == 0 else None))
    yield path
    comm.Barrier()
    if comm.rank == 0:
        shutil.rmtree(path, ignore_errors=True)


def some_of(comm: Communicator) -> Communicator | None:
    """All ranks but the last, if there are several."""
    size = max(1, comm.size - 1)
    return comm.Split(0 if comm.rank < size else MPI.UNDEFINED, comm.rank)


def backward(net: torch.nn.Module, step: int, rank: int = 0) -> None:
    generator = torch.Generator().manual_seed(100 * step + rank)
    inputs = torch.randn(4, FEATURES, generator=generator, dtype=torch.float64)
    net(inputs).square().mean().backward()


# ---- DASO, on pretended nodes ------------------------------------------------------------------------------


def train_daso(comm: Communicator, path: Path, *, go_on: bool) -> dict[str, torch.Tensor]:
    """Two steps before the checkpoint, which is taken between two averages, or what it brings back."""
    net = mlp(seed=comm.rank if go_on else 0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    options = {"warmup_epochs": 0, "cooldown_epochs": 0, "wire_dtype": None, "progress": "hooks"}
    daso = DASO(optimizer, comm, 9, **options)  # type: ignore[arg-type]
    model = DataParallelMultiGPU(net, daso, comm)
    daso.last_batch = 2
    state = {"optimizer": daso, "model": model}
    if go_on:
        load(path, state, comm)
    else:
        for step in range(2):
            daso.zero_grad()
            backward(model, step, comm.rank)
            daso.step()
        save(path, state, comm)
    found = {name: value.clone() for name, value in model.state_dict().items()}
    daso.free()
    model.free()
    return found


def test_daso_moves_to_other_nodes(comm: Communicator, folder: Path) -> None:
    fewer = some_of(comm)
    with pretended_nodes(comm, 1) as nodes:
        saved = train_daso(nodes, folder / "run", go_on=False)
    if fewer is not None:
        with pretended_nodes(fewer, 2) as nodes:
            loaded = train_daso(nodes, folder / "run", go_on=True)
        fewer.Free()
        assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    plain = mlp(seed=5)
    load(folder / "run", {"model": plain.state_dict(prefix="module.")}, comm)
    assert_replicas_equal(comm, list(plain.parameters()))


# ---- collaborative optimizers ------------------------------------------------------------------------------


def train_collaborative(comm: Communicator, path: Path, steps: range, *, go_on: bool) -> torch.nn.Module:
    net = mlp(seed=comm.rank)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    with CollaborativeOptimizer(optimizer, comm, target_batch_size=4) as opt:
        if go_on:
            load(path, {"model": net, "optimizer": opt}, comm)
            assert opt.local_step == steps.start
        for step in steps:
            if comm.rank == 0:
                opt.zero_grad()
                backward(net, step)
                opt.step(4)
            while opt.local_step == step:
                opt.step_aux()
        if not go_on:
            save(path, {"model": net, "optimizer": opt}, comm)
    return net


@pytest.mark.parametrize("fewer_first", [True, False])
def test_collaborative_training_goes_on_on_another_number_of_ranks(
    fewer_first: bool, comm: Communicator, folder: Path
) -> None:
    fewer = some_of(comm)
    net = None
    for go_on, steps in ((False, range(2)), (True, range(2, 4))):
        group = fewer if fewer_first != go_on else comm
        net = None if group is None else train_collaborative(group, folder / "run", steps, go_on=go_on)
        comm.Barrier()
    expected = mlp(seed=0)
    plain = torch.optim.Adam(expected.parameters(), lr=0.05)
    for step in range(4):
        plain.zero_grad()
        backward(expected, step)
        plain.step()
    if net is not None:
        assert_close(net, expected)
    if fewer is not None:
        fewer.Free()
