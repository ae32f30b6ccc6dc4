"""The plan of a save: which rank writes what where. Data, made on rank 0, executed by all.

Ranks of equal trees and fingerprints form a *class*; mostly there is one of them, or one for each stage of a
pipeline. The trees of the classes are merged into their union. A leaf that several classes have is the same
one if its fingerprint is, and then each of its slices is written by one of the ranks that hold it::

    rank 0   model.0  model.1            rng of 0       rank 0 writes   half of model.0         rng of 0
    rank 1   model.0  model.1            rng of 1       rank 1          half of 0, half of 1    rng of 1
    rank 2            model.1  model.2   rng of 2       rank 2          model.2, half of 1      rng of 2

A value that differs between ranks, or is marked by :class:`~hpcpar.checkpoint.PerRank`, becomes a node

    ``{"$": "ranks", "marked": true, "items": [[[0, 2], <node>], [[1], <node>]]}``

of kind ``ranks``: what the ranks of each list have. A dict whose keys are not the same on all ranks that
have it says which of them, by place, the ranks of each list had:

    ``{"$": "dict", "items": [["0", ...], ["1", ...], ["2", ...]], "own": [[[0, 1], [0, 1]], [[2], [1, 2]]]}``

Slices with the same holders are dealt out in order, so
that every rank writes few long stretches, and so that all write as many bytes, where the holders allow it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpcpar.checkpoint.fingerprint import slice_bounds
from hpcpar.checkpoint.leaves import nbytes_of
from hpcpar.checkpoint.tree import LEAF_KINDS, MAPPINGS, MARK, SEQUENCES, Node, Tree, kind_of, value_of
from hpcpar.errors import CheckpointError

__all__ = ["ALIGNMENT", "Description", "Piece", "Plan", "Write", "describe", "make_plan"]

_LOG = logging.getLogger(__name__)
ALIGNMENT = 64
_MOST_NAMED = 5

Fingerprint = Sequence[str]


@dataclass(frozen=True)
class Description:
    """What rank 0 must know of a rank's tree.

    Attributes
    ----------
    digest
        The same for ranks whose trees and leaves are equal, marked values aside.
    node
        Structure; ``None`` on all ranks of a class but the first, when it is sent.
    parts
        Structures of the marked values.
    fingerprints
        Of the leaves by number; on all ranks of a class but the first only those of the parts.
    """

    digest: str
    node: Node
    parts: tuple[Node, ...]
    fingerprints: Mapping[int, Fingerprint]

    def to_json(self, *, complete: bool) -> list[Any]:
        """For a message: without what another rank of the class sends, unless ``complete``. Local."""
        wanted = self.fingerprints if complete else set().union(*map(_numbers, self.parts))
        prints = [[n, self.fingerprints[n]] for n in sorted(wanted)]
        return [self.digest, self.node if complete else None, list(self.parts), prints]

    @classmethod
    def from_json(cls, message: list[Any]) -> Description:
        """The same, received. Local."""
        digest, node, parts, prints = message
        return cls(digest, node, tuple(parts), dict(prints))


@dataclass(frozen=True)
class Write:
    """A rank writes bytes ``start`` to ``end`` of its leaf ``leaf`` at ``offset`` of its data."""

    leaf: int
    start: int
    end: int
    offset: int


@dataclass(frozen=True)
class Piece:
    """A slice of a saved leaf: ``nbytes`` at ``offset`` of the data of ``rank``, and their digest."""

    rank: int
    offset: int
    nbytes: int
    digest: str


@dataclass(frozen=True)
class Plan:
    """The outcome.

    Attributes
    ----------
    node
        The union of all structures; its leaves are numbered anew.
    leaves
        Where the slices of each leaf are, in order.
    work
        What each rank writes.
    data_bytes
        How long the data of each rank is.
    """

    node: Node
    leaves: tuple[tuple[Piece, ...], ...]
    work: tuple[tuple[Write, ...], ...]
    data_bytes: tuple[int, ...]


def describe(tree: Tree, fingerprints: Sequence[Fingerprint]) -> Description:
    """The description of a whole tree. Local."""
    own = {n for part in tree.parts for n in _numbers(part)}
    common = _numbers(tree.node)
    text = json.dumps([tree.node, [fingerprints[n] for n in sorted(common)]])
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Description(digest, tree.node, tuple(tree.parts), {n: fingerprints[n] for n in common | own})


def make_plan(descriptions: Sequence[Description]) -> Plan:
    """Merge what the ranks have, and deal out the writing. Local.

    Parameters
    ----------
    descriptions
        Of all ranks; of each class (ranks with the same digest) the first must be complete.

    Raises
    ------
    CheckpointError
        When a value is marked by ``PerRank`` on some of the ranks that have it, or keys that ranks have in
        one dict are equal to Python, as 1 and True.
    """
    merger = _Merger(descriptions)
    first: dict[str, int] = {}
    for rank, description in enumerate(descriptions):
        first.setdefault(description.digest, rank)
    members = {
        leader: tuple(r for r, d in enumerate(descriptions) if d.digest == digest)
        for digest, leader in first.items()
    }
    node = merger.merge([(members[leader], descriptions[leader].node) for leader in first.values()], "state")
    if merger.different:
        _warn_once(tuple(merger.different[:_MOST_NAMED]), len(merger.different))
    return _deal(node, merger.leaves, len(descriptions))


@functools.lru_cache(maxsize=64)
def _warn_once(names: tuple[str, ...], count: int) -> None:
    """Not for each of a training's checkpoints again."""
    _LOG.warning(
        "%d saved value(s) differ between ranks and will not load on another number of them: %s%s. Wrap in "
        "PerRank what belongs to a rank, or make it equal",
        count,
        ", ".join(names),
        ", ..." if count > len(names) else "",
    )


