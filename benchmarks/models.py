"""What the training benchmarks train: a model, its loss, and batches of made-up data.

Two shapes of the same size, because they stress different things. The perceptron has many parameters for
little arithmetic, so communication weighs most; the transformer has many small tensors between large ones,
and much more to compute per parameter::

                parameters    per rank and step
    mlp         8.4 million   64 vectors of 1024
    gpt        10.9 million   2 windows of 64 bytes

Data are random but fixed: the seed is the rank, so ranks differ and runs do not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["WORKLOADS", "Batch", "Workload", "workload"]

Batch = tuple[torch.Tensor, torch.Tensor]
VOCABULARY = 256


@dataclass(frozen=True)
class Workload:
    """A model to train; ``loss`` takes output and targets."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Batch]
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def workload(name: str, quick: bool) -> Workload:
    """The workload of that name, or a tiny one of the same kind. **Local.**"""
    return WORKLOADS[name](quick)


def _mlp(quick: bool) -> Workload:
    layers, width, batch_size = (3, 64, 4) if quick else (8, 1024, 64)

    def build() -> nn.Module:
        parts: list[nn.Module] = []
        for _ in range(layers):
            parts += [nn.Linear(width, width), nn.ReLU()]
        return nn.Sequential(*parts[:-1])

    def batch(generator: torch.Generator) -> Batch:
        inputs, targets = torch.randn(2, batch_size, width, generator=generator)
        return inputs, targets

    return Workload("mlp", build, batch, F.mse_loss)


def _gpt(quick: bool) -> Workload:
    layers, width, heads, windows, context = (2, 32, 2, 2, 16) if quick else (6, 384, 6, 2, 64)

    def batch(generator: torch.Generator) -> Batch:
        text = torch.randint(VOCABULARY, (windows, context + 1), generator=generator)
        return text[:, :-1], text[:, 1:]

    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return Workload("gpt", lambda: Gpt(layers, width, heads, context), batch, loss)


WORKLOADS: dict[str, Callable[[bool], Workload]] = {"mlp": _mlp, "gpt": _gpt}


class Gpt(nn.Module):
    """A decoder-only transformer on bytes, pre-norm. Integers (batch, time) to logits (batch, time, 256)."""

    def __init__(self, layers: int, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.position = nn.Parameter(torch.randn(context, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.token(tokens) + self.position[: tokens.shape[1]]
        logits: torch.Tensor = self.head(self.norm(self.blocks(x)))
        return logits


class Block(nn.Module):
    """Causal self-attention, then a two-layer perceptron, each around a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attend(self.attention_norm(x))
        x = x + self.mlp(self.mlp_norm(x))
        return x

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        batch, time, width = x.shape
        heads = self.query_key_value(x).view(batch, time, 3 * self.heads, width // self.heads).transpose(1, 2)
        query, key, value = heads.chunk(3, dim=1)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        projected: torch.Tensor = self.projection(mixed.transpose(1, 2).reshape(batch, time, width))
        return projected
