"""Ranks that are killed while they save leave a whole checkpoint; the next job saves over what they left."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.checkpoint.kill_writers import kill_writers


def test_killed_ranks_leave_a_whole_checkpoint(tmp_path: Path) -> None:
    draw = random.Random(1)
    for _ in range(2):
        kill_writers(tmp_path / "run", 2, draw)
    files = [path.name for path in (tmp_path / "run").iterdir()]
    assert len(files) < 20  # what the first job left is gone


@pytest.mark.large
@pytest.mark.timeout_s(900)
def test_killed_ranks_leave_a_whole_checkpoint_fifty_times(tmp_path: Path) -> None:
    draw = random.Random(2)
    for _ in range(50):
        kill_writers(tmp_path / "run", 2, draw)
