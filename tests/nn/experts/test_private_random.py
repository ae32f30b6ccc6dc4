"""A block under a private seed draws the same numbers every time, and changes nobody else's."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hpcpar.errors import HpcparError
from hpcpar.nn.experts.private_random import PrivateRandom

pytestmark = pytest.mark.local

DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: nn.functional.dropout(x, 0.5),
    "alpha_dropout": lambda x: nn.functional.alpha_dropout(x, 0.5, training=True),
    "rrelu": lambda x: nn.functional.rrelu(-x, training=True),
    "rand": lambda x: torch.rand(x.shape),
    "randn": lambda x: torch.randn(x.shape),
    "randint": lambda x: torch.randint(0, 100, x.shape),
    "randint_low": lambda x: torch.randint(100, x.shape),
    "randperm": lambda x: torch.randperm(50),
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "randint_like": lambda x: torch.randint_like(x, 100),
    "bernoulli": lambda x: torch.bernoulli(torch.full_like(x, 0.5)),
    "multinomial": lambda x: torch.multinomial(torch.ones(50), 20),
    "normal": lambda x: torch.normal(x, 1.0),
    "uniform_": lambda x: torch.empty_like(x).uniform_(),
    "exponential_": lambda x: torch.empty_like(x).exponential_(),
    "attention": lambda x: nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    "module": lambda x: nn.TransformerEncoderLayer(8, 2, 16, 0.5, batch_first=True)(x),
}


@pytest.mark.parametrize("name", DRAWS)
def test_same_seed_same_numbers_and_the_process_generator_stays(name: str) -> None:
    x = torch.ones(4, 6, 8)
    before = torch.get_rng_state()
    results = []
    for seed in (1, 1, 2):
        with PrivateRandom(seed):
            results.append(DRAWS[name](x))
        torch.rand(3)  # what others draw meanwhile makes no difference
    state = torch.get_rng_state()
    torch.set_rng_state(before)
    for _ in range(3):
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_gradients_pass_through() -> None:
    x = torch.ones(5, 5, requires_grad=True)
    with PrivateRandom(3):
        y = nn.functional.dropout(x, 0.5)
        (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, y.detach())


def test_other_threads_draw_from_the_process_generator() -> None:
    drawn: list[Tensor] = []
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    with PrivateRandom(1):
        thread = threading.Thread(target=lambda: drawn.append(torch.rand(4)))
        thread.start()
        thread.join()
    assert torch.equal(drawn[0], expected)


def test_attention_without_dropout_draws_nothing() -> None:
    x = torch.randn(2, 4, 8, requires_grad=True)
    with PrivateRandom(1):
        torch.autograd.grad(nn.functional.scaled_dot_product_attention(x, x, x).sum(), x)


def test_checkpointing_inside_is_an_error_and_not_a_wrong_gradient() -> None:
    x = torch.ones(5, 5, requires_grad=True)
    with PrivateRandom(3):
        y = checkpoint(nn.functional.dropout, x, 0.5, use_reentrant=False)
        with pytest.raises(HpcparError, match="must not use activation checkpointing"):
            torch.autograd.grad(y.sum(), x)
