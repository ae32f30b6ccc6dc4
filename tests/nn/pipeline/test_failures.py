"""A mistake or a failure on one rank is an error on all of them, at once, with the cause."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpcpar.comm import Communicator
from hpcpar.errors import CommunicatorFreedError, HpcparError, MismatchError, RankFailedError, ScheduleError
from hpcpar.nn import Pipeline
from hpcpar.nn.pipeline import Schedule, build_schedule
from tests.nn.pipeline.models import (
    WIDTH,
    Call,
    assert_gradients,
    assert_loss,
    batch,
    mlp,
    pipeline,
    reference_step,
    squares,
    train,
)

pytestmark = pytest.mark.mpi


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCPAR_TIMEOUT_S", "20")  # who is left waiting gets a StalledError


# ---- making ------------------------------------------------------------------------------------------------


def without(schedule: Schedule, cell: str) -> Schedule:
    return Schedule([[a for a in row if str(a) != cell] for row in schedule.actions])


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no microbatches": ({"microbatches": 0}, "microbatches must be a positive integer, got 0"),
    "half a microbatch": ({"microbatches": 1.5}, r"microbatches must be a positive integer, got 1\.5"),
    "schedule": ({"schedule": "fastest"}, "name of a schedule must be one of .*'fastest'"),
    "kind of schedule": ({"schedule": 3}, "schedule must be a name or a Schedule, got int"),
    "checkpoint": ({"checkpoint": "sometimes"}, "checkpoint must be one of .*'sometimes'"),
    "reuse": ({"reuse": "share"}, "reuse must be one of .*'share'"),
    "reduction": ({"loss_reduction": "max"}, "loss_reduction must be one of .*'max'"),
    "progress": ({"progress": "often"}, "progress must be one of .*'often'"),
    "transport": ({"transport": "pigeons"}, "transport must be one of .*'pigeons'"),
    "balance": ({"balance": "evenly"}, "balance must be None, 'time' or a list"),
    "sum of balance": ({"balance": [100]}, "balance must"),
    "no sample": ({"balance": "time"}, "sample_input must be given"),
    "chunks": ({"chunks": 100}, "layers? must|stages? must|must .*layers"),
    "no backward": (
        {"schedule": lambda size: without(build_schedule("1f1b", size, 4), "0B2")},
        "has no backward of microbatch 2",
    ),
    "ranks": ({"schedule": lambda size: build_schedule("1f1b", size + 1, 4)}, "one list of actions per rank"),
    "count": ({"schedule": lambda size: build_schedule("1f1b", size, 3)}, "be for 4 microbatch"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_argument_is_refused_on_every_rank(comm: Communicator, what: str) -> None:
    given, text = WRONG[what]
    options = {
        name: value(comm.size) if name == "schedule" and callable(value) else value
        for name, value in given.items()
    }
    with pytest.raises((MismatchError, ScheduleError), match=text):
        Pipeline(mlp(), comm, **{"microbatches": 4, "loss_fn": squares, **options})


@pytest.mark.parametrize("model", [nn.Linear(2, 2), [], [3], nn.Sequential()])
def test_model_that_is_no_sequence_is_refused(comm: Communicator, model: Any) -> None:
    with pytest.raises(MismatchError, match="pipeline must"):
        Pipeline(model, comm, microbatches=2)


def test_schedule_that_would_deadlock_is_refused(comm: Communicator) -> None:
    if comm.size == 1:
        pytest.skip("one rank waits for nobody")
    rows = [f"{rank}F0 {rank}F1 {rank}B0 {rank}B1".split() for rank in range(comm.size)]
    rows[0] = "0F0 0B0 0F1 0B1".split()  # waits for a backward that needs the forward behind it
    rows[-1] = [f"{comm.size - 1}{cell}" for cell in ("F0", "F1", "B0", "B1")]
    with pytest.raises(ScheduleError, match="dead"):
        Pipeline(mlp(), comm, microbatches=2, schedule=Schedule(rows))


DIFFERENT: dict[str, Callable[[bool], dict[str, Any]]] = {
    "microbatches": lambda odd: {"microbatches": 5 if odd else 4},
    "schedule": lambda odd: {"schedule": "gpipe" if odd else "1f1b"},
    "checkpoint": lambda odd: {"checkpoint": "always" if odd else "never"},
    "model": lambda odd: {"module": mlp(9 if odd else 8)},
    "dtype": lambda odd: {"module": mlp().float() if odd else mlp()},
    "balance": lambda odd: {"balance": None if odd else "time", "sample_input": batch(2)[0]},
    "wrong on one": lambda odd: {"microbatches": 0 if odd else 4},
    "no model on one": lambda odd: {"module": [] if odd else mlp()},
}


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("what", DIFFERENT)
def test_different_arguments_are_refused_on_every_rank(comm: Communicator, what: str) -> None:
    options = {"module": mlp(), "microbatches": 4, "loss_fn": squares}
    options.update(DIFFERENT[what](comm.rank == comm.size - 1))
    with pytest.raises(MismatchError, match=r"a pipeline must|microbatches must"):
        Pipeline(options.pop("module"), comm, **options)


# ---- steps -------------------------------------------------------------------------------------------------


class Failing(nn.Module):
    """Raises in a forward, or in a backward, when it is told to."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.where = where
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.where == "forward" and self.calls == 2:
            raise ValueError("the forward has failed")
        y = self.linear(x)
        if self.where == "backward" and y.requires_grad:
            y.register_hook(self.fail)
        return y

    def fail(self, gradient: Tensor) -> None:
        raise ValueError("the backward has failed")


