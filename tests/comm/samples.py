"""Data for the tests of ``hpcpar.comm``: known contents of every dtype, on every rank, in every layout.

A rank's contribution is a function of its number, so every rank knows what all ranks send and works out the
result in one process. Comparisons are of bits: NaN equals itself and 0.0 is not -0.0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

INTEGERS = (
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
)
FLOATS = (torch.float32, torch.float64)
COMPLEX = (torch.complex64, torch.complex128)
HALVES = (torch.bfloat16, torch.float16)
EIGHTHS = (
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
)
NARROW = HALVES + EIGHTHS
DTYPES = (torch.bool, *INTEGERS, *FLOATS, *COMPLEX, torch.complex32, *NARROW)

SHAPE = (2, 3, 2, 2)
"""Of one block: four dimensions for ``channels_last``, 24 elements for 1, 2, 3 and 4 ranks."""

Layout = Callable[[Tensor], Tensor]


def noise(dtype: torch.dtype, shape: Sequence[int], seed: int) -> Tensor:
    """Random bits, NaN and infinity included; of ``bool`` and ``complex32`` random finite values."""
    generator = torch.Generator().manual_seed(1000 + seed)
    count = torch.Size(shape).numel()
    if dtype is torch.bool:
        return torch.randint(0, 2, tuple(shape), generator=generator).to(torch.bool)
    raw = torch.randint(0, 256, (count * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    if dtype is torch.complex32:
        raw[1::2] &= 0b1011_1111  # torch computes its conjugate by way of float32, which changes NaN
    return raw.view(dtype).reshape(tuple(shape))


def digits(dtype: torch.dtype, shape: Sequence[int], seed: int, *, high: int = 3) -> Tensor:
    """Integers from 1 to ``high``, whose sums and products over four ranks are exact in most types."""
    generator = torch.Generator().manual_seed(1000 + seed)
    values = torch.randint(1, high + 1, tuple(shape), generator=generator)
    if dtype is torch.bool:
        return values > 1
    if dtype.is_complex:
        other = torch.randint(1, high + 1, tuple(shape), generator=generator)
        return torch.complex(values.double(), other.double()).to(dtype)
    return values.to(torch.float32).to(dtype)


def bits(tensor: Tensor) -> Tensor:
    """The contents, in logical order, as bytes."""
    if not tensor.numel():
        return torch.empty(0, dtype=torch.uint8)
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def same(got: Tensor, expected: Tensor) -> bool:
    return (
        got.dtype == expected.dtype and got.shape == expected.shape and torch.equal(bits(got), bits(expected))
    )


# ---- layouts: the same contents, differently placed in memory ----------------------------------------------


def contiguous(values: Tensor) -> Tensor:
    return values.clone(memory_format=torch.contiguous_format)


def transposed(values: Tensor) -> Tensor:
    return values.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)


def every_other(values: Tensor) -> Tensor:
    """A strided slice that neither starts nor ends with its memory."""
    *outer, inner = values.shape
    memory = noise(values.dtype, (*outer, 2 * inner + 3), 99)
    view = memory[..., 1 : 2 * inner + 1 : 2]
    view.copy_(values)
    return view


def channels_last(values: Tensor) -> Tensor:
    return values.clone(memory_format=torch.channels_last)


def conjugated(values: Tensor) -> Tensor:
    """A lazily conjugated view; of real types, an ordinary tensor with an offset into its memory."""
    if values.is_complex():
        return values.conj().resolve_conj().conj()
    return torch.cat([values.reshape(-1)[:1], values.reshape(-1)])[1:].view(values.shape)


LAYOUTS: tuple[Layout, ...] = (contiguous, transposed, every_other, channels_last, conjugated)
