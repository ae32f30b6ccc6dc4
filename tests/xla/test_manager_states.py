"""Training that goes on from a checkpoint is that of a run which nothing interrupted."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from hpcpar.checkpoint import load, save
from hpcpar.comm import MPI, Communicator
from hpcpar.data import DistributedSampler, H5Dataset
from hpcpar.errors import HpcparError
from hpcpar.xla import TPUManager
from tests.xla.models import Regression, Tally, assert_parameters, close, shares

pytestmark = pytest.mark.mpi

BATCH = 2


@pytest.fixture
def path(comm: Communicator) -> Iterator[Path]:
    """One for all ranks."""
    folder = Path(comm.bcast(tempfile.mkdtemp() if comm.rank == 0 else None))
    yield folder / "run"
    comm.Barrier()
    if comm.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)


class Run:
    """A model in training, with an optimizer that has a state."""

    def __init__(self, comm: Communicator, dataset: Any, **options: Any) -> None:
        self.comm = comm
        self.model = Regression()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.manager = TPUManager(
            self.model, dataset, batch_size_per_device=BATCH, devices=[0], comm=comm, **options
        )
        self.epoch = self.manager.epoch()

    def steps(self, number: int) -> list[int]:
        """Step so often, from epoch to epoch; how many samples each step had."""
        counts: list[int] = []
        while len(counts) < number:
            for _, count in self.epoch:
                self.optimizer.step()
                self.optimizer.zero_grad()
                counts.append(count)
                if len(counts) == number:
                    return counts
            self.epoch = self.manager.epoch()
        return counts

    @property
    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "manager": self.manager}

    def save(self, path: Path) -> None:
        save(path, self.state, self.comm)
        self.manager.shutdown()

    def load(self, path: Path) -> None:
        load(path, self.state, self.comm)


@pytest.mark.parametrize("before", [2, 5])  # an epoch has 4 steps, of which the last is short
def test_run_goes_on_in_the_middle_of_an_epoch(before: int, comm: Communicator, path: Path) -> None:
    dataset = shares([7] * comm.size)[comm.rank]
    whole = Run(comm, dataset)
    expected = whole.steps(7)
    first = Run(comm, dataset)
    counts = first.steps(before)
    first.save(path)
    second = Run(comm, dataset)
    second.load(path)
    counts += second.steps(7 - before)
    assert counts == expected
    assert_parameters(second.model, whole.model)
    assert second.manager.stats().steps == 7
    assert second.manager.stats().samples == sum(expected)
    for run in (whole, second):
        run.manager.shutdown()


def test_run_that_ended_with_an_epoch_goes_on_with_a_whole_one(comm: Communicator, path: Path) -> None:
    dataset = shares([4] * comm.size)[comm.rank]
    first = Run(comm, dataset)
    assert len(list(first.manager.epoch())) == 2
    first.save(path)
    second = Run(comm, dataset)
    second.load(path)
    assert len(list(second.manager.epoch())) == 2
    second.manager.shutdown()


def test_manager_may_go_back_to_a_state_of_its_own(comm: Communicator) -> None:
    run = Run(comm, shares([6] * comm.size)[comm.rank])
    run.steps(2)
    state = run.manager.state_dict()
    with pytest.raises(HpcparError, match="before the first step of an epoch"):
        run.manager.load_state_dict(state)
    assert len(list(run.epoch)) == 1
    run.manager.load_state_dict(state)
    assert run.manager.step()[1] == 2 * comm.size
    assert run.manager.step() == (0.0, 0)
    assert len(list(run.manager.epoch())) == 3
    run.manager.shutdown()


def fewer_ranks(comm: Communicator) -> Communicator | None:
    """All but the last, if there are several."""
    size = max(1, comm.size - 1)
    return comm.Split(0 if comm.rank < size else MPI.UNDEFINED, comm.rank)


def seen_in(model: Tally, manager: TPUManager, steps: int) -> torch.Tensor:
    """How often each index was in one of the next steps."""
    seen = torch.zeros_like(model.weight)
    for step, (_, count) in enumerate(manager.epoch(), start=1):
        assert model.weight.grad is not None
        seen += model.weight.grad * count
        manager.zero_grad()
        if step == steps:
            break
    return seen


def test_epoch_of_a_sampler_goes_on_on_another_number_of_ranks(comm: Communicator, path: Path) -> None:
    length = 9 * comm.size + 2
    model, dataset = Tally(length), list(range(length))
    options: dict[str, Any] = {"batch_size_per_device": BATCH, "devices": [0]}
    sampler = DistributedSampler(length, comm, seed=1)
    sampler.set_epoch(3)
    with TPUManager(model, dataset, comm=comm, sampler=sampler, **options) as manager:
        seen = seen_in(model, manager, steps=2)
        save(path, {"manager": manager}, comm)
    fewer = fewer_ranks(comm)
    if fewer is None:
        return
    model = Tally(length)
    sampler = DistributedSampler(length, fewer, seed=1)
    with TPUManager(model, dataset, comm=fewer, sampler=sampler, **options) as manager:
        load(path, {"manager": manager}, fewer)
        seen += seen_in(model, manager, steps=-1)
    fewer.Free()
    close(seen, torch.ones(length))


def test_state_between_epochs_is_that_of_the_epoch_that_the_sampler_was_told_of(comm: Communicator) -> None:
    length = 5 * comm.size
    model, dataset = Tally(length), list(range(length))
    options: dict[str, Any] = {"batch_size_per_device": BATCH, "devices": [0], "comm": comm}
    sampler = DistributedSampler(length, comm)
    with TPUManager(model, dataset, sampler=sampler, **options) as manager:
        list(manager.epoch())
        sampler.set_epoch(1)
        state = manager.state_dict()
    model, sampler = Tally(length), DistributedSampler(length, comm)
    with TPUManager(model, dataset, sampler=sampler, **options) as manager:
        manager.load_state_dict(state)
        close(seen_in(model, manager, steps=-1), torch.ones(length))


def test_state_behind_the_end_of_a_continued_epoch_begins_a_whole_one(comm: Communicator) -> None:
    length = 5 * comm.size
    state = None
    for is_last in (False, False, True):  # a step; the rest of the epoch; another
        model, sampler = Tally(length), DistributedSampler(length, comm)
        with TPUManager(
            model, list(range(length)), batch_size_per_device=BATCH, devices=[0], comm=comm, sampler=sampler
        ) as manager:
            if state is None:
                manager.step()
            else:
                manager.load_state_dict(state)
                seen = seen_in(model, manager, steps=-1)
                close(seen.sum().item(), float(length if is_last else length - BATCH * comm.size))
            state = manager.state_dict()


def test_epoch_without_a_sampler_needs_as_many_ranks(comm: Communicator) -> None:
    run = Run(comm, shares([4])[0])
    run.steps(1)
    state = run.manager.state_dict()
    run.manager.shutdown()
    other = Run(comm, shares([4])[0])
    state["taken"] = [*state["taken"], 2]
    with pytest.raises(ValueError, match=f"on {comm.size + 1} ranks must go on on as many, got {comm.size}"):
        other.manager.load_state_dict(state)
    other.manager.shutdown()


def test_epoch_that_was_loaded_and_left_begins_at_its_beginning(comm: Communicator) -> None:
    """The dataset is longer than what is read ahead, so nobody has come to its end."""
    length = 80 * comm.size
    options: dict[str, Any] = {"batch_size_per_device": BATCH, "devices": [0], "prefetch": 2, "comm": comm}
    model, sampler = Tally(length), DistributedSampler(length, comm)
    with TPUManager(model, list(range(length)), sampler=sampler, **options) as manager:
        seen_in(model, manager, steps=3)
        state = manager.state_dict()
    model, sampler = Tally(length), DistributedSampler(length, comm)
    with TPUManager(model, list(range(length)), sampler=sampler, **options) as manager:
        manager.load_state_dict(state)
        seen_in(model, manager, steps=2)
        close(seen_in(model, manager, steps=-1), torch.ones(length))


def test_epoch_of_a_file_goes_on_on_another_number_of_ranks(comm: Communicator, path: Path) -> None:
    """What has been read ahead of the steps is not lost."""
    length = 40 * comm.size + 1
    file = path.with_name("data.h5")
    if comm.rank == 0:
        with h5py.File(file, "w") as target:
            target["index"] = np.arange(length)
    comm.Barrier()
    options: dict[str, Any] = {"batch_size_per_device": BATCH, "devices": [0], "prefetch": 3}
    model = Tally(length)
    with (
        H5Dataset(file, "index", comm, seed=2) as dataset,
        TPUManager(model, dataset, comm=comm, **options) as manager,
    ):
        seen = seen_in(model, manager, steps=4)
        save(path, {"manager": manager}, comm)
    fewer = fewer_ranks(comm)
    if fewer is None:
        return
    model = Tally(length)
    with (
        H5Dataset(file, "index", fewer, seed=2) as dataset,
        TPUManager(model, dataset, comm=fewer, **options) as manager,
    ):
        load(path, {"manager": manager}, fewer)
        seen += seen_in(model, manager, steps=-1)
        close(seen, torch.ones(length))
        close(seen_in(model, manager, steps=2).sum().item(), 4.0 * fewer.size)
        close(seen_in(model, manager, steps=-1), torch.ones(length))
    fewer.Free()
