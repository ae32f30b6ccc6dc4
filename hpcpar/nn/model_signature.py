"""Do all ranks have the same model? Asked once, before anything is broadcast into it.

Ranks that were given different models, by a seed, a flag or a stale file, would exchange gradients of
different meaning or hang. Each rank describes its parameters and buffers in one line each; if the digests
differ, the lines are gathered and every rank raises the same error, which shows the first difference.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from hpcpar.errors import MismatchError
from hpcpar.nn.own_gradients import own_tensors
from hpcpar.nn.sparse_gradients import sparse_parameters

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["check_same_model", "describe"]


def describe(module: nn.Module) -> list[str]:
    """One line for each parameter and buffer: name, shape, dtype, kind of gradient. Local.

    Without those that a part of the model keeps to itself (:mod:`~hpcpar.nn.own_gradients`).
    """
    own = own_tensors(module)
    sparse = {id(parameter) for parameter in sparse_parameters(module)}
    lines = [
        f"parameter {name} {tuple(p.shape)} {p.dtype}{_memory_order(p)} "
        + ("frozen" if not p.requires_grad else "sparse" if id(p) in sparse else "trainable")
        for name, p in module.named_parameters()
        if id(p) not in own
    ]
    buffers = [(name, buffer) for name, buffer in module.named_buffers() if id(buffer) not in own]
    return lines + [f"buffer {name} {tuple(b.shape)} {b.dtype}" for name, b in buffers]


def _memory_order(tensor: torch.Tensor) -> str:
    """The axes from the outermost in memory, where that is unusual: gradients are laid out like it."""
    axes = [axis for axis, size in enumerate(tensor.shape) if size > 1]
    order = sorted(axes, key=tensor.stride, reverse=True)
    return "" if order == axes else f" axes {tuple(order)}"


def check_same_model(module: nn.Module, comm: Communicator, options: Mapping[str, object]) -> None:
    """Raise on every rank when the models of the ranks, or the options for them, differ. Collective.

    Raises
    ------
    MismatchError
        Names the first rank that differs from rank 0 and what it has instead.
    """
    lines = describe(module) + [f"option {name} {value}" for name, value in options.items()]
    digests = comm.allgather(hashlib.sha256("\n".join(lines).encode()).hexdigest())
    if len(set(digests)) == 1:
        return
    other = next(rank for rank, digest in enumerate(digests) if digest != digests[0])
    first, second = comm.bcast(lines, 0), comm.bcast(lines, other)
    place = next(
        (index for index, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]),
        min(len(first), len(second)),
    )
    shown = [part[place] if place < len(part) else "nothing more" for part in (first, second)]
    raise MismatchError(
        f"the model must be the same on all ranks, got {len(first)} parameters, buffers and options on "
        f"rank 0 and {len(second)} on rank {other}; first difference: {shown[0]!r} on rank 0, {shown[1]!r} "
        f"on rank {other}. Build it from the same code and options everywhere (seeds may differ: rank 0's "
        "values are broadcast)."
    )