def failing_model(size: int, place: int, where: str) -> nn.Sequential:
    """A layer per rank; that of rank ``place`` fails."""
    torch.manual_seed(4)
    layers = [Failing(where if index == place else "nowhere") for index in range(size)]
    return nn.Sequential(*layers).double()


def check_failure(
    comm: Communicator,
    pipe: Pipeline,
    place: int,
    step: Callable[[], object],
    error: type[Exception],
    text: str,
) -> None:
    """Rank ``place`` raises its own error, the others one that names it; and then nothing works any more,
    except on a single rank, which has no messages under way.

    Another rank may have done its part of the step before, and hears of it in the next.
    """
    if comm.rank == place:
        with pytest.raises(error, match=text):
            step()
    else:
        with pytest.raises(
            RankFailedError, match=f"(?s)rank {place} of {comm.size} failed.*{text}"
        ) as caught:
            for _ in range(2):
                step()
        assert caught.value.ranks == (place,)
    for again in (step, lambda: pipe(batch(2)[0])) if comm.size > 1 else ():
        with pytest.raises(HpcparError, match="must not be used after a failure") as refused:
            again()
        assert refused.value.__cause__ is not None
    pipe.free()
    pipe.free()


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize(("schedule", "checkpoint"), [("1f1b", "always"), ("zero_bubble", "never")])
def test_failing_layer_fails_the_step_on_all_ranks(
    comm: Communicator, where: str, schedule: str, checkpoint: str
) -> None:
    x, _ = batch(8)
    target = torch.zeros(8, WIDTH, dtype=torch.float64)
    for place in {0, comm.size // 2, comm.size - 1}:
        pipe = Pipeline(
            failing_model(comm.size, place, where),
            comm,
            microbatches=4,
            schedule=schedule,
            checkpoint=checkpoint,
            loss_fn=squares,
        )
        text = f"the {where} has failed"
        if where == "forward":
            text += rf"[^~]*in layer '{place}' \(Failing\) of pipeline stage {place}, microbatch "
        check_failure(comm, pipe, place, partial(train, pipe, x, target), ValueError, text)


def test_failing_evaluation_fails_on_all_ranks(comm: Communicator) -> None:
    x, _ = batch(8)
    for place in {0, comm.size - 1}:
        pipe = Pipeline(failing_model(comm.size, place, "forward"), comm, microbatches=4)
        check_failure(comm, pipe, place, partial(pipe, x), ValueError, "the forward has failed")


def test_single_rank_may_try_again(comm: Communicator) -> None:
    alone = comm.Split(comm.rank, 0)
    assert alone is not None
    x, target = batch(8)
    model = mlp()
    loss, expected = reference_step(model, x, target, squares)
    with pipeline(model, alone, microbatches=4, loss_fn=squares) as pipe:
        for wrong in (batch(6)[1], None):
            with pytest.raises((MismatchError, TypeError)):
                train(pipe, x, wrong)
            pipe.zero_grad()
            assert_loss(alone, train(pipe, x, target), loss)
            assert_gradients(pipe, expected)
            assert pipe(x).shape == target.shape
    with pytest.raises(CommunicatorFreedError):  # nothing was under way, so everything is given back
        pipe._comm.Barrier()
    alone.Free()


def test_pipeline_can_be_freed_when_only_some_know_of_a_failure(comm: Communicator) -> None:
    """Rank 0 fails in its last backward, when the last rank has done its part."""
    x, _ = batch(8)
    target = torch.zeros(8, WIDTH, dtype=torch.float64)
    pipe = Pipeline(failing_model(comm.size, 0, "backward"), comm, microbatches=1, loss_fn=squares)
    if comm.rank == 0:
        with pytest.raises(ValueError, match="the backward has failed"):
            train(pipe, x, target)
    else:
        with contextlib.suppress(RankFailedError):
            train(pipe, x, target)
    pipe.free()


def vector(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean(1)


def integer(output: Tensor, target: Tensor) -> Tensor:
    return (output > target).sum()


def nothing(output: Tensor, target: Tensor) -> None:
    return None


def broken(output: Tensor, target: Tensor) -> Tensor:
    raise ZeroDivisionError("the loss has failed")


LOSSES: dict[Callable[..., Any], tuple[type[Exception], str]] = {
    vector: (MismatchError, r"the result of loss_fn must be a loss[^~]*got a tensor of shape \(2,\)"),
    integer: (MismatchError, "the result of loss_fn must be a loss[^~]*got a tensor of shape .*int64"),
    nothing: (MismatchError, "the result of loss_fn must be a loss[^~]*got None"),
    broken: (ZeroDivisionError, "the loss has failed"),
}


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_wrong_loss_is_an_error_on_all_ranks(comm: Communicator, loss_fn: Callable[..., Any]) -> None:
    error, text = LOSSES[loss_fn]
    x, target = batch(8)
    pipe = Pipeline(mlp(), comm, microbatches=4, loss_fn=loss_fn)
    check_failure(comm, pipe, comm.size - 1, lambda: train(pipe, x, target), error, text)


def test_output_that_is_no_loss_is_an_error_on_all_ranks(comm: Communicator) -> None:
    x, _ = batch(8)
    pipe = Pipeline(mlp(), comm, microbatches=4)
    text = "the output of the model must be a loss[^~]*Reduce it by .mean"
    check_failure(comm, pipe, comm.size - 1, lambda: train(pipe, x, None), MismatchError, text)


BATCHES: dict[str, tuple[Any, Any, bool, str]] = {
    "no inputs": (None, batch(8)[1], True, "inputs must be given on the rank of the first stage, got None"),
    "fewer targets": (batch(8)[0], batch(6)[1], False, "got 6 targets for 8 inputs"),
    "more targets": (batch(8)[0], batch(12)[1], False, "got 12 targets for 8 inputs"),
    "no samples": (torch.zeros(0, WIDTH), batch(8)[1], True, "a batch must have at least one sample"),
    "uneven": ((batch(8)[0], batch(7)[0]), batch(8)[1], True, "must have the same number of samples"),
    "a number": (3, batch(8)[1], True, "must have a tensor with samples in dimension 0, got none"),
    "graph": (
        batch(8)[0].requires_grad_() * 2,
        batch(8)[1],
        True,
        "must not be part of an autograd graph",
    ),
}


@pytest.mark.parametrize("what", BATCHES)
def test_wrong_batch_is_an_error_on_all_ranks(comm: Communicator, what: str) -> None:
    x, target, is_first, text = BATCHES[what]
    pipe = Pipeline(mlp(), comm, microbatches=4, loss_fn=squares)
    place = 0 if is_first else comm.size - 1
    check_failure(comm, pipe, place, lambda: train(pipe, x, target), MismatchError, text)


def test_missing_targets_are_an_error_on_all_ranks(comm: Communicator) -> None:
    x, _ = batch(8)
    pipe = Pipeline(mlp(), comm, microbatches=4, loss_fn=squares)
    check_failure(comm, pipe, comm.size - 1, lambda: train(pipe, x, None), TypeError, "target")


# ---- values ------------------------------------------------------------------------------------------------


class SometimesList(nn.Module):
    """Returns a tensor in one step and a list in the next."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.wants_list = False

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        y = self.linear(x)
        return [y, y.detach()] if self.wants_list else y


def first_of(value: Tensor | list[Tensor]) -> Tensor:
    return value[0] if isinstance(value, list) else value


def test_structure_may_change_from_step_to_step(comm: Communicator) -> None:
    torch.manual_seed(6)
    takes_both = nn.Sequential(Call(first_of), nn.Linear(WIDTH, 2))
    more = [nn.Identity() for _ in range(2 * comm.size - 2)]
    model = nn.Sequential(SometimesList(), *more, takes_both).double()
    x, target = batch(8)
    loss, expected = reference_step(model, x, target, squares)
    with pipeline(model, comm, microbatches=4, balance=[2] * comm.size, loss_fn=squares) as pipe:
        for wants_list in (False, True, True, False):
            for layer in pipe.layers.children():
                layer.wants_list = wants_list
            pipe.zero_grad()
            assert_loss(comm, train(pipe, x, target), loss)
            assert_gradients(pipe, expected)


def test_structure_that_a_layer_cannot_take_is_its_error(comm: Communicator) -> None:
    torch.manual_seed(6)
    more = [nn.Identity() for _ in range(2 * comm.size - 2)]
    model = nn.Sequential(SometimesList(), *more, nn.Linear(WIDTH, 2)).double()
    x, target = batch(8)
    pipe = Pipeline(model, comm, microbatches=4, balance=[2] * comm.size, loss_fn=squares)
    train(pipe, x, target)
    for layer in pipe.layers.children():
        layer.wants_list = True
    name = str(2 * comm.size - 1)
    text = rf"list[^~]*in layer '{name}' \(Linear\) of pipeline stage {comm.size - 1}"
    check_failure(comm, pipe, comm.size - 1, lambda: train(pipe, x, target), TypeError, text)


def test_value_that_cannot_travel_is_an_error_on_all_ranks(comm: Communicator) -> None:
    if comm.size == 1:
        pytest.skip("nothing travels on one rank")
    model = nn.Sequential(Call(lambda x: (x, iter([x]))), *(nn.Identity() for _ in range(comm.size - 1)))
    pipe = Pipeline(model, comm, microbatches=2)
    x, _ = batch(4)
    check_failure(comm, pipe, 0, lambda: pipe(x), MismatchError, "a value that layers pass must consist of")


def test_freed_pipeline_says_so(comm: Communicator) -> None:
    pipe = Pipeline(mlp(), comm, microbatches=2, loss_fn=squares)
    train(pipe, *batch(4))
    pipe.free()
    pipe.free()
    for call in (lambda: train(pipe, *batch(4)), lambda: pipe(batch(4)[0])):
        with pytest.raises(CommunicatorFreedError, match=re.escape("must not be used after free()")):
            call()
    assert all(p.grad is not None for p in pipe.parameters())
