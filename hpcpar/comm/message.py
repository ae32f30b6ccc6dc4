"""Messages: a send or a receive under way, with the memory that MPI works on until its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from hpcpar.comm.buffers import HostBuffer, is_readable, start_bytes
from hpcpar.comm.mpi import MPI
from hpcpar.comm.tensor_spec import TensorSpec
from hpcpar.errors import MismatchError

if TYPE_CHECKING:
    from mpi4py import MPI as MPITypes

__all__ = ["HEADER_WORDS", "Message", "all_advance", "check_length", "header", "on_host"]

HEADER_WORDS = 256
"""Most integers in a header, which every MPI sends at once."""


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


def all_advance(messages: Sequence[Message]) -> bool:
    """Whether all are done; each of them is looked at, so that they make progress together. Local."""
    done = True
    for message in messages:
        done = message.advance() and done
    return done


def header(words: Sequence[int]) -> torch.Tensor:
    """Integers as a message. Local."""
    return torch.from_numpy(np.array(words, dtype=np.int64))  # several times as fast as torch.tensor


def check_length(words: int) -> None:
    """Raise for a header that is too long. Local.

    Raises
    ------
    MismatchError
        When it is.
    """
    if words > HEADER_WORDS:
        raise MismatchError(
            f"what a call says and carries must fit {HEADER_WORDS} words, got {words}. Pass fewer tensors"
        )
