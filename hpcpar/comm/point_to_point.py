"""Messages between two ranks: mpi4py's ``Send Recv Isend Irecv Sendrecv`` for tensors of any kind.

The signatures are mpi4py's, but ``None`` stands for ``ANY_SOURCE`` and ``ANY_TAG`` in the defaults: their
values belong to the MPI library, and reading them would start it when the module is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hpcpar.comm.base import CommunicatorBase
from hpcpar.comm.buffers import HostBuffer, as_tensor, block_type, check_writable, is_type_of, memory
from hpcpar.comm.mpi import MPI
from hpcpar.comm.request import Request
from hpcpar.errors import MismatchError, StalledError

if TYPE_CHECKING:
    from mpi4py import MPI as MPITypes

__all__ = ["PointToPoint", "plain_tensor"]


def plain_tensor(spec: object, *, writable: bool = False, blocks: int = 1) -> torch.Tensor | None:
    """The tensor of an mpi4py buffer specification; ``None`` for what is left to mpi4py. Local.

    Parameters
    ----------
    spec
        ``data``, ``[data, count]``, ``[data, (count, displ)]`` or ``[data, count, displ]``, each with an MPI
        type at the end if you like.
    writable
        Whether the buffer will be received into.
    blocks
        Blocks of ``count`` elements in the buffer.
    """
    parts = list(spec) if isinstance(spec, (list, tuple)) else [spec]
    tensor = as_tensor(parts[0]) if parts else None
    if tensor is None:
        return None
    if (
        len(parts) > 1
        and isinstance(parts[-1], (str, MPI.Datatype))
        and not is_type_of(parts.pop(), tensor.dtype)
    ):
        return None  # a type of the caller's own
    if writable:
        check_writable(parts[0])
    given = parts[1] if len(parts) == 2 and isinstance(parts[1], (list, tuple)) else parts[1:]
    count, displ = (*given, None, None)[:2]
    if count is None and displ is None:
        return tensor
    displ = int(displ or 0)
    length = tensor.numel() - displ if count is None else int(count) * blocks
    if min(displ, length) < 0 or displ + length > tensor.numel() or not tensor.is_contiguous():
        raise MismatchError(
            f"count and displacement must fit a contiguous buffer, got {blocks} x {count} at {displ} "
            f"for {tensor.numel()} elements with strides {tensor.stride()}"
        )
    return tensor.view(-1)[displ : displ + length]


class PointToPoint(CommunicatorBase):
    """The point-to-point half of :class:`~hpcpar.comm.communicator.Communicator`."""

    def Isend(self, buf: object, dest: int, tag: int = 0) -> Request:
        """Start sending ``buf`` (tensor or array, any dtype, stride, device). Point-to-point."""
        return self._isend("Isend", buf, dest, tag)

    def Irecv(self, buf: object, source: int | None = None, tag: int | None = None) -> Request:
        """Start receiving into ``buf``; it holds the data once the request is complete. Point-to-point."""
        return self._irecv("Irecv", buf, source, tag)

    def Send(self, buf: object, dest: int, tag: int = 0) -> None:
        """Send ``buf``; it may be used again afterwards. Point-to-point."""
        self._isend("Send", buf, dest, tag).wait()

    def Recv(
        self,
        buf: object,
        source: int | None = None,
        tag: int | None = None,
        status: MPITypes.Status | None = None,
    ) -> None:
        """Receive into ``buf``. Point-to-point."""
        _complete_or_cancel(self._irecv("Recv", buf, source, tag), status)

    def Sendrecv(
        self,
        sendbuf: object,
        dest: int,
        sendtag: int = 0,
        recvbuf: object = None,
        source: int | None = None,
        recvtag: int | None = None,
        status: MPITypes.Status | None = None,
    ) -> None:
        """Send one buffer and receive another at once, without deadlock in a ring. Point-to-point."""
        receive = self._irecv("Sendrecv", recvbuf, source, recvtag)
        send = self._isend("Sendrecv", sendbuf, dest, sendtag)
        _complete_or_cancel(receive, status)
        send.wait()

    def _isend(self, operation: str, buf: object, dest: int, tag: int) -> Request:
        tensor = plain_tensor(buf)
        if tensor is None:
            return Request(operation, [self.mpi.Isend(buf, dest, tag)], self._peer_patience(dest), keep=buf)
        buffer = HostBuffer.to_send(tensor)
        return self._message(operation, self.mpi.Isend, buffer, dest, tag)

    def _irecv(self, operation: str, buf: object, source: int | None, tag: int | None) -> Request:
        source = MPI.ANY_SOURCE if source is None else source
        tag = MPI.ANY_TAG if tag is None else tag
        tensor = plain_tensor(buf, writable=True)
        if tensor is None:
            handle = self.mpi.Irecv(buf, source, tag)
            return Request(operation, [handle], self._peer_patience(source), keep=buf)
        # A message may be shorter than the buffer; what it does not reach keeps its contents.
        buffer = HostBuffer.to_receive(tensor, preload=True)
        return self._message(operation, self.mpi.Irecv, buffer, source, tag)

    def _message(self, operation: str, call: Any, buffer: HostBuffer, peer: int, tag: int) -> Request:
        kind, derived = block_type(buffer.host.dtype, buffer.host.numel(), self._count_limit)
        handle = call([memory(buffer.flat), kind], peer, tag)
        if derived:
            kind.Free()
        return Request(operation, [handle], self._peer_patience(peer), keep=buffer, deliver=buffer.deliver)


def _complete_or_cancel(receive: Request, status: MPITypes.Status | None) -> None:
    """Wait for a receive that nobody can wait for again: left posted, it would swallow a later message."""
    try:
        receive.wait(status=status)
    except StalledError:
        if receive.cancel():
            raise
