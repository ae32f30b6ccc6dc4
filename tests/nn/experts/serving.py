"""What the tests of served experts share: experts, backends, and the same computation in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hpcpar.comm import Communicator
from hpcpar.nn.experts.backend import ExpertBackend
from hpcpar.nn.experts.descriptor import BatchTensorDescriptor

__all__ = ["WIDTH", "backends_of", "expert", "served_by", "sgd"]

WIDTH = 6


def expert(seed: int, *, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A small expert, equal on every rank that asks for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = nn.Linear(WIDTH, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, WIDTH)
        return nn.Sequential(*parts).to(dtype)


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


def backend(
    uid: str, module: nn.Module, *, dtype: torch.dtype = torch.float64, **options: Any
) -> ExpertBackend:
    """A backend of a module that takes one tensor, unless the options have a schema."""
    options.setdefault("args_schema", (BatchTensorDescriptor(WIDTH, dtype=dtype),))
    return ExpertBackend(uid, module, sgd(module), **options)


def served_by(
    comm: Communicator, rank: int, make: Callable[[], dict[str, ExpertBackend]]
) -> dict[str, ExpertBackend]:
    """The backends on one rank, nothing on the others."""
    return make() if comm.rank == rank else {}


def backends_of(
    comm: Communicator, uids: Iterable[str], make: Callable[[int], nn.Module], **options: Any
) -> dict[str, ExpertBackend]:
    """Experts dealt to the ranks in turn; the module of the i-th is ``make(i)``."""
    return {
        uid: backend(uid, make(place), **options)
        for place, uid in enumerate(uids)
        if place % comm.size == comm.rank
    }


def parameters_of(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]
