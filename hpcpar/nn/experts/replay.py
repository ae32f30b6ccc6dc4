"""Replay: the routings of forwards whose backward is yet to come.

Activation checkpointing computes a forward twice. The second time tokens must go where they went the first
time. Nothing tells a module which forward is being computed again; but its logits are known, and they are
those of the first time, bit for bit as a rule. So the routing with the nearest logits is taken::

    forward 1, forward 2, forward 3   |  backward of 3: recompute ~ logits of 3 -> routing 3 ...

A routing lives as long as the graph of its forward, which holds it. A forward without a graph, as reentrant
checkpointing and pipelines begin with, leaves no such owner; of these the last ones are kept until they are
replayed.

Invariant: all ranks replay the same forward. A rank that has no tokens to tell by goes by the others' word.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from hpcpar.nn.experts.routing import Routing

__all__ = ["RoutingMemory", "replaying", "to_be_replayed"]

_MOST_WITHOUT_GRAPH = 256


class RoutingMemory:
    """The routings of one layer on one rank. Local."""

    def __deepcopy__(self, memo: object) -> RoutingMemory:
        return RoutingMemory()  # nobody will compute the forwards of a copy's original again

    def __init__(self) -> None:
        self._alive: list[weakref.ref[Routing]] = []
        self._without_graph: deque[Routing] = deque(maxlen=_MOST_WITHOUT_GRAPH)
        self._requests = self._announcements = 0
        self.next_serial = 0

    @property
    def is_replay(self) -> bool:
        """Whether the forward that begins now is a recomputation."""
        return self._requests > 0 or torch._C._current_graph_task_id() != -1

    @contextmanager
    def requested(self) -> Iterator[None]:
        """Take the forwards inside the block for recomputations."""
        self._requests += 1
        try:
            yield
        finally:
            self._requests -= 1

    @contextmanager
    def announced(self) -> Iterator[None]:
        """Keep the routings of the forwards inside the block: their graphs will be dropped."""
        self._announcements += 1
        try:
            yield
        finally:
            self._announcements -= 1

    def remember(self, routing: Routing, *, keep: bool) -> None:
        """Note a new routing; what is not to be kept here is held by the graph of its forward."""
        self.next_serial = routing.serial + 1
        self._alive = [reference for reference in self._alive if reference() is not None]
        self._alive.append(weakref.ref(routing))
        if keep or self._announcements:
            self._without_graph.append(routing)

    def nearest(self, logits: torch.Tensor) -> Routing | None:
        """The routing of the forward that had these logits, or the ones most like them.

        Of equal ones the last that was not replayed yet: backward goes from the last forward to the first.
        """
        best: tuple[float, bool, int] | None = None
        found = None
        for routing in self._living():
            if routing.logits.shape != logits.shape:
                continue
            rank = (_distance(routing.logits, logits), routing.replays > 0, -routing.serial)
            if best is None or rank < best:
                best, found = rank, routing
        return found

    def take(self, serial: int) -> Routing | None:
        """The routing of forward ``serial``, for a replay, whose graph will hold it; ``None``: gone."""
        found = next((routing for routing in self._living() if routing.serial == serial), None)
        if found is not None:
            found.replays += 1
            if found in self._without_graph:
                self._without_graph.remove(found)
        return found

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
def replaying(module: nn.Module) -> Iterator[None]:
    """Take the forwards of all expert layers in ``module`` for recomputations inside the block. Local.

    For a checkpoint that computes forwards again outside of a backward; inside one that is noticed.
    """
    with ExitStack() as stack:
        for memory in _memories(module):
            stack.enter_context(memory.requested())
        yield


@contextmanager
def to_be_replayed(module: nn.Module) -> Iterator[None]:
    """Remember the forwards of all expert layers in ``module`` inside the block, for a recomputation. Local.

    For a checkpoint that drops graphs which the forwards may have.
    """
    with ExitStack() as stack:
        for memory in _memories(module):
            stack.enter_context(memory.announced())
        yield


def _memories(module: nn.Module) -> list[RoutingMemory]:
    found = (getattr(part, "routing_memory", None) for part in module.modules())
    return [memory for memory in found if isinstance(memory, RoutingMemory)]
