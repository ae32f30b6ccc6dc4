"""Where experts live, and how rows are divided among their replicas."""

from __future__ import annotations

import itertools

import pytest
import torch

from hpcpar.nn.experts.placement import Placement

pytestmark = pytest.mark.local

SIZES = list(itertools.product(range(1, 10), range(1, 10)))


@pytest.mark.parametrize(("num_experts", "num_ranks"), SIZES)
def test_every_expert_has_a_rank_and_every_rank_an_expert(num_experts: int, num_ranks: int) -> None:
    placement = Placement(num_experts, num_ranks)
    held = [list(placement.experts_of(rank)) for rank in range(num_ranks)]
    assert sorted({e for part in held for e in part}) == list(range(num_experts))
    assert all(held) and max(map(len, held)) == placement.most_experts
    assert max(map(len, held)) - min(map(len, held)) <= 1
    assert placement.has_replicas == (num_ranks > num_experts)
    for expert in range(num_experts):
        assert placement.ranks_of(expert) == [r for r in range(num_ranks) if expert in held[r]]
    assert list(placement.places) == sorted(placement.places)
    assert [rank for _, rank in placement.places] == sorted(rank for _, rank in placement.places)


@pytest.mark.parametrize(("num_experts", "num_ranks"), SIZES)
def test_rows_are_divided_evenly_and_completely(num_experts: int, num_ranks: int) -> None:
    placement = Placement(num_experts, num_ranks)
    rows = torch.randint(0, 20, (num_experts,))
    totals = torch.zeros(num_ranks, placement.most_experts, dtype=torch.int64)
    for sender in range(num_ranks):
        table = placement.divide(rows, sender)
        totals += table
        for expert in range(num_experts):
            ranks = placement.ranks_of(expert)
            parts = [int(table[r, expert - placement.experts_of(r).start]) for r in ranks]
            assert sum(parts) == rows[expert] and max(parts) - min(parts) <= 1
        assert table.sum() == rows.sum()
    for expert in range(num_experts):
        ranks = placement.ranks_of(expert)
        parts = [int(totals[r, expert - placement.experts_of(r).start]) for r in ranks]
        assert max(parts) - min(parts) <= len(ranks)  # remainders of the senders spread


def test_blocks_are_contiguous() -> None:
    assert [list(Placement(8, 3).experts_of(rank)) for rank in range(3)] == [[0, 1], [2, 3, 4], [5, 6, 7]]
    assert [list(Placement(3, 8).experts_of(rank)) for rank in range(8)] == [[0]] * 3 + [[1]] * 3 + [[2]] * 2
