"""Eight bits on the wire: nearly exact training, equal replicas, and residuals that can be saved."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hpcpar
from hpcpar.comm import Communicator
from hpcpar.errors import HpcparError, MismatchError
from hpcpar.nn import DataParallel
from hpcpar.nn.gradient_reduction import GradientReduction
from tests.nn.training import ROUTES, assert_replicas_equal, pretended_nodes, train, train_reference

pytestmark = pytest.mark.mpi

CROSSES = [route for route in ROUTES if route != "shared memory"]


def wide_mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Several buckets of more than a thousand numbers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 150), nn.Tanh(), nn.Linear(150, 40), nn.Tanh(), nn.Linear(40, 3)).to(
        dtype
    )


def batches_of(
    comm: Communicator, steps: int, dtype: torch.dtype = torch.float32
) -> list[tuple[Tensor, Tensor]]:
    """Global batches of a task that can be learnt."""
    generator = torch.Generator().manual_seed(99)
    mix = torch.randn(8, 3, generator=generator)
    inputs = [torch.randn(4 * comm.size, 8, generator=generator) for _ in range(steps)]
    return [(x.to(dtype), torch.sin(x @ mix).to(dtype)) for x in inputs]


def mine(comm: Communicator, batches: list[tuple[Tensor, Tensor]]) -> list[list[Tensor]]:
    return [[t.chunk(comm.size)[comm.rank] for t in batch] for batch in batches]


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=3e-3)


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def int8(net: nn.Module, comm: Communicator, **options: Any) -> DataParallel:
    options.setdefault("bucket_mb", 6e-3)
    return DataParallel(net, comm, wire_dtype=torch.int8, **options)


def loss_over(net: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    with torch.no_grad():
        return sum(float(nn.functional.mse_loss(net(x), y)) for x, y in batches) / len(batches)


def crosses(comm: Communicator, route: str) -> bool:
    """Whether anything is sent between nodes."""
    per_node, transport = ROUTES[route]
    return comm.size > 1 and (transport == "mpi" or (per_node is not None and comm.size > per_node))


@pytest.mark.parametrize("route", CROSSES)
def test_training_is_nearly_as_good_and_replicas_stay_equal(comm: Communicator, route: str) -> None:
    batches = batches_of(comm, 25) * 3
    start, reference = wide_mlp(), train_reference(wide_mlp(), adam, batches)
    ranks_per_node, transport = ROUTES[route]
    with pretended_nodes(comm, ranks_per_node) as nodes:
        net = wide_mlp()
        model = int8(net, nodes, transport=transport)
        train(model, adam(net.parameters()), mine(comm, batches))
        residuals = model.residual_state()
        model.free()
    assert_replicas_equal(comm, [*net.parameters(), *residuals.values()], route)
    exact, untrained, got = (loss_over(n, batches[:25]) for n in (reference, start, net))
    assert got < exact + 0.02 * (untrained - exact)
    if crosses(comm, route):
        assert residuals.keys() == dict(net.named_parameters()).keys()
        assert any(bool(residual.any()) for residual in residuals.values())


@pytest.mark.parametrize("route", CROSSES)
def test_gradients_and_residuals_make_up_the_exact_gradients(comm: Communicator, route: str) -> None:
    """Summed over steps without an update, what was delivered and what is kept back is the whole."""
    batches = batches_of(comm, 4, torch.float64)
    reference = wide_mlp(torch.float64)
    ranks_per_node, transport = ROUTES[route]
    with pretended_nodes(comm, ranks_per_node) as nodes:
        net = wide_mlp(torch.float64)
        model = int8(net, nodes, transport=transport)
        sums = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
        for (x, y), (whole_x, whole_y) in zip(mine(comm, batches), batches, strict=True):
            net.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            nn.functional.mse_loss(reference(whole_x), whole_y).backward()
            for name, p in net.named_parameters():
                sums[name] += p.grad
        residuals = model.residual_state()
        for name, p in reference.named_parameters():
            kept = residuals.get(name, torch.zeros_like(p))
            assert kept.shape == p.shape
            torch.testing.assert_close(sums[name] + kept, p.grad, rtol=1e-11, atol=1e-13)
        model.free()


def test_saved_residuals_go_on_where_they_were(comm: Communicator) -> None:
    """With other buckets and on another route, too."""
    batches = mine(comm, batches_of(comm, 3, torch.float64))
    net = wide_mlp(torch.float64)
    with pretended_nodes(comm, 1) as nodes:
        first = int8(net, nodes)
        train(first, momentum(net.parameters()), batches)
        state = {name: residual.clone() for name, residual in first.residual_state().items()}
        first.free()
    for ranks_per_node, transport in (None, "mpi"), (1, "shared_memory"), (2, "auto"):
        with pretended_nodes(comm, ranks_per_node) as nodes:
            second = int8(copy.deepcopy(net), nodes, transport=transport, bucket_mb=8.0)
            second.load_residual_state(state)
            loaded = second.residual_state()
            assert loaded.keys() == (state.keys() if comm.size > 1 else set())
            if nodes.num_nodes > 1 or transport == "mpi":
                for name in loaded:  # in short buckets nothing was kept back, and in one all may be
                    torch.testing.assert_close(loaded[name], state[name], rtol=1e-12, atol=0)
            second.free()


def test_same_ranks_go_on_as_if_never_stopped_up_to_rounding(comm: Communicator) -> None:
    batches = mine(comm, batches_of(comm, 8, torch.float64))
    with pretended_nodes(comm, 1) as nodes:
        whole, broken = wide_mlp(torch.float64), wide_mlp(torch.float64)
        model = int8(whole, nodes)
        train(model, momentum(whole.parameters()), batches)
        model.free()
        optimizer = momentum(broken.parameters())
        model = int8(broken, nodes)
        train(model, optimizer, batches[:4])
        state = model.residual_state()
        model.free()
        model = int8(broken, nodes)
        model.load_residual_state(state)
        train(model, optimizer, batches[4:])
        model.free()
    assert_replicas_equal(comm, broken.parameters())
    for p, q in zip(whole.parameters(), broken.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0.02, atol=0.02)


def test_overflow_reaches_every_rank_and_does_not_last(comm: Communicator) -> None:
    with pretended_nodes(comm, 1) as nodes:
        net = wide_mlp()
        model = int8(net, nodes)
        (x, y), *rest = mine(comm, batches_of(comm, 4))
        factor = float("inf") if comm.rank == comm.size - 1 else 1.0
        (nn.functional.mse_loss(model(x), y) * factor).backward()
        assert not any(bool(p.grad.isfinite().all()) for p in net.parameters() if p.grad is not None)
        train(model, momentum(net.parameters()), rest)
        assert all(bool(p.isfinite().all()) for p in net.parameters())
        assert all(bool(r.isfinite().all()) for r in model.residual_state().values())
        model.free()
    assert_replicas_equal(comm, net.parameters())


def test_overlapping_optimizer_finishes_first(comm: Communicator) -> None:
    batches = mine(comm, batches_of(comm, 3))
    with pretended_nodes(comm, 1) as nodes:
        net = wide_mlp()
        optimizer = hpcpar.optim.DataParallelOptimizer(momentum(net.parameters()))
        model = int8(net, nodes, optimizer=optimizer)
        train(model, optimizer, batches)
        assert bool(model.residual_state()) == (comm.size > 1)
        model.load_residual_state({})
        assert not any(bool(r.any()) for r in model.residual_state().values())
        train(model, optimizer, batches)
        model.free()
    assert_replicas_equal(comm, net.parameters())


class Flagged(nn.Module):
    """More than a thousand parameters, and so as many flags, of which some are unused."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.full((2,), 0.5)) for _ in range(1100)])

    def forward(self, x: Tensor) -> Tensor:
        return sum((weight * x).sum() for weight in list(self.weights)[::2])  # type: ignore[return-value]


