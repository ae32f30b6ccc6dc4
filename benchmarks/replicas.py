"""What a training benchmark must find when it is done: the same model on every rank."""

from __future__ import annotations

import torch
from torch import nn

from hpcpar.comm import Communicator

__all__ = ["require_equal_replicas"]


def require_equal_replicas(comm: Communicator, name: str, module: nn.Module) -> None:
    """Raise RuntimeError on all ranks when a variant's parameters differ between them. **Collective.**"""
    mine = nn.utils.parameters_to_vector(module.parameters()).detach()
    roots = mine.clone()
    comm.Bcast(roots, root=0)
    if not all(comm.allgather(torch.equal(mine, roots))):
        raise RuntimeError(f"{name}: replicas must be equal on all ranks, got different parameters")
