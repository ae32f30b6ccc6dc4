"""A step over all devices of all ranks is one batch of one process, whoever has how many samples."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from hpcpar.comm import Communicator
from hpcpar.data import DistributedSampler
from hpcpar.errors import DatasetEndedError, MismatchError
from hpcpar.optim import CollaborativeOptimizer, ShardedOptimizer
from hpcpar.xla import TPUManager
from tests.xla.models import (
    Regression,
    Tally,
    assert_equal_on_all_ranks,
    assert_gradients,
    assert_parameters,
    close,
    reference,
    samples,
    samples_of_step,
    shares,
)

pytestmark = pytest.mark.mpi

BATCH = 2


def unequal_sizes(comm: Communicator, per_step: int) -> list[int]:
    """The first of several ranks has nothing; the last has much more than the others, which end mid-step."""
    sizes = [per_step + 3 + rank for rank in range(comm.size)]
    sizes[-1] = 3 * per_step + 1
    return [0, *sizes[1:]] if comm.size > 1 else sizes


@pytest.mark.parametrize("accumulation", [1, 2])
def test_step_is_one_batch_of_all_samples_until_the_last_rank_has_none(
    accumulation: int, comm: Communicator, devices: list[torch.device]
) -> None:
    per_step = BATCH * accumulation * len(devices)
    parts = shares(unequal_sizes(comm, per_step))
    model = Regression(seed=comm.rank)  # rank 0's is taken
    with TPUManager(
        model,
        parts[comm.rank],
        batch_size_per_device=BATCH,
        grad_accumulation_steps=accumulation,
        prefetch=2,
        bucket_mb=1e-5,  # several pieces, which respect no parameter
        comm=comm,
    ) as manager:
        for _ in range(2):
            steps = 0
            for loss, count in manager.epoch():
                batch = samples_of_step(parts, steps, per_step)
                expected, gradients = reference(Regression(seed=0), batch)
                assert count == len(batch)
                close(loss, expected)
                assert_gradients(model, gradients)
                manager.zero_grad()
                steps += 1
            assert steps == 4
        assert manager.stats().samples == 2 * sum(map(len, parts))
        assert manager.stats().steps == 8


def test_end_is_told_once_and_then_is_an_error(comm: Communicator) -> None:
    model = Regression()
    with TPUManager(model, samples(1), batch_size_per_device=2, comm=comm) as manager:
        loss, count = manager.step()
        assert (count, loss > 0) == (comm.size, True)
        before = manager.get_aggregated_gradients()
        assert manager.step() == (0.0, 0)
        assert_gradients(before, [p.grad for p in model.parameters()])
        for _ in range(2):
            with pytest.raises(DatasetEndedError, match=r"epoch\(\) begins again"):
                manager.step()
        assert [count for _, count in manager.epoch()] == [comm.size]


def test_no_samples_anywhere_are_an_end_and_no_step(comm: Communicator) -> None:
    model = Regression()
    with TPUManager(model, [], comm=comm) as manager:
        assert list(manager.epoch()) == []
        assert all(parameter.grad is None for parameter in model.parameters())
        assert manager.stats().steps == 0


def test_sampler_shows_every_sample_once_an_epoch(comm: Communicator) -> None:
    length = 11 * comm.size + 2
    model = Tally(length)
    sampler = DistributedSampler(length, comm, seed=5)
    dataset = list(range(length))
    with TPUManager(model, dataset, batch_size_per_device=4, comm=comm, sampler=sampler) as manager:
        firsts = []
        for epoch in range(2):
            sampler.set_epoch(epoch)
            seen = torch.zeros(length)
            for step, (_, count) in enumerate(manager.epoch()):
                assert model.weight.grad is not None
                seen += model.weight.grad * count
                if not step:
                    firsts.append(model.weight.grad.clone())
                manager.zero_grad()
            close(seen, torch.ones(length))
    assert not torch.equal(firsts[0], firsts[1])


def test_training_is_that_of_one_process(comm: Communicator, devices: list[torch.device]) -> None:
    per_step = BATCH * len(devices)
    parts = shares([20 * per_step - rank for rank in range(comm.size)])
    model, plain = Regression(seed=comm.rank), Regression(seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    other = torch.optim.AdamW(plain.parameters(), lr=0.02)
    with TPUManager(model, parts[comm.rank], batch_size_per_device=BATCH, comm=comm) as manager:
        for step, (loss, _) in enumerate(manager.epoch()):  # the devices follow the optimizer unasked
            optimizer.step()
            optimizer.zero_grad()
            expected, gradients = reference(plain, samples_of_step(parts, step, per_step))
            for parameter, gradient in zip(plain.parameters(), gradients, strict=True):
                parameter.grad = gradient
            other.step()
            close(loss, expected)
        assert manager.stats().steps == 20
    assert_parameters(model, plain)
    assert_equal_on_all_ranks(comm, model)


def test_without_a_communicator_each_rank_is_alone(comm: Communicator) -> None:
    own = samples(4, seed=comm.rank)
    model = Regression(seed=comm.rank)
    with TPUManager(model, own, batch_size_per_device=4) as manager:
        for _ in range(comm.rank + 1):  # as often as it likes
            ((loss, count),) = manager.epoch()
    expected, gradients = reference(model, own)
    assert count == 4
    close(loss, expected)
    assert_gradients(model, [(comm.rank + 1) * g for g in gradients if g is not None])


def test_ranks_may_differ_in_devices_and_batch_size(comm: Communicator, devices: list[torch.device]) -> None:
    is_last = comm.rank == comm.size - 1
    size, used = (3, devices[:1]) if is_last else (2, devices)
    parts = shares([2 * len(devices)] * (comm.size - 1) + [3])
    model = Regression()
    with TPUManager(model, parts[comm.rank], batch_size_per_device=size, devices=used, comm=comm) as manager:
        ((loss, count),) = manager.epoch()
    expected, gradients = reference(Regression(), [sample for part in parts for sample in part])
    assert count == sum(map(len, parts))
    close(loss, expected)
    assert_gradients(model, gradients)


def test_buffers_are_the_mean_over_samples_and_the_same_on_all_ranks(comm: Communicator) -> None:
    class Running(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))
            self.register_buffer("mean", torch.tensor(1.0))
            self.register_buffer("batches", torch.tensor(0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.mean.mul_(0.9).add_(0.1 * x.mean())
            self.batches += 1
            return (self.weight * x).mean()

    sizes = [2 * rank + 1 for rank in range(comm.size)]
    data = [torch.full((), float(rank)) for rank, size in enumerate(sizes) for _ in range(size)]
    first = sum(sizes[: comm.rank])
    model = Running()
    with TPUManager(
        model,
        data[first : first + sizes[comm.rank]],
        batch_size_per_device=max(sizes),
        short_batch="compile",
        devices=[0],
        comm=comm,
    ) as manager:
        list(manager.epoch())
    close(model.mean, 0.9 + 0.1 * torch.stack(data).mean())
    assert model.batches.item() == 1


# ---- models and options that cannot be ---------------------------------------------------------------------


def test_models_must_be_alike_on_all_ranks(comm: Communicator) -> None:
    if comm.size == 1:
        return
    model = nn.Linear(3, 2 if comm.rank == comm.size - 1 else 1)
    with pytest.raises(MismatchError, match=f"on rank {comm.size - 1}"):
        TPUManager(model, samples(1), comm=comm)


class Endless(torch.utils.data.IterableDataset[int]):
    """It has no indices, though it inherits a method for them."""

    def __iter__(self) -> Iterator[int]:
        return itertools.count()


WRONG: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "batch size": (ValueError, {"batch_size_per_device": 0}),
    "type of a number": (TypeError, {"grad_accumulation_steps": 1.5}),
    "prefetch": (ValueError, {"prefetch": 0}),
    "dataset": (TypeError, {"dataset": 7}),
    "collate": (TypeError, {"collate_fn": "stack"}),
    "model": (ValueError, {"model": nn.ReLU()}),
    "no model": (TypeError, {"model": lambda x: x}),
    "model that communicates": (TypeError, {"model": nn.DataParallel(nn.Linear(3, 1))}),
    "device": (ValueError, {"devices": [99]}),
    "short batch": (ValueError, {"short_batch": "skip"}),
    "bucket": (ValueError, {"bucket_mb": -1}),
    "loader": (TypeError, {"dataset": torch.utils.data.DataLoader([1, 2])}),
    "sampler of a stream": (TypeError, {"dataset": iter([1]), "sampler": [0]}),
    "sampler of an iterable dataset": (TypeError, {"dataset": Endless(), "sampler": [0]}),
}


@pytest.mark.parametrize("what", WRONG)
def test_mistake_on_one_rank_is_an_error_on_all(what: str, comm: Communicator) -> None:
    kind, options = WRONG[what]
    given: dict[str, Any] = {"model": Regression(), "dataset": samples(1)}
    is_guilty = comm.rank == comm.size - 1
    with pytest.raises(kind if is_guilty else MismatchError, match="must"):
        TPUManager(**(given | options if is_guilty else given), comm=comm)


# ---- with optimizers over ranks ----------------------------------------------------------------------------


def test_collaborative_ranks_of_unequal_speed_stay_replicas(comm: Communicator) -> None:
    """The second of several ranks is slow, and the first soon has no data: it assists."""
    (batch,) = shares([4])  # the same for all, so that the mean does not depend on who was faster
    model, plain = Regression(seed=comm.rank), Regression(seed=0)
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    epochs = 1 if comm.rank == 0 and comm.size > 1 else 1000
    slow = comm.rank == 1
    pause = threading.Event()

    def stream() -> Iterator[Any]:
        for _ in range(epochs):
            for sample in batch:
                if slow:
                    pause.wait(2e-3)
                yield sample

    with (
        CollaborativeOptimizer(sgd, comm, target_batch_size=8 * comm.size) as opt,
        TPUManager(model, stream(), batch_size_per_device=4, devices=[0], prefetch=1) as manager,
    ):
        for _, count in manager.epoch():
            opt.step(batch_size=count)
            opt.zero_grad()
            if opt.local_step == 3:
                break
        while opt.local_step < 3:
            opt.step_aux()
    for _ in range(3):
        _, gradients = reference(plain, batch)
        with torch.no_grad():
            for parameter, gradient in zip(plain.parameters(), gradients, strict=True):
                assert gradient is not None
                parameter -= 0.05 * gradient
    assert_parameters(model, plain)
    assert_equal_on_all_ranks(comm, model)


def test_sharded_optimizer_may_follow_a_step(comm: Communicator, devices: list[torch.device]) -> None:
    per_step = BATCH * len(devices)
    parts = shares([3 * per_step - rank for rank in range(comm.size)])
    model = Regression(seed=comm.rank)
    plain = Regression(seed=0)
    other = torch.optim.AdamW(plain.parameters(), lr=0.02)
    with TPUManager(model, parts[comm.rank], batch_size_per_device=BATCH, comm=comm) as manager:
        optimizer = ShardedOptimizer(model, torch.optim.AdamW, comm, lr=0.02)
        for step, (loss, _) in enumerate(manager.epoch()):
            optimizer.step()
            optimizer.zero_grad()
            manager.update_model_parameters(model.parameters())  # other ranks have changed them, too
            expected, gradients = reference(plain, samples_of_step(parts, step, per_step))
            for parameter, gradient in zip(plain.parameters(), gradients, strict=True):
                parameter.grad = gradient
            other.step()
            close(loss, expected)
        optimizer.free()
    assert_parameters(model, plain)


def test_models_given_stay_the_host_s(comm: Communicator) -> None:
    """The manager changes nothing but gradients and tracked buffers."""
    model = Regression(seed=0)
    before = copy.deepcopy(model.state_dict())
    with TPUManager(model, samples(3), comm=comm) as manager:
        list(manager.epoch())
        assert manager.model is model
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
