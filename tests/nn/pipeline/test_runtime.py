"""What a pipeline holds and for how long, what it builds, and what it tells about its steps."""

from __future__ import annotations

import gc
import json
import math
import weakref
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hpcpar.nn.pipeline.runtime
from hpcpar.comm import Communicator
from hpcpar.nn.pipeline import LayerSpec, build_schedule, simulate
from tests.nn.pipeline.models import (
    SCHEDULES,
    TOKENS,
    WIDTH,
    Head,
    assert_gradients,
    assert_loss,
    assert_same_tensors,
    batch,
    mlp,
    pipeline,
    reference_step,
    squares,
    text_batch,
    text_loss,
    train,
)

pytestmark = pytest.mark.mpi


# ---- memory ------------------------------------------------------------------------------------------------


class Counted:
    """A saved tensor; how many there are, and the most there were."""

    living = most = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        Counted.living += 1
        Counted.most = max(Counted.most, Counted.living)

    def __del__(self) -> None:
        Counted.living -= 1


def most_saved(comm: Communicator, **options: Any) -> tuple[int, int]:
    """The most tensors that autograd held at once on this rank, and the peak that the pipeline reports."""
    torch.manual_seed(3)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(comm.size)))
    x, target = torch.randn(16, WIDTH), torch.randn(16, WIDTH)
    with pipeline(model, comm, loss_fn=squares, **options) as pipe:
        train(pipe, x, target)
        gc.collect()
        Counted.living = Counted.most = 0
        with torch.autograd.graph.saved_tensors_hooks(Counted, lambda saved: saved.tensor):
            train(pipe, x, target)
        assert Counted.living == 0, "a step must let go of all that it has saved"
        return Counted.most, pipe.stats().peak_activations


