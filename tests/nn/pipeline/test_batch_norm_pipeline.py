"""Running statistics in a pipeline: those of the whole batch, updated once, and alike in all replicas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hpcpar.comm import Communicator, ProcessGrid
from tests.nn.pipeline.models import (
    CHECKPOINTS,
    WIDTH,
    assert_same_tensors,
    batch,
    pipeline,
    squares,
    train,
)

pytestmark = pytest.mark.mpi


def norm_model(*, momentum: float | None = 0.1) -> nn.Sequential:
    """Batch normalisation in front, of which the statistics do not depend on microbatches, and behind."""
    torch.manual_seed(3)
    layers = [
        nn.BatchNorm1d(WIDTH, momentum=momentum),
        nn.Linear(WIDTH, WIDTH),
        nn.Sequential(nn.Tanh(), nn.BatchNorm1d(WIDTH)),
        nn.Linear(WIDTH, WIDTH),
        nn.BatchNorm1d(WIDTH),
        nn.Linear(WIDTH, 2),
    ]
    return nn.Sequential(*layers).double()


def in_front(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in tensors.items() if name.startswith("0.")}


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_deferred_statistics_are_those_of_the_whole_batch(comm: Communicator, checkpoint: str) -> None:
    for momentum in (0.1, None):
        model = norm_model(momentum=momentum)
        with pipeline(
            model, comm, microbatches=3, checkpoint=checkpoint, deferred_batch_norm=True, loss_fn=squares
        ) as pipe:
            for step, samples in enumerate((13, 8, 13)):
                x, target = batch(samples, seed=step)
                model[0](x)
                train(pipe, x, target)
                assert_same_tensors(
                    in_front(dict(pipe.named_buffers())), in_front(dict(model.named_buffers()))
                )
            tracked = {name: b for name, b in pipe.named_buffers() if name.endswith("tracked")}
            assert all(int(count) == 3 for count in tracked.values())
            model.eval()
            pipe.eval()
            model.load_state_dict(pipe.state_dict())
            got = pipe(x if pipe.is_first else None, broadcast_output=True)
            torch.testing.assert_close(got, model(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_plain_statistics_are_updated_once_per_microbatch(comm: Communicator, checkpoint: str) -> None:
    model = norm_model()
    with pipeline(model, comm, microbatches=4, checkpoint=checkpoint, loss_fn=squares) as pipe:
        for step in range(3):
            x, target = batch(12, seed=step)
            for part in x.chunk(4):
                model(part)
            train(pipe, x, target)
            expected = {name: tensor.double() for name, tensor in model.named_buffers()}
            assert_same_tensors({n: t.double() for n, t in pipe.named_buffers()}, expected, checkpoint)


class Average(nn.Module):
    """Puts a new tensor in the place of its buffer, and counts in a boolean and an integer one."""

    average: Tensor
    count: Tensor
    was_called: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(WIDTH))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("was_called", torch.tensor([False]))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.average = 0.9 * self.average + 0.1 * x.detach().mean(0)
            self.count += 1
            self.was_called.logical_or_(torch.ones(1, dtype=torch.bool))
        return x - self.average


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_buffers_of_any_layer_are_updated_once_per_microbatch(comm: Communicator, checkpoint: str) -> None:
    torch.manual_seed(3)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), Average()) for _ in range(comm.size)]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, 2)).double()
    with pipeline(model, comm, microbatches=4, checkpoint=checkpoint, loss_fn=squares) as pipe:
        for step in range(3):
            x, target = batch(12, seed=step)
            for part in x.chunk(4):
                model(part)
            train(pipe, x, target)
            expected = {name: tensor.double() for name, tensor in model.named_buffers()}
            assert_same_tensors({n: t.double() for n, t in pipe.named_buffers()}, expected, checkpoint)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("deferred", [False, True])
def test_replicas_end_with_equal_statistics(comm: Communicator, deferred: bool) -> None:
    if comm.size % 2:
        pytest.skip("two replicas need an even number of ranks")
    grid = ProcessGrid(comm, data=2, pipeline=-1)
    model = norm_model()
    with pipeline(
        model,
        grid.pipeline,
        microbatches=3,
        data_comm=grid.data,
        deferred_batch_norm=deferred,
        checkpoint="except_last",
        loss_fn=squares,
    ) as pipe:
        for step in range(3):
            x, target = batch(14, seed=step)
            mine = slice(0, 8) if grid.data.rank == 0 else slice(8, 14)
            train(pipe, x[mine], target[mine])
            model[0](x)
        buffers = dict(pipe.named_buffers())
        others = grid.data.allgather(buffers)
        assert_same_tensors(
            {n: t.double() for n, t in others[1].items()},
            {n: t.double() for n, t in others[0].items()},
            rtol=0.0,
        )
        if deferred:
            assert_same_tensors(in_front(buffers), in_front(dict(model.named_buffers())))
    grid.free()


@pytest.mark.mpi(min_size=2)
def test_replicas_may_change_different_buffers(comm: Communicator) -> None:
    """Which buffers change may depend on the data; the exchange must fit all the same."""
    if comm.size % 2:
        pytest.skip("two replicas need an even number of ranks")
    grid = ProcessGrid(comm, data=2, pipeline=-1)
    stages = grid.pipeline.size
    model = nn.Sequential(*(Largest() for _ in range(stages)), nn.Linear(WIDTH, 2)).double()
    x, target = batch(4)
    x = torch.zeros_like(x) + grid.data.rank
    with pipeline(model, grid.pipeline, microbatches=2, data_comm=grid.data, loss_fn=squares) as pipe:
        for _ in range(3):
            train(pipe, x, target)
        seen = grid.data.allgather({name: tensor.clone() for name, tensor in pipe.named_buffers()})
        assert_same_tensors(seen[1], seen[0], rtol=0.0)
    grid.free()


class Largest(nn.Module):
    largest: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("largest", torch.zeros(3))
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.largest.clamp_(min=float(x.max()))
        self.total += 1.0
        return x
