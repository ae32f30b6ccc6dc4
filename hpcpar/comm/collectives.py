"""Collectives on tensors, with mpi4py's signatures.

Three families share their code. *Transfers* (``Bcast Allgather Gather Scatter Alltoall``) only move blocks;
every rank sends ``send_blocks`` and receives ``recv_blocks`` blocks of one size. *Vector transfers*
(``Allgatherv Alltoallv``) move parts of different sizes. *Reductions* compute; for types that MPI cannot
add they become an :class:`~hpcpar.comm.ordered_reduction.OrderedReduction`.

Data that is neither a tensor nor an ordinary numpy array goes to mpi4py as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from hpcpar.comm import debug
from hpcpar.comm.base import CommunicatorBase
from hpcpar.comm.buffers import (
    HostBuffer,
    VectorSpec,
    accumulation_dtype,
    block_type,
    chunk_bounds,
    memory,
    mpi_type,
    part_types,
)
from hpcpar.comm.mpi import MPI
from hpcpar.comm.ordered_reduction import (
    Combine,
    OrderedReduction,
    combine_in_order,
    prefixes_in_order,
    slice_bounds,
)
from hpcpar.comm.point_to_point import plain_tensor
from hpcpar.comm.request import Request, wait_all
from hpcpar.errors import MismatchError

if TYPE_CHECKING:
    from mpi4py import MPI as MPITypes

__all__ = ["Collectives"]

Buffer = Any
Op = Any


class Collectives(CommunicatorBase):
    """The collective half of :class:`~hpcpar.comm.communicator.Communicator`."""

    # Transfers -------------------------------------------------------------------------------------------

    def Barrier(self) -> None:
        """Wait until every rank has come here. Collective."""
        self._enter("Barrier")
        Request("Barrier", [self.mpi.Ibarrier()], self._collective_patience).wait()

    def Ibarrier(self) -> Request:
        """Start a barrier; it is complete when every rank has started it. Collective."""
        self._enter("Ibarrier")
        return Request("Ibarrier", [self.mpi.Ibarrier()], self._collective_patience)

    def Bcast(self, buf: Buffer, root: int = 0) -> None:
        """Copy ``buf`` of ``root`` to all ranks. Collective."""
        self._broadcast("Bcast", buf, root, blocking=True).wait()

    def Ibcast(self, buf: Buffer, root: int = 0) -> Request:
        """Start a ``Bcast``. Collective."""
        return self._broadcast("Bcast", buf, root, blocking=False)

    def Allgather(self, sendbuf: Buffer, recvbuf: Buffer) -> None:
        """Concatenate the buffers of all ranks in ``recvbuf``, on every rank. Collective."""
        self._transfer("Allgather", sendbuf, recvbuf, 1, self.size, blocking=True).wait()

    def Iallgather(self, sendbuf: Buffer, recvbuf: Buffer) -> Request:
        """Start an ``Allgather``. Collective."""
        return self._transfer("Allgather", sendbuf, recvbuf, 1, self.size, blocking=False)

    def Gather(self, sendbuf: Buffer, recvbuf: Buffer, root: int = 0) -> None:
        """Concatenate the buffers of all ranks in ``recvbuf`` of ``root``. Collective."""
        recvbuf = recvbuf if self.rank == root else None
        self._transfer("Gather", sendbuf, recvbuf, 1, self.size, root=root, blocking=True).wait()

    def Scatter(self, sendbuf: Buffer, recvbuf: Buffer, root: int = 0) -> None:
        """Deal the blocks of ``sendbuf`` of ``root`` out to the ranks. Collective."""
        sendbuf = sendbuf if self.rank == root else None
        self._transfer("Scatter", sendbuf, recvbuf, self.size, 1, root=root, blocking=True).wait()

    def Alltoall(self, sendbuf: Buffer, recvbuf: Buffer) -> None:
        """Send block *j* of ``sendbuf`` to rank *j*, receive its block for me. Collective."""
        self._transfer("Alltoall", sendbuf, recvbuf, self.size, self.size, blocking=True).wait()

    def Ialltoall(self, sendbuf: Buffer, recvbuf: Buffer) -> Request:
        """Start an ``Alltoall``. Collective."""
        return self._transfer("Alltoall", sendbuf, recvbuf, self.size, self.size, blocking=False)

    def Allgatherv(self, sendbuf: Buffer, recvbuf: Buffer) -> None:
        """``Allgather`` of parts of different sizes, ``recvbuf = [data, counts, displs]``. Collective."""
        self._allgatherv(sendbuf, recvbuf).wait()

    def Alltoallv(self, sendbuf: Buffer, recvbuf: Buffer) -> None:
        """``Alltoall`` of parts of different sizes, both ``[data, counts, displs]``. Collective."""
        self._alltoallv("Alltoallv", sendbuf, recvbuf).wait()

    def Ialltoallv(self, sendbuf: Buffer, recvbuf: Buffer) -> Request:
        """Start an ``Alltoallv``. Collective."""
        return self._alltoallv("Alltoallv", sendbuf, recvbuf)

    # Reductions ------------------------------------------------------------------------------------------

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

    # How transfers are made ------------------------------------------------------------------------------

    def _broadcast(self, operation: str, buf: Buffer, root: int, *, blocking: bool) -> Request:
        self._check_root(operation, root)
        if buf is None:
            raise TypeError(f"buf of {operation} must be a buffer, got None ({self._where})")
        tensor = plain_tensor(buf, writable=self.rank != root)
        if tensor is None:
            self._enter(operation)
            return Request(operation, [self.mpi.Ibcast(buf, root)], self._collective_patience, keep=buf)
        buffer = HostBuffer.to_send(tensor) if self.rank == root else HostBuffer.to_receive(tensor)
        self._enter(operation, tensor.dtype, tensor.numel(), root)
        kind, derived = block_type(tensor.dtype, tensor.numel(), self._count_limit)
        call = self._method(operation, tensor.nbytes, blocking)
        handles = call([memory(buffer.flat), kind], root)
        if derived:
            kind.Free()
        return Request(operation, handles, self._collective_patience, keep=buffer, deliver=buffer.deliver)

    def _transfer(
        self,
        operation: str,
        sendbuf: Buffer,
        recvbuf: Buffer,
        send_blocks: int,
        recv_blocks: int,
        *,
        blocking: bool,
        root: int | None = None,
    ) -> Request:
        rooted = () if root is None else (root,)
        if root is not None:
            self._check_root(operation, root)
        self._check_given(operation, root, sendbuf, recvbuf)
        in_place = MPI.IN_PLACE
        send = plain_tensor(sendbuf, blocks=send_blocks)
        recv = plain_tensor(recvbuf, blocks=recv_blocks, writable=True)
        if send is None and recv is None:
            self._enter(operation, root)
            handle = getattr(self.mpi, "I" + operation.lower())(sendbuf, recvbuf, *rooted)
            return Request(operation, [handle], self._collective_patience, keep=(sendbuf, recvbuf))
        if operation == "Alltoall" and sendbuf is in_place and recv is not None:
            send = sendbuf = recv.clone()
        block, dtype = self._block(operation, send, recv, send_blocks, recv_blocks)
        source = None if send is None else HostBuffer.to_send(send)
        sink = None if recv is None else HostBuffer.to_receive(recv, preload=sendbuf is in_place)
        self._enter(operation, dtype, block, root)
        kind, derived = block_type(dtype, block, self._count_limit)
        send_spec = sendbuf if source is None else [memory(source.flat), kind]
        recv_spec = recvbuf if sink is None else [memory(sink.flat), kind]
        handles = self._method(operation, block * dtype.itemsize, blocking)(send_spec, recv_spec, *rooted)
        if derived:
            kind.Free()
        deliver = None if sink is None else sink.deliver
        return Request(operation, handles, self._collective_patience, keep=(source, sink), deliver=deliver)

    def _block(
        self,
        operation: str,
        send: torch.Tensor | None,
        recv: torch.Tensor | None,
        send_blocks: int,
        recv_blocks: int,
    ) -> tuple[int, torch.dtype]:
        """Elements and type of a block, the same by both buffers of this rank."""
        sizes = [
            (name, tensor, tensor.numel(), blocks)
            for name, tensor, blocks in (("sendbuf", send, send_blocks), ("recvbuf", recv, recv_blocks))
            if tensor is not None
        ]
        for name, _, numel, blocks in sizes:
            if numel % blocks:
                raise MismatchError(
                    f"{name} of {operation} must divide by {blocks} ranks, "
                    f"got {numel} elements ({self._where})"
                )
        found = {(numel // blocks, tensor.dtype) for _, tensor, numel, blocks in sizes}
        if len(found) > 1:
            text = " and ".join(f"{n} of {t.dtype} in {b} block(s)" for n, t, _, b in sizes)
            raise MismatchError(
                f"the blocks of {operation} must be equal, got {text}: "
                f"{[numel for _, _, numel, _ in sizes]} elements ({self._where})"
            )
        return found.pop()

    def _allgatherv(self, sendbuf: Buffer, recvbuf: Buffer) -> Request:
        operation = "Allgatherv"
        spec = VectorSpec.parse(recvbuf, self.size, name=operation, writable=True)
        if spec is None:
            self._enter(operation)
            handle = self.mpi.Iallgatherv(sendbuf, recvbuf)
            return Request(operation, [handle], self._collective_patience, keep=(sendbuf, recvbuf))
        mine, displs = spec.counts[self.rank], spec.packed_displs
        sink = HostBuffer.to_receive(spec.tensor, preload=True)  # what no part covers keeps its contents
        flat = sink.flat if spec.is_packed else sink.flat.new_empty(sum(spec.counts))
        pieces = [flat[d : d + c] for c, d in zip(spec.counts, displs, strict=True)]
        places = [sink.flat[d : d + c] for c, d in zip(spec.counts, spec.displs, strict=True)]
        own = pieces[self.rank]
        if sendbuf is MPI.IN_PLACE and not spec.is_packed:
            own.copy_(places[self.rank])
        if sendbuf is not MPI.IN_PLACE:
            send = plain_tensor(sendbuf)
            if send is None or send.numel() != mine or send.dtype != spec.tensor.dtype:
                got = "no tensor" if send is None else f"{send.numel()} of {send.dtype}"
                raise MismatchError(
                    f"sendbuf of {operation} must hold the {mine} elements of {spec.tensor.dtype} that "
                    f"counts announces, got {got} ({self._where})"
                )
            own.copy_(HostBuffer.to_send(send).flat)

        self._enter(operation, spec.tensor.dtype, spec.counts)

        def deliver() -> None:
            if not spec.is_packed:
                for piece, place in zip(pieces, places, strict=True):
                    place.copy_(piece)
            sink.deliver()

        # As many broadcasts when MPI cannot count the whole. Every rank knows all counts and so agrees;
        # displacements may differ between ranks, which is why gaps are filled by us and not by MPI.
        if sum(spec.counts) > self._count_limit:
            wait_all(
                [self._broadcast("Bcast", part, root, blocking=False) for root, part in enumerate(pieces)]
            )
            return Request(operation, [], self._collective_patience, deliver=deliver)
        receive = [memory(flat), spec.counts, displs, mpi_type(spec.tensor.dtype)]
        handle = self.mpi.Iallgatherv(MPI.IN_PLACE, receive)
        return Request(operation, [handle], self._collective_patience, keep=(sink, flat), deliver=deliver)

    def _alltoallv(self, operation: str, sendbuf: Buffer, recvbuf: Buffer) -> Request:
        recv = VectorSpec.parse(recvbuf, self.size, name=operation, writable=True)
        if recv is None:
            self._enter(operation)
            handle = self.mpi.Ialltoallv(sendbuf, recvbuf)
            return Request(operation, [handle], self._collective_patience, keep=(sendbuf, recvbuf))
        if sendbuf is MPI.IN_PLACE:
            send = VectorSpec(
                recv.tensor.clone(memory_format=torch.contiguous_format), recv.counts, recv.displs
            )
        else:
            parsed = VectorSpec.parse(sendbuf, self.size, name=operation)
            if parsed is None or parsed.tensor.dtype != recv.tensor.dtype:
                got = "no tensor" if parsed is None else parsed.tensor.dtype
                raise MismatchError(
                    f"both buffers of {operation} must have one dtype, got {got} and {recv.tensor.dtype} "
                    f"({self._where})"
                )
            send = parsed
        source, sink = HostBuffer.to_send(send.tensor), HostBuffer.to_receive(recv.tensor, preload=True)
        self._enter(operation, recv.tensor.dtype)
        # Alltoallw, because its types can carry what does not fit a C int. Whether that is needed only this
        # rank knows, and all ranks must call the same collective.
        *send_parts, send_derived = part_types(send, self._count_limit)
        *recv_parts, recv_derived = part_types(recv, self._count_limit)
        handle = self.mpi.Ialltoallw([memory(source.flat), *send_parts], [memory(sink.flat), *recv_parts])
        for kind in (*send_derived, *recv_derived):
            kind.Free()
        return Request(
            operation, [handle], self._collective_patience, keep=(source, sink), deliver=sink.deliver
        )

    # How reductions are made -----------------------------------------------------------------------------

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
