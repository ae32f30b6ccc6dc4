"""Beam search over product keys finds what trying all experts finds."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from hpcpar.errors import MismatchError
from hpcpar.nn.experts.product_key import ExpertGrid, ProductKeyGate

pytestmark = pytest.mark.local

GRIDS = [(1,), (4,), (1, 3), (3, 2), (4, 4), (2, 3, 4), (3, 1, 2), (2, 2, 2)]
COUNTS = [1, 2, 3, 5, 20]


def uids_of(grid: tuple[int, ...]) -> list[str]:
    return [".".join(("e", *map(str, place))) for place in itertools.product(*map(range, grid))]


def scores_of(grid: tuple[int, ...], seed: int, rows: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, length, generator=generator, dtype=torch.float64) for length in grid]


def all_sums(scores: list[torch.Tensor]) -> torch.Tensor:
    sums = torch.zeros(len(scores[0]), 1, dtype=torch.float64)
    for of_axis in scores:
        sums = (sums.unsqueeze(-1) + of_axis.unsqueeze(1)).flatten(1)
    return sums


@pytest.mark.parametrize("k", COUNTS)
@pytest.mark.parametrize("grid", GRIDS)
def test_full_grid_gives_exactly_the_best(grid: tuple[int, ...], k: int) -> None:
    scores = scores_of(grid, k, rows=50)
    indices, exists = ExpertGrid("e", grid, uids_of(grid)).best(scores, k)
    sums = all_sums(scores)
    wanted = sums.topk(min(k, sums.shape[1]), dim=1).indices
    assert torch.equal(indices, wanted)
    assert exists.all()


@pytest.mark.parametrize("k", COUNTS)
@pytest.mark.parametrize("grid", GRIDS)
def test_grid_with_holes_gives_only_experts_that_exist(grid: tuple[int, ...], k: int) -> None:
    for seed in range(10):
        everything = uids_of(grid)
        uids = random.sample(everything, random.randint(1, len(everything)))
        found = ExpertGrid("e", grid, [*uids, "f.0", "e", "e.x", "e.0.0.0.0"])
        indices, exists = found.best(scores_of(grid, seed), k)
        assert found.count == len(uids)
        for row, real in zip(indices.tolist(), exists.tolist(), strict=True):
            chosen = [found.uid(index) for index, is_real in zip(row, real, strict=True) if is_real]
            assert len(set(chosen)) == len(chosen) == min(k, len(uids))
            assert set(chosen) <= set(uids)


@pytest.mark.parametrize("grid", GRIDS)
def test_coordinates_are_those_in_the_uid(grid: tuple[int, ...]) -> None:
    found = ExpertGrid("e", grid, uids_of(grid))
    indices = torch.arange(len(uids_of(grid)))
    places = torch.stack(found.coordinates(indices), -1).tolist()
    assert [found.uid(i) for i in indices.tolist()] == uids_of(grid)
    assert [".".join(("e", *map(str, place))) for place in places] == uids_of(grid)


def test_infinite_scores_and_nan_are_bad_scores_and_not_missing_experts() -> None:
    scores = [torch.tensor([[-torch.inf, 1.0, torch.nan]])]
    indices, exists = ExpertGrid("e", (3,), uids_of((3,))).best(scores, 3)
    assert indices[0, 0] == 1
    assert sorted(indices[0].tolist()) == [0, 1, 2]
    assert exists.all()


def test_no_rows() -> None:
    indices, exists = ExpertGrid("e", (2, 3), uids_of((2, 3))).best(scores_of((2, 3), 0, rows=0), 4)
    assert indices.shape == exists.shape == (0, 4)


@pytest.mark.parametrize("grid", [(), (0,), (2, -1), (1 << 14, 1 << 14)])
def test_what_is_no_grid_is_refused(grid: tuple[int, ...]) -> None:
    with pytest.raises(MismatchError, match="a grid must have axes"):
        ExpertGrid("e", grid, ["e.0"])


def test_grid_without_experts_is_refused() -> None:
    with pytest.raises(MismatchError, match=r"served as 'e\.0\.0'"):
        ExpertGrid("e", (2, 2), ["e.0", "e.2.0", "ee.0.0"])


def test_gate_scores_each_axis_and_averages_sequences() -> None:
    gate = ProductKeyGate(5, (2, 3))
    x = torch.randn(4, 7, 5)
    scores = gate(x)
    assert [tuple(of_axis.shape) for of_axis in scores] == [(4, 2), (4, 3)]
    for ours, mean in zip(scores, gate(x.mean(1)), strict=True):
        torch.testing.assert_close(ours, mean)
