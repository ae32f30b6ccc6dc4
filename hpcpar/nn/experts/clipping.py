"""Clipping by the norm of all gradients, where each rank has those of other experts.

``torch.nn.utils.clip_grad_norm_`` would see other gradients on each rank and clip by another factor, so that
the replicated part of the model would drift apart. Here each expert counts once, wherever it lives and
however many replicas it has, and so does each parameter that all ranks have.
"""

from __future__ import annotations

import torch
from torch import nn

from hpcpar.errors import MismatchError
from hpcpar.nn.experts.local_experts import LocalExperts
from hpcpar.nn.own_gradients import own_tensors

__all__ = ["clip_grad_norm_"]


def clip_grad_norm_(module: nn.Module, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
    """Scale the gradients of a model with experts so that their norm is at most ``max_norm``. Collective.

    Parameters
    ----------
    module
        A model whose gradients are reduced: one within :class:`~hpcpar.nn.DataParallel`, after the backward.
    max_norm
        The largest norm that is left as it is.
    norm_type
        Order of the norm, such as 2 or infinity.

    Returns
    -------
    torch.Tensor
        The norm before, a float64 scalar, the same on all ranks.

    Raises
    ------
    MismatchError
        For an order that is not positive.
    """
    if not norm_type > 0.0:
        raise MismatchError(f"norm_type must be a positive number, got {norm_type!r}")
    own = own_tensors(module)
    replicated = [p.grad for p in module.parameters() if p.grad is not None and id(p) not in own]
    norms = [part.gradient_norm(norm_type) for part in module.modules() if isinstance(part, LocalExperts)]
    norms.append(float(torch.nn.utils.get_total_norm(replicated, norm_type)))
    total: torch.Tensor = torch.linalg.vector_norm(torch.tensor(norms, dtype=torch.float64), norm_type)
    torch.nn.utils.clip_grads_with_norm_(module.parameters(), max_norm, total)
    return total
