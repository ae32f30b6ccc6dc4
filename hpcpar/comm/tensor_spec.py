"""Dtype and shape of a tensor as integers, for messages that say what they carry.

A specification is ``[code of the dtype, number of axes, length of each axis]``. The codes number the dtypes
in one fixed order, so that they mean the same to all processes of a job.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

__all__ = ["TensorSpec", "decode_specs", "encode_specs", "spec_of"]

TensorSpec = tuple[torch.dtype, torch.Size]
"""Dtype and shape of one tensor."""

_DTYPES: tuple[torch.dtype, ...] = tuple(
    getattr(torch, name)
    for name in (
        "bool uint8 int8 int16 int32 int64 uint16 uint32 uint64 float16 bfloat16 float32 float64 complex32 "
        "complex64 complex128 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz"
    ).split()
    if hasattr(torch, name)
)
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    """Dtype and shape. Local."""
    return tensor.dtype, tensor.shape


def encode_specs(specs: Iterable[TensorSpec]) -> list[int]:
    """The words of some specifications, one after the other. Local."""
    words: list[int] = []
    for dtype, shape in specs:
        words += [_CODES[dtype], len(shape), *shape]
    return words


def decode_specs(words: Sequence[int], count: int) -> list[TensorSpec]:
    """The inverse of :func:`encode_specs`, for the first ``count`` specifications. Local."""
    specs: list[TensorSpec] = []
    place = 0
    for _ in range(count):
        end = place + 2 + words[place + 1]
        specs.append((_DTYPES[words[place]], torch.Size(words[place + 2 : end])))
        place = end
    return specs
