"""The replica: what an optimizer step changes, as one thing that can be packed, sent, compared and loaded.

A packed state is one structure, which is pickled and small, and one stretch of bytes with all tensors end to
end, cut into chunks by whoever sends it::

    (version, step, [tensor 0, tensor 1], {"state": {0: {"exp_avg": tensor 2 ...           structure
    [ bytes of tensor 0 | bytes of tensor 1 | bytes of tensor 2 | ...                      contents

It is a copy, so that the sender may train on while it is being sent.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["Packed", "Replica", "Scheduler", "describe"]


class Scheduler(Protocol):
    """A learning-rate scheduler, as of torch."""

    def step(self) -> None:
        """One more global step was made."""

    def state_dict(self) -> dict[str, Any]:
        """As in torch."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch."""


@dataclass(frozen=True)
class Packed:
    """A state on its way: the pickled structure, uint8, and the tensors' bytes, uint8, both on the host."""

    structure: torch.Tensor
    contents: torch.Tensor


@dataclass(frozen=True)
class _Place:
    """Stands for a tensor in a structure."""

    index: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Replica:
    """Parameters, optimizer and scheduler of one rank, with their version. Local.

    Parameters
    ----------
    optimizer
        Steps the parameters.
    scheduler
        Stepped after it, if any.

    Attributes
    ----------
    version : int
        Rounds that have led to it.
    step : int
        Optimizer steps that have.
    parameters, untrained : list of torch.Tensor
        Those that were trainable in the beginning, in the order of their groups, and those that were not.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, scheduler: Scheduler | None) -> None:
        self.optimizer, self.scheduler = optimizer, scheduler
        self.version = self.step = 0
        everything = [p for group in optimizer.param_groups for p in group["params"]]
        self.parameters = [parameter for parameter in everything if parameter.requires_grad]
        self.untrained = [parameter for parameter in everything if not parameter.requires_grad]

    def apply(self, clip_grad_norm: float | None) -> None:
        """Step with the gradients that are there."""
        if clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, clip_grad_norm)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.step += 1

    def pack(self) -> Packed:
        """A copy of everything, with the state of torch's, Python's and numpy's random numbers."""
        tensors: list[torch.Tensor] = []
        tree = _replace(
            {
                "version": self.version,
                "step": self.step,
                "parameters": [p for group in self.optimizer.param_groups for p in group["params"]],
                "optimizer": self.optimizer.state_dict(),
                "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
                "random": _random_state(),
            },
            tensors,
        )
        parts = [_bytes_of(tensor) for tensor in tensors]
        structure = bytearray(pickle.dumps((tree, [part.numel() for part in parts]), pickle.HIGHEST_PROTOCOL))
        return Packed(torch.frombuffer(structure, dtype=torch.uint8), torch.cat(parts))

    def unpack(self, packed: Packed, *, with_random: bool) -> None:
        """Become the same, the random numbers only if asked for."""
        structure, sizes = pickle.loads(packed.structure.numpy().tobytes())
        parts = [
            part.clone() for part in torch.split(packed.contents, sizes)
        ]  # aligned, in memory of their own
        tree = _restore(structure, parts)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        with torch.no_grad():
            for parameter, value in zip(parameters, tree["parameters"], strict=True):
                parameter.copy_(value)
        self.optimizer.load_state_dict(tree["optimizer"])
        if self.scheduler is not None and tree["scheduler"] is not None:
            self.scheduler.load_state_dict(tree["scheduler"])
        if with_random:
            _set_random_state(tree["random"])
        self.version, self.step = tree["version"], tree["step"]

    def broadcast(self, comm: Communicator) -> None:
        """Become what rank 0 has. Collective."""
        if comm.size == 1:
            return
        packed = self.pack() if comm.rank == 0 else None
        sizes = comm.bcast(None if packed is None else (packed.structure.numel(), packed.contents.numel()))
        if packed is None:
            packed = Packed(*(torch.empty(size, dtype=torch.uint8) for size in sizes))
        comm.Bcast(packed.structure)
        comm.Bcast(packed.contents)
        if comm.rank:
            self.unpack(packed, with_random=False)


def describe(replica: Replica, options: dict[str, object]) -> list[str]:
    """One line for each thing that must be alike on all ranks. Local."""
    lines = [f"{name}={value}" for name, value in options.items()]
    lines.append(f"optimizer {type(replica.optimizer).__name__}")
    lines.append(f"scheduler {type(replica.scheduler).__name__}")
    for number, group in enumerate(replica.optimizer.param_groups):
        lines += [
            f"parameter {place} of group {number}: {tuple(p.shape)} {p.dtype}"
            + ("" if p.requires_grad else " frozen")
            for place, p in enumerate(group["params"])
        ]
    return lines


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    state["numpy"] = np.random.get_state(legacy=False)  # noqa: NPY002 - the one that programs draw from
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return plain.view(torch.uint8) if plain.numel() else torch.empty(0, dtype=torch.uint8)


def _replace(tree: Any, tensors: list[torch.Tensor]) -> Any:
    """The same with a place for each tensor; the tensors are appended."""
    if isinstance(tree, torch.Tensor):
        tensors.append(tree)
        return _Place(len(tensors) - 1, tree.dtype, tuple(tree.shape))
    return _mapped(tree, lambda part: _replace(part, tensors))


def _restore(tree: Any, parts: Sequence[torch.Tensor]) -> Any:
    """The same with tensors in their places."""
    if isinstance(tree, _Place):
        part = parts[tree.index]
        filled = part.view(tree.dtype) if part.numel() else torch.empty(0, dtype=tree.dtype)
        return filled.reshape(tree.shape)
    return _mapped(tree, lambda part: _restore(part, parts))


def _mapped(tree: Any, function: Any) -> Any:
    if isinstance(tree, dict):
        return {key: function(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)) and type(tree) in (list, tuple):
        return type(tree)(function(value) for value in tree)
    return tree
