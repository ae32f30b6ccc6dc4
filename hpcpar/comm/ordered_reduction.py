"""Reductions that we compute ourselves: in rank order, each element in one place, narrow types in float32.

MPI has no 16-bit floats, and a Python reduction function inside MPI would be slow and wrong by rounding
at every step. So the vector is cut into one slice per rank, and each slice has an owner::

      stage 1, to the owners             owner             stage 2, to who wants it
    rank 0  [a0|a1|a2]  --a0-->  0: a0+b0+c0 (float32)  --->  all ranks (Allreduce)
    rank 1  [b0|b1|b2]  --b1-->  1: a1+b1+c1            --->  the root  (Reduce)
    rank 2  [c0|c1|c2]  --c2-->  2: a2+b2+c2            --->  nobody    (Reduce_scatter_block)
                                 or every prefix sum    --->  rank by rank (Scan, Exscan)

The owner adds in rank order and rounds once, so that results are reproducible and bitwise equal on every
rank. Wire traffic is that of an optimal all-reduce, in the narrow type.

Invariant: the stages are point-to-point messages with a tag of their own, not chained collectives. MPI
demands that all ranks start collectives in the same order, and when stage 1 ends differs between ranks.
The request is registered with the progress engine until it is complete, because the other ranks need this
rank's slice even while this rank waits for something else.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from hpcpar.comm.buffers import accumulation_dtype, block_type, memory
from hpcpar.comm.mpi import MPI
from hpcpar.comm.progress import ENGINE
from hpcpar.comm.request import PatienceMaker, Request

if TYPE_CHECKING:
    from mpi4py import MPI as MPITypes

__all__ = ["OrderedReduction", "combine_in_order", "prefixes_in_order", "slice_bounds"]

Combine = Callable[[torch.Tensor], Sequence["torch.Tensor | None"]]


def slice_bounds(count: int, parts: int, align: int = 1) -> list[tuple[int, int]]:
    """Cut ``count`` elements into ``parts`` ranges as equal as ``align`` allows. Local.

    Every range starts at a multiple of ``align``; ranges at the end may be empty.
    """
    blocks = -(-count // align)
    edges = [min(align * (blocks * part // parts), count) for part in range(parts + 1)]
    return list(pairwise(edges))


def combine_in_order(rows: torch.Tensor, op: MPITypes.Op) -> torch.Tensor:
    """Reduce ``rows`` (ranks, elements) over ranks, row 0 first, rounding once at the end. Local."""
    return prefixes_in_order(rows, op, last_only=True)[0]


def prefixes_in_order(rows: torch.Tensor, op: MPITypes.Op, *, last_only: bool = False) -> list[torch.Tensor]:
    """The results after row 0, after rows 0 and 1, and so on; or only the last of them. Local."""
    function = arithmetic(op)
    wide = accumulation_dtype(rows.dtype) or rows.dtype
    total = rows[0].to(wide, copy=True)
    results = [] if last_only else [total.to(rows.dtype, copy=True)]
    for row in rows[1:]:
        function(total, row.to(wide), out=total)
        if not last_only:
            results.append(total.to(rows.dtype, copy=True))
    return [total.to(rows.dtype)] if last_only else results


def arithmetic(op: MPITypes.Op) -> Callable[..., torch.Tensor]:
    """The torch function of an MPI operator; ``TypeError`` for one that makes no sense for floats. Local."""
    table: tuple[tuple[Any, Callable[..., torch.Tensor]], ...] = (
        (MPI.SUM, torch.add),
        (MPI.PROD, torch.mul),
        (MPI.MAX, torch.maximum),
        (MPI.MIN, torch.minimum),
    )
    for known, function in table:
        if op == known:
            return function
    raise TypeError("16-bit and 8-bit floats must be reduced by MPI.SUM, PROD, MAX or MIN")


class OrderedReduction(Request):
    """A reduction in two stages of messages, as the module describes. Collective, never waits by itself.

    Parameters
    ----------
    operation, patience
        As in :class:`~hpcpar.comm.request.Request`.
    control
        Communicator of our own that carries the messages.
    tag
        Not used by any other operation under way on ``control``.
    send
        This rank's contribution, flat, contiguous, on the host.
    bounds
        The slice of each owner, in elements of ``send``.
    combine
        Turns the contributions to this rank's slice, shape (ranks, elements), into what each rank gets.
    receive
        Where the result of each owner goes, ``None`` for owners that send this rank nothing.
    limit
        Largest count in one message.
    members
        The ranks of ``control`` that take part, this one among them, in the order of ``bounds``, rows and
        ``receive``; all by default.
    """

    def __init__(
        self,
        operation: str,
        patience: PatienceMaker,
        control: MPITypes.Comm,
        tag: int,
        *,
        send: torch.Tensor,
        bounds: Sequence[tuple[int, int]],
        combine: Combine,
        receive: Sequence[torch.Tensor | None],
        deliver: Callable[[], None],
        limit: int,
        members: Sequence[int] | None = None,
    ) -> None:
        super().__init__(operation, (), patience, deliver=deliver)
        self._control, self._tag, self._limit = control, tag, limit
        self._combine, self._receive = combine, receive
        self._members = range(control.size) if members is None else members
        self._me = me = self._members.index(control.rank)
        mine = bounds[me][1] - bounds[me][0]
        self._rows = send.new_empty((len(self._members), mine))
        self._rows[me].copy_(send[slice(*bounds[me])])
        self._stage = 1
        self._busy = threading.Lock()
        self._keep = [send]
        self._exchange(
            [None if r == me else send[slice(*bounds[r])] for r in range(len(self._members))],
            [None if r == me else self._rows[r] for r in range(len(self._members))],
        )
        ENGINE.add(self)

    needed_by_others = True

    def progress(self) -> None:
        """Go on to the next stage if this one is complete; for the progress engine. Local."""
        self.advance(None)

    def advance(self, status: MPITypes.Status | None = None) -> bool:
        """As in :class:`~hpcpar.comm.request.Request`."""
        if not self._busy.acquire(blocking=False):
            return False  # another thread's waiting loop is at it
        try:
            complete = super().advance(status)
        finally:
            self._busy.release()
        if complete:
            ENGINE.discard(self)
        return complete

    def _poll(self, status: MPITypes.Status | None) -> bool:
        if not MPI.Request.Testall(self._handles):
            return False
        if self._stage == 2:
            return True
        results = self._combine(self._rows)
        me = self._me
        own, result = self._receive[me], results[me]
        if own is not None and result is not None:
            own.copy_(result)
        self._exchange(
            [None if r == me else result for r, result in enumerate(results)],
            [None if r == me else buffer for r, buffer in enumerate(self._receive)],
        )
        self._stage = 2  # not earlier: after an error above this is not complete
        return bool(MPI.Request.Testall(self._handles))

    def _exchange(
        self, sends: Sequence[torch.Tensor | None], receives: Sequence[torch.Tensor | None]
    ) -> None:
        """Post the messages of a stage; both ends know the lengths, so empty ones are not sent."""
        self._handles = []
        self._keep = [self._keep, sends, receives]
        for rank, buffer in zip(self._members, receives, strict=True):
            if buffer is not None and buffer.numel():
                self._post(self._control.Irecv, buffer, rank)
        for rank, buffer in zip(self._members, sends, strict=True):
            if buffer is not None and buffer.numel():
                self._post(self._control.Isend, buffer, rank)

    def _post(self, call: Callable[..., MPITypes.Request], buffer: torch.Tensor, rank: int) -> None:
        kind, derived = block_type(buffer.dtype, buffer.numel(), self._limit)
        self._handles.append(call([memory(buffer), kind], rank, self._tag))
        if derived:
            kind.Free()