# ---- the union ---------------------------------------------------------------------------------------------

Ranks = tuple[int, ...]
Group = tuple[Ranks, Node]  # the ranks of a class, and what they have


@dataclass
class _Leaf:
    """A leaf of the union: its number on each rank that holds it."""

    nbytes: int
    digests: Sequence[str]
    holders: dict[int, int]


class _Merger:
    def __init__(self, descriptions: Sequence[Description]) -> None:
        self._descriptions = descriptions
        self._known: dict[tuple[Any, ...], int] = {}
        self.leaves: list[_Leaf] = []
        self.different: list[str] = []

    def merge(self, groups: Sequence[Group], where: str) -> Node:
        """The union of what some classes have at one place."""
        kinds = {kind_of(node) for _, node in groups}
        kind = next(iter(kinds))
        if "mine" in kinds:
            return self._marked(groups, kinds, where)
        if len(kinds) == 1 and kind in MAPPINGS:
            return self._mappings(kind, groups, where)
        if len(kinds) == 1 and kind in SEQUENCES and len({len(_items(node)) for _, node in groups}) == 1:
            rows = zip(*(_items(node) for _, node in groups), strict=True)
            items = [
                self.merge([(ranks, n) for (ranks, _), n in zip(groups, row, strict=True)], f"{where}[{i}]")
                for i, row in enumerate(rows)
            ]
            return items if kind == "list" else {MARK: kind, "items": items}
        return self._values(groups, where)

    def _mappings(self, kind: str, groups: Sequence[Group], where: str) -> Node:
        """All keys of all classes, in the order of their first appearance."""
        found: dict[str, tuple[Node, list[Group]]] = {}
        for ranks, node in groups:
            for key, item in node["items"]:
                found.setdefault(json.dumps(key), (key, []))[1].append((ranks, item))
        _check_keys([key for key, _ in found.values()], where)
        pairs = [[key, self.merge(parts, f"{where}[{key!r}]")] for key, parts in found.values()]
        own = _own_keys(list(found), groups)
        return {MARK: kind, "items": pairs, **({"own": own} if own else {})}

    def _values(self, groups: Sequence[Group], where: str) -> Node:
        """What cannot be merged further: one value where all have the same, else one for each."""
        different: dict[str, tuple[list[int], list[Group]]] = {}
        for ranks, node in groups:
            facts = json.dumps(self._facts(node, ranks[0]))
            members, same = different.setdefault(facts, ([], []))
            members.extend(ranks)
            same.append((ranks, node))
        if len(different) == 1:
            return self._same(groups, where)
        self.different.append(where)
        items = [[sorted(members), self._same(same, where)] for members, same in different.values()]
        return {MARK: "ranks", "marked": False, "items": items}

    def _marked(self, groups: Sequence[Group], kinds: set[str], where: str) -> Node:
        if kinds != {"mine"}:
            raise CheckpointError(
                f"{where} must be marked by PerRank on all ranks that have it, or on none, got both"
            )
        parts = [((r,), self._descriptions[r].parts[node["part"]]) for ranks, node in groups for r in ranks]
        parts.sort(key=lambda part: part[0])
        items = [[list(ranks), self._same([(ranks, part)], where)] for ranks, part in parts]
        return {MARK: "ranks", "marked": True, "items": items}

    def _same(self, groups: Sequence[Group], where: str) -> Node:
        """One node for groups that have equal ones, with the numbers of the union."""
        first = groups[0][1]
        kind = kind_of(first)
        if kind in LEAF_KINDS:
            return {**first, "n": self._number(groups, first)}
        if kind not in MAPPINGS and kind not in SEQUENCES:
            return first
        return self.merge(groups, where)

    def _number(self, groups: Sequence[Group], node: Node) -> int:
        """The number of a leaf, the same one for those that are one leaf on all these ranks."""
        identity = tuple((ranks, other["n"]) for ranks, other in groups)
        if identity not in self._known:
            self._known[identity] = len(self.leaves)
            prints = self._descriptions[groups[0][0][0]].fingerprints
            holders = {rank: other["n"] for ranks, other in groups for rank in ranks}
            self.leaves.append(_Leaf(nbytes_of(node), prints[node["n"]], holders))
        return self._known[identity]

    def _facts(self, node: Node, rank: int) -> Any:
        """All that two equal nodes have in common: numbers of leaves are replaced by their fingerprints."""
        if isinstance(node, list):
            return [self._facts(item, rank) for item in node]
        if not isinstance(node, dict):
            return node
        facts = {key: self._facts(value, rank) for key, value in node.items()}
        if kind_of(node) in LEAF_KINDS:
            facts["n"] = self._descriptions[rank].fingerprints[node["n"]]
        return facts


