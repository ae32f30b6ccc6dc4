"""The simulator: times by hand, bubbles by formula, memory, deadlocks, and schedules of real sizes."""

from __future__ import annotations

import pytest

from hpcpar.errors import ScheduleError
from hpcpar.nn.pipeline.builders import build_schedule
from hpcpar.nn.pipeline.schedule import Schedule
from hpcpar.nn.pipeline.simulate import Simulation, simulate

pytestmark = pytest.mark.local

TWO = Schedule([["0F0", "0F1", "0B0", "0B1"], ["1F0", "1B0", "1F1", "1B1"]])


def times(result: Simulation) -> dict[str, tuple[float, float]]:
    return {span.label: (span.start_s, span.end_s) for span in result.timeline.spans}


def test_times_are_those_worked_out_by_hand() -> None:
    result = simulate(TWO, forward=[1, 2], backward_input=3, backward_weight=[1, 0], message=0.5)
    assert times(result) == {
        "0F0": (0, 1),
        "0F1": (1, 2),
        "1F0": (1.5, 3.5),
        "1B0": (3.5, 6.5),
        "0B0": (7, 11),
        "1F1": (6.5, 8.5),
        "1B1": (8.5, 11.5),
        "0B1": (12, 16),
    }
    assert result.makespan == 16
    assert result.busy == (10, 10)
    assert result.bubble == pytest.approx(1 - 20 / 32)
    assert result.efficiency == pytest.approx(20 / 32)


def test_split_backward_passes_the_gradient_on_before_its_weights() -> None:
    split = Schedule([["0F0", "0I0", "0W0"], ["1F0", "1I0", "1W0"]])
    result = simulate(split, backward_input=2, backward_weight=3)
    assert times(result)["0I0"] == (4, 6)
    assert times(result)["1W0"] == (4, 7)
    assert result.makespan == 9
    assert (
        simulate(Schedule([["0F0", "0B0"], ["1F0", "1B0"]]), backward_input=2, backward_weight=3).makespan
        == 12
    )


def test_message_between_stages_of_one_rank_costs_nothing() -> None:
    one = Schedule([["0F0", "1F0", "1B0", "0B0"]])
    assert simulate(one, message=10).makespan == 6
    assert simulate(one, message=10).bubble == 0


@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 4), (2, 8), (4, 8), (5, 9)])
def test_bubble_of_1f1b_is_that_of_the_formula(ranks: int, microbatches: int) -> None:
    bubble = simulate(build_schedule("1f1b", ranks, microbatches)).bubble
    assert bubble == pytest.approx((ranks - 1) / (microbatches + ranks - 1))


def test_activations_are_held_until_the_weights_are_done() -> None:
    assert simulate(TWO).peak_activations == (2, 1)
    rows = [["0F0", "0I0", "0F1", "0W0", "0I1", "0W1"]]
    assert simulate(Schedule(rows)).peak_activations == (2,)
    assert simulate(Schedule([["0F0", "0I0", "0W0", "0F1", "0I1", "0W1"]])).peak_activations == (1,)


def test_too_many_activations_are_refused_with_rank_and_action() -> None:
    assert simulate(TWO, max_activations=2).peak_activations == (2, 1)
    assert simulate(TWO, max_activations=[2, 1]).peak_activations == (2, 1)
    with pytest.raises(ScheduleError, match=r"rank 0 must hold activations of at most 1 .*, got 2 at 0F1"):
        simulate(TWO, max_activations=[1, 1])


@pytest.mark.parametrize(
    ("rows", "waits"),
    [
        (
            [["0F0", "0B0", "0F1", "0B1"], ["1F1", "1B1", "1F0", "1B0"]],
            [
                "rank 0 waits at 0B0 for 1B0, which rank 1 has behind 1F1",
                "rank 1 waits at 1F1 for 0F1, which rank 0 has behind 0B0",
            ],
        ),
        ([["1F0", "0F0", "1B0", "0B0"]], ["rank 0 waits at 1F0 for 0F0, which rank 0 has behind 1F0"]),
        (
            [
                ["0F0", "0F1", "0I1", "0W1", "0I0", "0W0"],
                ["1F0", "1F1", "1I0", "2F1", "1W0", "1I1", "1W1"],
                ["2F0", "2I0", "2F1", "2W0", "2I1", "2W1"],
            ],
            None,
        ),
        (
            [["0F0", "0F1", "0B1", "0B0"], ["1F0", "1B0", "1F1", "1B1"], ["2F1", "2B1", "2F0", "2B0"]],
            [
                "rank 0 waits at 0B1 for 1B1",
                "rank 1 waits at 1B0 for 2B0, which rank 2 has behind 2F1",
                "rank 2 waits at 2F1 for 1F1",
            ],
        ),
    ],
    ids=["two ranks", "one rank", "not even complete", "three ranks"],
)
def test_deadlock_is_described_for_every_stuck_rank(rows: list[list[str]], waits: list[str] | None) -> None:
    with pytest.raises(ScheduleError) as caught:
        simulate(Schedule(rows))
    for wait in waits or ["stage 2 must be on one rank"]:
        assert wait in str(caught.value)
    assert ("deadlock" in str(caught.value)) == (waits is not None)


def test_incomplete_schedule_is_refused() -> None:
    with pytest.raises(ScheduleError, match="no backward of microbatch 0"):
        simulate(Schedule([["0F0"]]))


def test_forwards_alone_can_be_simulated() -> None:
    result = simulate(Schedule([["0F0", "0F1"], ["1F0", "1F1"]]), forward_only=True)
    assert result.makespan == 3
    assert result.peak_activations == (1, 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"forward": -1},
        {"forward": float("nan")},
        {"forward": [1, 2, 3]},
        {"backward_input": [1, "2"]},
        {"backward_weight": "12"},
        {"message": float("inf")},
        {"message": True},
        {"max_activations": 0},
        {"max_activations": 1.5},
        {"max_activations": [1]},
    ],
    ids=str,
)
def test_costs_and_limits_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ScheduleError, match=f"{next(iter(wrong))}.* must"):
        simulate(TWO, **wrong)  # type: ignore[arg-type]


def test_schedule_that_costs_nothing_has_no_bubble() -> None:
    assert simulate(TWO, forward=0, backward_input=0, backward_weight=0).bubble == 0


def test_large_schedule_comes_to_its_end() -> None:
    result = simulate(build_schedule("1f1b", 64, 256))
    assert result.makespan == 3 * (256 + 63)
    assert result.peak_activations == tuple(64 - rank for rank in range(64))
