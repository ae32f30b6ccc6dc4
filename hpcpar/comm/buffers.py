"""Tensors as MPI buffers: any dtype, stride and device.

MPI reads and writes contiguous host memory of types it knows. A tensor that is that already is handed over
in place, by address. Any other is staged: what MPI sends is a contiguous host copy, and what MPI receives
is delivered into the tensor when the operation is complete (:class:`hpcpar.comm.request.Request` does it).

A tensor type that MPI does not know (the 16-bit and 8-bit floats) travels as an integer of the same width;
only reductions need arithmetic, and :mod:`hpcpar.comm.ordered_reduction` does that.

MPI counts are C ints. A block of more than ``limit`` elements travels as *one* element of a derived
datatype of the same extent, which works with every MPI and every operation that only moves data.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hpcpar.comm.mpi import MPI
from hpcpar.errors import MismatchError

if TYPE_CHECKING:
    from mpi4py import MPI as MPITypes

__all__ = ["COUNT_LIMIT", "HostBuffer", "VectorSpec", "accumulation_dtype", "as_tensor", "mpi_type"]

COUNT_LIMIT = 2**31 - 1
"""Largest count that every MPI takes, in elements."""


@functools.cache
def _native_types() -> dict[torch.dtype, MPITypes.Datatype]:
    """Types that MPI can reduce."""
    return {
        torch.bool: MPI.C_BOOL,
        torch.uint8: MPI.UINT8_T,
        torch.uint16: MPI.UINT16_T,
        torch.uint32: MPI.UINT32_T,
        torch.uint64: MPI.UINT64_T,
        torch.int8: MPI.INT8_T,
        torch.int16: MPI.INT16_T,
        torch.int32: MPI.INT32_T,
        torch.int64: MPI.INT64_T,
        torch.float32: MPI.FLOAT,
        torch.float64: MPI.DOUBLE,
        torch.complex64: MPI.C_FLOAT_COMPLEX,
        torch.complex128: MPI.C_DOUBLE_COMPLEX,
    }


def mpi_type(dtype: torch.dtype) -> MPITypes.Datatype:
    """The MPI type that carries ``dtype``: its own, or an unsigned integer of the same width. Local."""
    native = _native_types().get(dtype)
    if native is not None:
        return native
    return {1: MPI.UINT8_T, 2: MPI.UINT16_T, 4: MPI.UINT32_T, 8: MPI.UINT64_T}[dtype.itemsize]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype | None:
    """What ``dtype`` is summed in when MPI cannot: ``None`` when MPI can. Local."""
    if dtype in _native_types():
        return None
    return torch.complex64 if dtype.is_complex else torch.float32


def as_tensor(data: object) -> torch.Tensor | None:
    """``data`` as a tensor on the same memory, ``None`` for what only mpi4py understands. Local."""
    if isinstance(data, torch.Tensor):
        if data.layout is not torch.strided:
            raise TypeError(
                f"a tensor buffer must be dense, got layout {data.layout}. Call .to_dense() first"
            )
        if data.is_quantized:
            raise TypeError("a tensor buffer must not be quantized. Send .int_repr() instead")
        return data.detach()
    if isinstance(data, np.ndarray) and all(stride >= 0 for stride in data.strides):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # read-only arrays: we only read what is sent
            try:
                return torch.from_numpy(data)
            except (TypeError, ValueError):
                return None  # structured, big-endian, datetime: mpi4py's own rules apply
    return None


def check_writable(data: object) -> None:
    """Raise for memory that a receive must not write, of which torch knows nothing. Local."""
    if isinstance(data, np.ndarray) and not data.flags.writeable:
        raise ValueError("a receive buffer must be writable, got a read-only numpy array")


def is_type_of(kind: Any, dtype: torch.dtype) -> bool:
    """Whether an MPI type given beside a buffer says no more than its ``dtype`` does. Local."""
    datatype: MPITypes.Datatype = MPI.Datatype.fromcode(kind) if isinstance(kind, str) else kind
    return bool(datatype.is_predefined) and datatype.Get_size() == dtype.itemsize


@dataclass
class HostBuffer:
    """A tensor's contents in contiguous host memory.

    ``host`` is what MPI works on; ``target`` is the caller's tensor when ``host`` is only a staging copy of
    it, else ``None``.
    """

    host: torch.Tensor
    target: torch.Tensor | None = None

    @classmethod
    def to_send(cls, tensor: torch.Tensor) -> HostBuffer:
        """Wrap a tensor that MPI will read. Local."""
        host = tensor.resolve_conj().resolve_neg().cpu().contiguous()
        return cls(host)

    @classmethod
    def to_receive(cls, tensor: torch.Tensor, *, preload: bool = False) -> HostBuffer:
        """Wrap a tensor that MPI will write; ``preload`` keeps its contents (in-place operations). Local."""
        if (
            tensor.device.type == "cpu"
            and tensor.is_contiguous()
            and not tensor.is_conj()
            and not tensor.is_neg()
        ):
            return cls(tensor)
        if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
            raise ValueError(
                "a receive buffer must have memory of its own for each element, got a tensor expanded to "
                f"shape {tuple(tensor.shape)} with strides {tensor.stride()}. Receive into .contiguous()"
            )
        pin = tensor.device.type == "cuda"
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pin)
        if preload:
            host.copy_(tensor)
        return cls(host, tensor)

    def deliver(self) -> None:
        """Copy what MPI wrote to where the caller wants it. Local."""
        if self.target is not None:
            self.target.copy_(self.host)

    @property
    def flat(self) -> torch.Tensor:
        """The host memory as one dimension."""
        return self.host.view(-1)


def memory(flat: torch.Tensor) -> Any:
    """The bytes of a contiguous host tensor, as mpi4py takes them. Local."""
    return MPI.buffer.fromaddress(flat.data_ptr(), flat.numel() * flat.element_size())


def block_type(dtype: torch.dtype, count: int, limit: int) -> tuple[MPITypes.Datatype, bool]:
    """A datatype for blocks of ``count`` elements, and whether it is derived (and must be freed). Local.

    Up to ``limit`` elements that is the element type, and MPI counts elements. Above, it is one type of
    ``count`` elements, and MPI counts blocks: ``q`` chunks of ``limit`` elements and a remainder.
    """
    base = mpi_type(dtype)
    if count <= limit:
        return base, False
    chunks, rest = divmod(count, limit)
    chunk = base.Create_contiguous(limit)
    body = chunk.Create_contiguous(chunks)
    tail = base.Create_contiguous(rest)
    offset = chunks * limit * dtype.itemsize
    derived = MPI.Datatype.Create_struct([1, 1], [0, offset], [body, tail]).Commit()
    for part in (chunk, body, tail):
        part.Free()
    return derived, True


def is_readable(tensor: torch.Tensor) -> bool:
    """Whether MPI can read a tensor where it lies. Local."""
    is_plain = tensor.device.type == "cpu" and tensor.is_contiguous()
    return is_plain and not tensor.is_conj() and not tensor.is_neg()


def start_bytes(operation: Any, host: torch.Tensor, peer: int, tag: int, limit: int) -> MPITypes.Request:
    """Start ``Isend`` or ``Irecv`` of a contiguous host tensor as bytes. Point-to-point.

    Cheaper than by the type of the elements, which only reductions need.
    """
    handle: MPITypes.Request
    if host.nbytes <= limit:
        handle = operation(memory(host), peer, tag)
        return handle
    kind, derived = block_type(host.dtype, host.numel(), limit)
    handle = operation([memory(host), kind], peer, tag)
    if derived:
        kind.Free()
    return handle


@dataclass(frozen=True)
class VectorSpec:
    """A buffer whose parts have sizes of their own, as in ``Alltoallv``: ``[data, counts, displs]``.

    Parameters
    ----------
    tensor
        The whole buffer.
    counts, displs
        Elements in the part of each rank, and where it starts in the flattened buffer.
    """

    tensor: torch.Tensor
    counts: tuple[int, ...]
    displs: tuple[int, ...]

    @classmethod
    def parse(cls, spec: object, size: int, *, name: str, writable: bool = False) -> VectorSpec | None:
        """Read an mpi4py vector specification; ``None`` for data that only mpi4py understands. Local.

        Parameters
        ----------
        spec
            ``data``, ``[data, counts]``, ``[data, (counts, displs)]``, ``[data, counts, displs]``, each
            with an MPI type at the end if you like. Without counts the buffer is divided evenly.
        size
            Number of parts.
        name
            Of the operation, for errors.
        writable
            Whether the buffer will be received into.
        """
        parts = list(spec) if isinstance(spec, (list, tuple)) else [spec]
        tensor = as_tensor(parts[0])
        if tensor is None:
            return None
        if (
            len(parts) > 1
            and isinstance(parts[-1], (str, MPI.Datatype))
            and not is_type_of(parts.pop(), tensor.dtype)
        ):
            return None
        if writable:
            check_writable(parts[0])
        counts, displs = (parts[1] if len(parts) > 1 else None), (parts[2] if len(parts) > 2 else None)
        if isinstance(counts, tuple) and len(counts) == 2 and (counts[0] is None or np.ndim(counts[0])):
            counts, displs = counts
        if counts is None:
            counts = [_even_share(tensor.numel(), size, name)] * size
        return cls(tensor, *_vector_layout(tensor.numel(), counts, displs, size, name))

    @property
    def packed_displs(self) -> tuple[int, ...]:
        """Where the parts would start if they followed each other without gaps, in rank order."""
        return tuple(accumulate((0, *self.counts[:-1])))

    @property
    def is_packed(self) -> bool:
        """Whether the parts follow each other without gaps, in rank order."""
        places = zip(self.counts, self.displs, self.packed_displs, strict=True)
        return all(count == 0 or displ == packed for count, displ, packed in places)


def _even_share(numel: int, size: int, name: str) -> int:
    if numel % size:
        raise MismatchError(
            f"the buffer of {name} must divide by {size} ranks, got {numel} elements. Pass counts"
        )
    return numel // size


def _vector_layout(
    numel: int, counts: Any, displs: Any, size: int, name: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    counts = tuple(int(count) for count in counts)
    displs = tuple(accumulate((0, *counts[:-1]))) if displs is None else tuple(int(d) for d in displs)
    if len(counts) != size or len(displs) != size:
        raise MismatchError(
            f"counts and displs of {name} must have {size} entries, got {len(counts)} and {len(displs)}"
        )
    ends = [d + c for c, d in zip(counts, displs, strict=True) if c]
    if min((*counts, *displs), default=0) < 0 or max(ends, default=0) > numel:
        raise MismatchError(
            f"the parts of {name} must lie inside the buffer of {numel} elements, got counts {list(counts)} "
            f"at {list(displs)}"
        )
    return counts, displs


def part_types(
    spec: VectorSpec, limit: int
) -> tuple[list[int], list[int], list[MPITypes.Datatype], list[Any]]:
    """Counts, byte displacements and types for ``Alltoallw``, and the derived types to free. Local.

    ``Alltoallw`` takes its displacements as C ints of *bytes*; a part beyond them gets a type that carries
    its displacement inside, as does a part of more than ``limit`` elements.
    """
    base, itemsize = mpi_type(spec.tensor.dtype), spec.tensor.dtype.itemsize
    parts: list[tuple[int, int, MPITypes.Datatype]] = []
    derived = []
    for count, displ in zip(spec.counts, spec.displs, strict=True):
        offset = displ * itemsize if count else 0
        if count <= limit and offset <= limit:
            parts.append((count, offset, base))
            continue
        block, is_derived = block_type(spec.tensor.dtype, count, limit)
        placed = MPI.Datatype.Create_struct([1 if is_derived else count], [offset], [block]).Commit()
        if is_derived:
            block.Free()
        derived.append(placed)
        parts.append((1, 0, placed))
    counts, displs, types = (list(column) for column in zip(*parts, strict=True))
    return counts, displs, types, derived


def chunk_bounds(count: int, limit: int) -> Sequence[tuple[int, int]]:
    """Cut ``count`` elements into ranges of at most ``limit``; one empty range for nothing. Local."""
    return [(start, min(start + limit, count)) for start in range(0, max(count, 1), limit)]
