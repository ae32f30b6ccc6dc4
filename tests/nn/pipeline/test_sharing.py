"""What may be shared, and must not be: memory of gradients, weights of specs, parameters, masks, buffers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcpar.comm import Communicator, ProcessGrid
from hpcpar.errors import MismatchError
from hpcpar.nn import Pipeline
from hpcpar.nn.pipeline import LayerSpec

WIDTH, BATCH, MICROBATCHES = 6, 8, 4

pytestmark = pytest.mark.mpi


class ViewedSum(nn.Module):
    """The gradients of ``x`` and of ``p`` are views of one tensor, and autograd copies neither."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.randn(BATCH // MICROBATCHES, WIDTH, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (x.view(-1) + self.p.view(-1)).view(-1, WIDTH)


class HookedInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH).double()

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(lambda gradient: 0.5 * gradient)
        return self.linear(x)


class LateCounter(nn.Module):
    """Counts microbatches of large numbers in a buffer, which the first microbatches are not."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("large", torch.zeros((), dtype=torch.int64))
        self.linear = nn.Linear(WIDTH, WIDTH).double()

    def forward(self, x: Tensor) -> Tensor:
        if bool((x > 50.0).all()):
            self.large.add_(1)
        return self.linear(x)


class Tied(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.linear.weight.t())


def linears(count: int) -> list[nn.Module]:
    return [nn.Linear(WIDTH, WIDTH).double() for _ in range(count)]


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, BATCH, WIDTH, generator=generator, dtype=torch.float64)
    return x, y


def gradients_of_whole(layers: list[nn.Module]) -> dict[str, Tensor]:
    """Those of the unsplit model, microbatch by microbatch."""
    net = nn.Sequential(*copy.deepcopy(layers))
    x, y = batch()
    for a, b in zip(x.chunk(MICROBATCHES), y.chunk(MICROBATCHES), strict=True):
        (F.mse_loss(net(a), b) / MICROBATCHES).backward()
    return {n: p.grad for n, p in net.named_parameters(remove_duplicate=False) if p.grad is not None}


def check_gradients(pipe: Pipeline, expected: dict[str, Tensor]) -> None:
    for name, parameter in pipe.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-10, atol=1e-12)


def make(layers: list[Any], comm: Communicator, **options: Any) -> Pipeline:
    return Pipeline(layers, comm, microbatches=MICROBATCHES, loss_fn=F.mse_loss, **options)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zero_bubble"])
def test_gradient_under_way_does_not_share_memory_with_that_of_a_parameter(
    comm: Communicator, schedule: str
) -> None:
    layers = [
        layer for pair in zip(linears(4), [ViewedSum() for _ in range(4)], strict=True) for layer in pair
    ]
    # A stage begins with a ViewedSum: what it hands back is a view, too.
    layers = [layers[0], *layers[1:], *linears(1)]
    expected = gradients_of_whole(layers)
    stages = 2 * comm.size
    balance = [1, *[2] * (stages - 2), 9 - 1 - 2 * (stages - 2)] if stages > 1 else None
    pipe = make(layers, comm, schedule=schedule, chunks=2, balance=balance if stages <= 5 else None)
    for _ in range(2):
        pipe.zero_grad()
        pipe.train_step(*batch())
        check_gradients(pipe, expected)
    pipe.free()


@pytest.mark.parametrize("checkpoint", ["never", "always"])
def test_hook_on_the_input_of_a_stage_acts_once(comm: Communicator, checkpoint: str) -> None:
    layers = [linears(1)[0], *[HookedInput() for _ in range(4)]]
    expected = gradients_of_whole(layers)
    pipe = make(layers, comm, checkpoint=checkpoint)
    pipe.train_step(*batch())
    check_gradients(pipe, expected)
    pipe.free()


def test_buffer_that_changes_late_is_updated_once_under_checkpointing(comm: Communicator) -> None:
    pipe = make([LateCounter(), *linears(3)], comm, checkpoint="always")
    x, y = batch()
    x[BATCH // 2 :] = 100.0
    pipe.train_step(x, y)
    assert [int(buffer) for buffer in pipe.layers.buffers()] == [2] * (comm.rank == 0)
    pipe.free()


def test_weights_of_specs_do_not_depend_on_the_number_of_ranks(comm: Communicator) -> None:
    specs = [LayerSpec(nn.Linear, WIDTH, WIDTH, dtype=torch.float64) for _ in range(4)]
    with comm.Split(comm.rank) as alone:  # type: ignore[union-attr]
        torch.manual_seed(5)
        ambient = torch.get_rng_state()
        whole = make(list(specs), alone)
        spread = make([LayerSpec(nn.Linear, WIDTH, WIDTH, dtype=torch.float64) for _ in range(4)], comm)
        assert torch.equal(torch.get_rng_state(), ambient)
        state = whole.state_dict()
        assert not torch.equal(state["0.weight"], state["1.weight"])
        for name, value in spread.state_dict().items():
            assert torch.equal(value, state[name]), name
        whole.free()
    spread.free()


@pytest.mark.parametrize("reuse", ["route", "replicate"])
def test_spec_may_share_a_module_that_it_is_given(comm: Communicator, reuse: str) -> None:
    torch.manual_seed(2)
    first, *middle = linears(4)
    assert isinstance(first, nn.Linear)
    expected = gradients_of_whole([first, *middle, Tied(first)])
    pipe = make([first, *middle, LayerSpec(Tied, first)], comm, reuse=reuse)
    pipe.train_step(*batch())
    check_gradients(pipe, expected)
    pipe.free()


@pytest.mark.mpi(min_size=2)
def test_parameters_that_are_unfrozen_later_are_averaged_over_replicas(comm: Communicator) -> None:
    if comm.size % 2:
        pytest.skip("needs an even number of ranks")
    layers = linears(3)
    layers[0].requires_grad_(False)
    expected = gradients_of_whole([layer.requires_grad_(True) for layer in copy.deepcopy(layers)])
    with ProcessGrid(comm, data=2, pipeline=-1) as grid:
        pipe = Pipeline(layers, grid.pipeline, microbatches=2, loss_fn=F.mse_loss, data_comm=grid.data)
        part = slice(grid.data.rank * BATCH // 2, (grid.data.rank + 1) * BATCH // 2)
        x, y = (tensor[part] for tensor in batch())
        pipe.train_step(x, y)
        for parameter in pipe.parameters():
            parameter.requires_grad_(True)
        pipe.zero_grad()
        pipe.train_step(x, y)
        check_gradients(pipe, expected)
        pipe.free()


def test_evaluation_in_training_mode_draws_new_masks(comm: Communicator) -> None:
    pipe = make([*linears(3), nn.Dropout(0.5), *linears(1)], comm)
    x, _ = batch()
    outputs = [pipe(x, broadcast_output=True) for _ in range(2)]
    assert not torch.equal(*outputs)
    pipe.free()


@pytest.mark.mpi(min_size=2)
def test_mistake_in_one_replica_is_an_error_in_all(comm: Communicator) -> None:
    if comm.size % 2:
        pytest.skip("needs an even number of ranks")
    with ProcessGrid(comm, data=2, pipeline=-1) as grid:
        microbatches = 0 if grid.data.rank == 1 else 4
        with pytest.raises(MismatchError, match="microbatches must be a positive integer, got 0"):
            Pipeline(linears(4), grid.pipeline, microbatches=microbatches, data_comm=grid.data)


@pytest.mark.cuda
def test_stages_on_a_gpu_equal_the_unsplit_model(comm: Communicator) -> None:
    device = torch.device("cuda", comm.rank % torch.cuda.device_count())
    layers = [*linears(2), nn.Dropout(0.0), *linears(2)]
    expected = gradients_of_whole(layers)
    for schedule in ("1f1b", "zero_bubble"):
        for checkpoint in ("never", "always"):
            pipe = make(copy.deepcopy(layers), comm, device=device, schedule=schedule, checkpoint=checkpoint)
            pipe.train_step(*batch())
            for name, parameter in pipe.named_parameters():
                assert parameter.grad is not None and parameter.grad.device == device
                torch.testing.assert_close(parameter.grad.cpu(), expected[name], rtol=1e-9, atol=1e-11)
            pipe.free()
