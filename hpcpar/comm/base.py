"""What every kind of message of a communicator shares: the MPI handles, numbering, patience, debug checks.

A communicator sends on two MPI communicators with the same ranks: the one it wraps, for the operations
that MPI performs, and a private duplicate (``control``) for what we add: roll calls, ordered reductions and
the comparisons of ``HPCPAR_DEBUG``. A user's ``Recv(ANY_SOURCE, ANY_TAG)`` can therefore never catch them.

Collectives are numbered; the number is the tag of ordered reductions and the word of roll calls. All ranks
call collectives of one communicator in the same order, so the numbers agree without being exchanged.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from hpcpar.comm import debug
from hpcpar.comm.buffers import COUNT_LIMIT
from hpcpar.comm.mpi import MPI
from hpcpar.comm.progress import Patience
from hpcpar.comm.request import PatienceMaker, Request
from hpcpar.comm.roll_call import RollCall
from hpcpar.errors import CommunicatorFreedError, MismatchError

if TYPE_CHECKING:
    from mpi4py import MPI as MPITypes

__all__ = ["CommunicatorBase"]

_BLOCKING_FROM_BYTES = 64 * 1024


class CommunicatorBase:
    """Handles, numbering, patience. See the module's description.

    Parameters
    ----------
    mpi
        The communicator to send on.
    control
        A duplicate of it for our own messages; ``None`` on a communicator of one rank.
    count_limit
        Largest MPI count in elements; smaller values are for tests of the chunking.

    Attributes
    ----------
    attachments : dict
        What other packages run on this communicator and must find again, by name, such as a server.
    """

    def __init__(self, mpi: MPITypes.Intracomm, control: MPITypes.Intracomm | None, count_limit: int) -> None:
        self._handle: MPITypes.Intracomm | None = mpi
        self._control_handle = control
        self._count_limit = min(count_limit, COUNT_LIMIT)
        self._rank: int = mpi.Get_rank()
        self._size: int = mpi.Get_size()
        self._collectives = 0
        self._checked = True
        self._roll_call = RollCall(control) if control is not None else None
        self._staged: weakref.WeakSet[Request] = weakref.WeakSet()  # need us until they are complete
        self._tags = int(mpi.Get_attr(MPI.TAG_UB) or 32767)
        self.attachments: dict[str, object] = {}

    @property
    def rank(self) -> int:
        """Number of this rank, 0 to ``size - 1``. Local."""
        return self._rank

    @property
    def size(self) -> int:
        """Number of ranks. Local."""
        return self._size

    @property
    def mpi(self) -> MPITypes.Intracomm:
        """The mpi4py communicator. Local.

        Raises
        ------
        CommunicatorFreedError
            After ``Free``.
        """
        if self._handle is None:
            raise CommunicatorFreedError(
                f"a communicator must not be used after Free (rank {self._rank} of {self._size})"
            )
        return self._handle

    @property
    def _control(self) -> MPITypes.Intracomm:
        return self.mpi if self._control_handle is None else self._control_handle

    @property
    def _where(self) -> str:
        return f"rank {self._rank} of {self._size}"

    def _enter(self, operation: str, *facts: object) -> None:
        """Number a collective and, with ``HPCPAR_DEBUG=1``, compare its facts between the ranks."""
        self.mpi  # noqa: B018  raises when freed
        self._collectives += 1
        if self._checked and os.environ.get("HPCPAR_DEBUG", "0") not in ("", "0") and self._size > 1:
            debug.compare(self, operation, facts)

    def _tag(self) -> int:
        """Of the collective entered last; 0 belongs to roll calls."""
        return 1 + self._collectives % (self._tags - 1)

    @property
    def _collective_patience(self) -> PatienceMaker:
        """Patience of the collective entered last; it may be waited for when later ones have been."""
        number = self._collectives
        return lambda operation, timeout_s: CollectivePatience(operation, self, number, timeout_s)

    def _peer_patience(self, *peers: int) -> PatienceMaker:
        """Patience of a message from or to ``peers``; MPI's negative numbers mean any rank or none."""
        named = [peer for peer in peers if peer >= 0]
        return lambda operation, timeout_s: Patience(
            operation, missing=lambda: named, where=self._where, timeout_s=timeout_s
        )

    def _method(self, operation: str, nbytes: int, blocking: bool) -> Callable[..., list[MPITypes.Request]]:
        """The MPI call behind a collective: blocking where that is faster and cannot hang, else not.

        Blocking collectives come from better tuned code (Open MPI: three times as fast at 25 MiB), but
        have no deadline. So the ranks meet in a barrier that has one, and then none can be missing.
        """
        if blocking and nbytes >= _BLOCKING_FROM_BYTES and self._size > 1:
            self._meet(operation)
            call = getattr(self.mpi, operation)

            def perform(*args: Any) -> list[MPITypes.Request]:
                call(*args)
                return []

            return perform
        start = getattr(self.mpi, "I" + operation.lower())
        return lambda *args: [start(*args)]

    def _meet(self, operation: str) -> None:
        """Wait for all ranks to come here, before MPI calls that have no deadline. Collective."""
        Request(operation, [self.mpi.Ibarrier()], self._collective_patience).wait()

    def _check_given(self, operation: str, root: int | None, sendbuf: object, recvbuf: object) -> None:
        """To mpi4py ``None`` means no data; only a rank that is not the root can mean that."""
        missing = [name for name, buf in (("sendbuf", sendbuf), ("recvbuf", recvbuf)) if buf is None]
        if len(missing) > (root is not None and self._rank != root):
            raise TypeError(f"{missing[0]} of {operation} must be a buffer, got None ({self._where})")

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

    def _check_root(self, operation: str, root: int) -> None:
        if not 0 <= root < self._size:
            raise MismatchError(
                f"root of {operation} must be a rank from 0 to {self._size - 1}, got {root} ({self._where})"
            )


class CollectivePatience(Patience):
    """The patience of collective ``number``: asks around who has arrived."""

    nobody_missing = "waits, though every rank has arrived"

    def __init__(self, operation: str, comm: CommunicatorBase, number: int, timeout_s: float | None) -> None:
        super().__init__(operation, missing=self._absent, where=comm._where, timeout_s=timeout_s)
        self._comm, self._number = comm, number

    def on_tick(self, waited_s: float, timeout_s: float) -> None:
        """Exchange signs of life."""
        if self._comm._roll_call is not None:
            self._comm._roll_call.tick(self._comm._collectives, waited_s, timeout_s)

    def _absent(self) -> Sequence[int]:
        return () if self._comm._roll_call is None else self._comm._roll_call.missing(self._number)
