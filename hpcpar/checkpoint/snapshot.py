"""Snapshots: a copy of a state's leaves in host memory, from which a thread writes while training goes on.

The memory is kept from one save to the next, because memory that is new costs more than the copy: the system
clears each of its pages at the first touch. With leaves on a GPU it is pinned, so that the device copies by
itself, at the full rate of its bus.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hpcpar.checkpoint.leaves import LeafValue, as_bytes, value_nbytes

__all__ = ["SnapshotMemory"]

_ALIGNMENT = 64


class SnapshotMemory:
    """Memory of one snapshot at a time. Local."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, leaves: Sequence[LeafValue]) -> list[LeafValue]:
        """Copy the leaves; the copies are good until the next call. Local.

        Returns
        -------
        list
            For each leaf its contents, as bytes.
        """
        sizes = [value_nbytes(leaf) for leaf in leaves]
        on_gpu = any(isinstance(leaf, torch.Tensor) and leaf.is_cuda for leaf in leaves)
        total = sum(_aligned(size) for size in sizes)
        if total > self._memory.numel() or (on_gpu and not self._memory.is_pinned()):
            self._memory = torch.empty(0, dtype=torch.uint8)  # first give the old one back
            self._memory = torch.empty(total, dtype=torch.uint8, pin_memory=on_gpu)
        copies: list[LeafValue] = []
        offset = 0
        for leaf, size in zip(leaves, sizes, strict=True):
            copy = self._memory[offset : offset + size]
            _copy(leaf, copy)
            copies.append(copy)
            offset += _aligned(size)
        if on_gpu:
            torch.cuda.synchronize()
        return copies


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _copy(leaf: LeafValue, copy: torch.Tensor) -> None:
    if not copy.numel():
        return
    if isinstance(leaf, torch.Tensor):
        copy.view(leaf.dtype).view(leaf.shape).copy_(leaf.detach(), non_blocking=True)
    else:
        copy.copy_(as_bytes(leaf))
