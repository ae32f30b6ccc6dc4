"""Many tensors from one rank to all, packed into few messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from hpcpar.comm.communicator import Communicator

__all__ = ["broadcast_packed"]


def broadcast_packed(tensors: Sequence[torch.Tensor], comm: Communicator, root: int) -> None:
    """Copy tensors of any shapes and dtypes from ``root``, in messages of some megabytes. Collective."""
    if comm.size == 1:
        return
    group: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        group.append(tensor.detach())
        size += tensor.nbytes
        if size >= 16 << 20:
            _broadcast_group(group, comm, root)
            group, size = [], 0
    if group:
        _broadcast_group(group, comm, root)


def _broadcast_group(tensors: Sequence[torch.Tensor], comm: Communicator, root: int) -> None:
    flats = [tensor.contiguous().cpu().reshape(-1).view(torch.uint8) for tensor in tensors]
    packed = torch.cat(flats)
    comm.Bcast(packed, root)
    if comm.rank == root:
        return
    for tensor, part in zip(tensors, torch.split(packed, [flat.numel() for flat in flats]), strict=True):
        # A copy, because a part may start at an address that its dtype does not allow.
        tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))
