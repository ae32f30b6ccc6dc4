"""The sum of a flat tensor over the network, in a narrower type where one is asked for.

For what leaves a node; shared memory keeps its own type.

A 16-bit type needs only a cast, for a sum of it is an operation of our communicators. Eight bits are a code
(:mod:`~hpcpar.comm.quantised`), which nobody can add up without unpacking it, at the owner of each slice::

              rank 0                            owner of slice 1                  every rank
    flat + residual = packed + residual'  --->  unpack all, add in rank order
                                                + residual of sums
                                                = packed + residual of sums' --->  unpack

Invariant: every rank, the owner included, takes what it unpacks, and so all have the same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hpcpar.comm.mpi import MPI
from hpcpar.comm.quantised import ErrorFeedback, add_decoded, decode, packed_bounds
from hpcpar.comm.request import Request

if TYPE_CHECKING:
    from hpcpar.comm.communicator import Communicator

__all__ = ["WireReduction", "narrowed"]


class WireReduction:
    """An ``Iallreduce`` of a flat tensor in place. Collective, does not wait.

    Parameters
    ----------
    comm
        A communicator on which nobody else starts collectives.
    flat
        This rank's contribution; the sum, once :meth:`test` says so.
    wire_dtype
        A 16-bit type to send in, where the tensor's is wider. Eight bits are not had without ``feedback``.
    feedback
        Of this tensor, from one sum of it to the next. It makes the sum travel in eight bits.
    """

    def __init__(
        self,
        comm: Communicator,
        flat: torch.Tensor,
        wire_dtype: torch.dtype | None,
        feedback: ErrorFeedback | None = None,
    ) -> None:
        self._flat = flat
        self._wire = flat if feedback is not None else narrowed(flat, wire_dtype)
        self._request: Request = (
            comm.Iallreduce(MPI.IN_PLACE, self._wire)
            if feedback is None
            else _iallreduce_quantised(comm, flat, feedback)
        )

    def test(self) -> bool:
        """Whether the sum is in the flat tensor. Local."""
        if not self._request.advance():
            return False
        if self._wire is not self._flat:
            self._flat.copy_(self._wire)
        return True


def narrowed(flat: torch.Tensor, wire_dtype: torch.dtype | None) -> torch.Tensor:
    """A copy of ``flat`` in the narrower type, or itself where that is no narrower or an integer. Local."""
    if wire_dtype is None or not wire_dtype.is_floating_point or not flat.is_floating_point():
        return flat
    return flat.to(wire_dtype) if wire_dtype.itemsize < flat.dtype.itemsize else flat


def _iallreduce_quantised(comm: Communicator, flat: torch.Tensor, feedback: ErrorFeedback) -> Request:
    operation, bounds = "Iallreduce in eight bits", packed_bounds(feedback.bounds)
    first, last = feedback.bounds[comm.rank]

    def combine(rows: torch.Tensor) -> list[torch.Tensor | None]:
        total = add_decoded(rows, flat.new_empty(last - first))
        return [feedback.encode_sum(total)] * comm.size

    def deliver() -> None:
        decode(packed, flat)

    comm._enter(operation, flat.dtype, flat.numel())
    packed = feedback.encode(flat, feedback.bounds)
    receive = [packed[start:end] for start, end in bounds]
    return comm._ordered(operation, packed, bounds, combine, receive, deliver)
