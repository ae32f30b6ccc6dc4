"""What the pipeline benchmark trains: a list of layers, a cut into stages, a batch in microbatches.

::

    stages of 2 ranks, chunks=1     [ layers of rank 0 ] [ layers of rank 1 ]
                       chunks=2     [ 0 ] [ 1 ] [ 2 ] [ 3 ]      stages 0 and 2 on rank 0, 1 and 3 on rank 1

    mlp    4 x (Linear(768) + GELU) per rank, and a mean square for a loss; microbatches of 32, 8 and 4 rows
    gpt    embedding, 2 blocks per rank, norm and head; the head has the embedding's matrix. Microbatches of
           2 windows of 128 bytes

The perceptron is cut into stages of equal cost, so that what is lost is the pipeline's. Its microbatches get
smaller: 32 rows compute for milliseconds, 4 rows for so short a time that an action's overhead shows. The
transformer has unequal stages, and one parameter on two of them.

Every rank builds the whole model from one seed, and takes its layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from models import VOCABULARY, Batch, Block

__all__ = ["WORKLOAD_NAMES", "PipelineWorkload", "workloads"]

WORKLOAD_NAMES = ("mlp", "gpt")
MLP_WIDTH, MLP_BLOCKS = 768, 4
MLP_SHAPES = ((8, 32), (32, 8), (8, 4))  # microbatches, rows of each


@dataclass(frozen=True)
class PipelineWorkload:
    """A model to cut and to train.

    Attributes
    ----------
    label
        For people, and the key of the results.
    microbatches, samples
        How many, and the samples of each.
    build
        Makes the whole model; its children are the layers.
    balance
        Layers of each stage, given the number of stages.
    batch
        Makes inputs and targets of all microbatches.
    loss
        Takes output and targets; a mean over samples.
    is_tied
        Whether the last layer has a parameter of the first one, both of the name ``shared``.
    """

    label: str
    microbatches: int
    samples: int
    build: Callable[[], nn.Sequential]
    balance: Callable[[int], list[int]]
    batch: Callable[[], Batch]
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    is_tied: bool = False

    def stage(self, model: nn.Sequential, index: int, stages: int) -> nn.Sequential:
        """The layers of a stage. A slice of a Sequential keeps their names. **Local.**"""
        first = sum(self.balance(stages)[:index])
        return model[first : first + self.balance(stages)[index]]


def workloads(which: str, ranks: int, quick: bool) -> list[PipelineWorkload]:
    """Those of one name, or of ``"both"``, for so many ranks; tiny ones if ``quick``. **Local.**"""
    mlps = [_mlp(ranks, *shape, quick) for shape in MLP_SHAPES] if which != "gpt" else []
    return [*mlps, *([_gpt(ranks, quick)] if which != "mlp" else [])]


def _mlp(ranks: int, microbatches: int, rows: int, quick: bool) -> PipelineWorkload:
    width = 16 if quick else MLP_WIDTH
    blocks = MLP_BLOCKS * ranks

    def build() -> nn.Sequential:
        torch.manual_seed(0)
        parts = [(nn.Linear(width, width), nn.GELU()) for _ in range(blocks)]
        return nn.Sequential(*(layer for part in parts for layer in part))

    def batch() -> Batch:
        generator = torch.Generator().manual_seed(1)
        inputs, targets = torch.randn(2, microbatches * rows, width, generator=generator)
        return inputs, targets

    return PipelineWorkload(
        f"mlp {microbatches} x ({rows}, {width})",
        microbatches,
        rows,
        build,
        lambda stages: [2 * blocks // stages] * stages,
        batch,
        F.mse_loss,
    )


def _gpt(ranks: int, quick: bool) -> PipelineWorkload:
    microbatches, windows, blocks = 8, 2, 2 * ranks
    width, heads, context = (16, 2, 8) if quick else (192, 6, 128)

    def build() -> nn.Sequential:
        torch.manual_seed(0)
        embedding = _Embedding(width, context)
        middle = [Block(width, heads) for _ in range(blocks)]
        return nn.Sequential(embedding, *middle, _Head(width, embedding.shared))

    def balance(stages: int) -> list[int]:
        counts = [blocks // stages] * stages
        counts[0] += 1
        counts[-1] += 1
        return counts

    def batch() -> Batch:
        generator = torch.Generator().manual_seed(1)
        text = torch.randint(VOCABULARY, (microbatches * windows, context + 1), generator=generator)
        return text[:, :-1].contiguous(), text[:, 1:].contiguous()

    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    label = f"gpt {microbatches} x ({windows}, {context}), width {width}"
    return PipelineWorkload(label, microbatches, windows, build, balance, batch, loss, is_tied=True)


class _Embedding(nn.Module):
    """Bytes (batch, time) to vectors (batch, time, width)."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.shared = nn.Parameter(torch.randn(VOCABULARY, width) * 0.02)
        self.position = nn.Parameter(torch.randn(context, width) * 0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.embedding(tokens, self.shared) + self.position[: tokens.shape[1]]


class _Head(nn.Module):
    """Vectors to logits, by the matrix of the embedding."""

    def __init__(self, width: int, shared: nn.Parameter) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.shared = shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.norm(x), self.shared)
