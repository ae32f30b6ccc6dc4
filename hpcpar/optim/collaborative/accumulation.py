"""Accumulation: sums of batch size times gradient, in the memory in which they are averaged.

The mean over all samples is one division of two sums, so that is what a rank keeps: for each parameter the
sum of ``batch_size * gradient``, in float32 where the parameter is narrower, and behind the last bucket, in a
*tail* of integers, what must be summed with it to the last digit::

    buckets  [ sum of n*g1 | sum of n*g2 | ... ]  [ ... ]   tail  [ samples | overflows | used 1 | used 2 ]

Where the accumulators lie is a choice:

* in the buckets themselves, so that a round copies nothing;
* with ``reuse_grad_buffers``, ``.grad`` itself lies there, and backward accumulates. All batches have one
  size then, by which the sums are multiplied at the end;
* beside them (*apart*), if the next samples must be accumulated while a round is under way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hpcpar.comm import BucketLayout, Reducer, Slot, plan_buckets, view_slot
from hpcpar.errors import HpcparError

__all__ = ["Accumulation", "Totals", "plan_accumulation"]

_BUCKET_BYTES = 8 * 2**20
_HEAD = 2  # words of the tail before the flags


@dataclass(frozen=True)
class Totals:
    """The tail after a round.

    Attributes
    ----------
    samples : int
        Of all members.
    has_overflowed : bool
        Whether a gradient of any of them was not finite under a ``GradScaler``.
    used : list of bool
        Which parameters had a gradient on any of them.
    """

    samples: int
    has_overflowed: bool
    used: list[bool]


def plan_accumulation(
    parameters: Sequence[torch.Tensor], device: torch.device | None
) -> tuple[list[torch.Tensor], list[BucketLayout], list[torch.device]]:
    """What accumulators look like (tensors without memory), their buckets, and the devices of these. Local.

    Parameters
    ----------
    parameters
        In the order of their groups.
    device
        Of the accumulators; that of the first parameter of a bucket by default.
    """
    likes = [
        torch.empty_like(parameter, dtype=_wide(parameter.dtype), device="meta") for parameter in parameters
    ]
    places = [device or parameter.device for parameter in parameters]
    layouts: list[BucketLayout] = []
    devices: list[torch.device] = []
    for place in dict.fromkeys(places):
        mine = [index for index, other in enumerate(places) if other == place]
        for layout in plan_buckets([likes[index] for index in mine], _BUCKET_BYTES):
            slots = tuple(Slot(mine[slot.index], slot.offset, slot.length) for slot in layout.slots)
            layouts.append(BucketLayout(layout.dtype, layout.numel, slots))
            devices.append(place)
    tail = BucketLayout(torch.int64, _HEAD + len(parameters))
    return likes, [*layouts, tail], [*devices, torch.device("cpu")]


class Accumulation:
    """The accumulators of one rank. Local.

    Parameters
    ----------
    parameters
        In the order of their groups.
    likes, layouts
        From :func:`plan_accumulation`.
    reducer
        Has the buckets.
    apart
        Keep accumulators beside the buckets.
    batch_size
        Of every batch, if ``.grad`` is the accumulator (``reuse_grad_buffers``); else ``None``.
    unit
        In which sums are handed over, a power of two, so that a narrow wire does not overflow.
    untrained
        Parameters that have no accumulator, since they were frozen when these were laid out.

    Attributes
    ----------
    samples : int
        Accumulated and not handed over.
    oldest : int or None
        The lowest version of parameters that their gradients are of.
    """

    def __init__(
        self,
        parameters: Sequence[torch.Tensor],
        likes: Sequence[torch.Tensor],
        layouts: Sequence[BucketLayout],
        reducer: Reducer,
        *,
        apart: bool,
        batch_size: int | None,
        unit: float = 1.0,
        untrained: Sequence[torch.Tensor] = (),
    ) -> None:
        self._unit, self._untrained = unit, list(untrained)
        self._parameters = list(parameters)
        self._flats = reducer.flats
        self._tail = reducer.flats[-1]
        self._likes, self._layouts = likes, layouts[:-1]
        for flat in self._flats[:-1]:
            flat.zero_()
        self._views = self.views_of(self._flats)
        self._apart = apart
        self._sums = [torch.zeros_like(view) for view in self._views] if apart else self._views
        self._batch_size = batch_size
        self._handles: list[Any] = []
        self.clear()
        if batch_size is not None:
            self._attach()

    def views_of(self, flats: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The part of each parameter of tensors that are laid out like the buckets."""
        views = [torch.empty(0)] * len(self._likes)
        for layout, flat in zip(self._layouts, flats, strict=False):
            for slot in layout.slots:
                views[slot.index] = view_slot(flat, slot, self._likes[slot.index])
        return views

    def clear(self) -> None:
        """Drop what is accumulated and not handed over."""
        for total in self._sums:
            total.zero_()
        self.samples = 0
        self.oldest: int | None = None
        self._has_overflowed = False
        self._used = [False] * len(self._sums)

    def add(self, samples: int, version: int, scale: float | None, has_overflowed: bool) -> None:
        """Count a batch, with what ``.grad`` holds.

        Parameters
        ----------
        samples
            In the batch.
        version
            Of the parameters that its gradient is of.
        scale
            That a ``GradScaler`` multiplied the loss by; ``None`` for none.
        has_overflowed
            Whether the gradient is not finite. It is left out then.
        """
        for parameter in self._untrained:
            if parameter.grad is not None:
                raise HpcparError(
                    f"a parameter of shape {tuple(parameter.shape)} must be trainable when a "
                    "CollaborativeOptimizer is made, got a gradient of one that was frozen then. Make a new "
                    "one"
                )
        self.samples += samples
        self.oldest = version if self.oldest is None else self.oldest
        self._has_overflowed |= has_overflowed
        if self._batch_size is not None or has_overflowed:
            return
        factor = samples if scale is None else samples / scale
        for index, (parameter, total) in enumerate(zip(self._parameters, self._sums, strict=True)):
            if parameter.grad is not None:
                gradient = parameter.grad.detach()
                gradient = gradient if gradient.layout is torch.strided else gradient.to_dense()
                total.add_(gradient.to(total.device), alpha=factor)
                self._used[index] = True

    def hand_over(self) -> None:
        """Fill the buckets for a round; with accumulators apart, begin new ones."""
        head = [self.samples, int(self._has_overflowed)]
        self._tail.copy_(torch.tensor([*head, *map(int, self._used)]))
        if self._apart:
            for view, total in zip(self._views, self._sums, strict=True):
                view.copy_(total)
        factor = (self._batch_size or 1) / self._unit
        for flat in self._flats[:-1] if factor != 1.0 else ():
            flat.mul_(factor)
        if self._apart:
            self._handed = self.oldest
            self.clear()

    def take_back(self) -> None:
        """Undo :meth:`hand_over`, when the round takes place without this rank. For accumulators apart."""
        for view, total in zip(self._views, self._sums, strict=True):
            total.add_(view, alpha=self._unit)
        samples, overflows, *used = self._tail.tolist()
        self.samples += samples
        self._has_overflowed |= bool(overflows)
        self._used = [a or bool(b) for a, b in zip(self._used, used, strict=True)]
        self.oldest = self.oldest if self._handed is None else self._handed

    def totals(self) -> Totals:
        """What the tail says after a round."""
        samples, overflows, *used = self._tail.tolist()
        return Totals(samples, overflows > 0, [flag > 0 for flag in used])

    def write_means(self, totals: Totals) -> None:
        """Let ``.grad`` of every parameter be the mean over all samples; ``None`` of one that nobody used."""
        units = totals.samples / self._unit
        for parameter, view, used in zip(self._parameters, self._views, totals.used, strict=True):
            if not used:
                parameter.grad = None
            elif self._batch_size is not None:
                view.div_(units)
            else:
                _write_gradient(parameter, view / units)

    def end_round(self) -> None:
        """Begin anew after a round."""
        if not self._apart:
            self.clear()
        if self._batch_size is not None:
            for parameter, view in zip(self._parameters, self._views, strict=True):
                parameter.grad = view

    def detach(self) -> None:
        """Leave the buckets, which are about to be freed."""
        for handle in self._handles:
            handle.remove()
        if self._batch_size is not None:
            for parameter in self._parameters:
                parameter.grad = None
        self._flats, self._views, self._sums = [], [], []
        self._tail = torch.empty(0, dtype=torch.int64)

    def _attach(self) -> None:
        """Have backward accumulate in the buckets, and notice which parameters it reaches."""
        for index, (parameter, view) in enumerate(zip(self._parameters, self._views, strict=True)):
            parameter.grad = view
            add_hook: Any = parameter.register_post_accumulate_grad_hook
            self._handles.append(add_hook(self._make_hook(index)))

    def _make_hook(self, index: int) -> Any:
        def hook(parameter: torch.Tensor) -> None:
            view = self._views[index]
            if parameter.grad is not None and parameter.grad.data_ptr() != view.data_ptr():
                view.add_(parameter.grad)  # the program set .grad to None, but what was there is here
                parameter.grad = view
            self._used[index] = True

        return hook


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


def _write_gradient(parameter: torch.Tensor, mean: torch.Tensor) -> None:
    """Into the memory that ``.grad`` has, if it can hold a dense gradient."""
    gradient = parameter.grad
    if gradient is None or gradient.layout is not torch.strided or gradient.requires_grad:
        parameter.grad = torch.empty_like(parameter).copy_(mean)
    else:
        gradient.copy_(mean)
