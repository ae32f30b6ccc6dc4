"""Buckets: many small tensors laid out in a few flat ones, so that each message is worth sending.

::

    tensors    t5        t4   t3      t2           t1  t0        in the order in which they become ready
    buckets   [t5 ______ t4 _ t3]    [t2 _________ t1 _ t0]      each one flat tensor of one dtype

Tensors start at multiples of 64 bytes. A layout is plain data, computed alike on every rank; a *slot* says
where a tensor lies, and :func:`view_slot` makes the view with the shape and strides of the original. Complex
tensors lie as pairs of real numbers, because that is what is summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["BucketLayout", "Slot", "padded_length", "plan_buckets", "view_slot"]

_ALIGN_BYTES = 64


@dataclass(frozen=True)
class Slot:
    """Where one tensor lies in its bucket; offset and length in elements of the bucket's dtype."""

    index: int
    offset: int
    length: int


@dataclass(frozen=True)
class BucketLayout:
    """One flat tensor and what lies in it."""

    dtype: torch.dtype
    numel: int
    slots: tuple[Slot, ...] = ()

    @property
    def nbytes(self) -> int:
        """Size of the flat tensor in bytes."""
        return self.numel * self.dtype.itemsize


def plan_buckets(tensors: Sequence[torch.Tensor], bucket_bytes: int) -> list[BucketLayout]:
    """Lay ``tensors`` out in buckets. Local.

    Parameters
    ----------
    tensors
        In the order in which their contents become ready. Only shapes and dtypes are looked at.
    bucket_bytes
        A bucket is closed when it has reached this size, so 0 gives every tensor its own.

    Returns
    -------
    list of BucketLayout
        In the order in which they fill. Tensors of one dtype share buckets; slots name tensors by index.
    """
    open_slots: dict[torch.dtype, list[Slot]] = {}
    open_sizes: dict[torch.dtype, int] = {}
    buckets: list[BucketLayout] = []
    for index, tensor in enumerate(tensors):
        dtype = tensor.dtype.to_real()
        length = tensor.numel() * (2 if tensor.is_complex() else 1)
        offset = open_sizes.get(dtype, 0)
        open_slots.setdefault(dtype, []).append(Slot(index, offset, length))
        open_sizes[dtype] = offset + padded_length(length, dtype)
        if open_sizes[dtype] * dtype.itemsize >= bucket_bytes:
            buckets.append(BucketLayout(dtype, open_sizes.pop(dtype), tuple(open_slots.pop(dtype))))
    rest = [BucketLayout(dtype, open_sizes[dtype], tuple(slots)) for dtype, slots in open_slots.items()]
    return buckets + sorted(rest, key=lambda layout: layout.slots[-1].index)


def padded_length(length: int, dtype: torch.dtype) -> int:
    """Elements that a tensor takes in a bucket, so that the next one is aligned. Local."""
    align = max(1, _ALIGN_BYTES // dtype.itemsize)
    return -(-length // align) * align


def view_slot(flat: torch.Tensor, slot: Slot, like: torch.Tensor) -> torch.Tensor:
    """A view of ``flat`` with the dtype and shape of ``like``, and its strides if these are dense. Local."""
    part = flat[slot.offset : slot.offset + slot.length]
    if like.is_complex():
        part = torch.view_as_complex(part.view(slot.length // 2, 2))
    if like.numel() and _is_dense(like):
        return part.as_strided(like.shape, like.stride(), part.storage_offset())
    return part.view(like.shape)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill a stretch of memory without gaps or overlaps, in any order of axes."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
