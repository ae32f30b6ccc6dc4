"""The leaves of a state that have many bytes: tensors, arrays, byte strings, each as one stretch of memory.

What is written is the memory of a contiguous copy on the host, so every dtype of torch is saved alike, those
that HDF5 and numpy lack included, and what comes back is the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch.nn.parameter import is_lazy

from hpcpar.errors import CheckpointError

__all__ = [
    "Leaf",
    "LeafValue",
    "array_dtype",
    "as_bytes",
    "describe_leaf",
    "empty_leaf",
    "finished",
    "memory_of",
    "nbytes_of",
    "value_nbytes",
]

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

LeafValue = torch.Tensor | np.ndarray[Any, Any] | np.generic | bytes | bytearray
Leaf = Mapping[str, Any]

_KINDS_OF_ARRAYS = "biufcSUMm?"


def memory_of(array: np.ndarray[Any, Any]) -> memoryview:
    """The memory of a contiguous array, for calls that want a buffer. Local."""
    return memoryview(cast("ReadableBuffer", array))


def describe_leaf(value: LeafValue, where: str) -> dict[str, Any]:
    """What must be known to make the value again from its bytes. Local.

    Raises
    ------
    CheckpointError
        For tensors and arrays that are more than a block of numbers.
    """
    if isinstance(value, torch.Tensor) and is_lazy(value):
        raise CheckpointError(
            f"{where} must have a shape, got one that is not yet initialised. Run the lazy module once first"
        )
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or value.is_meta or value.is_quantized or value.is_nested:
            raise CheckpointError(
                f"{where} must be a dense tensor with contents, got one of layout {value.layout} on "
                f"{value.device}. Convert it first, for instance by to_dense()"
            )
        return {"$": "tensor", "dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
    if isinstance(value, (np.ndarray, np.generic)):
        if value.dtype.kind not in _KINDS_OF_ARRAYS:
            raise CheckpointError(f"{where} must be an array of numbers or strings, got dtype {value.dtype}")
        kind = "array" if isinstance(value, np.ndarray) else "scalar"
        return {"$": kind, "dtype": value.dtype.str, "shape": list(value.shape)}
    return {"$": "bytes", "dtype": "|u1", "shape": [len(value)]}


def value_nbytes(value: LeafValue) -> int:
    """How many bytes its contents have. Local."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.dtype.itemsize
    return len(value) if isinstance(value, (bytes, bytearray)) else value.nbytes


def array_dtype(leaf: Leaf) -> torch.dtype | np.dtype[Any]:
    """The dtype that a description names. Local.

    Raises
    ------
    ValueError, TypeError
        When there is none of that name.
    """
    if leaf["$"] != "tensor":
        found = np.dtype(str(leaf["dtype"]))
        if found.kind not in _KINDS_OF_ARRAYS:
            raise ValueError(f"{leaf['dtype']!r} is not a dtype of numbers or strings")
        return found
    dtype = getattr(torch, str(leaf["dtype"]), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"this PyTorch has no dtype {leaf['dtype']!r}")
    return dtype


def nbytes_of(leaf: Leaf) -> int:
    """Bytes of the contents. Local."""
    count = array_dtype(leaf).itemsize
    for extent in leaf["shape"]:
        if not isinstance(extent, int) or extent < 0:
            raise ValueError(f"{leaf['shape']!r} is not a shape")
        count *= extent
    return count


def as_bytes(value: LeafValue) -> torch.Tensor:
    """The contents as bytes on the host: the memory itself where it is contiguous there, else a copy. Local.

    Returns
    -------
    torch.Tensor
        uint8, one dimension.
    """
    if isinstance(value, (bytes, bytearray)):
        return _of_array(np.frombuffer(value, dtype=np.uint8))
    if isinstance(value, (np.ndarray, np.generic)):
        return _of_array(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
    flat = value.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8)


def _of_array(flat: np.ndarray[Any, Any]) -> torch.Tensor:
    if not flat.size:
        return torch.empty(0, dtype=torch.uint8)
    if flat.flags.writeable:
        return torch.from_numpy(flat)
    # Torch warns of memory that must not be written; nobody does here, and a copy costs little for these.
    return torch.from_numpy(flat.copy())


def empty_leaf(leaf: Leaf) -> tuple[LeafValue, torch.Tensor]:
    """A new tensor or array for a leaf, and the memory to read its bytes into. Local."""
    dtype = array_dtype(leaf)
    if isinstance(dtype, torch.dtype):
        tensor = torch.empty(leaf["shape"], dtype=dtype)
        return tensor, as_bytes(tensor)
    array = np.empty(leaf["shape"], dtype=dtype)
    memory = (
        torch.from_numpy(array.reshape(-1).view(np.uint8))
        if array.size
        else torch.empty(0, dtype=torch.uint8)
    )
    return array, memory


def finished(leaf: Leaf, value: LeafValue) -> LeafValue:
    """What the caller gets, once the memory of :func:`empty_leaf` has been filled. Local."""
    if leaf["$"] == "bytes":
        return np.asarray(value).tobytes()
    if leaf["$"] == "scalar":
        return cast(np.generic, np.asarray(value)[()])
    return value
