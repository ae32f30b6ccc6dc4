"""A stage: consecutive layers of one rank as a function of the values that come in.

::

    chain value, popped skips  --->  layers  --->  chain value, stashed skips

It knows nothing of messages, microbatch order or autograd. Each layer runs with random numbers of its own
(:mod:`~hpcpar.nn.pipeline.randomness`). Running it again for the same microbatch, as activation checkpointing
does, gives the same result and leaves buffers alone: those that forwards change (running statistics) are
found out, and a recomputation gets copies of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hpcpar.nn.batch_norm import SyncBatchNorm
from hpcpar.nn.experts.replay import replaying, to_be_replayed
from hpcpar.nn.own_gradients import InjectsLosses, OwnGradients, own_tensors
from hpcpar.nn.pipeline.batch_norm import DeferredBatchNorm
from hpcpar.nn.pipeline.plan import StagePlan
from hpcpar.nn.pipeline.randomness import LayerSeeds, may_draw
from hpcpar.nn.pipeline.skip import SkipName, SkipTracker, pop_names, stash_names, use_tracker

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["Stage"]

_COPIED_BYTES = 1 << 20
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

    Attributes
    ----------
    meets_replicas : bool
        Whether computing it is Collective over its replicas.
    losses_scale : float
        Of the gradients of losses that layers add themselves, for a whole batch.
    """

    def __init__(
        self, plan: StagePlan, layers: Sequence[nn.Module], names: Sequence[str], seeds: LayerSeeds
    ) -> None:
        self.plan = plan
        self.layers = list(layers)
        self._names = list(names)
        self._seeds = seeds
        self._watched: list[_Watched] | None = None
        self._parameters = list({id(p): p for layer in layers for p in layer.parameters()}.values())
        self._deferred = [
            module for layer in layers for module in layer.modules() if isinstance(module, DeferredBatchNorm)
        ]
        self._injecting = [m for layer in layers for m in layer.modules() if isinstance(m, InjectsLosses)]
        self.meets_replicas = any(
            isinstance(module, (OwnGradients, SyncBatchNorm))
            for layer in layers
            for module in layer.modules()
        )
        self.losses_scale = 1.0
        self._draws: list[bool] = []
        self._has_skips = any(stash_names(layer) or pop_names(layer) for layer in layers)
        self.overwrites_input = _overwrites_input(self.layers)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters of the layers, each once."""
        return list(self._parameters)

    def without_gradient(self) -> list[nn.Parameter]:
        """Trainable parameters whose ``.grad`` the next backward will make. Local."""
        return [p for p in self._parameters if p.grad is None and p.requires_grad]

    @property
    def buffers(self) -> list[tuple[torch.Tensor, bool]]:
        """Each buffer that replicas share, and whether training changes it here; alike everywhere.

        Not the deferred statistics, nor the buffers of experts that other replicas have not.
        """
        others = {id(buffer) for layer in self._deferred for buffer in layer.buffers()}
        for layer in self.layers:
            others |= own_tensors(layer)
        return [
            (watched.home[watched.name], watched.changes)
            for watched in self._watched or ()
            if id(watched.home[watched.name]) not in others
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
        if self._watched is None:
            self._watched = [_Watched(home, name) for home, name in self._places()]
            self._draws = [may_draw(layer) for layer in self.layers]
        if self._has_skips:
            tracker = _StageTracker(popped)
            with use_tracker(tracker):
                value = self._run_layers(microbatch, value)
        else:
            tracker = None
            value = self._run_layers(microbatch, value)
        for watched in self._watched:
            watched.look()
        return value, {} if tracker is None else tracker.stashed

    def _run_layers(self, microbatch: int, value: Any) -> Any:
        for place, layer in enumerate(self.layers):
            try:
                if self._draws[place]:
                    value = self._seeds.seeded(self.plan.layers[place], microbatch, layer, value)
                else:
                    value = layer(value)
            except Exception as error:
                error.add_note(
                    f"in layer {self._names[place]!r} ({type(layer).__name__}) of pipeline stage "
                    f"{self.plan.index}, microbatch {microbatch}"
                )
                if "in-place operation" in str(error):
                    error.add_note("a stage must not change its input in place: other stages may need it")
                raise
        return value

    def seeded(self, microbatch: int, function: Callable[..., Any], *args: Any) -> Any:
        """The loss of a microbatch: ``function(*args)``, which may draw like a layer. Local."""
        return self._seeds.seeded(_LOSS, microbatch, function, *args)

    def mode(self) -> tuple[bool, ...]:
        """What decides which tensors want gradients and which buffers change. Local."""
        modules = [module.training for layer in self.layers for module in layer.modules()]
        return (*modules, *(p.requires_grad for layer in self.layers for p in layer.parameters()))

    def weigh_losses(self, share: float) -> None:
        """Have layers with losses of their own add their gradients, for a share of the batch. Local."""
        for module in self._injecting:
            module.inject_losses(share * self.losses_scale)

    def end_step(self, replicas: Communicator | None) -> None:
        """Update deferred running statistics. Collective over ``replicas`` of the stage, if given."""
        for layer in self._deferred:
            if layer.training:
                layer.commit(replicas)

    @contextmanager
    def to_be_recomputed(self, microbatch: int) -> Iterator[None]:
        """Around a forward whose graph is dropped. Local."""
        with ExitStack() as stack:
            for part in self.layers:
                stack.enter_context(to_be_replayed(part, (self.plan.index, microbatch)))
            yield

    @contextmanager
    def recomputing(self, microbatch: int) -> Iterator[None]:
        """Give the layers copies of the buffers that they change, for the block. Local.

        To put the old contents back instead would look to autograd like a change of what it has saved.
        """
        originals = [(w.home, w.name, w.home[w.name]) for w in self._watched or () if w.changes]
        copies = {id(buffer): buffer.clone() for _, _, buffer in originals}
        for home, name, buffer in originals:
            home[name] = copies[id(buffer)]
        for layer in self._deferred:
            layer.is_recomputing = True
        try:
            with ExitStack() as stack:
                for part in self.layers:
                    stack.enter_context(replaying(part, (self.plan.index, microbatch)))
                yield
        finally:
            for layer in self._deferred:
                layer.is_recomputing = False
            for home, name, buffer in originals:
                home[name] = buffer

    def forget(self) -> None:
        """Look again which buffers change: the layers' modes are others now. Local."""
        self._watched = None

    def _places(self) -> list[_Place]:
        """Where the buffers are, for a layer may put a new tensor in the place of one; each once."""
        homes = {id(m._buffers): m._buffers for layer in self.layers for m in layer.modules()}
        return [(home, name) for home in homes.values() for name in home if home[name] is not None]


class _Watched:
    """A buffer, and whether forwards change it.

    A change shows as another tensor in its place, or as a new version, at whatever forward it happens. Batch
    normalisation writes its statistics without raising the version; those are small, and change at once, so
    the contents of small buffers are compared after the first forward.
    """

    __slots__ = ("_copy", "_seen", "changes", "home", "name")

    def __init__(self, home: _Home, name: str) -> None:
        self.home, self.name = home, name
        self.changes = False
        self._seen = self._state()
        buffer = home[name]
        self._copy = buffer.clone() if buffer.nbytes <= _COPIED_BYTES else None

    def look(self) -> None:
        """After a forward. Local."""
        if self.changes:
            return
        self.changes = self._state() != self._seen
        if self._copy is not None:
            self.changes = self.changes or not _same(self.home[self.name], self._copy)
            self._copy = None

    def _state(self) -> tuple[int, int]:
        buffer = self.home[self.name]
        return id(buffer), -1 if buffer.is_inference() else buffer._version


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
    """Whether the bytes are equal, which says it for any dtype and for NaN, too."""
    one, other = buffer.contiguous().view(-1), copy.contiguous().view(-1)
    return one.numel() == 0 or torch.equal(one.view(torch.uint8), other.view(torch.uint8))
