"""Dispatch and combine by themselves: where rows arrive, what returns, and what their gradients are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from hpcpar.comm import Communicator
from hpcpar.nn.experts.dispatch import combine, dispatch, without_rows
from hpcpar.nn.experts.exchange import Exchange
from hpcpar.nn.experts.placement import Placement
from hpcpar.nn.experts.routing import Routing, route
from tests.nn.experts.mixtures import assert_same


@contextmanager
def exchange_of(comm: Communicator) -> Iterator[Exchange]:
    exchange = Exchange(comm)
    yield exchange
    exchange.free()


def routing_of(
    exchange: Exchange, tokens: int, num_experts: int, capacity_factor: float | None = None
) -> Routing:
    """Random choices of two experts, different on all ranks."""
    logits = torch.randn(tokens, num_experts, dtype=torch.float64)
    probabilities = logits.softmax(-1)
    chosen = probabilities.topk(min(2, num_experts)).indices
    ranks = exchange.comm
    return route(logits, probabilities, chosen, Placement(num_experts, ranks.size), ranks, capacity_factor, 0)


def marked(comm: Communicator, tokens: int) -> Tensor:
    """Rows that tell whose they are: rank, number of the token."""
    numbers = torch.arange(tokens, dtype=torch.float64)
    return torch.stack([torch.full_like(numbers, comm.rank), numbers], dim=1)


def everyones(comm: Communicator, items: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    return sorted(item for part in comm.allgather(items) for item in part)


@pytest.mark.parametrize("num_experts", [1, 2, 3, 8])
def test_rows_arrive_at_the_experts_that_were_chosen(comm: Communicator, num_experts: int) -> None:
    torch.manual_seed(comm.rank)
    tokens = 3 * comm.rank
    with exchange_of(comm) as exchange:
        routing = routing_of(exchange, tokens, num_experts)
        _, rows = dispatch(marked(comm, tokens), exchange, routing, None, needs_gradient=False)
        local = Placement(num_experts, comm.size).experts_of(comm.rank)
        got = [
            (e, int(rank), int(token)) for e, part in zip(local, rows, strict=True) for rank, token in part
        ]
        chosen = [(int(e), comm.rank, t) for t, row in enumerate(routing.experts) for e in row]
        arrived, sent = everyones(comm, got), everyones(comm, chosen)
        assert arrived == sent
        assert routing.load.tolist() == [sum(e == f for f, _, _ in arrived) for e in range(num_experts)]


@pytest.mark.parametrize("capacity_factor", [None, 0.6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_there_and_back_is_the_identity(
    comm: Communicator, dtype: torch.dtype, capacity_factor: float | None
) -> None:
    torch.manual_seed(comm.rank)
    tokens = torch.randn(4 + comm.rank, 5).to(dtype).requires_grad_()
    with exchange_of(comm) as exchange:
        routing = routing_of(exchange, len(tokens), 3, capacity_factor)
        kept = routing.plan.position < len(routing.plan.slots)
        weights = torch.rand(kept.shape, dtype=torch.float64, requires_grad=True)
        tether, rows = dispatch(tokens, exchange, routing, None, needs_gradient=True)
        output = combine(tether, rows, weights, None, exchange, routing, None, 0.0, needs_gradient=True)
        factor = (weights * kept).sum(-1, keepdim=True)
        assert output.dtype is dtype
        tolerance = {"rtol": 0.02, "atol": 0.02} if dtype is torch.bfloat16 else {}
        expected = tokens.double() * factor
        torch.testing.assert_close(output.double(), expected, **tolerance, check_dtype=False)
        weights_grad, tokens_grad = torch.autograd.grad(expected.sum(), [weights, tokens])
        output.double().sum().backward()
        for got, wanted in ((weights.grad, weights_grad), (tokens.grad, tokens_grad)):
            assert got is not None
            loose = {"rtol": 0.05, "atol": 0.05} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
            torch.testing.assert_close(got.double(), wanted.double(), **loose)


def test_scales_are_seen_by_experts_and_not_by_tokens(comm: Communicator) -> None:
    torch.manual_seed(comm.rank)
    scales = torch.arange(1.0, comm.size + 1, dtype=torch.float64)
    found = []
    with exchange_of(comm) as exchange:
        start = torch.randn(4, 5, dtype=torch.float64)
        routing = routing_of(exchange, 4, 3)
        for factors in (None, scales):
            tokens = start.clone().requires_grad_()
            tether, rows = dispatch(tokens, exchange, routing, factors, needs_gradient=True)
            scaled = [row * 1.0 for row in rows]
            for row in scaled:
                row.retain_grad()
            weights = torch.full((4, 2), 0.5, dtype=torch.float64)
            combine(
                tether, scaled, weights, None, exchange, routing, factors, 0.0, needs_gradient=True
            ).sin().sum().backward()
            found.append((tokens.grad, [row.grad for row in scaled]))
    assert_same(found[1][0], found[0][0])
    for plain, multiplied in zip(found[0][1], found[1][1], strict=True):
        assert plain is not None
        assert_same(multiplied, plain * scales[comm.rank])


def test_backward_runs_on_ranks_that_need_no_gradient(comm: Communicator) -> None:
    with exchange_of(comm) as exchange:
        routing = routing_of(exchange, 4, 3)
        tokens = marked(comm, 4).requires_grad_(comm.rank == 0)
        tether, rows = dispatch(tokens, exchange, routing, None, needs_gradient=True)
        weights = torch.ones(4, 2, dtype=torch.float64)
        output = combine(tether, rows, weights, None, exchange, routing, None, 0.0, needs_gradient=True)
        output.sum().backward()
        assert (tokens.grad is not None) == (comm.rank == 0)


def test_parameters_without_rows_get_zeros() -> None:
    used, frozen = torch.ones(3, requires_grad=True), torch.ones(2)
    output = without_rows(torch.empty(0, 4), [used, frozen])
    assert output.shape == (0, 4)
    output.sum().backward()
    assert used.grad is not None and not used.grad.any() and frozen.grad is None
    with torch.no_grad():
        assert not without_rows(torch.empty(0, 4), [used]).requires_grad
