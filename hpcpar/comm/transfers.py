"""Collectives that move data, with mpi4py's signatures.

*Transfers* (``Bcast Allgather Gather Scatter Alltoall``) move blocks of one size: every rank sends
``send_blocks`` and receives ``recv_blocks`` of them. *Vector transfers* (``Allgatherv Alltoallv``) move parts
of different sizes.

Data that is neither a tensor nor an ordinary numpy array goes to mpi4py as it is.
"""

from __future__ import annotations

from typing import Any

import torch

from hpcpar.comm.base import CommunicatorBase
from hpcpar.comm.buffers import HostBuffer, VectorSpec, block_type, memory, mpi_type, part_types
from hpcpar.comm.mpi import MPI
from hpcpar.comm.point_to_point import plain_tensor
from hpcpar.comm.request import Request, wait_all
from hpcpar.errors import MismatchError

__all__ = ["Transfers"]

Buffer = Any


class Transfers(CommunicatorBase):
    """The collectives of :class:`~hpcpar.comm.communicator.Communicator` that move data."""

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
