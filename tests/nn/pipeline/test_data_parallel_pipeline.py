"""Replicas of a pipeline train as one on the batches of all, and stay equal."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from hpcpar.comm import Communicator, ProcessGrid
from hpcpar.errors import MismatchError, RankFailedError
from hpcpar.nn import Pipeline
from tests.nn.pipeline.models import (
    WIDTH,
    assert_gradients,
    assert_loss,
    assert_same_tensors,
    batch,
    gradients,
    mlp,
    pipeline,
    reference_step,
    squares,
    text_batch,
    text_loss,
    text_model,
    train,
)

pytestmark = pytest.mark.mpi(min_size=2)


@pytest.fixture
def grid(comm: Communicator) -> Iterator[ProcessGrid]:
    """Two replicas of as many stages as there are ranks for; of three ranks, three replicas of one stage."""
    made = ProcessGrid(comm, data=3 if comm.size == 3 else 2, pipeline=-1)
    yield made
    made.free()


def part(grid: ProcessGrid, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.chunk(grid.data.size)[grid.data.rank] for tensor in tensors]


def spoiled(model: nn.Module, grid: ProcessGrid) -> nn.Module:
    """Other weights in all replicas but the first, whose must win."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(float(grid.data.rank))
    return model


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zero_bubble"])
def test_gradients_are_those_of_the_whole_batch(comm: Communicator, grid: ProcessGrid, schedule: str) -> None:
    x, target = text_batch(12)
    loss, expected = reference_step(text_model(), x, target, text_loss)
    mine = part(grid, x, target)
    for reuse, chunks, checkpoint in (
        ("route", 1, "never"),
        ("replicate", 1, "always"),
        ("replicate", 2, "never"),
    ):
        with pipeline(
            spoiled(text_model(), grid),
            grid.pipeline,
            data_comm=grid.data,
            microbatches=3,
            schedule=schedule,
            reuse=reuse,
            chunks=chunks,
            checkpoint=checkpoint,
            bucket_mb=1e-4,
            loss_fn=text_loss,
        ) as pipe:
            for _ in range(2):
                pipe.zero_grad()
                assert_loss(comm, train(pipe, *mine), loss)
                assert_gradients(pipe, expected, (reuse, chunks))
            assert_replicas_equal(grid, pipe)


def assert_replicas_equal(grid: ProcessGrid, pipe: Pipeline) -> None:
    for tensors in (dict(pipe.named_parameters()), gradients(pipe.layers)):
        found = grid.data.allgather(tensors)
        for other in found[1:]:
            assert_same_tensors(other, found[0], rtol=0.0)


@pytest.mark.parametrize("reuse", ["route", "replicate"])
def test_accumulated_steps_average_with_and_without_synchronization(
    comm: Communicator, grid: ProcessGrid, reuse: str
) -> None:
    x, target = text_batch(12)
    loss, expected = reference_step(text_model(), x, target, text_loss)
    mine_x, mine_target = part(grid, x, target)
    for schedule, synchronized in itertools.product(("1f1b", "zero_bubble"), (True, False)):
        with pipeline(
            text_model(),
            grid.pipeline,
            data_comm=grid.data,
            microbatches=2,
            schedule=schedule,
            reuse=reuse,
            loss_fn=text_loss,
        ) as pipe:
            for _ in range(2):
                pipe.zero_grad()
                with contextlib.nullcontext() if synchronized else pipe.no_sync():
                    first = train(pipe, *(t.chunk(2)[0] for t in (mine_x, mine_target)), scale=0.5)
                second = train(pipe, *(t.chunk(2)[1] for t in (mine_x, mine_target)), scale=0.5)
                assert_loss(comm, (first + second) / 2, loss)
                assert_gradients(pipe, expected, (schedule, synchronized))


def test_steps_without_synchronization_keep_gradients_apart(comm: Communicator, grid: ProcessGrid) -> None:
    x, target = batch(12)
    mine = part(grid, x, target)
    _, expected = reference_step(mlp(), *mine, squares)
    with pipeline(mlp(), grid.pipeline, data_comm=grid.data, microbatches=2, loss_fn=squares) as pipe:
        with pipe.no_sync():
            train(pipe, *mine)
        assert_gradients(pipe, expected)


