"""A sum of a flat tensor over ranks of which each wants only its own part.

The first half of an :class:`~hpcpar.comm.ordered_reduction.OrderedReduction`: the parts travel to their
owners, who add in rank order. The other elements of the tensor stay as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from hpcpar.comm.buffers import accumulation_dtype
from hpcpar.comm.quantised import ErrorFeedback, add_decoded, packed_bounds
from hpcpar.comm.request import Request
from hpcpar.comm.wire_reduction import narrowed

if TYPE_CHECKING:
    from hpcpar.comm.communicator import Communicator

__all__ = ["WireScatter"]

_OPERATION = "Ireduce_scatter"


class WireScatter:
    """Sums ``flat`` over ranks, in place and each part at its owner only. Collective, does not wait.

    Parameters
    ----------
    comm
        A communicator on which nobody else starts collectives.
    flat
        This rank's contribution.
    bounds
        The part of each rank, in elements.
    wire_dtype
        A narrower type to send in, ``None`` for its own. Sums are rounded once, to the type of ``flat``.
    feedback
        As in :class:`~hpcpar.comm.wire_reduction.WireReduction`: contributions travel in eight bits.
    """

    def __init__(
        self,
        comm: Communicator,
        flat: torch.Tensor,
        bounds: Sequence[tuple[int, int]],
        wire_dtype: torch.dtype | None,
        feedback: ErrorFeedback | None = None,
    ) -> None:
        comm._enter(_OPERATION, flat.dtype, flat.numel(), tuple(bounds), wire_dtype)
        self._request: Request = (
            _start(comm, flat, bounds, narrowed(flat, wire_dtype))
            if feedback is None
            else _start_quantised(comm, flat, bounds, feedback)
        )

    def test(self) -> bool:
        """Whether this rank's part holds the sum. Local."""
        return self._request.advance()


def _start(
    comm: Communicator, flat: torch.Tensor, bounds: Sequence[tuple[int, int]], wire: torch.Tensor
) -> Request:
    receive: list[torch.Tensor | None] = [None] * comm.size
    receive[comm.rank] = flat[slice(*bounds[comm.rank])]

    def combine(rows: torch.Tensor) -> list[torch.Tensor | None]:
        total = rows[0].to(accumulation_dtype(rows.dtype) or rows.dtype, copy=True)
        for row in rows[1:]:
            total.add_(row)
        return [total if rank == comm.rank else None for rank in range(comm.size)]

    return comm._ordered(_OPERATION, wire, bounds, combine, receive, lambda: None)


def _start_quantised(
    comm: Communicator, flat: torch.Tensor, bounds: Sequence[tuple[int, int]], feedback: ErrorFeedback
) -> Request:
    nobody: list[torch.Tensor | None] = [None] * comm.size  # wants what is packed

    def combine(rows: torch.Tensor) -> list[torch.Tensor | None]:
        add_decoded(rows, flat[slice(*bounds[comm.rank])])
        return nobody

    packed = feedback.encode(flat, bounds)
    return comm._ordered(_OPERATION, packed, packed_bounds(bounds), combine, nobody, lambda: None)
