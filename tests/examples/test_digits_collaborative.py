"""The record of who has contributed what. Whole runs are in tests/launched/test_examples.py."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch

from digits import endless_batches
from digits_collaborative import Contributions, draw_contributions

pytestmark = pytest.mark.local


def test_endless_batches_go_through_all_samples_again_and_again() -> None:
    numbers = torch.cat(list(islice(endless_batches(10, 4, [1, 2]), 6))).tolist()
    assert sorted(numbers[:10]) == sorted(numbers[10:]) == list(range(10))
    assert numbers[:10] != numbers[10:]


def test_samples_are_counted_to_the_step_that_they_went_into() -> None:
    contributions = Contributions(5)
    assert contributions.update(4, 5, 4) == 0
    assert contributions.update(4, 6, 0) == 1
    assert contributions.update(3, 6, 3) == 0
    assert contributions.update(4, 7, 4) == 1  # a round that ran behind: the last four are for the next
    assert contributions.update(4, 8, 0) == 1
    assert contributions.samples == [8, 3, 8]


def test_rank_that_was_left_out_has_contributed_nothing() -> None:
    contributions = Contributions(0)
    assert contributions.update(4, 3, 4) == 3  # it has loaded a state, and keeps its gradients
    assert contributions.update(4, 4, 0) == 1
    assert contributions.samples == [0, 0, 0, 8]


def test_picture_of_any_number_of_ranks(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for ranks in (1, 3, 40):
        picture = draw_contributions(tmp_path / f"{ranks}.png", [[8, 0, 16]] * ranks, first_step=4)
        assert picture is not None
        assert picture.stat().st_size > 1000
