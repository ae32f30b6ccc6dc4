"""Models and samples for a TPU manager, and what plain torch makes of them in one process.

The reference of a step is the mean loss over the samples that all devices of all ranks have together, and its
gradient: one batch, one ``backward()``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from hpcpar.comm import Communicator

__all__ = [
    "FEATURES",
    "Regression",
    "Sample",
    "Tally",
    "assert_equal_on_all_ranks",
    "assert_gradients",
    "assert_parameters",
    "close",
    "reference",
    "samples",
    "samples_of_step",
    "shares",
]

FEATURES = 3

Sample = dict[str, Tensor]

# For float32: a manager adds weighted means of batches, over devices and then ranks, where the reference
# takes one mean, and XLA fuses operations. Each costs some roundings of 6e-8 of the largest term, and terms
# cancel.
RTOL, ATOL = 1e-4, 2e-6


class Regression(nn.Module):
    """Called by keywords; the loss is in a mapping."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Linear(FEATURES, 5)
        self.second = nn.Linear(5, 1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        predicted = self.second(self.first(x).tanh()).squeeze(-1)
        return {"loss": (predicted - y).square().mean(), "predicted": predicted}


class Tally(nn.Module):
    """Its gradient, times the number of samples, says how often each index was seen."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(length))

    def forward(self, indices: Tensor) -> Tensor:
        return self.weight[indices].mean()


def samples(count: int, seed: int = 0) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, FEATURES, generator=generator)
    targets = torch.randn(count, generator=generator)
    return [{"x": x, "y": y} for x, y in zip(inputs, targets, strict=True)]


def shares(sizes: Sequence[int]) -> list[list[Sample]]:
    """Samples of each rank, of which every rank knows all."""
    everything = iter(samples(sum(sizes), seed=7))
    return [[next(everything) for _ in range(size)] for size in sizes]


def samples_of_step(parts: Iterable[Sequence[Sample]], step: int, per_rank: int) -> list[Sample]:
    """Those of all ranks, of which each takes so many in a step while it has them."""
    return [sample for part in parts for sample in part[step * per_rank : (step + 1) * per_rank]]


def reference(model: nn.Module, batch: Sequence[Any]) -> tuple[float, list[Tensor | None]]:
    """The mean loss over samples, and its gradient; the model stays as it is."""
    own = copy.deepcopy(model)
    own.zero_grad()
    output = own(**default_collate(list(batch)))
    output["loss"].backward()
    return output["loss"].item(), [parameter.grad for parameter in own.parameters()]


def close(got: Any, expected: Any) -> None:
    """Equal up to rounding in float32."""
    torch.testing.assert_close(got, expected, rtol=RTOL, atol=ATOL)


def assert_gradients(got: nn.Module | Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    gradients = [p.grad for p in got.parameters()] if isinstance(got, nn.Module) else got
    for mine, other in zip(gradients, expected, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            close(mine, other)


def assert_parameters(got: nn.Module, expected: nn.Module) -> None:
    for (name, tensor), other in zip(got.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(
            tensor, other, rtol=RTOL, atol=ATOL, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_equal_on_all_ranks(comm: Communicator, model: nn.Module) -> None:
    """Bitwise."""
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])
    table = flat.new_empty(comm.size, flat.numel())
    comm.Allgather(flat, table)
    assert all(torch.equal(row, table[0]) for row in table)
