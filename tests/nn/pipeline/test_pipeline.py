"""A pipeline trains and evaluates as the unsplit model does, on any number of ranks, under any schedule."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcpar.comm import Communicator
from hpcpar.nn import Pipeline
from hpcpar.nn.pipeline import Kind, Schedule, build_schedule
from tests.nn.pipeline.models import (
    CHECKPOINTS,
    SCHEDULES,
    WIDTH,
    Call,
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

pytestmark = pytest.mark.mpi


def check_text_model(
    comm: Communicator, samples: int, steps: int = 2, *, what: object = "", **options: Any
) -> None:
    """Train, evaluate, train again: everything is what the unsplit model computes."""
    model = text_model()
    x, target = text_batch(samples)
    loss, expected = reference_step(model, x, target, text_loss)
    output = model(x).detach()
    with pipeline(model, comm, loss_fn=text_loss, **options) as pipe:
        for _ in range(steps):
            pipe.zero_grad()
            assert_loss(comm, train(pipe, x, target), loss, what)
            assert_gradients(pipe, expected, what)
            got, eval_loss = pipe.eval_step(x if pipe.is_first else None, target if pipe.is_last else None)
            assert (got is not None) == pipe.is_last
            assert eval_loss is not None
            assert_loss(comm, eval_loss, loss, what)
            if got is not None:
                assert not got.requires_grad
                torch.testing.assert_close(got, output, rtol=1e-10, atol=1e-12)


# ---- parity ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_mode_equals_the_unsplit_model(comm: Communicator, schedule: str) -> None:
    sizes = [(13, 4, 1), (12, 4, 1), (13, 16, 1), (2, 4, 1)]
    if comm.size <= 3:
        sizes += [(13, 5, 2), (2, 4, 2)]
    for checkpoint, (samples, microbatches, chunks) in itertools.product(CHECKPOINTS, sizes):
        reuse = "route" if (len(checkpoint) + samples + chunks) % 2 else "replicate"
        options = {"checkpoint": checkpoint, "microbatches": microbatches, "chunks": chunks, "reuse": reuse}
        check_text_model(comm, samples, schedule=schedule, what=options, **options)


def mixed_backwards(ranks: int, microbatches: int, chunks: int) -> Schedule:
    """Zero-bubble, but stages with odd numbers do each backward as a whole."""
    split = build_schedule("zero_bubble", ranks, microbatches, chunks)
    rows = []
    for row in split.actions:
        even = [str(action) if action.stage % 2 == 0 else None for action in row]
        odd = [
            str(action).replace("I", "B") if action.kind is not Kind.BACKWARD_WEIGHT else None
            for action in row
        ]
        rows.append([one or other for one, other in zip(even, odd, strict=True)])
    return Schedule(rows, "mixed")


@pytest.mark.parametrize("chunks", [1, 2])
def test_schedule_from_a_file_is_followed(comm: Communicator, tmp_path: Path, chunks: int) -> None:
    if chunks * comm.size > 8:
        chunks = 1
    schedule = mixed_backwards(comm.size, 5, chunks)
    schedule.to_csv(tmp_path / "schedule.csv")
    schedule = Schedule.from_csv(tmp_path / "schedule.csv")
    for checkpoint in CHECKPOINTS:
        check_text_model(
            comm, 13, microbatches=5, schedule=schedule, checkpoint=checkpoint, reuse="replicate"
        )


def test_balance_decides_where_layers_are(comm: Communicator) -> None:
    balance = [1] * (comm.size - 1) + [8 - comm.size + 1]
    model = text_model()
    x, target = text_batch(6)
    loss, expected = reference_step(model, x, target, text_loss)
    for given in (balance, balance[::-1], "time"):
        options: dict[str, Any] = {"sample_input": x[:2]} if given == "time" else {}
        with pipeline(
            model, comm, microbatches=3, balance=given, reuse="replicate", loss_fn=text_loss, **options
        ) as pipe:
            assert sum(pipe.balance) == 8
            if given != "time":
                assert pipe.balance == given
                mine = {name.partition(".")[0] for name, _ in pipe.named_parameters(remove_duplicate=False)}
                start = sum(given[: comm.rank])
                assert mine <= {str(index) for index in range(start, start + given[comm.rank])}
            assert_loss(comm, train(pipe, x, target), loss)
            assert_gradients(pipe, expected)


def test_run_can_be_repeated_bit_by_bit(comm: Communicator) -> None:
    x, target = text_batch(13)
    for schedule in ("1f1b", "zero_bubble"):
        seen = []
        for _ in range(3):
            with pipeline(text_model(), comm, microbatches=6, schedule=schedule, loss_fn=text_loss) as pipe:
                for _ in range(2):
                    loss = train(pipe, x, target)
                seen.append([loss, *(p.grad for p in pipe.parameters())])
        for other in seen[1:]:
            assert all(torch.equal(one, two) for one, two in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
def test_progress_thread_changes_nothing(
    comm: Communicator, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # "auto" measures only with cores to spare
    for progress in ("thread", "auto", "hooks"):
        check_text_model(
            comm, 9, 14 if progress == "auto" else 3, microbatches=4, schedule=schedule, progress=progress
        )


# ---- losses ------------------------------------------------------------------------------------------------


class LossLayer(nn.Module):
    """The last layer may return the loss, of the batch and its targets as inputs."""

    def forward(self, value: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(value[0], value[1])


class OnFirst(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, value: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.layer(value[0]), value[1]


def test_last_layer_may_return_the_loss(comm: Communicator) -> None:
    model = nn.Sequential(*(OnFirst(layer) for layer in mlp(5)), LossLayer())
    x, target = batch(7)
    loss, expected = reference_step(model, (x, target), None, lambda output, _: output)
    for schedule, checkpoint in ("1f1b", "always"), ("zero_bubble", "never"):
        with pipeline(model, comm, microbatches=3, schedule=schedule, checkpoint=checkpoint) as pipe:
            assert_loss(comm, pipe.train_step((x, target) if pipe.is_first else None), loss)
            assert_gradients(pipe, expected)
            output, nothing = pipe.eval_step((x, target) if pipe.is_first else None)
            assert nothing is None
            assert output is None or output.shape == (3,)  # a loss per microbatch


def sum_of_squares(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output, target, reduction="sum")


def test_sum_over_samples_is_not_weighted(comm: Communicator) -> None:
    model = mlp()
    x, target = batch(7)
    loss, expected = reference_step(model, x, target, sum_of_squares)
    with pipeline(model, comm, microbatches=3, loss_fn=sum_of_squares, loss_reduction="sum") as pipe:
        assert_loss(comm, train(pipe, x, target), loss)
        assert_gradients(pipe, expected)


def norm_of(output: Tensor) -> Tensor:
    return output.square().mean()


def test_loss_may_need_no_targets_and_have_one_element(comm: Communicator) -> None:
    model = mlp()
    x, _ = batch(7)
    loss, expected = reference_step(model, x, None, lambda output, _: norm_of(output))
    for loss_fn in (norm_of, lambda output: norm_of(output).reshape(1, 1)):
        with pipeline(model, comm, microbatches=3, loss_fn=loss_fn) as pipe:
            assert_loss(comm, train(pipe, x, None), loss)
            assert_gradients(pipe, expected)


def test_scale_multiplies_gradients_and_not_the_loss(comm: Communicator) -> None:
    model = mlp()
    x, target = batch(7)
    loss, expected = reference_step(model, x, target, squares)
    for checkpoint in ("never", "always"):
        with pipeline(model, comm, microbatches=3, loss_fn=squares, checkpoint=checkpoint) as pipe:
            assert_loss(comm, train(pipe, x, target, scale=0.25), loss)
            assert_gradients(pipe, {name: 0.25 * g for name, g in expected.items() if g is not None})


def test_targets_may_be_nested(comm: Communicator) -> None:
    model = mlp()
    x, target = batch(7)

    def loss_fn(output: Tensor, parts: dict[str, Any]) -> Tensor:
        return F.mse_loss(output * parts["weight"], parts["y"])

    weight = torch.rand(7, 1, dtype=torch.float64)
    targets = {"y": target, "weight": weight}
    loss, expected = reference_step(model, x, targets, loss_fn)
    with pipeline(model, comm, microbatches=3, loss_fn=loss_fn) as pipe:
        assert_loss(comm, train(pipe, x, targets), loss)
        assert_gradients(pipe, expected)


# ---- gradients ---------------------------------------------------------------------------------------------


def test_inputs_that_require_grad_get_theirs(comm: Communicator) -> None:
    model = mlp()
    x, target = batch(7)
    leaf = x.clone().requires_grad_()
    squares(model(leaf), target).backward()
    for schedule, checkpoint in itertools.product(("1f1b", "zero_bubble"), ("never", "always")):
        mine = x.clone().requires_grad_()
        with pipeline(
            model, comm, microbatches=3, schedule=schedule, checkpoint=checkpoint, loss_fn=squares
        ) as pipe:
            train(pipe, mine, target)
            assert (mine.grad is not None) == pipe.is_first
            if pipe.is_first:
                assert_same_tensors({"x": mine.grad}, {"x": leaf.grad}, (schedule, checkpoint))
                train(pipe, mine, target)
                assert_same_tensors({"x": mine.grad}, {"x": 2 * leaf.grad})
            else:
                train(pipe, mine, target)


def test_steps_accumulate_until_gradients_are_cleared(comm: Communicator) -> None:
    model = mlp()
    batches = [batch(samples, seed) for seed, samples in enumerate((7, 4, 7))]
    alone = copy.deepcopy(model)
    for schedule in ("1f1b", "zero_bubble"):
        alone.zero_grad()
        with pipeline(model, comm, microbatches=3, schedule=schedule, loss_fn=squares) as pipe:
            for x, target in batches:
                train(pipe, x, target, scale=1 / 3)
                (squares(alone(x), target) / 3).backward()
                assert_gradients(pipe, gradients(alone), schedule)
            for set_to_none in (False, True):
                pipe.zero_grad(set_to_none=set_to_none)
                alone.zero_grad(set_to_none=set_to_none)
                assert_gradients(pipe, gradients(alone), schedule)
                train(pipe, *batches[0])
                squares(alone(batches[0][0]), batches[0][1]).backward()
                assert_gradients(pipe, gradients(alone), schedule)


FROZEN: dict[str, Callable[[int], bool]] = {
    "first": lambda layer: layer < 2,
    "middle": lambda layer: 2 <= layer < 6,
    "last": lambda layer: layer >= 6,
    "every other": lambda layer: layer % 2 == 0,
    "all": lambda layer: True,
    "none": lambda layer: False,
}


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
def test_frozen_layers_get_no_gradients(comm: Communicator, schedule: str) -> None:
    """And the choice may change between steps."""
    x, target = batch(7)
    for checkpoint in ("never", "always"):
        model = mlp()
        with pipeline(
            model, comm, microbatches=3, schedule=schedule, checkpoint=checkpoint, loss_fn=squares
        ) as pipe:
            for which, is_frozen in FROZEN.items():
                for module in (model, pipe.layers):
                    for name, parameter in module.named_parameters():
                        parameter.requires_grad_(not is_frozen(int(name.partition(".")[0])))
                model.zero_grad()
                pipe.zero_grad()
                loss = squares(model(x), target)
                if loss.requires_grad:
                    loss.backward()
                for repetition in range(2):
                    pipe.zero_grad()
                    assert_loss(comm, train(pipe, x, target), loss.detach(), which)
                    assert_gradients(pipe, gradients(model), (which, checkpoint, repetition))


def test_in_place_layers_compute_the_same(comm: Communicator) -> None:
    torch.manual_seed(3)
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(WIDTH, WIDTH), nn.Identity(), nn.ReLU(inplace=True)]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, 2)).double()
    x, target = batch(7)
    loss, expected = reference_step(model, x, target, squares)
    for size in range(1, 4):
        balance = [size] * (comm.size - 1) + [13 - size * (comm.size - 1)]
        for schedule, checkpoint in itertools.product(("1f1b", "zero_bubble"), ("never", "always")):
            with pipeline(
                model,
                comm,
                microbatches=3,
                schedule=schedule,
                checkpoint=checkpoint,
                balance=balance,
                loss_fn=squares,
            ) as pipe:
                for _ in range(2):
                    pipe.zero_grad()
                    assert_loss(comm, train(pipe, x, target), loss)
                    assert_gradients(pipe, expected, (balance, schedule, checkpoint))


# ---- evaluation --------------------------------------------------------------------------------------------


def test_evaluation_leaves_no_trace(comm: Communicator) -> None:
    model = mlp()
    x, _ = batch(7)
    output = model(x).detach()
    with pipeline(model, comm, microbatches=3, loss_fn=squares) as pipe:
        for _ in range(10):
            got = pipe(x if pipe.is_first else None)
            assert (got is not None) == pipe.is_last
            if got is not None:
                torch.testing.assert_close(got, output, rtol=1e-10, atol=1e-12)
        got, nothing = pipe.eval_step(x if pipe.is_first else None, broadcast_output=True)
        assert nothing is None
        torch.testing.assert_close(got, output, rtol=1e-10, atol=1e-12)
        assert all(p.grad is None for p in pipe.parameters())


def test_broadcast_output_keeps_its_structure(comm: Communicator) -> None:
    x, _ = batch(5)
    model = nn.Sequential(
        *mlp(4), Call(lambda y: {"y": y.T.contiguous().T, "signs": (y > 0, 7), "nothing": None})
    )
    with pipeline(model, comm, microbatches=2) as pipe:
        got = pipe(x if pipe.is_first else None, broadcast_output=True)
    expected = model(x)
    assert got.keys() == expected.keys()
    torch.testing.assert_close(got["y"], expected["y"].detach(), rtol=1e-10, atol=1e-12)
    assert torch.equal(got["signs"][0], expected["signs"][0])
    assert (got["signs"][1], got["nothing"]) == (7, None)


def test_training_and_evaluation_may_alternate(comm: Communicator) -> None:
    x, target = batch(8)
    other_x, other_target = batch(5, seed=9)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pipeline(model, comm, microbatches=3, loss_fn=squares) as pipe:
        mine = torch.optim.SGD(pipe.parameters(), lr=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            squares(model(x), target).backward()
            optimizer.step()
            pipe.train()
            mine.zero_grad()
            train(pipe, x, target)
            mine.step()
            pipe.eval()
            for _ in range(2):
                _, loss = pipe.eval_step(
                    other_x if pipe.is_first else None, other_target if pipe.is_last else None
                )
                assert loss is not None
                assert_loss(comm, loss, squares(model(other_x), other_target).detach())
        assert_same_tensors(dict(pipe.named_parameters()), dict(model.named_parameters()))


# ---- number types ------------------------------------------------------------------------------------------


def test_narrow_parameters_and_activations_pass(comm: Communicator) -> None:
    model = mlp().bfloat16()
    x, target = (tensor.bfloat16() for tensor in batch(8))
    alone = copy.deepcopy(model)
    for part, of_target in zip(x.chunk(4), target.chunk(4), strict=True):
        (squares(alone(part), of_target) / 4).backward()
    with pipeline(model, comm, microbatches=4, loss_fn=squares) as pipe:
        train(pipe, x, target)
        assert_same_tensors(gradients(pipe.layers), gradients(alone), rtol=0.03)


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
def test_autocast_around_a_step_reaches_every_stage(comm: Communicator, schedule: str) -> None:
    model = mlp().float()
    x, target = (tensor.float() for tensor in batch(8))
    alone = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        losses = [squares(alone(p), t) / 4 for p, t in zip(x.chunk(4), target.chunk(4), strict=True)]
    for loss in losses:
        loss.backward()
    exact: list[dict[str, Tensor | None]] = []
    for checkpoint in CHECKPOINTS:
        with pipeline(
            model, comm, microbatches=4, schedule=schedule, checkpoint=checkpoint, loss_fn=squares
        ) as pipe:
            for _ in range(3):
                pipe.zero_grad()
                with torch.autocast("cpu", torch.bfloat16):
                    got = train(pipe, x, target)
                assert_same_tensors(gradients(pipe.layers), gradients(alone), checkpoint, rtol=0.03)
                exact.append(
                    {name: None if g is None else g.clone() for name, g in gradients(pipe.layers).items()}
                )
                assert abs(got.item() - sum(loss.item() for loss in losses)) < 0.01
    for other in exact[1:]:
        assert_same_tensors(other, exact[0], rtol=0.0)


def test_autocast_is_no_part_of_backward(comm: Communicator) -> None:
    seen: list[bool] = []
    model = mlp(4).float()
    x, target = (tensor.float() for tensor in batch(4))
    pipe = Pipeline(model, comm, microbatches=2, loss_fn=squares)
    for parameter in pipe.parameters():
        parameter.register_hook(lambda gradient: seen.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        train(pipe, x, target)
    assert seen
    assert not any(seen)
    pipe.free()
