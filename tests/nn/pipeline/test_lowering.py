"""Lowering: schedules for chains of segments are complete, run, and are about what they came from."""

from __future__ import annotations

import random

import pytest

from hpcpar.errors import ScheduleError
from hpcpar.nn.pipeline.builders import SCHEDULE_NAMES, build_schedule
from hpcpar.nn.pipeline.list_scheduling import forward_only
from hpcpar.nn.pipeline.lowering import lower
from hpcpar.nn.pipeline.schedule import Kind, Schedule, messages
from hpcpar.nn.pipeline.simulate import simulate

pytestmark = pytest.mark.local

each_name = pytest.mark.parametrize("name", SCHEDULE_NAMES)


@each_name
def test_stages_that_stay_whole_leave_the_schedule_as_it_is(name: str) -> None:
    schedule = build_schedule(name, 3, 4, 2)
    assert lower(schedule, [[rank] for rank in schedule.placement]) is schedule


def test_segments_are_numbered_along_the_chain() -> None:
    lowered = lower(build_schedule("1f1b", 2, 3), [[0], [1, 0, 1]])
    assert lowered.placement == (0, 1, 0, 1)
    assert lowered.name == "1f1b"


def test_only_microbatch_goes_along_the_chain_and_back() -> None:
    lowered = lower(build_schedule("1f1b", 2, 1), [[0], [1, 0, 1]])
    assert lowered == Schedule([["0F0", "2F0", "2B0", "0B0"], ["1F0", "3F0", "3B0", "1B0"]])


@each_name
def test_any_cut_gives_a_complete_schedule_that_runs(name: str) -> None:
    """The same cuts on all ranks, since the generator has a seed of its own."""
    draw = random.Random(f"cuts of {name}")
    for _ in range(40):
        ranks, chunks, microbatches = draw.randint(1, 5), draw.randint(1, 3), draw.randint(1, 9)
        schedule = build_schedule(name, ranks, microbatches, chunks)
        parts = [
            [rank, *draw.choices(range(ranks), k=draw.choice([0, 0, 1, 3]))] for rank in schedule.placement
        ]
        for chain in parts:
            draw.shuffle(chain)
        lowered = lower(schedule, parts)
        lowered.check(ranks, microbatches)
        assert lowered.placement == tuple(rank for chain in parts for rank in chain)
        assert lowered.splits_backward == schedule.splits_backward
        simulate(lowered)
        messages(lowered)
        simulate(forward_only(lowered), forward_only=True)


def test_segments_keep_the_microbatches_in_order() -> None:
    lowered = lower(build_schedule("zero_bubble", 3, 7), [[0, 2], [1], [2, 0, 1]])
    for stage, rank in enumerate(lowered.placement):
        for kind in (Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT):
            row = [a.microbatch for a in lowered.actions[rank] if (a.stage, a.kind) == (stage, kind)]
            assert row == list(range(7))


def test_backward_is_cut_in_two_where_it_was() -> None:
    mixed = Schedule([["0F0", "0F1", "0B0", "0I1", "0W1"], ["1F0", "1I0", "1F1", "1W0", "1B1"]])
    lowered = lower(mixed, [[0, 1], [1]])
    names = {str(action) for row in lowered.actions for action in row}
    assert names >= {"0B0", "1B0", "0I1", "0W1", "1I1", "1W1", "2I0", "2W0", "2B1"}
    assert len(names) == 6 + 3 + 2 * 3


@pytest.mark.parametrize("name", ["1f1b", "zero_bubble"])
def test_no_more_microbatches_enter_than_the_longer_chain_needs(name: str) -> None:
    schedule = build_schedule(name, 3, 20)
    lowered = lower(schedule, [[0], [1, 0, 1], [2]])
    in_flight = most = 0
    for action in lowered.actions[0]:
        if action.stage == 0 and action.kind is not Kind.BACKWARD_WEIGHT:
            in_flight += 1 if action.kind is Kind.FORWARD else -1
            most = max(most, in_flight)
    assert 3 <= most <= 3 + 2


@each_name
def test_moving_a_third_of_a_stage_costs_little_more_than_its_work(name: str) -> None:
    schedule = build_schedule(name, 4, 8)
    parts = [[0], [1, 0, 1], [2], [3]]
    share = [1 / len(chain) for chain in parts for _ in chain]
    result = simulate(lower(schedule, parts), forward=share, backward_input=share, backward_weight=share)
    assert max(result.busy) == pytest.approx(8 * 3 * 4 / 3)
    # Nothing is shorter than the work of the busiest rank; the rest is the bubble, which may grow a little.
    assert 32 - 1e-9 < result.makespan < 32 + 3 * 3


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ([[0]], "one list per stage, 2, got 1"),
        ([[0], []], "stage 1 must have at least one rank"),
        ([[0], [2]], "must be from 0 to 1, got 2"),
        ([[0], [True]], "must be from 0 to 1, got True"),
        ([[0], [0]], "must give every rank a segment, got none for rank 1"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts: list[list[int]], problem: str) -> None:
    with pytest.raises(ScheduleError, match=problem):
        lower(build_schedule("1f1b", 2, 2), parts)


def test_schedule_that_deadlocks_is_refused() -> None:
    stuck = Schedule([["0F0", "0B0", "0F1", "0B1"], ["1F1", "1B1", "1F0", "1B0"]])
    with pytest.raises(ScheduleError, match="must not deadlock"):
        lower(stuck, [[0], [1]])
