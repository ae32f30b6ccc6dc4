"""Replay: the routings of forwards whose backward is yet to come.

Activation checkpointing computes a forward twice. The second time tokens must go where they went the first
time, though a bias has moved since. Which forward is it that is computed again?

* A pipeline says so: it announces a forward under a key, and requests the same key later.
* torch's checkpoint says nothing, but the recomputation runs inside of a backward, and has the logits of its
  forward, bit for bit as a rule. Ranks exchange which of their forwards that may be, and take one that may be
  it on all of them::

    rank 0   logits of forwards 3, 5 (the same batch twice)  ──┐
    rank 1   logits of forward 5                              ──┴─ forward 5

A routing lives as long as the graph of its forward, which holds it. A forward without a graph, as reentrant
checkpointing begins with, leaves no such owner; of these the last ones are kept until they are replayed.

Invariant: all ranks replay the same forward, or none. Where several would do and their biases differ, nobody
can tell, and all ranks raise an error: no gradient is wrong in silence.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from hpcpar.errors import HpcparError
from hpcpar.nn.experts.routing import Routing

__all__ = ["RoutingMemory", "replaying", "to_be_replayed"]

_MOST_WITHOUT_GRAPH = 256
_MOST_BYTES = 256 << 20
_NEAR = 1e-4  # of the largest logit: arithmetic that is not quite the same twice


class RoutingMemory:
    """The routings of one layer on one rank. Local."""

    def __deepcopy__(self, memo: object) -> RoutingMemory:
        return RoutingMemory()  # nobody will compute the forwards of a copy's original again

    def __init__(self) -> None:
        self._alive: list[weakref.ref[Routing]] = []
        self._without_graph: deque[Routing] = deque()
        self._announced: dict[Hashable, list[Routing]] = {}
        self._announcement: Hashable = None
        self._request: Hashable = None
        self.next_serial = 0

    @property
    def is_replay(self) -> bool:
        """Whether the forward that begins now is a recomputation."""
        return self._request is not None or torch._C._current_graph_task_id() != -1

    @contextmanager
    def announced(self, key: Hashable) -> Iterator[None]:
        """Keep the routings of the forwards inside the block, to be requested by the key."""
        self._announced[key] = []
        self._announcement = key
        try:
            yield
        finally:
            self._announcement = None

    @contextmanager
    def requested(self, key: Hashable) -> Iterator[None]:
        """Take the forwards inside the block for recomputations of those announced, in their order."""
        self._request = key
        try:
            yield
        finally:
            self._request = None

    def remember(self, routing: Routing) -> None:
        """Note a new routing. It is kept here unless the graph of its forward holds it."""
        self.next_serial = routing.serial + 1
        self._alive = [reference for reference in self._alive if reference() is not None]
        self._alive.append(weakref.ref(routing))
        if self._announcement is not None:
            self._announced[self._announcement].append(routing)
        elif routing.training and not routing.has_graph:
            self._without_graph.append(routing)
            while len(self._without_graph) > 1 and self._is_full():
                self._without_graph.popleft()

    def candidates(self, logits: torch.Tensor, training: bool) -> list[int]:
        """Numbers of the forwards that this may be a recomputation of."""
        if self._request is not None:
            return [routing.serial for routing in self._announced.get(self._request, [])[:1]]
        distances = {
            routing.serial: _distance(routing.logits, logits)
            for routing in self._living()
            if routing.training == training and routing.logits.shape == logits.shape
        }
        exact = [serial for serial, distance in distances.items() if distance == 0.0]
        limit = _NEAR * max(1.0, float(logits.abs().max())) if logits.numel() else 0.0
        return exact or [serial for serial, distance in distances.items() if distance <= limit]

    def take(self, serials: Sequence[int]) -> Routing | None:
        """The routing of one of these forwards, the same on all ranks; the new graph will hold it.

        Parameters
        ----------
        serials
            Candidates of all ranks; none: ``None``.

        Raises
        ------
        HpcparError
            When it could be either of several that differ.
        """
        found = [routing for routing in self._living() if routing.serial in serials]
        if not found:
            return None
        fresh = [routing for routing in found if routing.replays == 0] or found
        owned = [routing for routing in fresh if routing.has_graph] or fresh
        if len({routing.bias_version for routing in owned}) > 1:
            raise HpcparError(
                f"a recomputation must be told from other forwards of the same tokens, got {len(owned)} such "
                "forwards with different biases. Evaluate in eval() mode, or between steps"
            )
        chosen = max(owned, key=lambda routing: routing.serial)
        chosen.replays += 1
        if chosen in self._without_graph:
            self._without_graph.remove(chosen)
        for waiting in self._announced.values():
            if chosen in waiting:
                waiting.remove(chosen)
        return chosen

    def _is_full(self) -> bool:
        kept = sum(routing.logits.nbytes for routing in self._without_graph)
        return len(self._without_graph) > _MOST_WITHOUT_GRAPH or kept > _MOST_BYTES

    def _living(self) -> Iterator[Routing]:
        for reference in self._alive:
            routing = reference()
            if routing is not None:
                yield routing


def _distance(first: torch.Tensor, second: torch.Tensor) -> float:
    if first.numel() == 0 or torch.equal(first, second):
        return 0.0
    distance = float((first - second).abs().max())
    return distance if distance == distance else float("inf")


@contextmanager
def replaying(module: nn.Module, key: Hashable) -> Iterator[None]:
    """Take the forwards of all expert layers in ``module`` for recomputations inside the block. Local.

    Of those that :func:`to_be_replayed` has announced under the same key.
    """
    with ExitStack() as stack:
        for memory in _memories(module):
            stack.enter_context(memory.requested(key))
        yield


@contextmanager
def to_be_replayed(module: nn.Module, key: Hashable) -> Iterator[None]:
    """Remember the forwards of all expert layers in ``module`` inside the block, for a recomputation. Local.

    For a checkpoint that computes forwards again outside of a backward.

    Parameters
    ----------
    module
        With the layers.
    key
        Of these forwards; those of an earlier block with the same key are forgotten.
    """
    with ExitStack() as stack:
        for memory in _memories(module):
            stack.enter_context(memory.announced(key))
        yield


def _memories(module: nn.Module) -> list[RoutingMemory]:
    found = (getattr(part, "routing_memory", None) for part in module.modules())
    return [memory for memory in found if isinstance(memory, RoutingMemory)]
