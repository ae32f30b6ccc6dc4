"""Dropout draws the same masks on any number of ranks and under any schedule, and disturbs nobody."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpcpar.comm import Communicator
from tests.nn.pipeline.models import (
    CHECKPOINTS,
    SCHEDULES,
    WIDTH,
    assert_loss,
    assert_same_tensors,
    batch,
    gradients,
    pipeline,
    squares,
    train,
)

pytestmark = pytest.mark.mpi


class Noise(nn.Module):
    """Draws in training only, and by a function."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x) if self.training else x


def dropout_model() -> nn.Sequential:
    torch.manual_seed(7)
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3)), Noise()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 2)).double()


Steps = list[tuple[Tensor, dict[str, Tensor | None]]]


def run(comm: Communicator, make: Callable[[], nn.Module], **options: Any) -> Steps:
    x, target = batch(7)
    seen = []
    with pipeline(make(), comm, microbatches=3, loss_fn=squares, **options) as pipe:
        for _ in range(2):
            pipe.zero_grad()
            loss = train(pipe, x, target)
            seen.append(
                (loss, {n: None if g is None else g.clone() for n, g in gradients(pipe.layers).items()})
            )
    return seen


def assert_same_steps(comm: Communicator, got: Steps, expected: Steps, what: object) -> None:
    for (loss, grads), (other, others) in zip(got, expected, strict=True):
        assert_loss(comm, loss, other, what)
        assert_same_tensors(grads, others, what)


def test_masks_depend_on_neither_ranks_nor_schedule(comm: Communicator) -> None:
    alone = comm.Split(comm.rank, 0)
    assert alone is not None
    expected = run(alone, dropout_model)
    assert not torch.equal(expected[0][0], expected[1][0]), "each step must draw anew"
    for schedule, checkpoint in itertools.product(SCHEDULES, CHECKPOINTS):
        chunks = 2 if schedule == "interleaved" else 1
        got = run(comm, dropout_model, schedule=schedule, checkpoint=checkpoint, chunks=chunks)
        assert_same_steps(comm, got, expected, (schedule, checkpoint))
    alone.Free()


class Remember(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(torch.ones_like(x))
        self.seen.append(y.detach())
        return x * y


def test_masks_differ_between_steps_microbatches_and_layers_and_not_in_a_recomputation(
    comm: Communicator,
) -> None:
    model = nn.Sequential(*(Remember() for _ in range(comm.size)), nn.Linear(50, 2)).double()
    x, target = torch.ones(6, 50, dtype=torch.float64), torch.zeros(6, 2, dtype=torch.float64)
    with pipeline(model, comm, microbatches=3, checkpoint="always", loss_fn=squares) as pipe:
        for _ in range(2):
            train(pipe, x, target)
        mine = [mask for layer in pipe.layers.children() for mask in getattr(layer, "seen", [])]
        everything = [mask for masks in comm.allgather(mine) for mask in masks]
    counts = [sum(torch.equal(mask, other) for other in everything) for mask in everything]
    assert counts == [2] * (2 * 2 * 3 * comm.size)  # once forward, once again


@pytest.mark.parametrize("checkpoint", ["never", "always"])
def test_random_numbers_of_the_program_are_left_alone(comm: Communicator, checkpoint: str) -> None:
    x, target = batch(7)
    with pipeline(dropout_model(), comm, microbatches=3, checkpoint=checkpoint, loss_fn=squares) as pipe:
        for _ in range(3):
            torch_state, python_state = torch.get_rng_state(), random.getstate()
            train(pipe, x, target)
            pipe(x if pipe.is_first else None)
            assert torch.equal(torch.get_rng_state(), torch_state)
            assert random.getstate() == python_state
            torch.rand(1)


def test_evaluation_draws_nothing(comm: Communicator) -> None:
    x, _ = batch(7)
    model = dropout_model().eval()
    with pipeline(model, comm, microbatches=3) as pipe:
        for mode in (False, True, False):
            pipe.train(mode)
            got = pipe(x if pipe.is_first else None, broadcast_output=True)
            same = torch.allclose(got, model(x), rtol=1e-10, atol=1e-12)
            assert same != mode


class Annealed(nn.Module):
    """Begins to draw later: a rate that grows, a layer that is dropped now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.rate = 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return nn.functional.dropout(x, self.rate) if self.rate > 0.0 else x


def annealed_model() -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(*(Annealed() for _ in range(4)), nn.Linear(WIDTH, 2)).double()


@pytest.mark.parametrize("checkpoint", ["never", "always"])
def test_layer_may_begin_to_draw_later(comm: Communicator, checkpoint: str) -> None:
    alone = comm.Split(comm.rank, 0)
    assert alone is not None
    x, target = batch(7)
    seen = []
    for ranks in (alone, comm):
        torch.manual_seed(8)
        with pipeline(
            annealed_model(), ranks, microbatches=3, checkpoint=checkpoint, loss_fn=squares
        ) as pipe:
            train(pipe, x, target)
            torch.rand(ranks.rank + 1)  # the ranks' own generators may differ
            state = torch.get_rng_state()
            for layer in pipe.layers.children():
                if isinstance(layer, Annealed):
                    layer.rate = 0.5
            pipe.zero_grad()
            loss = train(pipe, x, target)
            assert torch.equal(torch.get_rng_state(), state)
            seen.append([(loss, gradients(pipe.layers))])
    assert_same_steps(comm, seen[1], seen[0], checkpoint)
    alone.Free()


def noisy_squares(output: Tensor, target: Tensor) -> Tensor:
    return squares(output + torch.randn_like(output), target)


def test_loss_may_draw(comm: Communicator) -> None:
    alone = comm.Split(comm.rank, 0)
    assert alone is not None
    x, target = batch(7)
    seen: list[Steps] = []
    for ranks, checkpoint, schedule in (alone, "never", "gpipe"), (comm, "always", "1f1b"):
        model = dropout_model()
        torch.manual_seed(8)
        state = torch.get_rng_state()
        with pipeline(
            model,
            ranks,
            microbatches=3,
            checkpoint=checkpoint,
            schedule=schedule,
            loss_fn=noisy_squares,
        ) as pipe:
            loss = train(pipe, x, target)
            seen.append([(loss, gradients(pipe.layers))])
        assert torch.equal(torch.get_rng_state(), state)
    assert_same_steps(comm, seen[1], seen[0], "loss")
    alone.Free()
