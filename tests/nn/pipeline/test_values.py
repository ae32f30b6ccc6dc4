"""Layers may pass any nested value; skips go past stages; what is known does not travel again."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from hpcpar.comm import Communicator
from hpcpar.nn.pipeline import Namespace, Whole, pop, skippable, stash
from tests.nn.pipeline.models import (
    WIDTH,
    Call,
    assert_gradients,
    assert_loss,
    batch,
    gradients,
    mlp,
    pipeline,
    reference_step,
    squares,
    train,
)

pytestmark = pytest.mark.mpi


class State(NamedTuple):
    hidden: Tensor
    mask: Tensor
    positions: Tensor
    depth: int
    nothing: None


class Enter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, value: dict[str, Any]) -> State:
        hidden = self.linear(value["x"]) @ value["rotation"]
        positions = torch.arange(len(hidden)) + value["start"]
        return State(hidden, value["x"] > 0, positions, 0, None)


class Middle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, state: State) -> State:
        hidden = torch.tanh(self.linear(state.hidden)) * state.mask
        hidden = hidden + state.positions[:, None] * 0.01 * (state.depth + 1)
        assert state.nothing is None
        return state._replace(hidden=hidden, depth=state.depth + 1)


class Leave(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 2)

    def forward(self, state: State) -> Tensor:
        return self.linear(state.hidden) * state.depth


def nested_model(size: int) -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(Enter(), *(Middle() for _ in range(max(1, size - 2))), Leave()).double()


def by_microbatch(model: nn.Module, x: dict[str, Any], target: Tensor, count: int) -> tuple[float, Any]:
    """What the unsplit model computes microbatch by microbatch, for layers that look at their sizes."""
    model = copy.deepcopy(model)
    total = 0.0
    for part, goal in zip(x["x"].tensor_split(count), target.tensor_split(count), strict=True):
        loss = squares(model({**x, "x": part}), goal) * (len(part) / len(target))
        loss.backward()
        total += float(loss.detach())
    return total, gradients(model)


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
def test_nested_values_pass_every_stage(comm: Communicator, schedule: str) -> None:
    """Named tuples, masks, integers, constants that change from batch to batch, None."""
    model = nested_model(comm.size)
    rotation = torch.rand(WIDTH, WIDTH, dtype=torch.float64)
    for checkpoint in ("never", "always"):
        with pipeline(
            model, comm, microbatches=3, schedule=schedule, checkpoint=checkpoint, loss_fn=squares
        ) as pipe:
            for start in (0, 3, 3, 8):
                x, target = batch(7, seed=start)
                inputs = {"x": x, "start": start, "rotation": rotation}
                loss, expected = by_microbatch(model, inputs, target, 3)
                pipe.zero_grad()
                got = train(pipe, {**inputs, "rotation": Whole(rotation)}, target)
                assert_loss(comm, got, loss)
                assert_gradients(pipe, expected, (checkpoint, start))


def test_headers_travel_only_when_something_changes(comm: Communicator) -> None:
    model = mlp()

    def headers() -> int:
        return sum(comm.allgather(pipe.stats().headers_sent))

    with pipeline(model, comm, microbatches=4, loss_fn=squares) as pipe:
        before = 0
        for samples in (8, 13, 8):
            x, target = batch(samples)
            seen = []
            for _ in range(4):
                loss, expected = reference_step(model, x, target, squares)
                pipe.zero_grad()
                assert_loss(comm, train(pipe, x, target), loss)
                assert_gradients(pipe, expected)
                for _ in range(2):
                    pipe.eval_step(x if pipe.is_first else None, target if pipe.is_last else None)
                seen.append(headers())
            assert len(set(seen)) == 1, "known parcels were described again"
            assert (seen[0] > before) == (comm.size > 1), "other shapes must be described"
            before = seen[0]


class Several(nn.Module):
    """Of three outputs the next layers use the first, part of the second, and not the third."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(linear(x) for linear in self.linears)


def use_some(value: tuple[Tensor, ...]) -> Tensor:
    return value[0] + value[1][:, :1]


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
def test_unused_outputs_get_no_gradient(comm: Communicator, schedule: str) -> None:
    torch.manual_seed(5)
    between = [nn.Identity() for _ in range(max(0, comm.size - 2))]
    model = nn.Sequential(Several(), *between, nn.Sequential(Call(use_some), nn.Linear(WIDTH, 2))).double()
    x, target = batch(7)
    loss, expected = reference_step(model, x, target, squares)
    for checkpoint in ("never", "always"):
        with pipeline(
            model, comm, microbatches=3, schedule=schedule, checkpoint=checkpoint, loss_fn=squares
        ) as pipe:
            for _ in range(2):
                pipe.zero_grad()
                assert_loss(comm, train(pipe, x, target), loss)
                assert_gradients(pipe, expected)


# ---- skips -------------------------------------------------------------------------------------------------


@skippable(stash=["a", "b"])
class Fork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        y = torch.tanh(self.linear(x))
        yield stash("a", {"y": y, "mask": x > 0, "count": 3})
        yield stash("b", None)
        return y


@skippable(pop=["a"])
class TakeA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        a = yield pop("a")
        return torch.tanh(self.linear(x)) * a["mask"] + a["y"] * a["count"]


@skippable(pop=["b"])
class TakeB(nn.Module):
    def forward(self, x: Tensor) -> Any:
        b = yield pop("b")
        return x if b is None else x + b


def skip_model() -> nn.Sequential:
    """A skip popped twice, one of None, and a repeated block with names of its own, inside of the first."""
    torch.manual_seed(5)
    inner = Namespace()
    layers = [
        Fork(),
        nn.Linear(WIDTH, WIDTH),
        Fork().isolate(inner),
        TakeA(),
        nn.Tanh(),
        TakeA().isolate(inner),
        TakeB().isolate(inner),
        TakeA(),
        TakeB(),
        nn.Linear(WIDTH, 2),
    ]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zero_bubble"])
def test_skips_pass_over_stages(comm: Communicator, schedule: str) -> None:
    model = skip_model()
    x, target = batch(7)
    loss, expected = reference_step(model, x, target, squares)
    output = model(x).detach()
    for checkpoint, chunks in ("never", 1), ("always", 1), ("except_last", 2):
        with pipeline(
            model,
            comm,
            microbatches=3,
            schedule=schedule,
            checkpoint=checkpoint,
            chunks=chunks,
            loss_fn=squares,
        ) as pipe:
            for _ in range(2):
                pipe.zero_grad()
                assert_loss(comm, train(pipe, x, target), loss)
                assert_gradients(pipe, expected, (checkpoint, chunks))
            got = pipe(x if pipe.is_first else None, broadcast_output=True)
            torch.testing.assert_close(got, output, rtol=1e-10, atol=1e-12)
