"""A stage: consecutive layers of one rank as a function of the values that come in.

::

    chain value, popped skips  --->  layers  --->  chain value, stashed skips

It knows nothing of messages, microbatch order or autograd. Each layer runs with random numbers of its own
(:mod:`~hpcpar.nn.pipeline.randomness`). Running it again for the same microbatch, as activation checkpointing
does, gives the same result and leaves buffers alone: those that change in a forward (running statistics) are
found in the first one, and a recomputation gets copies of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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

_LOSS = -1  # number of the loss among the layers
_Home = dict[str, Any]
_Place = tuple[_Home, str]
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
        self._changing: list[_Place] | None = None
        self._deferred = [
            module for layer in layers for module in layer.modules() if isinstance(module, DeferredBatchNorm)
        ]
        self.overwrites_input = _overwrites_input(self.layers)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters of the layers, each once."""
        return list({id(p): p for layer in self.layers for p in layer.parameters()}.values())

    @property
    def buffers(self) -> list[tuple[torch.Tensor, bool]]:
        """Each buffer but the deferred statistics, and whether training changes it here; alike everywhere."""
        deferred = {id(buffer) for layer in self._deferred for buffer in layer.buffers()}
        changing = {(id(home), name) for home, name in self._changing or ()}
        return [
            (home[name], (id(home), name) in changing)
            for home, name in self._places()
            if id(home[name]) not in deferred
        ]

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
            self._changing = [
                (home, name)
                for home, name, buffer, copy in watched
                if home[name] is not buffer or not _same(buffer, copy)
            ]
        return value, tracker.stashed

    def seeded(self, microbatch: int, function: Callable[..., Any], *args: Any) -> Any:
        """The loss of a microbatch: ``function(*args)``, which may draw like a layer. Local."""
        return self._seeds.seeded(_LOSS, microbatch, function, *args)

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
        """Give the layers copies of the buffers that they change, for the block. Local.

        To put the old contents back instead would look to autograd like a change of what it has saved.
        """
        originals = [(home, name, home[name]) for home, name in self._changing or ()]
        copies = {id(buffer): buffer.clone() for _, _, buffer in originals}
        for home, name, buffer in originals:
            home[name] = copies[id(buffer)]
        for layer in self._deferred:
            layer.is_recomputing = True
        try:
            yield
        finally:
            for layer in self._deferred:
                layer.is_recomputing = False
            for home, name, buffer in originals:
                home[name] = buffer

    def forget(self) -> None:
        """Look again which buffers change: the layers' modes are others now. Local."""
        self._changing = None

    def _watch_buffers(self) -> list[tuple[_Home, str, torch.Tensor, torch.Tensor]] | None:
        if self._changing is not None:
            return None
        return [(home, name, home[name], home[name].clone()) for home, name in self._places()]

    def _places(self) -> list[_Place]:
        """Where the buffers are, for a layer may put a new tensor in the place of one; each once."""
        homes = {id(m._buffers): m._buffers for layer in self.layers for m in layer.modules()}
        return [(home, name) for home in homes.values() for name in home if home[name] is not None]


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
