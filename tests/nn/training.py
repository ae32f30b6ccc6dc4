"""Train a model on all ranks, and a copy of it in one process on the batches of all ranks together.

The loss is a mean over equally large local batches, so the mean of the ranks' gradients is the gradient of
the whole batch, and the one-process run is the reference for everything that data parallelism may change.
Models are in float64, in which a wrong term shows and rounding does not.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hpcpar.comm import Communicator
from hpcpar.nn import DataParallel

Batch = tuple[Tensor, Tensor]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

FEATURES = 6

# Name of what carries the buckets: pretended ranks per node, and the ``transport`` to ask for.
ROUTES: dict[str, tuple[int | None, str]] = {
    "shared memory": (None, "shared_memory"),
    "nodes of one, by window": (1, "shared_memory"),
    "nodes of one": (1, "auto"),
    "nodes of two": (2, "auto"),
    "nodes of three": (3, "auto"),  # with four ranks, nodes of unequal size
    "messages": (None, "mpi"),
}


@contextlib.contextmanager
def pretended_nodes(comm: Communicator, ranks_per_node: int | None) -> Iterator[Communicator]:
    """The same ranks on nodes of the given size; ``None`` for the real ones."""
    before = os.environ.pop("HPCPAR_RANKS_PER_NODE", None)
    if ranks_per_node is not None:
        os.environ["HPCPAR_RANKS_PER_NODE"] = str(ranks_per_node)
    try:
        mpi = comm.mpi.Dup()
        pretended = Communicator(mpi)
    finally:
        os.environ.pop("HPCPAR_RANKS_PER_NODE", None)
        if before is not None:
            os.environ["HPCPAR_RANKS_PER_NODE"] = before
    with pretended:
        yield pretended
    mpi.Free()


def mlp(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(FEATURES, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3)).to(
        dtype
    )


def make_batches(
    comm: Communicator, steps: int, *, rows: int = 4, dtype: torch.dtype = torch.float64
) -> list[Batch]:
    """Global batches, the same on every rank, with ``rows`` for each rank."""
    generator = torch.Generator().manual_seed(4711)
    return [
        (
            torch.randn(rows * comm.size, FEATURES, generator=generator, dtype=torch.float64).to(dtype),
            torch.randn(rows * comm.size, 3, generator=generator, dtype=torch.float64).to(dtype),
        )
        for _ in range(steps)
    ]


def local_part(comm: Communicator, *tensors: Tensor) -> list[Tensor]:
    """This rank's rows."""
    return [tensor.chunk(comm.size)[comm.rank] for tensor in tensors]


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    output = model(x).float() if x.dtype is torch.bfloat16 else model(x)
    return nn.functional.mse_loss(output, y.to(output.dtype))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[Sequence[Tensor]]) -> None:
    for x, y in batches:
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()


def train_reference(net: nn.Module, make_optimizer: MakeOptimizer, batches: Iterable[Batch]) -> nn.Module:
    reference = copy.deepcopy(net)
    train(reference, make_optimizer(reference.parameters()), batches)
    return reference


def wrap(net: nn.Module, comm: Communicator, **options: Any) -> DataParallel:
    """``DataParallel`` with small buckets, so that small models have several."""
    options.setdefault("bucket_mb", 1e-4)
    return DataParallel(net, comm, **options)


def assert_close(got: nn.Module, expected: nn.Module, what: object = "") -> None:
    """Parameters and buffers are equal up to rounding."""
    names, others = dict(got.named_parameters()), dict(expected.named_parameters())
    names.update(got.named_buffers())
    others.update(expected.named_buffers())
    assert names.keys() == others.keys()
    for name, tensor in names.items():
        torch.testing.assert_close(
            tensor.detach(), others[name].detach(), msg=lambda text, name=name: f"{name} {what}: {text}"
        )


def assert_gradients_close(got: nn.Module, expected: nn.Module, what: object = "") -> None:
    for (name, parameter), other in zip(got.named_parameters(), expected.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), (
            f"{name} {what}: {parameter.grad}, {other.grad}"
        )
        if parameter.grad is not None and other.grad is not None:
            torch.testing.assert_close(
                parameter.grad, other.grad, msg=lambda text, name=name: f"gradient of {name} {what}: {text}"
            )


def assert_replicas_equal(comm: Communicator, tensors: Iterable[Tensor], what: object = "") -> None:
    """All ranks hold the same bits."""
    mine = [tensor.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8) for tensor in tensors]
    packed = torch.cat([torch.empty(0, dtype=torch.uint8), *mine])
    table = packed.new_empty(comm.size, packed.numel())
    comm.Allgather(packed, table)
    different = [rank for rank, row in enumerate(table) if not torch.equal(row, table[0])]
    assert not different, f"ranks {different} differ from rank 0 {what}"
