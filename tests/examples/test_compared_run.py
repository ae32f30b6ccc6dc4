"""Reading another run's history, and saying how far it is from this one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import common
import train_text
from compared_run import read_compared_run

pytestmark = pytest.mark.local


def row(step: int, train_loss: float, validation_loss: float) -> dict[str, float]:
    return {
        "step": step,
        "train_loss": train_loss,
        "validation_loss": validation_loss,
        "bytes_per_s": 1.0,
        "waiting_share": 0.0,
    }


@pytest.fixture
def history(tmp_path: Path) -> Path:
    path = tmp_path / "plain" / "history.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"evaluations": [row(10, 3.0, 2.5), row(20, 2.0, 1.5)]}))
    return path


def test_largest_difference_of_all_losses_is_told(history: Path) -> None:
    run = read_compared_run(history)
    assert run.difference([row(10, 3.0, 2.5), row(20, 2.001, 1.49), row(30, 1.0, 1.0)]) == (
        "compared with plain: losses differ by at most 0.01 nats per byte (step 20), 2 evaluations"
    )
    assert "no evaluation at a step of this run" in run.difference([row(15, 3.0, 2.5)])


def test_both_runs_are_drawn(history: Path, tmp_path: Path) -> None:
    run = read_compared_run(history)
    assert run.curve("training", "train_loss") == ("training, plain", [10, 20], [3.0, 2.0])
    pytest.importorskip("matplotlib")
    picture = train_text.draw_results(tmp_path / "curves.png", [row(10, 3.0, 2.5)], run)
    assert picture is not None and picture.stat().st_size > 1000


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"evaluations": [{"step": 1}]}', '{"evaluations": 3}'])
def test_file_that_is_no_history_is_a_mistake(tmp_path: Path, content: str) -> None:
    path = tmp_path / "history.json"
    path.write_text(content)
    with pytest.raises(common.UserError, match="is no history of this script"):
        read_compared_run(path)
    with pytest.raises(common.UserError, match="cannot be read"):
        read_compared_run(tmp_path / "nowhere.json")
