"""Partitions: which rank owns which elements of a bucket, when each part of a sum is wanted by one rank only.

An optimizer whose state is split over the ranks needs of each gradient only the part whose state it holds. A
bucket is cut so that both levels of a reduction deliver just that, here for two nodes of two ranks::

    bucket    [ slice 0          | slice 1          ]   one for each node-local index, summed in each node
    parts     [ node 0 | node 1  | node 0 | node 1  ]   one for each node, summed over the rail
    owner       rank 0   rank 2    rank 1   rank 3

Nodes cut alike, so the smallest one decides how many slices there are; ranks beyond own nothing.

Parts are cut anywhere (:func:`even_partition`), or between tensors (:func:`whole_tensors`) for algorithms
that must see a tensor whole; then the tensors of a bucket are put in the order of their owners.
:func:`gather_parts` is the way back: it copies every part from its owner to all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch

from hpcpar.comm.bucket import BucketLayout, Slot, padded_length
from hpcpar.comm.ordered_reduction import slice_bounds
from hpcpar.comm.topology import NodeMap

if TYPE_CHECKING:
    from hpcpar.comm.communicator import Communicator

__all__ = ["Partition", "even_partition", "gather_parts", "owners_in_order", "whole_tensors"]

_ALIGN_ELEMENTS = 64


@dataclass(frozen=True)
class Partition:
    """The part of a bucket that each rank owns: ``bounds[rank]`` is (start, end) in elements."""

    bounds: tuple[tuple[int, int], ...]

    def span(self, ranks: Sequence[int]) -> tuple[int, int]:
        """The stretch of the bucket that ``ranks`` own together; they must be neighbours in it. Local."""
        parts = [self.bounds[rank] for rank in ranks]
        return min(start for start, _ in parts), max(end for _, end in parts)


def owners_in_order(node_map: NodeMap) -> list[int]:
    """The ranks that own parts, in the order of their parts in a bucket. Local."""
    nodes = [node_map.ranks_of(node) for node in range(node_map.num_nodes)]
    return [ranks[index] for index in range(node_map.smallest_node) for ranks in nodes]


def even_partition(layout: BucketLayout, node_map: NodeMap) -> Partition:
    """Parts as equal as 64 elements allow. Local, the same on every rank.

    Parameters
    ----------
    layout
        The bucket.
    node_map
        Of the communicator that reduces it.
    """
    slices = slice_bounds(layout.numel, node_map.smallest_node, _ALIGN_ELEMENTS)
    parts = [
        (first + start, first + end)
        for first, last in slices
        for start, end in slice_bounds(last - first, node_map.num_nodes, _ALIGN_ELEMENTS)
    ]
    return _by_rank(parts, node_map)


def whole_tensors(
    layouts: Sequence[BucketLayout], node_map: NodeMap
) -> tuple[list[BucketLayout], list[Partition]]:
    """Buckets of the same tensors, put in the order of their owners, and who owns them. Local.

    The largest tensor of all buckets goes to the rank that has least so far, then the next.
    """
    owners = owners_in_order(node_map)
    sizes = [slot.length * layout.dtype.itemsize for layout in layouts for slot in layout.slots]
    places = _places(sizes, len(owners))
    ordered, partitions = [], []
    for layout in layouts:
        place_of = {slot.index: places.pop(0) for slot in layout.slots}
        slots: list[Slot] = []
        edges, end = [0], 0
        for place in range(len(owners)):
            for slot in layout.slots:
                if place_of[slot.index] == place:
                    slots.append(replace(slot, offset=end))
                    end += padded_length(slot.length, layout.dtype)
            edges.append(end)
        ordered.append(replace(layout, slots=tuple(slots)))
        partitions.append(_by_rank(list(pairwise(edges)), node_map))
    return ordered, partitions


def gather_parts(
    group: Communicator,
    members: Sequence[int],
    flats: Sequence[torch.Tensor],
    partitions: Sequence[Partition],
) -> None:
    """Give every rank of ``group`` the parts of all its ranks, a message for each tensor. Collective.

    Parameters
    ----------
    group
        The ranks that exchange their parts.
    members
        Their numbers in the partitions, in the order of ``group``.
    flats
        Host tensors of any dtypes, in which each rank's own parts are up to date.
    partitions
        Of each of them.
    """
    if group.size == 1:
        return
    for flat, partition in zip(flats, partitions, strict=True):
        parts = [flat[slice(*partition.bounds[member])].view(torch.uint8) for member in members]
        counts = [part.numel() for part in parts]
        gathered = torch.empty(sum(counts), dtype=torch.uint8)
        group.Allgatherv(parts[group.rank], [gathered, counts])
        for rank, (part, arrived) in enumerate(zip(parts, _split(gathered, counts), strict=True)):
            if rank != group.rank:
                part.copy_(arrived)


def _split(tensor: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    edges = [0, *accumulate(sizes)]
    return [tensor[start:end] for start, end in pairwise(edges)]


def _places(sizes: Sequence[int], count: int) -> list[int]:
    """Spread things of these sizes over ``count`` places; the place of each."""
    loads = [0] * count
    places = [0] * len(sizes)
    for thing in sorted(range(len(sizes)), key=lambda thing: -sizes[thing]):
        places[thing] = loads.index(min(loads))
        loads[places[thing]] += sizes[thing]
    return places


def _by_rank(parts: Sequence[tuple[int, int]], node_map: NodeMap) -> Partition:
    """The parts, which are in the order of their owners, by rank."""
    end = parts[-1][1]
    bounds = [(end, end)] * len(node_map.nodes)
    for owner, part in zip(owners_in_order(node_map), parts, strict=True):
        bounds[owner] = part
    return Partition(tuple(bounds))