def test_flags_of_unused_parameters_stay_exact(comm: Communicator) -> None:
    model = int8(Flagged(), comm, transport="mpi", bucket_mb=8.0)
    for _ in range(2):
        model.zero_grad()
        model(torch.ones(2)).backward()
        for index, weight in enumerate(model.module.weights):
            assert (weight.grad is None) == (index % 2 == 1)
    model.free()


def test_without_eight_bits_there_is_no_state(comm: Communicator) -> None:
    for wire_dtype in (None, torch.bfloat16):
        model = DataParallel(wide_mlp(), comm, wire_dtype=wire_dtype, transport="mpi")
        assert model.residual_state() == {}
        model.load_residual_state({"0.weight": torch.ones(150, 8)})  # from a run that had it
        model.free()


def test_state_of_another_model_is_refused(comm: Communicator) -> None:
    model = int8(wide_mlp(), comm)
    for state in ({"module.0.weight": torch.ones(150, 8)}, {"0.weight": torch.ones(8, 150)}):
        with pytest.raises(MismatchError, match=r"residual .* must have the shape"):
            model.load_residual_state(state)
    model.free()


def test_residuals_are_not_had_while_a_reduction_is_under_way(comm: Communicator) -> None:
    net = wide_mlp()
    model = int8(net, comm)
    gradients = model._gradients
    if gradients is not None:
        assert isinstance(gradients, GradientReduction)
        gradients.reducer.begin()
        with pytest.raises(HpcparError, match="complete before its residuals"):
            gradients.reducer.residuals()
        gradients.reducer.abandon()
    model.free()
