"""What can be wrong with what a sharded optimizer is given, found before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hpcpar.comm import MPI, WIRE_DTYPES, TransportKind
from hpcpar.errors import HpcparError, MismatchError

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["check_model", "check_routes", "check_whole_rows"]


def check_model(model: Any, groups: Sequence[dict[str, Any]], comm: Communicator) -> None:
    """Whether a model that scatters its gradients reduces these parameters, over these ranks. Local.

    Parameters
    ----------
    model
        Such as an :class:`hpcpar.nn.DataParallel`.
    groups
        Of parameters.
    comm
        The optimizer's ranks.

    Raises
    ------
    MismatchError
        When it does not.
    """
    theirs = model.comm
    if theirs is not None:
        relation = MPI.Group.Compare(theirs.mpi.Get_group(), comm.mpi.Get_group())
        if relation != MPI.IDENT:
            raise MismatchError("comm of a ShardedOptimizer must have the ranks of its model, got others")
    mine = {id(p) for group in groups for p in group["params"] if p.requires_grad}
    surplus = len(mine - {id(p) for p in model.reduced_parameters()})
    if surplus:
        raise MismatchError(
            "a ShardedOptimizer must have parameters that are the same on all ranks, with dense gradients, "
            f"got {surplus} that are of experts or sparse. Leave them out by parameters=, and give them an "
            "optimizer of their own"
        )


def check_routes(wire_dtype: torch.dtype | None, transport: str, *, reduces_itself: bool) -> None:
    """Options of the reduction, which a model that reduces itself has already. Local.

    Raises
    ------
    MismatchError
        For options that are none, or not this optimizer's.
    """
    if reduces_itself:
        raise MismatchError(
            "wire_dtype and transport must be given to the DataParallel, which reduces the gradients, got "
            "them with the ShardedOptimizer"
        )
    if wire_dtype not in WIRE_DTYPES:
        raise MismatchError(f"wire_dtype must be one of {WIRE_DTYPES}, got {wire_dtype!r}")
    if transport not in [kind.value for kind in TransportKind]:
        raise MismatchError(f"transport must be 'auto', 'shared_memory' or 'mpi', got {transport!r}")


def check_whole_rows(model: nn.Module | None, *, shared: bool) -> None:
    """Modules that write to their parameters in forward, which one copy for many ranks cannot have. Local.

    Raises
    ------
    HpcparError
        For an embedding with ``max_norm``.
    """
    embeddings = (nn.Embedding, nn.EmbeddingBag)
    modules = () if model is None or not shared else model.modules()
    if any(isinstance(module, embeddings) and module.max_norm is not None for module in modules):
        raise HpcparError(
            "parameters that ranks share must not be written in forward, got an embedding with max_norm. Use "
            "shared=False"
        )
