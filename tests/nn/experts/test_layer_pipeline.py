"""Expert layers in pipeline stages: replicas of a stage share the experts, and gradients are the model's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpcpar.comm import Communicator, ProcessGrid
from hpcpar.errors import MismatchError, RankFailedError
from hpcpar.nn import MixtureOfExperts, Pipeline
from tests.nn.experts.mixtures import FEATURES, Dense, expert, gate

SAMPLES = 6  # of each replica
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero_bubble")


class Plain(nn.Module):
    """The dense layer as a module, which adds its losses to a list."""

    def __init__(self, dense: Dense, losses: list[Tensor]) -> None:
        super().__init__()
        self.dense, self.losses = dense, losses
        self.gate, self.experts = dense.gate, nn.ModuleList(dense.experts)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dense(x)
        self.losses.append(self.dense.balancing_loss + self.dense.z_loss)
        return y


def linear(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(FEATURES, FEATURES).double()


def reference(num_experts: int, losses: list[Tensor], **options: Any) -> nn.Sequential:
    """Linear, experts, linear, experts, in one process."""
    mixtures = [
        Plain(Dense(gate(num_experts, **options), [expert(10 * n + e) for e in range(num_experts)]), losses)
        for n in range(2)
    ]
    return nn.Sequential(linear(1), mixtures[0], nn.Tanh(), linear(2), mixtures[1])


def split_model(num_experts: int, data: Communicator, **options: Any) -> nn.Sequential:
    """The same with expert layers over the replicas."""
    mixtures = [
        MixtureOfExperts(gate(num_experts, **options), [expert(10 * n + e) for e in range(num_experts)], data)
        for n in range(2)
    ]
    return nn.Sequential(linear(1), mixtures[0], nn.Tanh(), linear(2), mixtures[1])


def batches(replicas: int, steps: int) -> list[list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(5)
    return [
        [tuple(torch.randn(2, SAMPLES, FEATURES, dtype=torch.float64)) for _ in range(replicas)]  # type: ignore[misc]
        for _ in range(steps)
    ]


def expected_gradients(
    model: nn.Sequential, losses: list[Tensor], step: list[tuple[Tensor, Tensor]], microbatches: int
) -> Tensor:
    """As the pipelines have it: microbatch by microbatch, the tokens of all replicas together."""
    total = torch.zeros((), dtype=torch.float64)
    for rows in torch.arange(SAMPLES).tensor_split(microbatches):
        share = len(rows) / SAMPLES
        x = torch.cat([inputs[rows] for inputs, _ in step])
        y = torch.cat([targets[rows] for _, targets in step])
        losses.clear()
        loss = nn.functional.mse_loss(model(x), y)
        torch.autograd.backward((loss + torch.stack(losses).sum()) * share)
        total += loss.detach() * share
    return total


def compare(pipe: Pipeline, model: nn.Sequential) -> None:
    """Every local parameter's gradient with that of the reference, where the experts have other names."""
    plain = dict(model.named_parameters())
    compared = 0
    for name, parameter in pipe.named_parameters():
        wanted = plain[name].grad
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-9, atol=1e-12, msg=name)
        compared += 1
    assert compared > 0 or not pipe.plan.stages


def grid_of(comm: Communicator) -> ProcessGrid:
    pipeline = 2 if comm.size % 2 == 0 else 1
    return ProcessGrid(comm, data=-1, pipeline=pipeline)


