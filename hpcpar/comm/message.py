"""Messages: a send or a receive under way, with the memory that MPI works on until its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hpcpar.comm.buffers import HostBuffer, is_readable, start_bytes
from hpcpar.comm.mpi import MPI
from hpcpar.comm.tensor_spec import TensorSpec

if TYPE_CHECKING:
    from mpi4py import MPI as MPITypes

__all__ = ["Message", "on_host"]


class Message:
    """A tensor on its way to or from ``peer``; keep it until :meth:`advance` is true."""

    __slots__ = ("_done", "_error", "handle", "host", "peer")

    def __init__(self, handle: MPITypes.Request, host: torch.Tensor, peer: int) -> None:
        self.handle, self.host, self.peer = handle, host, peer
        self._done = False
        self._error: Exception | None = None

    @classmethod
    def send(cls, mpi: MPITypes.Intracomm, host: torch.Tensor, dest: int, tag: int, limit: int) -> Message:
        """Start to send a tensor that is :func:`on_host`, of any size. Point-to-point."""
        return cls(start_bytes(mpi.Isend, host, dest, tag, limit), host, dest)

    @classmethod
    def receive(cls, mpi: MPITypes.Intracomm, spec: TensorSpec, source: int, tag: int, limit: int) -> Message:
        """Start to receive a tensor into memory of its own. Point-to-point."""
        host = torch.empty(spec[1], dtype=spec[0])
        return cls(start_bytes(mpi.Irecv, host, source, tag, limit), host, source)

    def advance(self) -> bool:
        """Whether MPI is done with it; raises what MPI raises, every time. Local."""
        if self._error is not None:  # MPI reports an error once, and calls the message complete then
            raise self._error
        try:
            self._done = self._done or self.handle.Test()
        except MPI.Exception as error:
            self._error = error
            raise
        return self._done


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where MPI can read it, else a copy that it can. Local."""
    return tensor if is_readable(tensor) else HostBuffer.to_send(tensor.detach()).host
