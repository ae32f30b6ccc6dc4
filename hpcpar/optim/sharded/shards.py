"""Shards: the stretches of the parameters that this rank updates, and how updates reach the parameters.

::

    node copy      [ w2 ............ | w1 ....... | w0 ... ]      one on each node, the parameters are views
    rank 0's part  [ w2 ........|                                 shard of w2
    rank 1's part               |... | w1 ....... | w0 ... ]      shards of w2, w1, w0

A shard in a type of 32 bits or more *is* its stretch of the node copy, which the optimizer updates in place.
One in a narrower type has a master of float32, updated with float32 gradients and rounded into the copy.
Parameters on a GPU stay where they are: the copy on the host only carries new values between ranks.

Invariants:

* Parameters are written between ``enter`` and ``leave`` of the copy only, each element by its owner.
* A parameter that has been given other memory, or another type, is noticed before the next update.
* A master rounds to its parameter; where something else has changed that, the parameter counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from hpcpar.comm import NodeCopy, Slot, view_slot
from hpcpar.errors import HpcparError, MismatchError
from hpcpar.optim.sharded.gradient_parts import GradientParts

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["Shard", "Shards"]


@dataclass
class Shard:
    """A stretch of one parameter, ``start`` to ``end`` in the flat tensor of ``bucket``.

    ``value`` is what the optimizer updates: a tensor of one dimension, or of the shape of the parameter where
    these are kept whole. ``target`` is the stretch of the parameter's own memory, in its own type.
    """

    bucket: int
    slot: Slot
    start: int
    end: int
    value: torch.Tensor
    target: torch.Tensor

    @property
    def is_whole(self) -> bool:
        """Whether it is all of its parameter."""
        return self.end - self.start == self.slot.length

    @property
    def is_master(self) -> bool:
        """Whether ``value`` is a copy with more digits."""
        return self.value.dtype.to_real() != self.target.dtype

    def shaped(self, part: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        """Elements of the shard, as they lie in a bucket, in the shape of its value. Local."""
        if self.value.shape != parameter.shape:
            return part
        return view_slot(part, Slot(self.slot.index, 0, self.slot.length), parameter)


class Shards:
    """A rank's shards of some parameters, which move into memory shared by their node. Collective.

    Parameters
    ----------
    gradients
        The parameters, in buckets, and who owns which part.
    comm
        The ranks.
    whole
        Shards are whole parameters, and have their shapes.
    shared
        Whether a node may hold one copy.
    """

    def __init__(self, gradients: GradientParts, comm: Communicator, *, whole: bool, shared: bool) -> None:
        self._gradients, self._whole = gradients, whole
        self._copy = NodeCopy(comm, gradients.layouts, gradients.partitions, shared=shared)
        self._on_host = [
            self._parameter(layout.slots[0]).device.type == "cpu" for layout in gradients.layouts
        ]
        self._stretches = [
            (bucket, slot) for bucket, layout in enumerate(gradients.layouts) for slot in layout.slots
        ]
        self._rank = comm.rank
        self._places: list[tuple[int, ...]] = []
        self._versions: list[int] = []
        self._make_dense()
        self.take_over()
        self.own = [
            self._shard(bucket, slot, start, end)
            for bucket, slot in self._stretches
            for start, end in [_overlap(slot, gradients.partitions[bucket].bounds[comm.rank])]
            if start < end
        ]

    @property
    def is_shared(self) -> bool:
        """Whether the ranks of this node hold one copy. Local."""
        return self._copy.is_shared and all(self._on_host)

    def of_parameters(self, parameters: Sequence[nn.Parameter]) -> list[Shard]:
        """The shards of some parameters, in the order of these. Local."""
        order = {id(parameter): place for place, parameter in enumerate(parameters)}
        chosen = [shard for shard in self.own if id(self._parameter(shard.slot)) in order]
        return sorted(chosen, key=lambda shard: order[id(self._parameter(shard.slot))])

    def check(self) -> None:
        """Whether the parameters are where they were put. Local.

        Raises
        ------
        HpcparError
            Names the shape of one that is not.
        """
        for (_, slot), place in zip(self._stretches, self._places, strict=True):
            parameter = self._parameter(slot)
            if _place_of(parameter) != place:
                raise HpcparError(
                    f"a parameter of shape {tuple(parameter.shape)} must keep the memory that the "
                    "ShardedOptimizer gave it, got another. Change parameters inside "
                    "`with optimizer.changing_parameters():`"
                )

    def bind(self, has_gradient: Callable[[int], bool]) -> None:
        """Give the shards the gradients of this step. Local.

        Parameters
        ----------
        has_gradient
            Of a parameter by its index; the others are left out of the step.
        """
        flats = self._gradients.flats
        for shard in self.own:
            if has_gradient(shard.slot.index):
                part = flats[shard.bucket][shard.start : shard.end]
                gradient = shard.shaped(part, self._parameter(shard.slot))
                shard.value.grad = gradient.to(shard.value.dtype)
            else:
                shard.value.grad = None

    def unbind(self) -> None:
        """Let go of gradients. Local."""
        for shard in self.own:
            shard.value.grad = None

    def update(self, step: Callable[[], object], options: int) -> None:
        """Let ``step`` change the shards' values, and everybody see them. Collective.

        Parameters
        ----------
        step
            Of this rank's part.
        options
            A digest of those that it steps with.

        Raises
        ------
        MismatchError
            When ranks of this node have different options.
        """
        self._refresh_masters()
        if not self._copy.enter(options):
            raise MismatchError(
                "the options of a ShardedOptimizer, such as the learning rate, must be the same on all "
                "ranks, got others on a rank of this node. Does each rank step its scheduler alike?"
            )
        step()
        with torch.no_grad():
            for shard in self.own:
                if shard.is_master:
                    self._in_target(shard).copy_(shard.value)
                if not self._on_host[shard.bucket]:
                    self._copy.flats[shard.bucket][shard.start : shard.end].copy_(shard.target)
        self._copy.leave()
        self._receive()

    def let_go(self) -> None:
        """Give the parameters memory of their own, which each rank may change. Local."""
        for (bucket, slot), place in zip(self._stretches, self._places, strict=True):
            parameter = self._parameter(slot)
            if self._on_host[bucket] and _place_of(parameter) == place:
                parameter.data = parameter.detach().clone()

    def free(self) -> None:
        """Give the parameters memory of their own for good. Collective."""
        self.let_go()
        self.own = []
        self._copy.free()

    def _in_target(self, shard: Shard) -> torch.Tensor:
        return shard.shaped(shard.target, self._parameter(shard.slot))

    def _parameter(self, slot: Slot) -> nn.Parameter:
        return self._gradients.parameters[slot.index]

    def _make_dense(self) -> None:
        """Give parameters on GPUs memory without gaps; those on the host move anyway."""
        for bucket, slot in self._stretches:
            if not self._on_host[bucket]:
                parameter = self._parameter(slot)
                flat = _flat_values(parameter, slot)
                parameter.data = view_slot(flat, Slot(slot.index, 0, slot.length), parameter)

    def take_over(self) -> None:
        """Bring the parameters into the copy; each rank its own part, since all have the same. Collective."""
        self._copy.enter()
        for bucket, slot in self._stretches:
            start, end = _overlap(slot, self._gradients.partitions[bucket].bounds[self._rank])
            if start < end:
                flat = _flat_values(self._parameter(slot), slot)
                self._copy.flats[bucket][start:end].copy_(flat[start - slot.offset : end - slot.offset])
        self._copy.leave()
        for bucket, slot in self._stretches:
            if self._on_host[bucket]:
                parameter = self._parameter(slot)
                own_storage = self._copy.tensor(bucket, slot.offset, slot.length)
                parameter.data = view_slot(own_storage, Slot(slot.index, 0, slot.length), parameter)
        self._places = [_place_of(self._parameter(slot)) for _, slot in self._stretches]

    def _refresh_masters(self) -> None:
        """Where something else has changed a parameter since the last update, its master follows."""
        now = [self._parameter(slot)._version for _, slot in self._stretches]
        if now != self._versions:
            for shard in self.own:
                if shard.is_master:
                    target = self._in_target(shard)
                    differs = shard.value.to(target.dtype) != target
                    shard.value[differs] = target[differs].to(shard.value.dtype)

    def _shard(self, bucket: int, slot: Slot, start: int, end: int) -> Shard:
        parameter = self._parameter(slot)
        if self._on_host[bucket]:
            target = self._copy.tensor(bucket, start, end - start)
        else:
            target = _memory_of(parameter)[start - slot.offset : end - slot.offset]
        value = target.float() if target.dtype.itemsize < 4 else target
        if self._whole:
            value = view_slot(value, Slot(slot.index, 0, slot.length), parameter)
        return Shard(bucket, slot, start, end, value, target)

    def _receive(self) -> None:
        """Copy new values to parameters on GPUs, and tell autograd that parameters have changed."""
        changed = []
        with torch.no_grad():
            for bucket, slot in self._stretches:
                parameter = self._parameter(slot)
                if self._on_host[bucket]:
                    changed.append(parameter)
                else:
                    flat = self._copy.flats[bucket][slot.offset : slot.offset + slot.length]
                    _memory_of(parameter).copy_(flat)
        torch.autograd.graph.increment_version(changed)
        self._versions = [self._parameter(slot)._version for _, slot in self._stretches]


def _place_of(parameter: nn.Parameter) -> tuple[int, ...]:
    """Address, type and strides of what a parameter refers to."""
    return parameter.data_ptr(), hash(parameter.dtype), *parameter.stride()


def _overlap(slot: Slot, part: tuple[int, int]) -> tuple[int, int]:
    """What of a slot lies in a part of its bucket."""
    return max(slot.offset, part[0]), min(slot.offset + slot.length, part[1])


def _memory_of(parameter: nn.Parameter) -> torch.Tensor:
    """The elements of a dense parameter in the order of its memory, real ones."""
    real = torch.view_as_real(parameter.detach()) if parameter.is_complex() else parameter.detach()
    return real.as_strided((real.numel(),), (1,))


def _flat_values(parameter: nn.Parameter, slot: Slot) -> torch.Tensor:
    """A copy of the values of a parameter as they lie in a bucket."""
    flat = torch.empty(slot.length, dtype=parameter.dtype.to_real(), device=parameter.device)
    with torch.no_grad():
        view_slot(flat, Slot(slot.index, 0, slot.length), parameter).copy_(parameter)
    return flat