def test_frozen_layers_stay_without_gradients(comm: Communicator, grid: ProcessGrid) -> None:
    x, target = batch(12)
    mine = part(grid, x, target)
    for is_frozen in (lambda layer: layer < 3, lambda layer: layer >= 6, lambda layer: True):
        model = mlp()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not is_frozen(int(name.partition(".")[0])))
        if any(p.requires_grad for p in model.parameters()):
            loss, expected = reference_step(model, x, target, squares)
        else:
            loss, expected = squares(model(x), target), gradients(model)
        with pipeline(model, grid.pipeline, data_comm=grid.data, microbatches=3, loss_fn=squares) as pipe:
            for _ in range(2):
                pipe.zero_grad()
                assert_loss(comm, train(pipe, *mine), loss)
                assert_gradients(pipe, expected)


class Sometimes(nn.Module):
    """Uses its weights only where there is something to use them on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.rare = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.linear(x))
        return y + self.rare(y) if bool((x[:, 0] > 0).any()) else y


def test_replica_that_does_not_use_a_parameter_counts_as_zero(comm: Communicator, grid: ProcessGrid) -> None:
    """As in DataParallel; and what no replica uses keeps None."""
    torch.manual_seed(9)
    stages = grid.pipeline.size
    model = nn.Sequential(
        Sometimes(),
        *(nn.Linear(WIDTH, 2) if s == stages - 1 else nn.Linear(WIDTH, WIDTH) for s in range(stages)),
    ).double()
    x, target = batch(12)
    for using in (1, 0):
        x[:, 0] = -1.0
        part(grid, x)
        x.chunk(grid.data.size)[-1][:, 0] = float(using) * 2 - 1
        total: dict[str, Any] = {}
        for a, b in zip(x.chunk(grid.data.size), target.chunk(grid.data.size), strict=True):
            _, found = reference_step(model, a, b, squares)
            for name, g in found.items():
                share = None if g is None else g / grid.data.size
                before = total.get(name)
                total[name] = share if before is None else before if share is None else before + share
        with pipeline(model, grid.pipeline, data_comm=grid.data, microbatches=1, loss_fn=squares) as pipe:
            for _ in range(2):
                pipe.zero_grad()
                train(pipe, *part(grid, x, target))
                assert_gradients(pipe, total, using)


def test_training_equals_the_unsplit_model(comm: Communicator, grid: ProcessGrid) -> None:
    model = text_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with pipeline(
        text_model(),
        grid.pipeline,
        data_comm=grid.data,
        microbatches=3,
        reuse="replicate",
        loss_fn=text_loss,
    ) as pipe:
        mine = torch.optim.AdamW(pipe.parameters(), lr=0.01)
        for step in range(4):
            x, target = text_batch(12, seed=step)
            optimizer.zero_grad()
            text_loss(model(x), target).backward()
            optimizer.step()
            mine.zero_grad()
            train(pipe, *part(grid, x, target))
            mine.step()
        assert_same_tensors(
            dict(pipe.named_parameters(remove_duplicate=False)),
            dict(model.named_parameters(remove_duplicate=False)),
        )
        assert_replicas_equal(grid, pipe)


def test_evaluation_is_each_replicas_own(grid: ProcessGrid) -> None:
    model = mlp()
    x, target = batch(6, seed=grid.data.rank)
    with pipeline(model, grid.pipeline, data_comm=grid.data, microbatches=2, loss_fn=squares) as pipe:
        if grid.data.rank == 0:  # the others need not take part
            _, loss = pipe.eval_step(x, target)
            assert loss is not None
            assert_loss(grid.pipeline, loss, squares(model(x), target).detach())


def test_replicas_that_differ_are_refused(comm: Communicator, grid: ProcessGrid) -> None:
    with pytest.raises(MismatchError):
        Pipeline(
            mlp().float() if grid.data.rank else mlp(), grid.pipeline, data_comm=grid.data, microbatches=2
        )


def raising(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    raise ValueError("one loss has failed")


def test_failure_in_one_replica_fails_all(
    comm: Communicator, grid: ProcessGrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPCPAR_TIMEOUT_S", "20")
    pipe = Pipeline(
        mlp(),
        grid.pipeline,
        data_comm=grid.data,
        microbatches=2,
        loss_fn=raising if grid.data.rank == 1 else squares,
    )
    error = ValueError if pipe.is_last and grid.data.rank == 1 else RankFailedError
    with pytest.raises(error, match="one loss has failed"):
        train(pipe, *batch(6))
    pipe.free()
