"""The network below a transport: what leaves a node, in which type, and what rounding has kept back of it.

With ``torch.int8`` a sum travels in eight bits and leaves residuals (:mod:`~hpcpar.comm.quantised`), which
are state: they must outlive the sum, and be saved with the model. The *outstanding error* of a bucket is the
sum of the residuals of all ranks that send it, in units of its result. It is one tensor, whatever the number
of ranks, and any number of ranks can carry it on: each takes an equal share of it for its own residual.

Invariant: whether a bucket travels in eight bits depends on its layout only, and so all ranks agree on it.
Flags and counts must be exact. They live in buckets without slots, which never do; nor do short tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from hpcpar.comm.bucket import BucketLayout
from hpcpar.comm.quantised import ErrorFeedback, is_quantisable
from hpcpar.comm.wire_reduction import WireReduction
from hpcpar.comm.wire_scatter import WireScatter

if TYPE_CHECKING:
    from hpcpar.comm.communicator import Communicator

__all__ = ["WIRE_DTYPES", "Wire"]

WIRE_DTYPES = (None, torch.bfloat16, torch.float16, torch.int8)
"""What may cross the network in place of a tensor's own type, for which stands ``None``."""


class Wire:
    """Sums buckets, or slices of them, over ranks that share no memory.

    Parameters
    ----------
    comm
        These ranks. Nobody else starts collectives on it.
    layouts
        The buckets.
    wire_dtype
        ``None`` for their own, a 16-bit type, or ``torch.int8``.
    """

    def __init__(
        self, comm: Communicator, layouts: Sequence[BucketLayout], wire_dtype: torch.dtype | None
    ) -> None:
        self._comm, self._layouts, self._dtype = comm, layouts, wire_dtype
        self._feedbacks: dict[int, ErrorFeedback] = {}

    def reduce(self, bucket: int, flat: torch.Tensor) -> WireReduction:
        """Start to sum this rank's tensor of ``bucket``, for all. Collective, does not wait."""
        return WireReduction(self._comm, flat, self._dtype, self._feedback(bucket, flat))

    def scatter(self, bucket: int, flat: torch.Tensor, bounds: Sequence[tuple[int, int]]) -> WireScatter:
        """Start to sum it, each part for its owner only. Collective, does not wait."""
        return WireScatter(self._comm, flat, bounds, self._dtype, self._feedback(bucket, flat))

    def outstanding(self, bucket: int) -> torch.Tensor | None:
        """What this rank has kept back of ``bucket``, ``None`` for nothing. Local."""
        feedback = self._feedbacks.get(bucket)
        return None if feedback is None else feedback.outstanding()

    def load_outstanding(self, bucket: int, total: torch.Tensor) -> None:
        """Take this rank's share of what all ranks have kept back, if there is use for it. Local."""
        feedback = self._feedback(bucket, total)
        if feedback is not None:
            feedback.load(total / self._comm.size)

    def _feedback(self, bucket: int, flat: torch.Tensor) -> ErrorFeedback | None:
        if self._dtype is not torch.int8 or not self._layouts[bucket].slots or not is_quantisable(flat):
            return None
        if bucket not in self._feedbacks:
            comm = self._comm
            self._feedbacks[bucket] = ErrorFeedback(flat.numel(), flat.dtype, comm.rank, comm.size)
        return self._feedbacks[bucket]
