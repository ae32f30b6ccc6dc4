"""Plans and fingerprints, without ranks: what is the same, what is merged, who writes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from hpcpar.checkpoint import PerRank
from hpcpar.checkpoint.fingerprint import SLICE_BYTES, digest, fingerprint
from hpcpar.checkpoint.leaves import as_bytes
from hpcpar.checkpoint.plan import Description, Plan, describe, make_plan
from hpcpar.checkpoint.tree import decode, encode, kind_of
from hpcpar.errors import CheckpointError

pytestmark = pytest.mark.local

MEGABYTE = 1 << 20


def plan_of(*states: Any) -> Plan:
    """The plan for ranks with these states, from what they would send."""
    descriptions = []
    seen: set[str] = set()
    for state in states:
        tree = encode(state)
        description = describe(tree, [fingerprint(as_bytes(leaf)) for leaf in tree.leaves])
        message = description.to_json(complete=description.digest not in seen)
        seen.add(description.digest)
        descriptions.append(Description.from_json(message))
    return make_plan(descriptions)


def written(plan: Plan) -> list[int]:
    return [sum(write.end - write.start for write in work) for work in plan.work]


def large(value: float, megabytes: float = 8.0) -> torch.Tensor:
    return torch.full((int(megabytes * MEGABYTE / 4),), float(value))


def test_replicas_write_each_slice_once_and_share_the_work() -> None:
    state = {"w": large(1, 40), "small": [torch.ones(3) * i for i in range(10)]}
    plan = plan_of(*[state] * 3)
    assert sum(written(plan)) == sum(as_bytes(leaf).numel() for leaf in encode(state).leaves)
    assert max(written(plan)) - min(written(plan)) <= SLICE_BYTES + 1000
    assert [sum(piece.nbytes for piece in leaf) for leaf in plan.leaves] == [40 * MEGABYTE] + [12] * 10


def test_those_with_parts_of_their_own_write_less_of_the_rest() -> None:
    shared = large(1, 24)
    plan = plan_of({"shared": shared, "own0": large(2, 16)}, {"shared": shared}, {"shared": shared})
    assert max(written(plan)) - min(written(plan)) <= SLICE_BYTES + 1000
    assert all(len({write.leaf for write in work}) == 1 for work in plan.work)


def test_data_of_a_rank_do_not_overlap() -> None:
    plan = plan_of(*[{"a": large(1, 9.3), "b": [torch.ones(i) for i in range(20)]}] * 2)
    for work, end in zip(plan.work, plan.data_bytes, strict=True):
        places = sorted((write.offset, write.offset + write.end - write.start) for write in work)
        assert all(a[1] <= b[0] for a, b in pairwise(places)) and places[-1][1] <= end


def test_keys_of_all_ranks_are_united_in_order() -> None:
    plan = plan_of({"a": 1, "m": {"0": 1}}, {"m": {"0": 1, "1": 2}, "z": 3}, {"m": {"1": 2, "2": 4}})
    assert decode(plan.node, lambda node: None) == {"a": 1, "m": {"0": 1, "1": 2, "2": 4}, "z": 3}


def test_values_that_differ_are_kept_for_their_ranks() -> None:
    plan = plan_of({"n": 1, "x": torch.ones(2)}, {"n": 2, "x": torch.ones(3)}, {"n": 1, "x": torch.ones(2)})
    n, x = (node for _, node in plan.node["items"])
    assert kind_of(n) == kind_of(x) == "ranks" and not n["marked"]
    assert n["items"] == [[[0, 2], 1], [[1], 2]]
    assert [ranks for ranks, _ in x["items"]] == [[0, 2], [1]]
    assert sum(written(plan)) == 8 + 12


def test_lists_of_different_lengths_are_kept_whole() -> None:
    plan = plan_of([1, [2, torch.ones(2)]], [1, [2]])
    assert kind_of(plan.node[1]) == "ranks" and plan.node[0] == 1


def test_numbers_of_another_type_are_another_value() -> None:
    assert kind_of(plan_of({"n": 1}, {"n": 1.0}).node["items"][0][1]) == "ranks"


def test_marked_values_do_not_part_the_ranks() -> None:
    states = [{"rng": PerRank(torch.full((4,), r)), "w": large(1)} for r in range(4)]
    trees = [encode(state) for state in states]
    digests = {describe(t, [fingerprint(as_bytes(leaf)) for leaf in t.leaves]).digest for t in trees}
    assert len(digests) == 1
    plan = plan_of(*states)
    rng = plan.node["items"][0][1]
    assert rng["marked"] and [ranks for ranks, _ in rng["items"]] == [[0], [1], [2], [3]]
    assert sum(written(plan)) == 8 * MEGABYTE + 4 * 32


def test_values_marked_on_some_ranks_only_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"state\['a'\] must be marked by PerRank on all ranks"):
        plan_of({"a": PerRank(1)}, {"a": 1})


@pytest.mark.parametrize("nbytes", [0, 1, 7, 8, 255, 256, 257, MEGABYTE, 3 * MEGABYTE + 77])
def test_fingerprints_see_single_bits_and_order(nbytes: int) -> None:
    data = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
    seen = {digest(data)}
    assert (
        digest(data.clone()) in seen
        and digest(torch.cat([data, torch.zeros(1, dtype=torch.uint8)])) not in seen
    )
    for place in torch.randint(0, nbytes, (20,)).unique().tolist() if nbytes else []:
        changed = data.clone()
        changed[place] ^= 128
        seen.add(digest(changed))
    for shift in (1, 4, 8, 1024, MEGABYTE // 32, MEGABYTE):
        if nbytes > shift:
            seen.add(digest(data.roll(shift)))
    offset = torch.cat([torch.zeros(3, dtype=torch.uint8), data])[3:]
    assert digest(offset) == digest(data)
    assert len(seen) >= min(nbytes, 10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_fingerprints_see_a_change_of_all_signs(dtype: torch.dtype) -> None:
    for values in (torch.ones(2 * MEGABYTE), torch.randn(2 * MEGABYTE), torch.arange(1, 1000)):
        tensor = values.to(dtype)
        half = torch.cat([-tensor[: len(tensor) // 2], tensor[len(tensor) // 2 :]])
        assert len({digest(as_bytes(each)) for each in (tensor, -tensor, half)}) == 3