@pytest.mark.parametrize("num_experts", [1, 4])
@pytest.mark.parametrize("checkpoint", ["never", "always"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradients_equal_one_process(
    comm: Communicator, schedule: str, checkpoint: str, num_experts: int
) -> None:
    grid = grid_of(comm)
    losses: list[Tensor] = []
    options = {"balancing_coefficient": 0.3, "z_coefficient": 0.1}
    model = reference(num_experts, losses, **options)
    pipe = Pipeline(
        split_model(num_experts, grid.data, **options),
        grid.pipeline,
        microbatches=2,
        schedule=schedule,
        checkpoint=checkpoint,
        chunks=2 if schedule == "interleaved" else 1,
        loss_fn=nn.functional.mse_loss,
        data_comm=grid.data,
    )
    optimizer = torch.optim.SGD(pipe.parameters(), lr=0.1)
    twin = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in batches(grid.data.size, 3):
        optimizer.zero_grad()
        twin.zero_grad()
        loss = pipe.train_step(*step[grid.data.rank])
        wanted = expected_gradients(model, losses, step, 2)
        torch.testing.assert_close(loss, wanted, rtol=1e-9, atol=1e-12)
        compare(pipe, model)
        optimizer.step()
        twin.step()
    pipe.free()


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
def test_microbatches_of_unequal_size_and_equal_content(comm: Communicator, schedule: str) -> None:
    """Layers' losses are weighted like the loss; one replica has the same samples in each microbatch."""
    grid = grid_of(comm)
    losses: list[Tensor] = []
    options = {"balancing_coefficient": 0.3, "z_coefficient": 0.1}
    model = reference(4, losses, **options)
    pipe = Pipeline(
        split_model(4, grid.data, **options), grid.pipeline, microbatches=4, schedule=schedule,
        checkpoint="always", loss_fn=nn.functional.mse_loss, data_comm=grid.data,
    )  # fmt: skip
    for step in batches(grid.data.size, 2):
        step[0] = tuple(part[:1].expand_as(part).contiguous() for part in step[0])  # type: ignore[assignment]
        pipe.zero_grad()
        model.zero_grad()
        pipe.train_step(*step[grid.data.rank])
        expected_gradients(model, losses, step, 4)
        compare(pipe, model)
    pipe.free()


def test_accumulated_steps_count_each_gradient_once(comm: Communicator) -> None:
    grid = grid_of(comm)
    losses: list[Tensor] = []
    model = reference(1, losses)
    pipe = Pipeline(
        split_model(1, grid.data), grid.pipeline, microbatches=2, loss_fn=nn.functional.mse_loss,
        data_comm=grid.data,
    )  # fmt: skip
    for step in batches(grid.data.size, 3):
        pipe.train_step(*step[grid.data.rank])
        expected_gradients(model, losses, step, 2)
    compare(pipe, model)
    pipe.free()


def test_bias_that_moves_and_a_checkpoint_agree(comm: Communicator) -> None:
    """Routing is replayed in the recomputation, though the bias has changed by then."""
    grid = grid_of(comm)
    results = []
    for checkpoint in ("never", "always"):
        pipe = Pipeline(
            split_model(4, grid.data, bias_update_rate=0.5), grid.pipeline, microbatches=3,
            loss_fn=nn.functional.mse_loss, data_comm=grid.data, checkpoint=checkpoint,
        )  # fmt: skip
        optimizer = torch.optim.SGD(pipe.parameters(), lr=0.1)
        for step in batches(grid.data.size, 3):
            optimizer.zero_grad()
            pipe.train_step(*step[grid.data.rank])
            optimizer.step()
        results.append(copy.deepcopy(dict(pipe.layers.state_dict())))
        pipe.free()
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name
    biases = [value for name, value in results[0].items() if name.endswith("expert_bias")]
    assert all(bool(bias.any()) for bias in biases)


def test_state_is_complete_and_loads_on_one_process(comm: Communicator) -> None:
    grid = grid_of(comm)
    model = split_model(4, grid.data)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    pipe = Pipeline(model, grid.pipeline, microbatches=2, loss_fn=nn.functional.mse_loss, data_comm=grid.data)
    state = pipe.state_dict()
    alone = comm.Split(comm.rank)
    assert alone is not None
    whole = split_model(4, alone)
    names = [name for name, _ in whole.named_parameters()]
    assert set(names) <= set(state)
    whole.load_state_dict(state)
    plain = split_model(4, alone)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(dict(whole.named_parameters())[name], parameter + 1.0)
    pipe.load_state_dict(state)
    pipe.free()


def test_a_gate_of_ones_own_module_works_in_a_stage(comm: Communicator) -> None:
    """Without losses of its own."""
    grid = grid_of(comm)
    torch.manual_seed(3)
    layer = MixtureOfExperts(
        nn.Linear(FEATURES, 3).double(), [expert(e) for e in range(3)], grid.data, top_k=1
    )
    model = nn.Sequential(linear(1), layer)
    pipe = Pipeline(model, grid.pipeline, microbatches=2, loss_fn=nn.functional.mse_loss, data_comm=grid.data)
    step = batches(grid.data.size, 1)[0]
    assert torch.isfinite(pipe.train_step(*step[grid.data.rank]))
    pipe.free()


def test_clipping_counts_each_expert_once(comm: Communicator) -> None:
    grid = grid_of(comm)
    losses: list[Tensor] = []
    model = reference(3, losses)
    pipe = Pipeline(
        split_model(3, grid.data), grid.pipeline, microbatches=2, loss_fn=nn.functional.mse_loss,
        data_comm=grid.data,
    )  # fmt: skip
    step = batches(grid.data.size, 1)[0]
    pipe.train_step(*step[grid.data.rank])
    expected_gradients(model, losses, step, 2)
    norm = pipe.clip_grad_norm_(0.01)
    wanted = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    torch.testing.assert_close(norm, wanted, rtol=1e-9, atol=0.0)
    compare(pipe, model)
    pipe.free()


def test_replicas_with_other_numbers_of_microbatches_are_an_error(comm: Communicator) -> None:
    grid = grid_of(comm)
    pipe = Pipeline(
        split_model(2, grid.data), grid.pipeline, microbatches=4, loss_fn=nn.functional.mse_loss,
        data_comm=grid.data,
    )  # fmt: skip
    samples = 2 + grid.data.rank  # fewer than microbatches
    x = torch.zeros(samples, FEATURES, dtype=torch.float64)
    if grid.data.size == 1:
        assert torch.isfinite(pipe.train_step(x, x))
        return
    with pytest.raises((MismatchError, RankFailedError), match="same number of microbatches"):
        pipe.train_step(x, x)
