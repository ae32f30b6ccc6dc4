"""Experts to serve in tests, and what plain torch would do with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hpcpar.nn.experts.backend import ExpertBackend
from hpcpar.nn.experts.descriptor import BatchTensorDescriptor

__all__ = [
    "DIM",
    "Attention",
    "D",
    "Keywords",
    "Moody",
    "Returning",
    "assert_equal",
    "backend_of",
    "mlp",
    "parameters_of",
    "reference_step",
]

D = BatchTensorDescriptor
DIM = 6


class Keywords(nn.Module):
    """Keyword inputs only, of several dtypes, one of them never used, and nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, DIM)
        self.linear = nn.Linear(DIM, 3)

    def forward(self, *, x: torch.Tensor, index: torch.Tensor, mask: torch.Tensor, unused: Any) -> Any:
        hidden = self.linear(x + self.embedding(index)).masked_fill(mask[:, None], 0.0)
        return {"z": hidden, "a": (hidden.sum(1), index + 1, None)}


class Attention(nn.Module):
    """Sequences of any length, with a mask, under a dropout of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, 2, dropout=0.3, batch_first=True)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, key_padding_mask=mask, need_weights=False)[0]


class Moody(nn.Module):
    """Raises for rows that start with 13, after it has counted them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if (x[:, 0] == 13).any():
            raise ValueError("unlucky")
        return self.linear(x)


class Returning(nn.Module):
    """Returns whatever a function of its input and its weight is."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(1.0, DIM + 1))
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x, self.weight)


def mlp(*extra: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(DIM, 8), nn.ReLU(), *extra, nn.Linear(8, DIM))


def backend_of(expert: nn.Module, optimizer: Any = torch.optim.SGD, **options: Any) -> ExpertBackend:
    options.setdefault("args_schema", (D(DIM),))
    made = optimizer
    if optimizer is torch.optim.SGD:
        made = torch.optim.SGD(expert.parameters(), lr=0.1) if list(expert.parameters()) else None
    return ExpertBackend("expert", expert, made, **options)


def parameters_of(module: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def assert_equal(got: Sequence[Any], want: Sequence[Any], **tolerance: float) -> None:
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def reference_step(
    expert: nn.Module, inputs: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], flat: Any = None
) -> list[torch.Tensor | None]:
    """What plain torch does: gradients of the inputs, and one step of SGD."""
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = flat(expert, leaves) if flat else [expert(*leaves)]
    torch.autograd.backward(outputs, list(grads))
    torch.optim.SGD(expert.parameters(), lr=0.1).step()
    expert.zero_grad()
    return [leaf.grad for leaf in leaves]
