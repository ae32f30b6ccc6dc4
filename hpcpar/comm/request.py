"""Requests: operations under way, and how their results reach the caller's tensors.

A non-blocking operation on a tensor that MPI cannot read in place (strided, on a GPU, of a type MPI does
not know) works on a staging copy; the result must be copied back when MPI is done. That delivery belongs
to the request, and every spelling of every call leads through :meth:`Request.test`, so that none can
forget it.

Invariant: a request owns its buffers until MPI is done with them. One that the program drops while MPI
still works hands them to the progress engine, which keeps them until the end.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from hpcpar.comm.mpi import MPI
from hpcpar.comm.progress import ENGINE, Patience, timeout_from_environment, wait_until

if TYPE_CHECKING:
    from mpi4py import MPI as MPITypes

__all__ = ["Request", "wait_all"]

PatienceMaker = Callable[[str, "float | None"], Patience]


class Request:
    """An operation under way.

    Parameters
    ----------
    operation
        Its name, for errors.
    handles
        The mpi4py requests it consists of; it is complete when all are.
    patience
        Makes the :class:`Patience` of a wait from operation and time limit.
    keep
        Objects that must live until completion: staging tensors, derived datatypes.
    deliver
        Called once at completion, to copy staged results where they belong.
    """

    def __init__(
        self,
        operation: str,
        handles: Sequence[MPITypes.Request],
        patience: PatienceMaker,
        *,
        keep: object = None,
        deliver: Callable[[], None] | None = None,
    ) -> None:
        self.operation = operation
        self._handles = list(handles)
        self._make_patience = patience
        self._keep = keep
        self._deliver = deliver
        self._complete = False

    def test(self, status: MPITypes.Status | None = None) -> bool:
        """Whether the operation is complete; delivers staged results when it is. Local.

        Parameters
        ----------
        status
            Filled at completion, for an operation of a single message.
        """
        if not self.advance(status):
            ENGINE.advance()  # as MPI does in its own tests: others may need us before they can help us
        return self._complete

    def advance(self, status: MPITypes.Status | None = None) -> bool:
        """``test`` without a turn of the progress engine, for code that the engine calls. Local."""
        if self._complete:
            return True
        if not self._poll(status):
            return False
        self._complete = True
        self._handles.clear()
        if self._deliver is not None:
            self._deliver()
        self._deliver = self._keep = None
        return True

    def wait(
        self, timeout: float | MPITypes.Status | None = None, status: MPITypes.Status | None = None
    ) -> bool:
        """Wait for completion. Point-to-point or Collective, as the operation is.

        Parameters
        ----------
        timeout
            Seconds, ``HPCPAR_TIMEOUT_S`` by default. A status in this place is taken for one.
        status
            As in :meth:`test`.

        Returns
        -------
        bool
            Always true, as in mpi4py.

        Raises
        ------
        StalledError
            At the deadline; the operation is still under way and may be waited for again.
        """
        if isinstance(timeout, MPI.Status):  # mpi4py's own order of arguments
            timeout, status = None, timeout
        if not self.advance(status):
            wait_until(lambda: self.advance(status), self._make_patience(self.operation, timeout))
        return True

    Test = test
    Wait = wait

    def cancel(self) -> bool:
        """Give a receive up, so that it takes no later message; false if it completed before that. Local."""
        status = MPI.Status()
        for handle in self._handles:
            handle.Cancel()
            handle.Wait(status)
        if self._handles and not status.Is_cancelled():
            return not self.advance(None)
        self._handles.clear()
        self._complete, self._deliver, self._keep = True, None, None
        return True

    def _poll(self, status: MPITypes.Status | None) -> bool:
        if len(self._handles) == 1:
            return bool(self._handles[0].Test(status))
        return bool(MPI.Request.Testall(self._handles))

    def __del__(self) -> None:
        if not self._complete and self._handles and not sys.is_finalizing():
            ENGINE.adopt(_Orphan(self._handles, self._keep))


class _Orphan:
    """The remains of a dropped request: buffers that MPI still uses."""

    def __init__(self, handles: Sequence[MPITypes.Request], keep: object) -> None:
        self._handles = list(handles)
        self._keep = keep

    needed_by_others = False

    def progress(self) -> None:
        if MPI.Request.Testall(self._handles):
            ENGINE.discard(self)


class ObjectRequest(Request):
    """A request whose ``wait`` returns a Python object, as lower-case mpi4py calls do.

    Parameters
    ----------
    operation, patience
        As in :class:`Request`.
    match
        Returns ``None`` until the message is announced, which tells its length; then starts to receive it
        and returns the mpi4py request and the memory.
    unpack
        Turns the memory into the object.
    """

    def __init__(
        self,
        operation: str,
        patience: PatienceMaker,
        match: Callable[[], tuple[MPITypes.Request, Any] | None],
        unpack: Callable[[Any], Any],
    ) -> None:
        super().__init__(operation, (), patience, deliver=self._unpack_received)
        self._match, self._unpack = match, unpack
        self._object: Any = None

    def _poll(self, status: MPITypes.Status | None) -> bool:
        if not self._handles:
            matched = self._match()
            if matched is None:
                return False
            handle, self._keep = matched
            self._handles.append(handle)
        return super()._poll(status)

    def _unpack_received(self) -> None:
        self._object = self._unpack(self._keep)

    def wait(
        self, timeout: float | MPITypes.Status | None = None, status: MPITypes.Status | None = None
    ) -> Any:
        """Wait, then return the received object. Point-to-point."""
        super().wait(timeout, status)
        return self._object

    Wait = wait


def wait_all(requests: Iterable[Request], timeout: float | None = None) -> None:
    """Wait for several requests, in any order of completion.

    Parameters
    ----------
    requests
        Any mixture of requests of any communicators.
    timeout
        Seconds for all of them together, ``HPCPAR_TIMEOUT_S`` by default.

    Raises
    ------
    StalledError
        Names the first request that is not complete at the deadline.
    """
    pending = [request for request in requests if not request.advance(None)]

    def done() -> bool:
        pending[:] = [request for request in pending if not request.advance(None)]
        return not pending

    if pending:
        limit = timeout_from_environment() if timeout is None else timeout
        wait_until(done, _PatienceWithFirst(pending, limit))


class _PatienceWithFirst(Patience):
    """The patience of whichever request is first among those that are left."""

    def __init__(self, pending: list[Request], timeout_s: float) -> None:
        super().__init__("wait_all", missing=tuple, where="", timeout_s=timeout_s)
        self._pending = pending

    def tick(self, waited_s: float) -> None:
        first = self._pending[0]
        first._make_patience(first.operation, self._timeout_s).tick(waited_s)