def _check_keys(keys: Sequence[Node], where: str) -> None:
    """Whether one dict can have the keys of all ranks."""
    seen: dict[Any, Any] = {}
    for key in map(value_of, keys):
        if key in seen:
            raise CheckpointError(
                f"keys of {where} must be of one type on all ranks, got {seen[key]!r} on some and {key!r} on "
                "others, which are equal to Python"
            )
        seen[key] = key


def _own_keys(keys: Sequence[str], groups: Sequence[Group]) -> list[list[list[int]]]:
    """Which ranks had which of the keys, in which order, by place; nothing where all had the same."""
    places = {key: place for place, key in enumerate(keys)}
    members: dict[tuple[int, ...], list[int]] = {}
    for ranks, node in groups:
        had = tuple(places[json.dumps(key)] for key, _ in node["items"])
        members.setdefault(had, []).extend(ranks)
    if len(members) == 1:
        return []
    return [[sorted(ranks), list(had)] for had, ranks in members.items()]


def _items(node: Node) -> list[Node]:
    return node if isinstance(node, list) else list(node["items"])


def _numbers(node: Node) -> set[int]:
    """The leaves in a node."""
    if isinstance(node, list):
        return set().union(*map(_numbers, node))
    if not isinstance(node, dict):
        return set()
    if kind_of(node) in LEAF_KINDS:
        return {node["n"]}
    return set().union(*map(_numbers, node.values()))


# ---- who writes what ---------------------------------------------------------------------------------------


def _deal(node: Node, leaves: Sequence[_Leaf], ranks: int) -> Plan:
    """Give every slice to one of its holders."""
    by_holders: dict[Ranks, list[int]] = {}
    for number, leaf in enumerate(leaves):
        by_holders.setdefault(tuple(sorted(leaf.holders)), []).append(number)
    work: list[list[Write]] = [[] for _ in range(ranks)]
    pieces: list[list[Piece]] = [[] for _ in leaves]
    ends = [0] * ranks
    # Those with least choice first: whoever has a choice can then make up for the rest.
    for holders in sorted(by_holders, key=len):
        numbers = by_holders[holders]
        shares = _level([ends[rank] for rank in holders], sum(leaves[n].nbytes for n in numbers))
        queue = [(rank, ends[rank] + share) for rank, share in zip(holders, shares, strict=True)]
        for number in numbers:
            leaf = leaves[number]
            for (start, end), digest in zip(slice_bounds(leaf.nbytes), leaf.digests, strict=True):
                while len(queue) > 1 and ends[queue[0][0]] + (end - start) // 2 >= queue[0][1]:
                    queue.pop(0)
                rank = queue[0][0]
                work[rank].append(Write(leaf.holders[rank], start, end, ends[rank]))
                pieces[number].append(Piece(rank, ends[rank], end - start, digest))
                ends[rank] += _aligned(end - start)
    return Plan(node, tuple(map(tuple, pieces)), tuple(map(tuple, work)), tuple(ends))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _level(loads: Sequence[int], nbytes: int) -> list[int]:
    """How many of ``nbytes`` each gets, so that loads become as level as can be."""
    order = sorted(range(len(loads)), key=loads.__getitem__)
    level, count = loads[order[0]], 0
    left = nbytes
    for place, index in enumerate(order):
        step = (loads[index] - level) * place
        if step > left:
            break
        left -= step
        level, count = loads[index], place + 1
    level += left // count
    return [max(0, level - load) for load in loads]
