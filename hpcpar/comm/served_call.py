"""Calls as those who serve them see them: see :mod:`hpcpar.comm.calls`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from hpcpar.comm.message import Message, all_advance, check_length, header, on_host
from hpcpar.comm.mpi import MPI
from hpcpar.comm.tensor_spec import TensorSpec, encode_specs, spec_of

if TYPE_CHECKING:
    from mpi4py import MPI as MPITypes

    from hpcpar.comm.calls import CallExchange

__all__ = ["ServedCall"]

_MOST_TEXT_BYTES = 64_000


class ServedCall:
    """A call of another rank, or of this one, that is served here.

    Attributes
    ----------
    source : int
        The caller.
    words : tuple of int
        What it says.
    tensors : list of torch.Tensor
        What it sent, on the host.
    """

    def __init__(self, exchange: CallExchange, source: int, tag: int, words: tuple[int, ...]) -> None:
        self._exchange = exchange
        self._tag = tag
        self.source, self.words = source, words
        self.tensors: list[torch.Tensor] = []
        self._parts: list[Message] = []
        self._arrived = False

    def reply(self, tensors: Sequence[torch.Tensor]) -> None:
        """Start sending the answer. Point-to-point, does not wait, any thread."""
        self._answer(0, tensors)

    def fail(self, text: str) -> None:
        """Start telling the caller why there is no answer. Point-to-point, does not wait, any thread."""
        words = text.encode(errors="replace")[-_MOST_TEXT_BYTES:] or b"?"
        self._answer(1, [torch.frombuffer(bytearray(words), dtype=torch.uint8)])

    def _answer(self, failed: int, tensors: Sequence[torch.Tensor]) -> None:
        exchange = self._exchange
        hosts = [on_host(tensor) for tensor in tensors]
        specs = encode_specs(map(spec_of, hosts))
        words = [failed, len(hosts), 3 + len(specs), *specs]
        check_length(len(words))
        replies = exchange._alive(exchange._replies)
        try:
            for host in (header(words), *hosts):
                if self.source not in exchange.peers.known_dead:
                    exchange._send(replies, host, self.source, self._tag)
        except MPI.Exception as error:
            exchange.peers.report(self.source, error)

    def _expect(self, mpi: MPITypes.Intracomm, specs: Sequence[TensorSpec]) -> None:
        self._parts = [self._exchange._receive(mpi, spec, self.source, self._tag) for spec in specs]

    def _has_arrived(self) -> bool:
        if self._arrived:
            return True
        try:
            self._arrived = all_advance(self._parts)
        except MPI.Exception as error:
            self._exchange.peers.report(self.source, error)
        if self._arrived:
            self.tensors = [part.host for part in self._parts]
            self._parts = []
        return self._arrived
