"""States from rank to rank, in chunks that the receiver asks for, some ahead.

::

    rank 2   chunk 0 of request 5? -->  donor: packs a copy of its state, keeps it
             <-- sizes, structure, chunk 0
             chunk 1 of request 5? -->  donor
             <-- chunk 1               ... until the last, after which the donor drops the copy

The receiver draws, so a donor never waits for it and never has more than a few chunks under way, and a
receiver that gives up, or turns to another donor, need not tell anybody.

Invariant: a donor packs in its own thread, between two uses of the optimizer or while it waits in one, never
while a step writes parameters. It answers in every wait of that thread, so two ranks that ask each other
both get their answers.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from hpcpar.comm import Call, CallExchange
from hpcpar.comm.progress import ENGINE
from hpcpar.optim.collaborative.replica import Packed

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["Download", "StateExchange"]

CHUNK_BYTES = 16 * 2**20
_CHUNKS_AHEAD = 8


class StateExchange:
    """Gives states to other ranks, and gets them. Collective to make and to free.

    Parameters
    ----------
    comm
        The ranks.
    pack
        Copies this rank's state.
    chunk_bytes
        Most bytes in one message.
    """

    def __init__(
        self, comm: Communicator, pack: Callable[[], Packed], *, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        self._calls = CallExchange(comm)
        self._pack = pack
        self._chunk_bytes = chunk_bytes
        self._copies: dict[int, tuple[int, Packed]] = {}  # by receiver: its request, what it is given
        self._thread = threading.get_ident()
        self._is_serving = False
        ENGINE.add(self)

    needed_by_others = False

    def progress(self) -> None:
        """Answer those who ask; for the progress engine, in the optimizer's thread. Never waits."""
        if self._is_serving or threading.get_ident() != self._thread:
            return
        self._is_serving = True
        try:
            self._calls.progress()
            calls = self._calls.take()
            newest = {
                call.source: max(c.words[0] for c in calls if c.source == call.source) for call in calls
            }
            for call in calls:
                request, chunk = call.words
                is_given_up = request < newest[call.source]
                call.reply([] if is_given_up else self._chunk(call.source, request, chunk))
        finally:
            self._is_serving = False

    def download(self, donor: int, request: int) -> Download:
        """Begin to get the state of a rank. Point-to-point, does not wait.

        Parameters
        ----------
        donor
            Whose.
        request
            A number that this rank has not used before.
        """
        return Download(self._calls, donor, request)

    def stop(self) -> None:
        """Answer nobody any more, since the job fails. Local."""
        ENGINE.discard(self)

    def free(self) -> None:
        """Give the communicators back. Collective."""
        ENGINE.discard(self)
        self._copies.clear()
        self._calls.free()

    def _chunk(self, receiver: int, request: int, chunk: int) -> list[torch.Tensor]:
        if chunk == 0:
            self._copies[receiver] = request, self._pack()
        known, packed = self._copies.get(receiver, (None, None))
        if packed is None or known != request:  # a request that it has given up for another one
            return []
        start = chunk * self._chunk_bytes
        part = packed.contents[start : start + self._chunk_bytes]
        if start + part.numel() >= packed.contents.numel():
            del self._copies[receiver]
        return [part] if chunk else [torch.tensor([packed.contents.numel()]), packed.structure, part]


class Download:
    """A state on its way here. Made by :meth:`StateExchange.download`."""

    def __init__(self, calls: CallExchange, donor: int, request: int) -> None:
        self._calls, self.donor, self._request = calls, donor, request
        self._parts: list[torch.Tensor] = []
        self._structure = torch.empty(0, dtype=torch.uint8)
        self._total = 1  # chunks; known when the first has come
        self._asked = 0
        self._open: deque[Call] = deque()
        self._ask()

    def advance(self) -> bool:
        """Take what has come and ask for more; whether that was all. Local, never waits.

        Raises
        ------
        RankFailedError
            When the donor has died.
        """
        while self._open and self._open[0].test():
            tensors = self._open.popleft().tensors
            if not self._parts:
                size, self._structure, part = tensors
                self._total = -(-int(size) // max(1, part.numel()))
            else:
                (part,) = tensors
            self._parts.append(part)
            self._ask()
        return self._is_complete

    @property
    def chunks(self) -> int:
        """How many have come, which grows as long as the donor answers."""
        return len(self._parts)

    @property
    def packed(self) -> Packed:
        """The state, once :meth:`advance` has said that it is here."""
        return Packed(self._structure, torch.cat(self._parts))

    def abandon(self) -> None:
        """Do without it; late chunks are received and dropped. Local."""
        while self._open:
            self._open.popleft().abandon()

    @property
    def _is_complete(self) -> bool:
        return bool(self._parts) and len(self._parts) >= self._total

    def _ask(self) -> None:
        """Ask for some chunks ahead: a donor may look seldom, and answers all at once then."""
        while self._asked < self._total and len(self._open) < _CHUNKS_AHEAD:
            self._open.append(self._calls.call(self.donor, [self._request, self._asked], []))
            self._asked += 1
