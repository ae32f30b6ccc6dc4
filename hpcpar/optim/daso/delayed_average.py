"""The average of parameters over all ranks, on its way while training goes on, and merged when it arrives.

Two nodes of two ranks; inside a node all ranks hold the same parameters, and the node's slices travel by all
its rails at once, as gradients do (:mod:`hpcpar.comm.transport`)::

    node 0   step | snapshot | step  step (S = 2) | merge | step ...
    node 1   step | snapshot | step  step         | merge | step ...
                    `---- mean over the ranks ----'

Merging gives the mean the weight of the steps that its P nodes have contributed, and what was learned since
the snapshot, S steps, a weight of its own (Coquelin et al., J. Big Data 9:14, 2022, eq. 1)::

    x  <-  (2 S x + P mean) / (2 S + P)           S = 0: x <- mean

On a narrow wire it is not the parameters that travel, but what each node has changed since the last average,
which all know to the last bit: ``mean = reference + mean(x - reference)``. So what a 16-bit wire rounds off
is a part of the change, not of the parameter. That costs one more copy of the parameters.

Invariants: merging happens after a number of steps, and not when messages happen to arrive, so all ranks
merge in the same step and a run can be repeated. Ranks of a node do the same arithmetic on the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from hpcpar.comm import Reducer, ReducerStats, Slot, plan_buckets, view_slot

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["DelayedAverage"]

_BUCKET_BYTES = 8 << 20


class DelayedAverage:
    """Averages tensors over the ranks in the background. Collective to make and to free.

    Parameters
    ----------
    comm
        All ranks; on several nodes.
    tensors
        What will be averaged, in floating-point or complex types. Only shapes, dtypes and devices matter.
    wire_dtype
        Type in which wider tensors cross the network, ``None`` for their own.
    use_thread
        Let a thread make the progress, instead of what this rank does meanwhile.
    """

    def __init__(
        self,
        comm: Communicator,
        tensors: Sequence[torch.Tensor],
        wire_dtype: torch.dtype | None,
        *,
        use_thread: bool,
    ) -> None:
        self._nodes = comm.num_nodes
        self._layouts = plan_buckets(tensors, _BUCKET_BYTES)
        devices = [tensors[layout.slots[0].index].device for layout in self._layouts]
        self._reducer = Reducer(
            comm, self._layouts, wire_dtype=wire_dtype, devices=devices, name="average of parameters"
        )
        self._reducer.use_progress_thread(use_thread)
        self._refers = wire_dtype is not None
        self._references: list[torch.Tensor] = []
        self._steps: int | None = None

    @property
    def is_under_way(self) -> bool:
        """Whether an average was begun and not merged. Local."""
        return self._steps is not None

    @property
    def steps(self) -> int:
        """Steps since it was begun. Local."""
        return self._steps or 0

    def stats(self) -> ReducerStats:
        """What averages have cost. Local."""
        return self._reducer.stats()

    @torch.no_grad()
    def refer_to(self, tensors: Sequence[torch.Tensor]) -> None:
        """Remember what all ranks hold alike now, unless there is a reference. Local.

        Any tensors will do that are the same on all ranks; the closer, the less is rounded off.
        """
        if not self._refers or self._references:
            return
        self._references = [torch.zeros_like(flat) for flat in self._reducer.flats]
        for bucket in range(len(self._layouts)):
            for slot, view in self._views(bucket, tensors, self._references):
                view.copy_(tensors[slot.index])

    def forget(self) -> None:
        """Drop the reference, and what the wire owes, since others have changed the tensors. Local."""
        self._references = []
        self._reducer.load_residuals([torch.zeros_like(flat, device="cpu") for flat in self._reducer.flats])

    @torch.no_grad()
    def start(self, tensors: Sequence[torch.Tensor]) -> None:
        """Send the tensors as they are now. Collective, does not wait."""
        self._reducer.begin()
        self._steps = 0
        for bucket, flat in enumerate(self._reducer.flats):
            for slot, view in self._views(bucket, tensors, self._reducer.flats):
                view.copy_(tensors[slot.index])
            if self._references:
                flat.sub_(self._references[bucket])
            self._reducer.publish(bucket)

    def count_step(self) -> None:
        """The tensors have changed since :meth:`start`; make progress. Local."""
        if self._steps is not None:
            self._steps += 1
            self._reducer.progress()

    @torch.no_grad()
    def merge(self, tensors: Sequence[torch.Tensor]) -> None:
        """Wait for the mean and merge it into the tensors. Collective in effect."""
        weight = self._nodes / (2 * self.steps + self._nodes)
        for bucket, flat in enumerate(self._reducer.flats):
            self._reducer.wait(bucket)
            if self._references:
                self._references[bucket].add_(flat)
                flat.copy_(self._references[bucket])
            for slot, mean in self._views(bucket, tensors, self._reducer.flats):
                tensors[slot.index].lerp_(mean, weight)
        self._steps = None

    def _views(
        self, bucket: int, tensors: Sequence[torch.Tensor], flats: Sequence[torch.Tensor]
    ) -> Iterator[tuple[Slot, torch.Tensor]]:
        for slot in self._layouts[bucket].slots:
            yield slot, view_slot(flats[bucket], slot, tensors[slot.index])

    def free(self) -> None:
        """Give memory and communicator back. Collective."""
        self._references = []
        self._reducer.free()
