"""Step sums: what all devices of all ranks have added up in one step.

Each device hands in a flat tensor on the host (:class:`~hpcpar.xla.replica.Contribution`). They are added in
the order of the devices, piece by piece, into the buckets of a :class:`~hpcpar.comm.Reducer`, and each piece
is on its way to the other ranks while the next one is added::

    bucket 0       [ loss | samples | failed ranks | uses of parameter 0, 1, ... ]
    bucket 1 ...   gradients times samples, in pieces
    last           changes of tracked buffers times samples, if there are any

Bucket 0 is also how ranks learn that one has failed: that rank adds zeros and a one. So a step is one
reduction, and no rank waits for another that has raised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hpcpar.comm import BucketLayout, Reducer

if TYPE_CHECKING:
    from hpcpar.comm import Communicator
    from hpcpar.xla.replica import Contribution

__all__ = ["StepSums", "StepTotals"]

_LOSS, _SAMPLES, _FAILED, _HEAD = range(4)


@dataclass(frozen=True)
class StepTotals:
    """Over all devices and ranks.

    Attributes
    ----------
    loss_sum : float
        Sum of the losses of all samples.
    samples : int
        How many they were.
    failed : int
        Ranks that have failed.
    used : list of int
        Trainable parameters that had a gradient anywhere, by their place among these.
    """

    loss_sum: float
    samples: int
    failed: int
    used: list[int]


class StepSums:
    """Adds contributions over the devices of this rank and over the ranks. Collective to make and to free.

    Parameters
    ----------
    comm
        The ranks, or None for this one alone.
    sizes
        Elements of each trainable parameter.
    buffer_numel
        Elements of all tracked buffers.
    dtype
        Of the sums.
    bucket_bytes
        Of a piece.
    transport
        As in :class:`hpcpar.comm.Reducer`.
    """

    def __init__(
        self,
        comm: Communicator | None,
        sizes: Sequence[int],
        buffer_numel: int,
        dtype: torch.dtype,
        *,
        bucket_bytes: int,
        transport: str,
    ) -> None:
        self._gradient_numel = sum(sizes)
        piece = max(1, bucket_bytes // dtype.itemsize)
        self._pieces = [
            (first, min(piece, self._gradient_numel - first))
            for first in range(0, self._gradient_numel, piece)
        ]
        if buffer_numel:  # behind the gradients and the loss
            self._pieces.append((self._gradient_numel + 1, buffer_numel))
        numels = [_HEAD + len(sizes), *(length for _, length in self._pieces)]
        self._reducer: Reducer | None = None
        if comm is not None and comm.size > 1:
            self._reducer = Reducer(
                comm,
                [BucketLayout(dtype, numel) for numel in numels],
                transport=transport,
                name="TPUManager.step()",
            )
            self._flats = self._reducer.flats
        else:
            self._flats = [torch.zeros(numel, dtype=dtype) for numel in numels]

    def add_up(self, contributions: Sequence[Contribution], *, failed: bool) -> StepTotals:
        """Sum over devices and ranks. Collective.

        Parameters
        ----------
        contributions
            Of this rank's devices; those without samples count for nothing.
        failed
            Whether this rank has failed. Its contributions do not matter then.

        Raises
        ------
        StalledError
            At the deadline, naming ranks that are late.
        """
        live = [] if failed else [each for each in contributions if each.sums is not None]
        if self._reducer is not None:
            self._reducer.begin(average=False)
        self._fill_head(live, failed=failed)
        self._publish(0)
        for bucket, (first, length) in enumerate(self._pieces, start=1):
            self._fill(self._flats[bucket], live, first, length)
            self._publish(bucket)
        if self._reducer is not None:
            self._reducer.wait_all()
        head = self._flats[0].tolist()
        used = [index for index, uses in enumerate(head[_HEAD:]) if uses]
        return StepTotals(head[_LOSS], round(head[_SAMPLES]), round(head[_FAILED]), used)

    @property
    def gradients(self) -> list[tuple[int, torch.Tensor]]:
        """The sums of gradients times samples: pieces, and where in the flat gradient they begin."""
        return [
            (first, self._flats[bucket])
            for bucket, (first, _) in enumerate(self._pieces, start=1)
            if first < self._gradient_numel
        ]

    @property
    def buffer_changes(self) -> torch.Tensor:
        """The sums of changes times samples, flat."""
        has_buffers = bool(self._pieces) and self._pieces[-1][0] > self._gradient_numel
        return self._flats[-1] if has_buffers else self._flats[0][:0]

    def give_up(self) -> None:
        """Leave what is under way, since this rank goes. Local; nothing may follow."""
        if self._reducer is not None:
            self._reducer.give_up()

    def free(self) -> None:
        """Give memory and communicator back. Collective."""
        if self._reducer is not None:
            self._reducer.free()

    def _fill_head(self, live: Sequence[Contribution], *, failed: bool) -> None:
        # As a list first: a model may have thousands of parameters, and each write to a tensor costs.
        head = [0.0] * self._flats[0].numel()
        head[_FAILED] = float(failed)
        for each in live:
            assert each.sums is not None
            head[_LOSS] += each.sums[self._gradient_numel].item()
            head[_SAMPLES] += each.samples
            for index in each.used:
                head[_HEAD + index] += 1.0
        self._flats[0].copy_(torch.tensor(head, dtype=torch.float64))

    def _fill(self, flat: torch.Tensor, live: Sequence[Contribution], first: int, length: int) -> None:
        """Add a piece of all devices' sums. Buffers count by the samples that their device has seen."""
        is_of_buffers = first > self._gradient_numel
        if not live:
            flat.zero_()
        for number, each in enumerate(live):
            assert each.sums is not None
            part = each.sums[first : first + length]
            scale = each.samples if is_of_buffers else 1
            if number:
                flat.add_(part, alpha=scale)
            else:
                torch.mul(part, scale, out=flat)

    def _publish(self, bucket: int) -> None:
        if self._reducer is not None:
            self._reducer.publish(bucket)
