"""The plan of a pipeline: which layers form which stage on which rank, and what travels between stages.

A *schedule* speaks of stages; the model is a list of layers; the *balance* says how many layers each stage of
the schedule gets. Layers that share parameters must compute where these live (``reuse="route"``), so a stage
may be cut into several that alternate between ranks, and the schedule is refined to match::

    layers      0 embed   1   2 | 3   4   5 head (tied to 0)      schedule: 2 stages on ranks 0, 1
    stages      [0 1 2]           [3 4]   [5]    []
    ranks          0                1      0      1               the loss stays on the last rank

*Edges* say what travels: the value of the chain from each stage to the next, and each skip connection from
the stage that stashes it straight to each stage that pops it.

The plan is plain data, computed alike on every rank without communication.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

from hpcpar.nn.pipeline.list_scheduling import forward_only
from hpcpar.nn.pipeline.lowering import lower
from hpcpar.nn.pipeline.schedule import Schedule
from hpcpar.nn.pipeline.skip import SkipEdge, SkipName

__all__ = ["Edge", "PipelinePlan", "StagePlan", "make_plan"]


@dataclass(frozen=True)
class Edge:
    """A value that travels from stage to stage.

    Attributes
    ----------
    index : int
        Number among all edges.
    source, dest : int
        Stages.
    skip : SkipName or None
        The skip connection that it carries, ``None`` for the chain itself.
    """

    index: int
    source: int
    dest: int
    skip: SkipName | None


@dataclass(frozen=True)
class StagePlan:
    """Consecutive layers that one rank computes together.

    Attributes
    ----------
    index, rank : int
        Number of the stage in the chain; where it lives.
    layers : tuple of int
        Numbers of the layers; none in a stage that only hands on, or only computes the loss.
    incoming, outgoing : tuple of Edge
        The chain's edge first.
    """

    index: int
    rank: int
    layers: tuple[int, ...]
    incoming: tuple[Edge, ...]
    outgoing: tuple[Edge, ...]


@dataclass(frozen=True)
class PipelinePlan:
    """See the module's description.

    Attributes
    ----------
    stages : tuple of StagePlan
        In the order of the chain.
    edges : tuple of Edge
        All of them.
    schedule, forward_schedule : Schedule
        Of these stages, for training and for evaluation.
    """

    stages: tuple[StagePlan, ...]
    edges: tuple[Edge, ...]
    schedule: Schedule
    forward_schedule: Schedule

    @property
    def last_rank(self) -> int:
        """The rank that computes the loss."""
        return self.stages[-1].rank

    def rank_of_layer(self, layer: int) -> int:
        """Where a layer computes."""
        return next(stage.rank for stage in self.stages if layer in stage.layers)

    def describe(self) -> str:
        """A line per stage, for comparing plans and for people."""
        return "\n".join(f"stage {s.index} on rank {s.rank}: layers {list(s.layers)}" for s in self.stages)


def make_plan(
    schedule: Schedule,
    balance: Sequence[int],
    tied: Sequence[Sequence[int]],
    skips: Sequence[SkipEdge],
) -> PipelinePlan:
    """Distribute layers over stages and ranks. Local.

    Parameters
    ----------
    schedule
        Complete, of as many stages as ``balance`` has entries.
    balance
        Layers of each stage.
    tied
        Groups of layers that must compute on one rank: that of the first of them.
    skips
        Skip connections between layers.
    """
    blocks = _assign(schedule.placement, balance, tied)
    parts = [[rank for rank, _ in stage] for stage in blocks]
    refined = lower(schedule, parts)
    pieces = [piece for stage in blocks for piece in stage]
    stage_of = {layer: index for index, (_, layers) in enumerate(pieces) for layer in layers}
    edges = [Edge(index, index, index + 1, None) for index in range(len(pieces) - 1)]
    for skip in skips:
        source, dest = stage_of[skip.stash_layer], stage_of[skip.pop_layer]
        known = any((edge.source, edge.dest, edge.skip) == (source, dest, skip.name) for edge in edges)
        if source != dest and not known:
            edges.append(Edge(len(edges), source, dest, skip.name))
    stages = tuple(
        StagePlan(
            index,
            rank,
            tuple(layers),
            tuple(edge for edge in edges if edge.dest == index),
            tuple(edge for edge in edges if edge.source == index),
        )
        for index, (rank, layers) in enumerate(pieces)
    )
    return PipelinePlan(stages, tuple(edges), refined, forward_only(refined))


def _assign(
    placement: Sequence[int], balance: Sequence[int], tied: Sequence[Sequence[int]]
) -> list[list[tuple[int, list[int]]]]:
    """For each stage of the schedule its pieces: rank and layers."""
    ends = list(accumulate(balance))
    owner = [rank for rank, count in zip(placement, balance, strict=True) for _ in range(count)]
    home = list(owner)
    for group in tied:
        for layer in group:
            home[layer] = owner[min(group)]
    blocks = []
    for stage, (end, count) in enumerate(zip(ends, balance, strict=True)):
        layers = range(end - count, end)
        pieces = [(rank, list(group)) for rank, group in groupby(layers, key=home.__getitem__)]
        is_last = stage == len(balance) - 1
        if is_last and pieces[-1][0] != placement[stage]:
            pieces.append((placement[stage], []))  # the loss, and the output, stay where they are expected
        elif all(rank != placement[stage] for rank, _ in pieces):
            pieces.insert(0, (placement[stage], []))  # every rank has a stage
        blocks.append(pieces)
    return blocks
