"""A stage: consecutive layers of one rank as a function of the values that come in.

::

    chain value, popped skips  --->  layers  --->  chain value, stashed skips

It knows nothing of messages, microbatch order or autograd. Each layer runs with random numbers of its own
(:mod:`~hpcpar.nn.pipeline.randomness`). Running it again for the same microbatch, as activation checkpointing
does, gives the same result and leaves buffers alone: those that change in a forward (running statistics) are
found in the first one, saved before a recomputation and put back after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hpcpar.nn.pipeline.batch_norm import DeferredBatchNorm
from hpcpar.nn.pipeline.plan import StagePlan
from hpcpar.nn.pipeline.randomness import LayerSeeds
from hpcpar.nn.pipeline.skip import SkipName, SkipTracker, use_tracker

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["Stage"]

_HANDING_ON = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd, nn.Sequential)


class Stage:
    """The layers of one stage. Local.

    Parameters
    ----------
    plan
        What the stage is.
    layers
        Its modules, in order.
    names
        Their names in the unsplit model, for errors.
    seeds
        Of this rank's layers.
    """

    def __init__(
        self, plan: StagePlan, layers: Sequence[nn.Module], names: Sequence[str], seeds: LayerSeeds
    ) -> None:
        self.plan = plan
        self.layers = list(layers)
        self._names = list(names)
        self._seeds = seeds
        self._changing: list[torch.Tensor] | None = None
        self._deferred = [
            module for layer in layers for module in layer.modules() if isinstance(module, DeferredBatchNorm)
        ]
        self.overwrites_input = _overwrites_input(self.layers)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters of the layers, each once."""
        return list({id(p): p for layer in self.layers for p in layer.parameters()}.values())

    @property
    def changing_buffers(self) -> list[torch.Tensor]:
        """The buffers that training changes, such as running statistics; in the same order everywhere."""
        deferred = {id(buffer) for layer in self._deferred for buffer in layer.buffers()}
        changing = {id(buffer) for buffer in self._changing or ()}
        buffers = {id(b): b for layer in self.layers for b in layer.buffers()}
        return [b for identity, b in buffers.items() if identity in changing and identity not in deferred]

    def run(
        self, microbatch: int, value: Any, popped: Mapping[SkipName, Any]
    ) -> tuple[Any, dict[SkipName, Any]]:
        """Compute the stage. Local.

        Parameters
        ----------
        microbatch
            Its number.
        value
            The input of the first layer.
        popped
            Skip connections from other stages.

        Returns
        -------
        value, dict
            The output of the last layer, and what the layers have stashed.
        """
        tracker = _StageTracker(popped)
        watched = self._watch_buffers()
        with use_tracker(tracker):
            for number, name, layer in zip(self.plan.layers, self._names, self.layers, strict=True):
                try:
                    value = self._seeds.call(number, layer, microbatch, value)
                except Exception as error:
                    error.add_note(
                        f"in layer {name!r} ({type(layer).__name__}) of pipeline stage {self.plan.index}, "
                        f"microbatch {microbatch}"
                    )
                    raise
        if watched is not None:
            self._changing = [b for b, copy in watched if not _same(b, copy)]
        return value, tracker.stashed

    def mode(self) -> tuple[bool, ...]:
        """What decides which tensors want gradients and which buffers change. Local."""
        modules = [module.training for layer in self.layers for module in layer.modules()]
        return (*modules, *(p.requires_grad for layer in self.layers for p in layer.parameters()))

    def end_step(self, replicas: Communicator | None) -> None:
        """Update deferred running statistics. Collective over ``replicas`` of the stage, if given."""
        for layer in self._deferred:
            if layer.training:
                layer.commit(replicas)

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Undo what happens to the buffers in the block. Local."""
        copies = [(buffer, buffer.clone()) for buffer in self._changing or ()]
        for layer in self._deferred:
            layer.is_recomputing = True
        try:
            yield
        finally:
            for layer in self._deferred:
                layer.is_recomputing = False
            with torch.no_grad():
                for buffer, copy in copies:
                    buffer.copy_(copy)

    def forget(self) -> None:
        """Look again which buffers change: the layers' modes are others now. Local."""
        self._changing = None

    def _watch_buffers(self) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
        if self._changing is not None:
            return None
        return [(buffer, buffer.clone()) for layer in self.layers for buffer in layer.buffers()]


class _StageTracker(SkipTracker):
    """Gives what other stages have sent, and notes what the layers stash."""

    def __init__(self, popped: Mapping[SkipName, Any]) -> None:
        super().__init__()
        self.stashed: dict[SkipName, Any] = {}
        for name, value in popped.items():
            super().stash(name, value)

    def stash(self, name: SkipName, value: Any) -> None:
        super().stash(name, value)
        self.stashed[name] = value


def _overwrites_input(layers: Sequence[nn.Module]) -> bool:
    """Whether the first layer works in place, apart from those that may hand on their input as it is."""
    for layer in layers:
        modules = list(layer.modules())
        if any(getattr(module, "inplace", False) for module in modules):
            return True
        if not all(isinstance(module, _HANDING_ON) for module in modules):
            return False
    return False


def _same(buffer: torch.Tensor, copy: torch.Tensor) -> bool:
    return torch.equal(torch.nan_to_num(buffer), torch.nan_to_num(copy))
