"""Overflows of mixed precision, where each rank has the gradients of other experts.

A ``GradScaler`` skips a step, and lowers its scale, when a gradient is not finite. Replicated gradients are
the same on all ranks, and so is the decision; an expert's are on one rank only. That rank alone would skip.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hpcpar.comm import MPI
from hpcpar.errors import MismatchError

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["agree_on_overflow"]


def agree_on_overflow(
    scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer, comm: Communicator
) -> bool:
    """Let all ranks skip the step if a gradient of any rank is not finite. Collective.

    Parameters
    ----------
    scaler
        After ``scaler.unscale_(optimizer)``, before ``scaler.step(optimizer)``.
    optimizer
        The one that was unscaled.
    comm
        All ranks that train the model.

    Returns
    -------
    bool
        Whether the step will be skipped.

    Raises
    ------
    MismatchError
        When gradients were not unscaled.

    Examples
    --------
    >>> scaler.scale(loss).backward()
    >>> scaler.unscale_(optimizer)
    >>> hpcpar.nn.agree_on_overflow(scaler, optimizer, comm)
    >>> scaler.step(optimizer)
    >>> scaler.update()
    """
    if not scaler.is_enabled():
        return False
    found = scaler._found_inf_per_device(optimizer)
    if comm.allreduce(not found, MPI.LOR):
        raise MismatchError(
            "gradients must be unscaled on all ranks, got some that are not. Call unscale_ first"
        )
    overflow = torch.tensor([max(float(flag) for flag in found.values())])
    comm.Allreduce(MPI.IN_PLACE, overflow, MPI.MAX)
    for flag in found.values():
        flag.fill_(float(overflow))
    return bool(overflow)
