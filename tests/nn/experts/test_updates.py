"""Updates of an expert: as many as promised, of the right examples, with the right learning rate."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, ReduceLROnPlateau, StepLR

from hpcpar.errors import HpcparError, MismatchError
from hpcpar.nn.experts.backend import ExpertBackend
from hpcpar.nn.experts.descriptor import BatchTensorDescriptor
from hpcpar.nn.experts.task_pool import Request

pytestmark = pytest.mark.local

DIM = 4
DOUBLE = BatchTensorDescriptor(DIM, dtype=torch.float64)


def mlp(*extra: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(DIM, 7), nn.Tanh(), *extra, nn.Linear(7, DIM)).double()


def backend_of(expert: nn.Module, **options: Any) -> ExpertBackend:
    optimizer = options.pop("optimizer", lambda parameters: torch.optim.AdamW(parameters, lr=0.01))
    return ExpertBackend("expert", expert, optimizer, args_schema=DOUBLE, **options)


def examples(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(count, DIM).double(), torch.randn(count, DIM).double()


def trained_plainly(expert: nn.Module, x: torch.Tensor, grad: torch.Tensor, size: int) -> list[Any]:
    """Parameters after full batches of ``size`` examples, in plain torch."""
    expert = copy.deepcopy(expert)
    optimizer = torch.optim.AdamW(expert.parameters(), lr=0.01)
    for start in range(0, len(x) // size * size, size):
        rows = slice(start, start + size)
        optimizer.zero_grad()
        expert(x[rows]).backward(grad[rows])
        optimizer.step()
    return list(expert.parameters())


def assert_close(got: Sequence[Any], want: Sequence[Any]) -> None:
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def random_cuts(total: int, rng: random.Random) -> list[int]:
    sizes: list[int] = []
    while sum(sizes) < total:
        sizes.append(min(rng.randint(1, 13), total - sum(sizes)))
    return sizes


@pytest.mark.parametrize("draw", range(6))
def test_updates_do_not_depend_on_how_requests_were_batched(draw: int) -> None:
    rng = random.Random(draw)
    expert, (x, grad), size = mlp(), examples(40), rng.randint(1, 9)
    backend = backend_of(copy.deepcopy(expert), samples_per_update=size)
    sizes = random_cuts(40, rng)
    for part, grad_part in zip(x.split(sizes), grad.split(sizes), strict=True):
        backend.backward(part, grad_part)
    assert_close(list(backend.expert.parameters()), trained_plainly(expert, x, grad, size))
    assert backend.get_stats() == {"updates": 40 // size, "examples_processed": 40}
    assert backend.accumulated_samples == 40 % size


@pytest.mark.parametrize("draw", range(3))
def test_updates_of_an_expert_that_draws_do_not_depend_on_batching(draw: int) -> None:
    expert, (x, grad) = mlp(nn.Dropout(0.5)), examples(30)
    rng = random.Random(draw)
    sizes = random_cuts(30, random.Random("requests"))
    requests = [Request(size, seed) for seed, size in enumerate(sizes)]
    results = []
    for together in (1, rng.randint(2, 4), len(sizes)):
        backend = backend_of(copy.deepcopy(expert), samples_per_update=7)
        parts = []
        for first in range(0, len(sizes), together):
            rows = slice(sum(sizes[:first]), sum(sizes[: first + together]))
            parts += backend.backward(x[rows], grad[rows], requests=requests[first : first + together])
        results.append((list(backend.expert.parameters()), torch.cat(parts)))
        assert backend.get_stats() == {"updates": 4, "examples_processed": 30}
    for parameters, grad_x in results[1:]:
        assert_close(parameters, results[0][0])
        assert_close([grad_x], [results[0][1]])


def test_each_batch_makes_an_update_by_default() -> None:
    backend = backend_of(mlp())
    for rows in (3, 1, 8):
        backend.backward(*examples(rows))
    assert backend.get_stats() == {"updates": 3, "examples_processed": 12}


def test_batch_norm_sees_the_whole_batch_where_an_update_cuts_it() -> None:
    expert, (x, grad) = mlp(nn.BatchNorm1d(7)), examples(5)
    backend = backend_of(copy.deepcopy(expert), samples_per_update=4)  # one row is left over
    backend.backward(x, grad)
    optimizer = torch.optim.AdamW(expert.parameters(), lr=0.01)
    masked = grad.clone()
    masked[4] = 0
    expert(x).backward(masked)
    optimizer.step()
    assert_close(list(backend.expert.parameters()), list(expert.parameters()))


def test_apply_gradients_updates_with_what_is_there() -> None:
    expert, (x, grad) = mlp(), examples(3)
    backend = backend_of(copy.deepcopy(expert), samples_per_update=100)
    backend.apply_gradients()
    assert backend.get_stats()["updates"] == 0
    backend.backward(x, grad)
    assert_close(list(backend.expert.parameters()), list(expert.parameters()))
    backend.apply_gradients()
    backend.apply_gradients()
    assert_close(list(backend.expert.parameters()), trained_plainly(expert, x, grad, 3))
    assert backend.get_stats() == {"updates": 1, "examples_processed": 3}


def test_clipping_is_torchs() -> None:
    expert, (x, grad) = mlp(), examples(3)
    backend = backend_of(
        copy.deepcopy(expert), clip_grad_norm=0.1, optimizer=lambda p: torch.optim.SGD(p, lr=1.0)
    )
    backend.backward(x, grad)
    expert(x).backward(grad)
    nn.utils.clip_grad_norm_(expert.parameters(), 0.1)
    torch.optim.SGD(expert.parameters(), lr=1.0).step()
    assert_close(list(backend.expert.parameters()), list(expert.parameters()))


def test_unused_parameter_is_left_alone() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = mlp(), mlp()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    backend = backend_of(Unused())
    before = copy.deepcopy(list(backend.expert.unused.parameters()))
    backend.backward(*examples(2))  # weight decay would change a parameter with a gradient of zeros
    assert_close(list(backend.expert.unused.parameters()), before)


def test_failing_optimizer_leaves_no_gradient_and_no_count() -> None:
    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise ValueError("no step")

    backend = backend_of(mlp(), optimizer=lambda p: Failing(p, lr=0.1))
    with pytest.raises(ValueError, match="no step"):
        backend.backward(*examples(2))
    assert backend.get_stats() == {"updates": 0, "examples_processed": 0}
    assert all(parameter.grad is None for parameter in backend.expert.parameters())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_gradient_checkpointing_inside_an_expert_works() -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.inner, x, use_reentrant=True)

    expert, (x, grad) = mlp(), examples(3)
    backend = backend_of(Checkpointed(copy.deepcopy(expert)))
    backend.backward(x, grad)
    assert_close(list(backend.expert.parameters()), trained_plainly(expert, x, grad, 3))


# ---- learning rates ----------------------------------------------------------------------------------------


def rates(updates: int, **options: Any) -> list[float]:
    """Learning rates of the first updates, of an optimizer whose own is one."""
    optimizer: list[torch.optim.Optimizer] = []

    def make(parameters: Any) -> torch.optim.Optimizer:
        optimizer.append(torch.optim.SGD(parameters, lr=1.0))
        return optimizer[0]

    backend = backend_of(mlp(), optimizer=make, samples_per_update=2, **options)
    found = []
    for _ in range(updates):
        found.append(optimizer[0].param_groups[0]["lr"])
        backend.backward(*examples(2))
    return found


def test_linear_warm_up_and_decay() -> None:
    assert rates(8, num_warmup_steps=2, num_total_steps=6) == [0, 0.5, 1, 0.75, 0.5, 0.25, 0, 0]
    assert rates(4, num_warmup_steps=2) == [0, 0.5, 1, 1]
    assert rates(4, num_total_steps=2) == [1, 0.5, 0, 0]
    assert rates(2) == [1, 1]


def test_scheduler_from_a_factory() -> None:
    def factory(optimizer: Any, num_warmup_steps: int, num_total_steps: int) -> LambdaLR:
        return LambdaLR(optimizer, lambda step: num_warmup_steps + step * num_total_steps)

    assert rates(3, scheduler=factory, num_warmup_steps=3, num_total_steps=10) == [3, 13, 23]
    assert rates(2, scheduler=factory, num_total_steps=10) == [0, 10]
    only_warmup = lambda optimizer, warmup: LambdaLR(optimizer, lambda step: warmup)  # noqa: E731
    assert rates(2, scheduler=only_warmup, num_warmup_steps=4) == [4, 4]
    assert rates(3, scheduler=lambda optimizer: StepLR(optimizer, 1, 0.5)) == [1, 0.5, 0.25]


def test_scheduler_of_ones_own_is_stepped_once_per_update() -> None:
    expert = mlp()
    optimizer = torch.optim.SGD(expert.parameters(), lr=1.0)
    scheduler = StepLR(optimizer, 1, 0.5)
    backend = backend_of(expert, optimizer=optimizer, scheduler=scheduler, samples_per_update=2)
    backend.backward(*examples(7))
    assert scheduler.last_epoch == 3 and optimizer.param_groups[0]["lr"] == 0.125


@pytest.mark.parametrize(
    "options",
    [
        {"scheduler": StepLR(torch.optim.SGD([torch.zeros(1)], lr=1.0), 1)},
        {"scheduler": ReduceLROnPlateau},
        {"scheduler": lambda optimizer: CosineAnnealingLR(optimizer, 3), "optimizer": None},
        {"num_warmup_steps": 3, "optimizer": None},
        {"optimizer": "adam"},
        {"samples_per_update": 0},
        {"clip_grad_norm": 0.0},
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(HpcparError, match="must"):
        backend_of(mlp(), **options)


# ---- replicas ----------------------------------------------------------------------------------------------


def test_replicas_accumulate_until_they_are_reduced() -> None:
    expert, (x, grad) = mlp(), examples(9)
    replicas = [backend_of(copy.deepcopy(expert), replicas=object(), samples_per_update=2) for _ in range(2)]
    replicas[0].backward(x[:4], grad[:4])
    replicas[0].backward(x[4:6], grad[4:6])
    replicas[1].backward(x[6:], grad[6:])
    assert [backend.accumulated_samples for backend in replicas] == [6, 3]
    assert [backend.get_stats()["updates"] for backend in replicas] == [0, 0]
    taken = [backend.take_gradients() for backend in replicas]
    assert [samples for _, samples in taken] == [6, 3]
    assert all(backend.accumulated_samples == 0 for backend in replicas)
    summed = [one + other for one, other in zip(taken[0][0], taken[1][0], strict=True)]
    for backend in replicas:
        backend.apply_summed([gradient.flatten().clone() for gradient in summed], 9)
        assert backend.get_stats() == {"updates": 1, "examples_processed": 9}
        assert_close(list(backend.expert.parameters()), trained_plainly(expert, x, grad, 9))


def test_replica_without_examples_has_gradients_of_zeros() -> None:
    backend = backend_of(mlp(), replicas=1)
    backend.expert[0].bias.requires_grad_(False)
    before = copy.deepcopy(list(backend.expert.parameters()))
    gradients, samples = backend.take_gradients()
    assert samples == 0
    assert [tuple(gradient.shape) for gradient in gradients] == [(7, DIM), (DIM, 7), (DIM,)]
    assert not any(gradient.any() for gradient in gradients)
    backend.apply_summed(gradients, 0)
    assert_close(list(backend.expert.parameters()), before)
    with pytest.raises(MismatchError, match="one for each of the 3"):
        backend.apply_summed(gradients[:2], 1)
