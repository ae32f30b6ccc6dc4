"""Experts in a data-parallel model: every gradient is that of the mean over the ranks' losses."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from hpcpar.comm import Communicator
from hpcpar.errors import HpcparError, MismatchError
from hpcpar.nn import DataParallel
from hpcpar.nn.experts.layer import MixtureOfExperts
from hpcpar.nn.reduction_options import ReductionOptions
from hpcpar.optim import DataParallelOptimizer
from tests.nn.experts.mixtures import (
    FEATURES,
    Dense,
    assert_expert_gradients,
    assert_same,
    expert,
    gate,
    pair,
    rows_of,
)
from tests.nn.training import assert_replicas_equal


class Model(nn.Module):
    """A layer between two others, as in a transformer."""

    def __init__(self, mixture: nn.Module | Dense) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            self.first = nn.Linear(FEATURES, FEATURES).double()
            self.last = nn.Linear(FEATURES, 2).double()
        self.mixture = mixture
        if isinstance(mixture, Dense):
            self.dense_experts = nn.ModuleList([mixture.gate, *mixture.experts])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        output: Tensor = self.last(x + self.mixture(x))
        return output

    def loss(self, output: Tensor) -> Tensor:
        router = self.mixture.gate if isinstance(self.mixture, MixtureOfExperts) else self.mixture
        extra: Tensor = router.balancing_loss + router.z_loss  # type: ignore[union-attr, operator]
        return output.sin().sum() + extra


@contextmanager
def part_of(comm: Communicator, size: int) -> Iterator[Communicator]:
    part = comm.Split(comm.rank // size, comm.rank)
    assert part is not None
    yield part
    part.Free()


def mean_loss(comm: Communicator, dense: Model, x: Tensor, counts: list[int]) -> Tensor:
    """The mean over the ranks of what their losses are, by one process."""
    router = dense.mixture
    assert isinstance(router, Dense)
    output = dense(x)
    return output.sin().sum() / comm.size + router.balancing_loss + router.z_loss


def assert_model_matches(model: Model, dense: Model, *, gradients: bool) -> None:
    mixture, other = model.mixture, dense.mixture
    assert isinstance(mixture, MixtureOfExperts) and isinstance(other, Dense)
    pairs = [(model.first, dense.first), (model.last, dense.last), (mixture.gate, other.gate)]
    pairs += [(module, other.experts[int(number)]) for number, module in mixture.experts.items()]
    for index, (one, two) in enumerate(pairs):
        for mine, its in zip(one.parameters(), two.parameters(), strict=True):
            expected = its.grad if gradients else its
            assert_same(
                mine.grad if gradients else mine,
                torch.zeros_like(its) if expected is None else expected,
                index,
            )


@pytest.mark.parametrize("num_experts", [2, 3, 8])
@pytest.mark.parametrize("mode", ["default", "blocking", "overlapping"])
def test_training_equals_one_process(comm: Communicator, num_experts: int, mode: str) -> None:
    counts = [5, 2, 0, 3]
    mixture, dense_mixture = pair(comm, num_experts, bias_update_rate=0.01, capacity_factor=1.25)
    model, dense = Model(mixture), Model(dense_mixture)
    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    optimizer = DataParallelOptimizer(inner) if mode == "overlapping" else inner
    parallel = DataParallel(
        model, comm, optimizer if mode == "overlapping" else None, mode == "blocking", bucket_mb=1e-4
    )
    reference = torch.optim.AdamW(dense.parameters(), lr=0.01)
    for step in range(4):
        x, mine = rows_of(comm, counts, seed=step)
        optimizer.zero_grad()
        reference.zero_grad(set_to_none=False)
        model.loss(parallel(x[mine])).backward()
        mean_loss(comm, dense, x, counts).backward()
        if mode != "overlapping":
            assert_model_matches(model, dense, gradients=True)
        optimizer.step()
        for parameter in dense_mixture.parameters():  # an expert that nobody used has zeros, and decays
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        reference.step()
    parallel.eval()
    with torch.no_grad():
        parallel(x[mine])
    assert_model_matches(model, dense, gradients=False)
    parallel.free()
    mixture.free()


def test_accumulation_without_synchronising(comm: Communicator) -> None:
    mixture, dense_mixture = pair(comm, 2)
    model, dense = Model(mixture), Model(dense_mixture)
    parallel = DataParallel(model, comm)
    for step in range(3):
        x, mine = rows_of(comm, [3, 1, 2], seed=step)
        mean_loss(comm, dense, x, []).backward()
        if step < 2:
            with parallel.no_sync():
                model.loss(parallel(x[mine])).backward()
        else:
            model.loss(parallel(x[mine])).backward()
    assert_model_matches(model, dense, gradients=True)
    parallel.free()
    mixture.free()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("num_experts", [1, 4])
def test_replicas_of_the_whole_layer(comm: Communicator, num_experts: int) -> None:
    """DataParallel over all ranks, and layers over two each: the loss is a mean over layers."""
    size = 2 if comm.size % 2 == 0 else 1
    with part_of(comm, size) as part:
        mixture, _ = pair(part, num_experts)
        dense = Model(pair_of_copies(num_experts))
        model = Model(mixture)
        parallel = DataParallel(model, comm, bucket_mb=1e-4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        reference = torch.optim.SGD(dense.parameters(), lr=0.1)
        for step in range(3):
            x, mine = rows_of(comm, [4], seed=step)
            optimizer.zero_grad()
            reference.zero_grad()
            model.loss(parallel(x[mine])).backward()
            total = torch.zeros((), dtype=torch.float64)
            for group in x.split(4 * size):
                total = total + dense(group).sin().sum() / comm.size
                router = dense.mixture
                assert isinstance(router, Dense)
                total = total + (router.balancing_loss + router.z_loss) * size / comm.size
            total.backward()
            assert_model_matches(model, dense, gradients=True)
            optimizer.step()
            reference.step()
        parallel.free()
        mixture.free()


def pair_of_copies(num_experts: int) -> Dense:
    return Dense(gate(num_experts), [expert(e) for e in range(num_experts)])


def test_replicas_reduce_without_data_parallel(comm: Communicator) -> None:
    """With more ranks than experts, replicas get the same gradient of the sum of all losses, each time."""
    mixture, dense = pair(comm, 1)
    for step in range(2):
        x, mine = rows_of(comm, [3, 0, 5], seed=step)
        dense(x).sin().sum().backward()
        mixture(x[mine]).sin().sum().backward()
        assert_expert_gradients(mixture, dense)
    assert_replicas_equal(comm, [p.grad for p in mixture.experts.parameters() if p.grad is not None])
    mixture.free()


def test_replicas_start_with_the_values_of_the_first(comm: Communicator) -> None:
    mixture = MixtureOfExperts(gate(1), [expert(comm.rank)], comm, top_k=1)
    assert_replicas_equal(comm, mixture.experts.parameters())
    assert_same(next(mixture.experts.parameters()), next(expert(0).parameters()))
    mixture.free()


def test_replicas_keep_buffers_equal(comm: Communicator) -> None:
    made = [nn.Sequential(nn.BatchNorm1d(FEATURES), expert(0)).double()]
    mixture = MixtureOfExperts(gate(1), made, comm, top_k=1)
    x, mine = rows_of(comm, [3, 4, 5])
    mixture(x[mine]).sum().backward()
    assert_replicas_equal(comm, mixture.experts.buffers())
    mixture.free()


def test_freezing_experts_later(comm: Communicator) -> None:
    mixture, dense_mixture = pair(comm, 2)
    model, dense = Model(mixture), Model(dense_mixture)
    parallel = DataParallel(model, comm)
    x, mine = rows_of(comm, [3, 4])
    for frozen in (True, False):
        for module in (model, dense):
            module.zero_grad()
        mixture.experts.requires_grad_(not frozen)
        model.loss(parallel(x[mine])).backward()
        mean_loss(comm, dense, x, []).backward()
        if frozen:
            assert all(p.grad is None for p in mixture.experts.parameters())
        else:
            assert_model_matches(model, dense, gradients=True)
    parallel.free()
    mixture.free()


def test_model_whose_parameters_are_all_of_experts(comm: Communicator) -> None:
    mixture, dense = pair(comm, 2)
    mixture.gate.requires_grad_(False)
    parallel = DataParallel(mixture, comm)
    x, mine = rows_of(comm, [3, 4])
    parallel(x[mine]).sin().sum().backward()
    (dense(x).sin().sum() / comm.size).backward()
    assert_expert_gradients(mixture, dense)
    parallel.free()
    mixture.free()


def test_copy_of_a_data_parallel_model(comm: Communicator) -> None:
    mixture, dense_mixture = pair(comm, 2)
    parallel = DataParallel(Model(mixture), comm)
    dense = Model(dense_mixture)
    x, mine = rows_of(comm, [3, 4])
    twin = copy.deepcopy(parallel)
    model = twin.module
    assert isinstance(model, Model)
    model.loss(twin(x[mine])).backward()
    mean_loss(comm, dense, x, []).backward()
    assert_model_matches(model, dense, gradients=True)
    assert all(parameter.grad is None for parameter in mixture.parameters())
    for module in (twin, parallel, mixture):
        module.free()


def test_layer_after_the_wrapper_is_freed(comm: Communicator) -> None:
    mixture, dense = pair(comm, 2)
    DataParallel(mixture, comm).free()
    x, mine = rows_of(comm, [3, 4])
    dense(x).sin().sum().backward()
    mixture(x[mine]).sin().sum().backward()
    assert_expert_gradients(mixture, dense)
    mixture.free()


@pytest.mark.mpi(min_size=2)
def test_joining_is_refused(comm: Communicator) -> None:
    mixture, _ = pair(comm, 2)
    parallel = DataParallel(mixture, comm)
    with pytest.raises(HpcparError, match="zero tokens"), parallel.join():
        pass
    parallel.free()
    mixture.free()


@pytest.mark.mpi(min_size=2)
def test_sharing_over_too_few_ranks_is_refused(comm: Communicator) -> None:
    mixture, _ = pair(comm, 2)
    options = ReductionOptions(
        bucket_mb=None, blocking=False, wire_dtype=None, transport="auto", progress="hooks"
    )
    with part_of(comm, 1) as alone, pytest.raises(MismatchError, match="all ranks of a layer"):
        mixture.share_gradients(alone, average=True, options=options)
