"""Collectives that compute, with mpi4py's signatures.

What MPI can reduce, MPI reduces, in chunks that its counts can express. Types that it cannot add (16-bit and
8-bit floats) become an :class:`~hpcpar.comm.ordered_reduction.OrderedReduction`. Booleans are reduced by the
logical operator that torch means by an arithmetic one.

Data that is neither a tensor nor an ordinary numpy array goes to mpi4py as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from hpcpar.comm import debug
from hpcpar.comm.base import CommunicatorBase
from hpcpar.comm.buffers import HostBuffer, accumulation_dtype, chunk_bounds, memory, mpi_type
from hpcpar.comm.mpi import MPI
from hpcpar.comm.ordered_reduction import (
    Combine,
    OrderedReduction,
    combine_in_order,
    prefixes_in_order,
    slice_bounds,
)
from hpcpar.comm.point_to_point import plain_tensor
from hpcpar.comm.request import Request
from hpcpar.errors import MismatchError

if TYPE_CHECKING:
    from mpi4py import MPI as MPITypes

__all__ = ["Reductions"]

Buffer = Any
Op = Any


class Reductions(CommunicatorBase):
    """The collectives of :class:`~hpcpar.comm.communicator.Communicator` that compute."""

    def Allreduce(self, sendbuf: Buffer, recvbuf: Buffer, op: Op = None) -> None:
        """Reduce the buffers of all ranks element by element, result on every rank. Collective.

        Parameters
        ----------
        sendbuf
            Contribution, or ``MPI.IN_PLACE`` when ``recvbuf`` holds it.
        recvbuf
            Result, as many elements of the same dtype.
        op
            An MPI operator, ``MPI.SUM`` by default.
        """
        self._reduce("Allreduce", sendbuf, recvbuf, op, blocking=True).wait()

    def Iallreduce(self, sendbuf: Buffer, recvbuf: Buffer, op: Op = None) -> Request:
        """Start an ``Allreduce``. Collective."""
        return self._reduce("Allreduce", sendbuf, recvbuf, op, blocking=False)

    def Reduce(self, sendbuf: Buffer, recvbuf: Buffer, op: Op = None, root: int = 0) -> None:
        """Reduce the buffers of all ranks, result in ``recvbuf`` of ``root``. Collective."""
        if self.rank != root:
            sendbuf, recvbuf = (recvbuf, None) if sendbuf is MPI.IN_PLACE else (sendbuf, None)
        self._check_root("Reduce", root)
        self._reduce("Reduce", sendbuf, recvbuf, op, root=root, blocking=True).wait()

    def Scan(self, sendbuf: Buffer, recvbuf: Buffer, op: Op = None) -> None:
        """Reduce the buffers of ranks 0 to this one, inclusive. Collective."""
        self._reduce("Scan", sendbuf, recvbuf, op, blocking=True).wait()

    def Exscan(self, sendbuf: Buffer, recvbuf: Buffer, op: Op = None) -> None:
        """Reduce the buffers of the ranks before this one; rank 0 keeps ``recvbuf``. Collective."""
        self._reduce("Exscan", sendbuf, recvbuf, op, blocking=True).wait()

    def Reduce_scatter_block(self, sendbuf: Buffer, recvbuf: Buffer, op: Op = None) -> None:
        """Reduce, and leave block *r* of the result on rank *r*. Collective."""
        self._reduce_scatter(sendbuf, recvbuf, op).wait()

    def _reduce(
        self,
        operation: str,
        sendbuf: Buffer,
        recvbuf: Buffer,
        op: Op,
        *,
        blocking: bool,
        root: int | None = None,
    ) -> Request:
        op = MPI.SUM if op is None else op
        rooted = () if root is None else (root,)
        self._check_given(operation, root, sendbuf, recvbuf)
        send, recv = plain_tensor(sendbuf), plain_tensor(recvbuf, writable=True)
        in_place = sendbuf is MPI.IN_PLACE
        foreign = (send is None and not in_place) or (recv is None and recvbuf is not None)
        sample = recv if send is None else send
        if sample is None or foreign:
            self._enter(operation, root)
            handle = getattr(self.mpi, "I" + operation.lower())(sendbuf, recvbuf, op, *rooted)
            return Request(operation, [handle], self._collective_patience, keep=(sendbuf, recvbuf))
        self._check_pair(operation, send, recv)
        self._check_operator(operation, op, sample.dtype)
        sink = (
            None if recv is None else HostBuffer.to_receive(recv, preload=in_place or operation == "Exscan")
        )
        source = sink if send is None else HostBuffer.to_send(send)
        deliver = (lambda: None) if sink is None else sink.deliver
        assert source is not None  # one of the two buffers was a tensor
        self._enter(operation, sample.dtype, sample.numel(), root, op)
        if accumulation_dtype(sample.dtype) is not None:
            return self._reduce_in_order(operation, source, sink, op, root, deliver)
        op = _logical(op) if sample.dtype is torch.bool else op
        kind = mpi_type(sample.dtype)
        call = self._method(operation, sample.nbytes, blocking)
        handles = []
        for start, end in chunk_bounds(sample.numel(), self._count_limit):
            send_spec = MPI.IN_PLACE if in_place else [memory(source.flat[start:end]), kind]
            recv_spec = None if sink is None else [memory(sink.flat[start:end]), kind]
            handles += call(send_spec, recv_spec, op, *rooted)
        return Request(operation, handles, self._collective_patience, keep=(source, sink), deliver=deliver)

    def _check_pair(self, operation: str, send: torch.Tensor | None, recv: torch.Tensor | None) -> None:
        if send is None or recv is None or (send.numel() == recv.numel() and send.dtype == recv.dtype):
            return
        raise MismatchError(
            f"sendbuf and recvbuf of {operation} must have the same number of elements and dtype, got "
            f"{send.numel()} of {send.dtype} and {recv.numel()} of {recv.dtype} ({self._where})"
        )

    def _check_operator(self, operation: str, op: Op, dtype: torch.dtype) -> None:
        """Raise for an operator that does not fit, before this rank takes a number or sends a message."""
        is_narrow = accumulation_dtype(dtype) is not None
        if isinstance(op, MPI.Op) and not op.is_predefined and not is_narrow:
            return
        names = ["SUM", "PROD"] if dtype.is_complex else ["SUM", "PROD", "MAX", "MIN"]
        if not (dtype.is_floating_point or dtype.is_complex):
            names += ["LAND", "LOR", "LXOR", "BAND", "BOR", "BXOR"]
        if not any(op == getattr(MPI, name) for name in names):
            raise TypeError(
                f"operator of {operation} on {dtype} must be one of MPI.{', '.join(names)}, "
                f"got {debug.describe(op)} ({self._where})"
            )

    def _reduce_in_order(
        self,
        operation: str,
        source: HostBuffer,
        sink: HostBuffer | None,
        op: Op,
        root: int | None,
        deliver: Any,
    ) -> Request:
        """A reduction of a type that MPI cannot add; see :mod:`hpcpar.comm.ordered_reduction`."""
        bounds = slice_bounds(source.flat.numel(), self.size)
        out: list[torch.Tensor | None] = (
            [None] * self.size if sink is None else [sink.flat[start:end] for start, end in bounds]
        )

        def combine(rows: torch.Tensor) -> Sequence[torch.Tensor | None]:
            if operation == "Scan":
                return prefixes_in_order(rows, op)
            if operation == "Exscan":
                return [None, *prefixes_in_order(rows, op)[:-1]]
            result = combine_in_order(rows, op)
            return [result if root in (None, rank) else None for rank in range(self.size)]

        if operation == "Exscan" and self.rank == 0:
            out = [None] * self.size
        return self._ordered(operation, source.flat, bounds, combine, out, deliver)

    def _ordered(
        self,
        operation: str,
        send: torch.Tensor,
        bounds: Sequence[tuple[int, int]],
        combine: Combine,
        receive: Sequence[torch.Tensor | None],
        deliver: Any,
    ) -> Request:
        reduction = OrderedReduction(
            operation,
            self._collective_patience,
            self._control,
            self._tag(),
            send=send,
            bounds=bounds,
            combine=combine,
            receive=receive,
            deliver=deliver,
            limit=self._count_limit,
        )
        self._staged.add(reduction)
        return reduction

    def _reduce_scatter(self, sendbuf: Buffer, recvbuf: Buffer, op: Op) -> Request:
        operation, op = "Reduce_scatter_block", MPI.SUM if op is None else op
        send, recv = plain_tensor(sendbuf), plain_tensor(recvbuf, writable=True)
        if recv is None or (send is None and sendbuf is not MPI.IN_PLACE):
            self._enter(operation)
            handle = self.mpi.Ireduce_scatter_block(sendbuf, recvbuf, op)
            return Request(operation, [handle], self._collective_patience, keep=(sendbuf, recvbuf))
        if send is None:  # in place: recvbuf holds all blocks, and block 0 gets the result, as in MPI
            send = recv.clone()
            recv = _first_block(recv, self.size)
        block, dtype = self._block(operation, send, recv, self.size, 1)
        self._check_operator(operation, op, dtype)
        source, sink = HostBuffer.to_send(send), HostBuffer.to_receive(recv)
        self._enter(operation, dtype, block, op)
        if accumulation_dtype(dtype) is None:
            op = _logical(op) if dtype is torch.bool else op
            return self._reduce_scatter_natively(source, sink, op)
        bounds = [(rank * block, (rank + 1) * block) for rank in range(self.size)]
        receive: list[torch.Tensor | None] = [None] * self.size
        receive[self.rank] = sink.flat

        def combine(rows: torch.Tensor) -> Sequence[torch.Tensor | None]:
            results: list[torch.Tensor | None] = [None] * self.size
            results[self.rank] = combine_in_order(rows, op)
            return results

        return self._ordered(operation, source.flat, bounds, combine, receive, sink.deliver)

    def _reduce_scatter_natively(self, source: HostBuffer, sink: HostBuffer, op: Op) -> Request:
        operation, result, kind = "Reduce_scatter_block", sink.flat, mpi_type(sink.host.dtype)
        blocks = source.flat.view(self.size, result.numel())
        call = self._method(operation, blocks.nbytes, blocking=True)
        handles: list[MPITypes.Request] = []
        pieces = []
        for start, end in chunk_bounds(result.numel(), self._count_limit):
            pieces.append(blocks[:, start:end].contiguous())  # a copy only when there are several chunks
            handles += call([memory(pieces[-1]), kind], [memory(result[start:end]), kind], op)
        return Request(
            operation, handles, self._collective_patience, keep=(pieces, sink), deliver=sink.deliver
        )


def _logical(op: Op) -> Op:
    """MPI's logical operator for what torch means by an arithmetic one on booleans."""
    table = (
        (MPI.LOR, (MPI.SUM, MPI.MAX, MPI.BOR)),
        (MPI.LAND, (MPI.PROD, MPI.MIN, MPI.BAND)),
        (MPI.LXOR, (MPI.BXOR,)),
    )
    return next((logical for logical, meant in table if op in meant), op)


def _first_block(tensor: torch.Tensor, blocks: int) -> torch.Tensor:
    if not tensor.is_contiguous() or tensor.numel() % blocks:
        raise MismatchError(
            f"an in-place Reduce_scatter_block must have a contiguous recvbuf that divides by {blocks} "
            f"ranks, got shape {tuple(tensor.shape)}"
        )
    return tensor.view(-1)[: tensor.numel() // blocks]
