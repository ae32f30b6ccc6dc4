"""The state of a sharded optimizer as the one that the plain optimizer would have, and back.

A shard's state has tensors like the shard (momenta), which are stretches of what the plain optimizer has, and
other things (a number of steps, factors of rows and columns), which are the same for every stretch of a
parameter, or belong to a whole one. So the whole state is put together from stretches, each from its owner,
and cut again for any other number of ranks. Masters of narrow parameters are a part of it, as ``master``; a
plain optimizer takes no notice of them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from hpcpar.comm import Slot, gather_parts, view_slot
from hpcpar.errors import CheckpointError
from hpcpar.optim.sharded.gradient_parts import GradientParts
from hpcpar.optim.sharded.shards import Shard

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["check_shapes", "cut_state", "load_state", "whole_state"]

MASTER = "master"


def whole_state(
    shards: Sequence[Shard], states: Any, gradients: GradientParts, comm: Communicator
) -> dict[int, dict[str, Any]]:
    """The state of each parameter that has one, by its index in ``gradients``, on the host. Collective.

    Parameters
    ----------
    shards
        This rank's.
    states
        The state of each shard's value, as ``torch.optim.Optimizer.state`` is.
    gradients
        The parameters and their buckets.
    comm
        The ranks.
    """
    own = [
        (shard, name, value)
        for shard in shards
        for name, value in {**states.get(shard.value, {}), **_master_of(shard)}.items()
    ]
    stretches = [item for item in own if _is_stretch(item[0], item[2])]
    facts = {(shard.slot.index, name, value.dtype.to_real()) for shard, name, value in stretches}
    others = [
        (s.slot.index, name, copy.deepcopy(value)) for s, name, value in own if not _is_stretch(s, value)
    ]
    everyone = comm.allgather((facts, others))
    result: dict[int, dict[str, Any]] = {}
    for _, objects in everyone:
        for index, name, value in objects:
            result.setdefault(index, {}).setdefault(name, value)
    known = set().union(*(found for found, _ in everyone))
    for name, dtype in sorted({(name, dtype) for _, name, dtype in known}, key=str):
        flats = _gather(stretches, name, dtype, gradients, comm)
        for bucket, layout in enumerate(gradients.layouts):
            for slot in layout.slots:
                if (slot.index, name, dtype) in known:
                    whole = view_slot(flats[bucket], slot, gradients.parameters[slot.index]).clone()
                    result.setdefault(slot.index, {})[name] = whole
    return result


def check_shapes(parameter: torch.Tensor, state: Mapping[str, Any]) -> None:
    """Whether the state of a parameter can be cut anywhere; asked on every rank, whatever it owns. Local.

    Raises
    ------
    CheckpointError
        When a tensor in it has another shape than the parameter.
    """
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and value.dim() and value.shape != parameter.shape:
            raise CheckpointError(
                f"the state {name!r} of a parameter of shape {tuple(parameter.shape)} must have the same "
                f"shape to be spread over ranks, got {tuple(value.shape)}"
            )


def cut_state(shard: Shard, parameter: torch.Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
    """What of the state of a parameter belongs to one of its shards; copies. Local."""
    result = {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape and name != "step":
            flat = _elements(value, shard, parameter)
            part = flat[shard.start - shard.slot.offset : shard.end - shard.slot.offset]
            result[name] = shard.shaped(part.clone(), parameter)
        else:
            result[name] = copy.deepcopy(value)
    return result


def load_state(
    optimizer: torch.optim.Optimizer,
    shards: Sequence[Shard],
    gradients: GradientParts,
    known: Mapping[int, Any],
    groups: Sequence[Mapping[str, Any]],
) -> None:
    """Give an optimizer over shards its part of a state. Local.

    Parameters
    ----------
    optimizer
        This rank's.
    shards
        What it updates.
    gradients
        Has the parameters.
    known
        The state of each parameter, by its identity; ``None`` where there is none.
    groups
        With the options to take over.
    """
    values = [value for group in optimizer.param_groups for value in group["params"]]
    number_of = {id(value): number for number, value in enumerate(values)}
    state: dict[int, Any] = {}
    for shard in shards:
        parameter = gradients.parameters[shard.slot.index]
        whole = known.get(id(parameter))
        if whole is None:
            continue
        own = cut_state(shard, parameter, whole)
        master = own.pop(MASTER, None)
        if shard.is_master:  # without one in the state the parameter is all there is
            shard.value.copy_(shard.shaped(shard.target, parameter) if master is None else master)
        state[number_of[id(shard.value)]] = own
    own_groups = optimizer.state_dict()["param_groups"]
    for own_group, group in zip(own_groups, groups, strict=True):
        own_group.update({name: value for name, value in group.items() if name != "params"})
    optimizer.load_state_dict({"state": state, "param_groups": own_groups})


def _gather(
    stretches: Sequence[tuple[Shard, str, torch.Tensor]],
    name: str,
    dtype: torch.dtype,
    gradients: GradientParts,
    comm: Communicator,
) -> list[torch.Tensor]:
    """Buckets of one of the states, complete on every rank."""
    flats = [torch.zeros(layout.numel, dtype=dtype) for layout in gradients.layouts]
    for shard, other, value in stretches:
        if other == name and value.dtype.to_real() == dtype:
            parameter = gradients.parameters[shard.slot.index]
            flats[shard.bucket][shard.start : shard.end].copy_(_elements(value, shard, parameter))
    gather_parts(comm, range(comm.size), flats, gradients.partitions)
    return flats


def _elements(value: torch.Tensor, shard: Shard, parameter: torch.Tensor) -> torch.Tensor:
    """The elements of a tensor like a shard, or like its parameter, as they lie in a bucket."""
    if value.shape != parameter.shape:
        return value
    flat = torch.empty(shard.slot.length, dtype=value.dtype.to_real(), device=value.device)
    view_slot(flat, Slot(shard.slot.index, 0, shard.slot.length), parameter).copy_(value)
    return flat


def _is_stretch(shard: Shard, value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == shard.value.shape and value.dim() > 0


def _master_of(shard: Shard) -> dict[str, torch.Tensor]:
    return {MASTER: shard.value.detach()} if shard.is_master else {}
