"""Timelines: shares of idle time, and the three ways to look at one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from hpcpar.errors import HpcparError
from hpcpar.nn.pipeline.builders import build_schedule
from hpcpar.nn.pipeline.simulate import simulate
from hpcpar.nn.pipeline.timeline import Span, Timeline

pytestmark = pytest.mark.local

MEASURED = Timeline(
    (
        Span(1, 14.0, 18.0, "1B0", "B", 1, 0),
        Span(0, 10.0, 11.0, "0F0", "F", 0, 0),
        Span(0, 11.0, 18.0, "0B0 waits", "wait", 0, 0),
        Span(0, 18.0, 20.0, "0B0", "B", 0, 0),
        Span(0, 18.5, 19.0, "bucket 0", "reduce"),
        Span(1, 12.0, 14.0, "1R0", "R", 1, 0),
    ),
    ranks=3,
)


def test_time_counts_from_the_first_start_and_overlaps_count_once() -> None:
    assert MEASURED.makespan == 10
    assert MEASURED.busy == (3, 6, 0)
    assert MEASURED.bubble == pytest.approx((0.7, 0.4, 1.0))


def test_bubble_of_a_simulation_is_the_mean_over_its_ranks() -> None:
    result = simulate(build_schedule("interleaved", 3, 6, 2), message=0.25)
    assert sum(result.timeline.bubble) / 3 == pytest.approx(result.bubble)
    assert result.timeline.busy == pytest.approx(result.busy)


def test_empty_timeline_has_no_time() -> None:
    empty = Timeline((), 2)
    assert (empty.makespan, empty.bubble) == (0, (0, 0))
    assert "rank 1" in empty.to_text()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Span(0, 0.0, 1.0, "x", "Q"),
        lambda: Span(0, 1.0, 0.5, "x", "F"),
        lambda: Span(0, float("nan"), 1.0, "x", "F"),
        lambda: Timeline((Span(2, 0.0, 1.0, "x", "F"),), 2),
        lambda: Timeline((), 1).to_text(width=5),
    ],
)
def test_what_makes_no_sense_is_refused(make: object) -> None:
    with pytest.raises(HpcparError, match="must"):
        make()  # type: ignore[operator]


# ---- text --------------------------------------------------------------------------------------------------


def test_text_of_a_small_schedule() -> None:
    text = simulate(build_schedule("1f1b", 2, 3)).timeline.to_text(width=36)
    assert text.splitlines() == [
        "rank 0 |F0F1....B0==F2B1==..B2==|",
        "rank 1 |..F0B0==F1B1==F2B2==....|",
        "       0                     12 s",
        "        F forward, B backward, . idle",
    ]


def test_text_tells_stages_apart_where_a_rank_has_several_and_there_is_room() -> None:
    timeline = simulate(build_schedule("gpipe", 1, 1, 2)).timeline
    assert timeline.to_text(60).splitlines()[0] == "rank 0 |0F0-----1F0-----1B0=============0B0=============|"
    assert timeline.to_text(25).splitlines()[0] == "rank 0 |F0F0B0==B0==|"


def test_text_shows_what_computes_above_what_goes_on_meanwhile() -> None:
    rows = MEASURED.to_text(width=31).splitlines()
    assert rows[0] == "rank 0 |F0,,,,,,,,,,,,,,B0==|"
    assert rows[1] == "rank 1 |....R0++B0======....|"
    assert rows[2] == "rank 2 |....................|"
    assert "B backward, R recompute, # reduce, , wait, . idle" in rows[4]


@pytest.mark.parametrize("width", [20, 33, 57, 100, 500])
@pytest.mark.parametrize("name", ["1f1b", "zero_bubble"])
def test_text_keeps_to_its_width(name: str, width: int) -> None:
    rows = simulate(build_schedule(name, 12, 40)).timeline.to_text(width).splitlines()[:12]
    assert len({len(row) for row in rows}) == 1
    assert len(rows[0]) <= width
    assert [row[:9] for row in rows] == [f"rank {rank} |".rjust(9) for rank in range(12)]


def test_wide_schedule_keeps_its_shape_in_few_characters() -> None:
    timeline = simulate(build_schedule("1f1b", 4, 64)).timeline
    rows = [line.split("|")[1] for line in timeline.to_text(50).splitlines()[:4]]
    # Backwards take two thirds of the time, and nobody is idle in the middle.
    assert all(row[5:-5].count("B") > row[5:-5].count("F") for row in rows)
    assert all("." not in row[6:-8] for row in rows)
    assert rows[0].startswith("F") and rows[0].endswith("B")
    assert rows[3].startswith(".") and rows[3].endswith(".")


# ---- files -------------------------------------------------------------------------------------------------


def test_chrome_trace_has_every_span_in_microseconds(tmp_path: Path) -> None:
    MEASURED.to_chrome(tmp_path / "t.json")
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    names = [event["args"]["name"] for event in events if event["ph"] == "M"]
    spans = [event for event in events if event["ph"] == "X"]
    assert names == ["rank 0", "rank 1", "rank 2"]
    assert len(spans) == len(MEASURED.spans)
    assert spans[0] == {
        "name": "1B0",
        "cat": "backward",
        "ph": "X",
        "ts": 4e6,
        "dur": 4e6,
        "pid": 0,
        "tid": 1,
        "args": {"kind": "B", "stage": 1, "microbatch": 0},
    }


@pytest.mark.parametrize("timeline", [MEASURED, Timeline((), 2)], ids=["measured", "empty"])
def test_picture_is_drawn_without_a_display(timeline: Timeline, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    timeline.draw(tmp_path / "t.png", title="a step")
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_picture_of_unknown_format_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(HpcparError, match=r"must end like one, as in \.png, got .*t\.nothing"):
        MEASURED.draw(tmp_path / "t.nothing")


def test_missing_matplotlib_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(HpcparError, match="pip install matplotlib"):
        MEASURED.draw(tmp_path / "t.png")
