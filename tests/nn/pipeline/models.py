"""Models to cut into stages, and the step of one process that a step of the pipeline must equal.

Everything is in float64, in which a wrong term shows and rounding does not. Layers and loss functions are at
the top level of this module, for a pipeline describes them by name and sends values by pickle.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcpar.comm import Communicator
from hpcpar.nn import Pipeline
from hpcpar.nn.pipeline import pop, skippable, stash

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero_bubble")
CHECKPOINTS = ("never", "except_last", "always")

WIDTH = 6
TOKENS = 11


# ---- layers ------------------------------------------------------------------------------------------------


@skippable(stash=["long"])
class Down(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        y = torch.tanh(self.linear(x))
        yield stash("long", y)
        return y


@skippable(pop=["long"])
class Up(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        skipped = yield pop("long")
        return self.linear(x) + skipped


class Head(nn.Module):
    """Logits by the embedding's own weights."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.embedding.weight)


class Call(nn.Module):
    """A layer without parameters, from a function."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, value: Any) -> Any:
        return self.function(value)


# ---- models ------------------------------------------------------------------------------------------------


def text_model(seed: int = 1) -> nn.Sequential:
    """Eight layers, with an embedding used at both ends and a skip connection."""
    torch.manual_seed(seed)
    embedding = nn.Embedding(TOKENS, WIDTH)
    return nn.Sequential(
        embedding,
        Down(),
        nn.Linear(WIDTH, WIDTH),
        nn.GELU(),
        nn.Linear(WIDTH, WIDTH),
        nn.LayerNorm(WIDTH),
        Up(),
        Head(embedding),
    ).double()


def text_batch(samples: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, TOKENS, (2, samples, 3), generator=generator)
    return tokens[0], tokens[1]


def text_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def mlp(layers: int = 8, seed: int = 1) -> nn.Sequential:
    """``layers`` layers, each with parameters."""
    torch.manual_seed(seed)
    made = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(layers - 1)]
    return nn.Sequential(*made, nn.Linear(WIDTH, 2)).double()


def batch(samples: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, WIDTH, generator=generator, dtype=torch.float64)
    return x, torch.randn(samples, 2, generator=generator, dtype=torch.float64)


def squares(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output, target)


# ---- pipelines and their references ------------------------------------------------------------------------


@contextmanager
def pipeline(model: Any, comm: Communicator, **options: Any) -> Iterator[Pipeline]:
    """A pipeline over a copy of ``model``, freed in the end unless something has failed."""
    pipe = Pipeline(copy.deepcopy(model), comm, **options)
    yield pipe
    pipe.free()


def train(pipe: Pipeline, x: Any, target: Any, **options: Any) -> Tensor:
    """A step for which each rank brings what it must, and no more."""
    return pipe.train_step(x if pipe.is_first else None, target if pipe.is_last else None, **options)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters(remove_duplicate=False)}


def reference_step(
    model: nn.Module, x: Any, target: Any, loss_fn: Callable[[Any, Any], Tensor]
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Loss and gradients of the unsplit model, which is not changed."""
    model = copy.deepcopy(model)
    model.zero_grad()
    loss = loss_fn(model(x), target)
    loss.backward()
    return loss.detach(), gradients(model)


def assert_same_tensors(
    got: Mapping[str, Tensor | None],
    expected: Mapping[str, Tensor | None],
    what: object = "",
    *,
    rtol: float = 1e-10,
) -> None:
    """Those that this rank has are equal, each up to ``rtol`` of its largest element."""
    for name, tensor in got.items():
        other = expected[name]
        assert (tensor is None) == (other is None), f"{name} {what}: got {tensor}, expected {other}"
        if tensor is not None and other is not None:
            largest = max(float(other.detach().abs().max()), 1e-6)
            torch.testing.assert_close(
                tensor.detach(),
                other.detach(),
                rtol=0.0,
                atol=rtol * largest,
                msg=lambda text, name=name: f"{name} {what}: {text}",
            )


def assert_gradients(pipe: Pipeline, expected: Mapping[str, Tensor | None], what: object = "") -> None:
    assert_same_tensors(gradients(pipe.layers), expected, what)


def assert_loss(comm: Communicator, loss: Tensor, expected: Tensor | float, what: object = "") -> None:
    """It is right, and the same bits on all ranks."""
    assert (loss.dtype, loss.shape, loss.requires_grad) == (torch.float64, (), False)
    losses = comm.allgather(float(loss))
    assert len(set(losses)) == 1, what
    assert abs(losses[0] - float(expected)) <= 1e-10 * max(1.0, abs(float(expected))), (
        losses,
        expected,
        what,
    )
