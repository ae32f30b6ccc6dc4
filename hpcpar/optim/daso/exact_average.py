"""Making one model, with one optimizer state, of those of several nodes: exactly, and waiting for it.

Inside a node all ranks hold the same, so one rank per node speaks for it, weighted by the node's ranks. Rank
0 computes the mean and everybody gets its bits, so that replicas are equal afterwards and stay so under equal
gradients::

    node 0   rank 0  2 x0 --.                    .-- mean --> rank 1
    node 1   rank 2  2 x1 ---`--> sum / 4, rank 0 --- mean --> rank 2 --> rank 3

Floating-point tensors are averaged in their own type, 16-bit ones in float32. What is no quantity but a count
(a tensor without axes, such as Adam's ``step``, and other types) is rank 0's. A parameter that was never used
on some node has no state there: its quantities count as zero, its counts are those of the first node that
has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["average_exactly", "average_state"]

_CHUNK_BYTES = 16 << 20


@torch.no_grad()
def average_exactly(tensors: Sequence[torch.Tensor], comm: Communicator) -> None:
    """Replace the tensors by their mean over the ranks; those that are no numbers by rank 0's. Collective.

    Parameters
    ----------
    tensors
        The same shapes and dtypes on all ranks, the same values inside a node.
    comm
        All ranks.
    """
    for group in _groups(tensors):
        parts = [_real(tensor).reshape(-1) for tensor in group]
        flat = torch.cat(parts)
        flat = _mean(flat, comm) if flat.is_floating_point() else flat
        _share(flat, comm)
        for tensor, part in zip(group, torch.split(flat, [part.numel() for part in parts]), strict=True):
            target = _real(tensor)
            target.copy_(part.view(target.shape))


def average_state(optimizer: torch.optim.Optimizer, comm: Communicator) -> None:
    """Give the optimizer the mean of the states of all nodes, as described above. Collective."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    outlines = comm.allgather([_outline(parameter, optimizer.state) for parameter in parameters])
    quantities: list[torch.Tensor] = []
    for index, parameter in enumerate(parameters):
        for key, entry in _union([outline[index] for outline in outlines]).items():
            state = optimizer.state[parameter]
            if isinstance(entry, _Count):
                state[key] = entry.restore(parameter)
                continue
            if key not in state:
                state[key] = torch.zeros(entry.shape, dtype=entry.dtype, device=parameter.device)
            quantities.append(state[key])
    average_exactly(quantities, comm)


@dataclass(frozen=True)
class _Quantity:
    """Stands for a tensor that will be averaged in the outline of a state."""

    shape: torch.Size
    dtype: torch.dtype


@dataclass(frozen=True)
class _Count:
    """What is copied. Optimizers keep a count on the host or beside the parameter, as suits their kernels."""

    value: Any
    on_host: bool

    def restore(self, parameter: torch.Tensor) -> Any:
        """A copy for the state of a parameter. Local."""
        if not isinstance(self.value, torch.Tensor):
            return self.value
        return self.value.clone() if self.on_host else self.value.to(parameter.device, copy=True)


def _outline(parameter: torch.Tensor, states: Mapping[torch.Tensor, dict[str, Any]]) -> dict[str, Any]:
    """The state of one parameter without what will be averaged."""
    return {key: _entry(value) for key, value in states.get(parameter, {}).items()}


def _entry(value: Any) -> _Quantity | _Count:
    if not isinstance(value, torch.Tensor):
        return _Count(value, on_host=True)
    if value.dim() and (value.is_floating_point() or value.is_complex()):
        return _Quantity(value.shape, value.dtype)
    return _Count(value.detach().cpu(), on_host=value.device.type == "cpu")


def _union(outlines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All keys, each with the entry of the first rank that has it."""
    entries: dict[str, Any] = {}
    for outline in outlines:
        for key, entry in outline.items():
            entries.setdefault(key, entry)
    return entries


def _groups(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Tensors of one type and device in messages of some megabytes, in an order that all ranks share."""
    kinds: dict[tuple[torch.dtype, str], list[torch.Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device.type), []).append(tensor)
    for members in kinds.values():
        group: list[torch.Tensor] = []
        for tensor in members:
            group.append(tensor)
            if sum(member.nbytes for member in group) >= _CHUNK_BYTES:
                yield group
                group = []
        if group:
            yield group


def _real(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _mean(flat: torch.Tensor, comm: Communicator) -> torch.Tensor:
    """The mean over the ranks, on rank 0."""
    wide = flat.float() if flat.dtype.itemsize < 4 else flat
    if comm.node.rank != 0 or comm.num_nodes == 1:
        return wide
    wide = wide * comm.node.size
    total = torch.empty_like(wide) if comm.rank == 0 else None
    comm.rail.Reduce(wide, total)
    return wide if total is None else total / comm.size


def _share(flat: torch.Tensor, comm: Communicator) -> None:
    """Copy from rank 0, once to each node and then inside it."""
    if comm.node.rank == 0 and comm.num_nodes > 1:
        comm.rail.Bcast(flat, 0)
    comm.node.Bcast(flat, 0)
