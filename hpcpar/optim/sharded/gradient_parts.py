"""Where a sharded optimizer gets its gradients from.

A data-parallel model scatters the gradients of its buckets itself, while backward runs; it is a
:class:`GradientParts` already, and all that this package knows of it. For parameters that nobody reduces,
:class:`SelfReducedGradients` does the same at the beginning of the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from hpcpar.comm import (
    BucketLayout,
    Partition,
    Reducer,
    even_partition,
    plan_buckets,
    view_slot,
    whole_tensors,
)
from hpcpar.errors import HpcparError

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["GradientParts", "SelfReducedGradients"]

_BUCKET_BYTES = 8 << 20


class GradientParts(Protocol):
    """Buckets of which each rank has its own part of the mean."""

    parameters: list[nn.Parameter]
    layouts: list[BucketLayout]
    partitions: list[Partition]
    reducer: Reducer

    @property
    def wire_dtype(self) -> torch.dtype | None:
        """The type in which gradients cross the network, if not their own."""

    @property
    def flats(self) -> list[torch.Tensor]:
        """The flat tensor of each bucket."""


class ScattersGradients(Protocol):
    """A model that leaves each rank its part of the mean gradients only."""

    def scatter_gradients(self, cut: str | None) -> GradientParts | None:
        """Begin that, cutting ``"anywhere"`` or between ``"tensors"``; end it with ``None``. Collective."""


class SelfReducedGradients:
    """Averages the gradients that parameters have, each part at its owner only. Collective to make and free.

    Where they are means over the ranks already, this gives the same again, up to rounding.

    Parameters
    ----------
    parameters
        In order of registration; the same on every rank.
    comm
        The ranks.
    cut
        ``"anywhere"`` or ``"tensors"``.
    wire_dtype, transport
        As in :class:`hpcpar.comm.Reducer`.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        comm: Communicator,
        cut: str,
        *,
        wire_dtype: torch.dtype | None,
        transport: str,
    ) -> None:
        self.parameters = list(reversed(parameters))
        self.layouts = plan_buckets(self.parameters, _BUCKET_BYTES)
        if cut == "tensors":
            self.layouts, self.partitions = whole_tensors(self.layouts, comm.node_map)
        else:
            self.partitions = [even_partition(layout, comm.node_map) for layout in self.layouts]
        devices = [self.parameters[layout.slots[0].index].device for layout in self.layouts]
        flags = BucketLayout(torch.float32, max(1, len(self.parameters)))
        self.wire_dtype = wire_dtype
        self.reducer = Reducer(
            comm,
            [*self.layouts, flags],
            transport=transport,
            wire_dtype=wire_dtype,
            devices=[*devices, torch.device("cpu")],
            partitions=[*self.partitions, None],
        )

    @property
    def flats(self) -> list[torch.Tensor]:
        """The flat tensor of each bucket; this rank's part holds the mean. Local."""
        return self.reducer.flats[:-1]

    def reduce(self) -> list[bool]:
        """Average the gradients as they are now; which parameters have one on any rank. Collective."""
        reducer, flags = self.reducer, self.reducer.flats[-1]
        reducer.begin()
        flags.zero_()
        for bucket, layout in enumerate(self.layouts):
            for slot in layout.slots:
                parameter = self.parameters[slot.index]
                view = view_slot(self.flats[bucket], slot, parameter)
                if parameter.grad is None:
                    view.zero_()
                else:
                    if parameter.grad.layout is not torch.strided:
                        raise HpcparError("gradients of a ShardedOptimizer must be dense, got a sparse one")
                    view.copy_(parameter.grad)
                    flags[slot.index] = 1.0
            reducer.publish(bucket)
        reducer.publish(len(self.layouts))
        reducer.wait_all()
        return [flag > 0.0 for flag in flags.tolist()]

    def free(self) -> None:
        """Free the reducer. Collective."""
        self.reducer.free()