@pytest.fixture
def no_overtaking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backwards that overtake forwards would leave fewer activations, now and then."""
    monkeypatch.setattr(hpcpar.nn.pipeline.runtime, "_OVERTAKE_AFTER", math.inf)


@pytest.mark.parametrize("microbatches", [2, 8])
@pytest.mark.usefixtures("no_overtaking")
def test_one_forward_one_backward_holds_as_many_activations_as_stages_follow(
    comm: Communicator, microbatches: int
) -> None:
    one, _ = most_saved(comm, microbatches=1)
    most, peak = most_saved(comm, microbatches=microbatches, schedule="1f1b")
    assert peak == min(microbatches, comm.size - comm.rank)
    assert most == peak * one
    most, peak = most_saved(comm, microbatches=microbatches, schedule="gpipe")
    assert (most, peak) == (microbatches * one, microbatches)


def test_checkpointing_holds_one_graph_at_a_time(comm: Communicator) -> None:
    one, _ = most_saved(comm, microbatches=1)
    for schedule in ("1f1b", "gpipe"):
        most, _ = most_saved(comm, microbatches=8, schedule=schedule, checkpoint="always")
        assert most <= one


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_rank_holds_more_than_the_schedule_asks_for(comm: Communicator, schedule: str) -> None:
    expected = simulate(build_schedule(schedule, comm.size, 6)).peak_activations
    with pipeline(mlp(), comm, microbatches=6, schedule=schedule, loss_fn=squares) as pipe:
        for _ in range(3):
            train(pipe, *batch(12))
        assert pipe.stats().peak_activations <= expected[comm.rank]


def living_tensors() -> int:
    gc.collect()
    return sum(1 for thing in gc.get_objects() if issubclass(type(thing), Tensor))


@pytest.mark.parametrize(("schedule", "checkpoint"), [("1f1b", "always"), ("zero_bubble", "never")])
def test_memory_stays_flat_over_many_steps(comm: Communicator, schedule: str, checkpoint: str) -> None:
    x, target = batch(8)
    with pipeline(
        mlp(), comm, microbatches=4, schedule=schedule, checkpoint=checkpoint, loss_fn=squares
    ) as pipe:
        optimizer = torch.optim.SGD(pipe.parameters(), lr=0.01)
        counts = []
        for _ in range(3):
            for _ in range(6):
                optimizer.zero_grad()
                train(pipe, x, target)
                optimizer.step()
                pipe(x if pipe.is_first else None)
            counts.append(living_tensors())
        assert counts[1] == counts[2], counts


def test_batch_and_output_are_let_go_after_a_step(comm: Communicator) -> None:
    with pipeline(mlp(), comm, microbatches=2, loss_fn=squares) as pipe:
        for _ in range(2):
            x, target = batch(4)
            references = [weakref.ref(x.untyped_storage()), weakref.ref(target.untyped_storage())]
            train(pipe, x, target)
            output = pipe(x, broadcast_output=True)
            references.append(weakref.ref(output.untyped_storage()))
            del x, target, output
            gc.collect()
            assert all(reference() is None for reference in references)


# ---- layers that are built where they live -----------------------------------------------------------------

BUILT: list[int] = []


class Noted(nn.Linear):
    """Notes that it was built, with memory."""

    def __init__(self, number: int) -> None:
        torch.manual_seed(number)
        super().__init__(WIDTH, WIDTH, dtype=torch.float64)
        if self.weight.device.type != "meta":
            BUILT.append(number)


def test_only_the_layers_of_this_rank_are_built(comm: Communicator) -> None:
    specs = [LayerSpec(Noted, number) for number in range(6)]
    reference = nn.Sequential(*(Noted(number) for number in range(6)))
    BUILT.clear()
    x, _ = batch(6)
    target = torch.zeros(6, WIDTH, dtype=torch.float64)
    loss, expected = reference_step(reference, x, target, squares)
    with pipeline(specs, comm, microbatches=3, loss_fn=squares) as pipe:
        first = sum(pipe.balance[: comm.rank])
        assert list(range(first, first + pipe.balance[comm.rank])) == BUILT
        assert_loss(comm, train(pipe, x, target), loss)
        assert_gradients(pipe, expected)
        assert_same_tensors(pipe.state_dict(), reference.state_dict(), rtol=0.0)


def make_embedding() -> nn.Embedding:
    torch.manual_seed(3)
    return nn.Embedding(TOKENS, WIDTH, dtype=torch.float64)


def logits(embedding: nn.Embedding, x: Tensor) -> Tensor:
    return x @ embedding.weight.T


@pytest.mark.parametrize("reuse", ["route", "replicate"])
def test_spec_may_be_used_twice(comm: Communicator, reuse: str) -> None:
    embedding = make_embedding()
    middle = [Noted(number) for number in range(4)]
    reference = nn.Sequential(embedding, *middle, Head(embedding))
    x, target = text_batch(6)
    loss, expected = reference_step(reference, x, target, text_loss)
    expected["5.weight"] = expected["0.weight"]
    spec = LayerSpec(make_embedding)
    model = [spec, *(LayerSpec(Noted, number) for number in range(4)), spec.using(logits)]
    for schedule in ("1f1b", "zero_bubble"):
        with pipeline(model, comm, microbatches=3, schedule=schedule, reuse=reuse, loss_fn=text_loss) as pipe:
            for _ in range(2):
                pipe.zero_grad()
                assert_loss(comm, train(pipe, x, target), loss)
                assert_gradients(pipe, expected, schedule)


# ---- what it tells -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
def test_trace_has_every_action_of_every_rank(comm: Communicator, tmp_path: Path, schedule: str) -> None:
    x, target = batch(8)
    with pipeline(
        mlp(), comm, microbatches=4, schedule=schedule, checkpoint="except_last", loss_fn=squares
    ) as pipe:
        train(pipe, x, target)
        with pipe.trace() as timeline:
            for _ in range(2):
                train(pipe, x, target)
        train(pipe, x, target)  # not noted any more
        seen = timeline()
        spans = Counter((span.rank, span.label) for span in seen.spans)
        for rank, row in enumerate(pipe.schedule.actions):
            for action in row:
                assert spans[rank, str(action)] == 2, action
        recomputed = Counter(span.microbatch for span in seen.spans if span.kind == "R")
        assert set(recomputed) == {0, 1, 2}
        for rank in range(comm.size):
            mine = sorted(
                (span.start_s, span.end_s) for span in seen.spans if span.rank == rank and span.kind != "R"
            )
            assert all(0.0 <= start <= end for start, end in mine)
            assert all(one[1] <= other[0] for one, other in pairwise(mine))
        path = tmp_path / "trace.json"
        seen.to_chrome(path)
        events = json.loads(path.read_text())
        assert events
        assert seen.to_text()


def test_stats_count_steps_messages_and_seconds(comm: Communicator) -> None:
    x, target = batch(8)
    with pipeline(mlp(), comm, microbatches=4, loss_fn=squares) as pipe:
        seen = [pipe.stats()]
        for _ in range(4):
            train(pipe, x, target)
            pipe(x if pipe.is_first else None)
            seen.append(pipe.stats())
        assert [stats.steps for stats in seen] == [0, 1, 2, 3, 4]
        messages = [after.messages_sent - before.messages_sent for before, after in pairwise(seen)]
        assert len(set(messages)) == 1  # a described parcel of one tensor is one message, too
        assert (messages[0] > 0) == (comm.size > 1)
        assert seen[-1].headers_sent == seen[1].headers_sent
        assert (seen[-1].bytes_sent > seen[1].bytes_sent) == (comm.size > 1)
        assert seen[-1].computed_s > seen[1].computed_s > 0.0
        assert "microbatches" in repr(pipe)
