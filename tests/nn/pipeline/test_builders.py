"""The schedules that hpcpar makes: complete and free of deadlocks for all numbers, as short as promised."""

from __future__ import annotations

import itertools

import pytest

from hpcpar.errors import ScheduleError
from hpcpar.nn.pipeline.builders import SCHEDULE_NAMES, build_schedule
from hpcpar.nn.pipeline.list_scheduling import forward_only, list_schedule
from hpcpar.nn.pipeline.schedule import Kind, Schedule
from hpcpar.nn.pipeline.simulate import simulate

pytestmark = pytest.mark.local

each_name = pytest.mark.parametrize("name", SCHEDULE_NAMES)
# Below, at, between and above multiples of every number of ranks.
SIZES = [
    (p, m) for p in (1, 2, 3, 4, 5, 7, 16) for m in sorted({1, 2, p - 1, p, p + 1, 2 * p, 2 * p + 1}) if m > 0
]


def cells(schedule: Schedule) -> list[str]:
    return [" ".join(map(str, row)) for row in schedule.actions]


@each_name
@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_schedule_of_any_size_is_complete_and_runs(name: str, chunks: int) -> None:
    for ranks, microbatches in SIZES:
        schedule = build_schedule(name, ranks, microbatches, chunks)
        schedule.check(ranks, microbatches)
        assert schedule.placement == tuple(stage % ranks for stage in range(ranks * chunks))
        simulate(schedule)


def test_gpipe_does_all_forwards_first() -> None:
    assert cells(build_schedule("gpipe", 2, 2, 2)) == [
        "0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1",
        "1F0 1F1 3F0 3F1 3B0 3B1 1B0 1B1",
    ]


def test_1f1b_is_the_one_of_the_papers() -> None:
    assert cells(build_schedule("1f1b", 3, 4)) == [
        "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3",
        "1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3",
        "2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3",
    ]


def test_1f1b_holds_no_more_microbatches_than_stages_follow() -> None:
    for ranks, microbatches in SIZES:
        peaks = simulate(build_schedule("1f1b", ranks, microbatches)).peak_activations
        assert peaks == tuple(min(microbatches, ranks - stage) for stage in range(ranks))


def test_interleaved_with_one_chunk_is_1f1b_and_1f1b_with_chunks_is_interleaved() -> None:
    assert build_schedule("interleaved", 4, 7) == build_schedule("1f1b", 4, 7)
    assert build_schedule("interleaved", 4, 7, 2) == build_schedule("1f1b", 4, 7, 2)


def test_interleaved_is_the_one_of_the_paper() -> None:
    assert cells(build_schedule("interleaved", 2, 4, 2)) == [
        "0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 2B2 2B3 0B2 0B3",
        "1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3",
    ]


@pytest.mark.parametrize(
    ("ranks", "groups", "chunks"), [*itertools.product([2, 3, 4, 8], [1, 2, 3], [2, 3, 4])]
)
def test_chunks_divide_the_bubble_of_interleaved(ranks: int, groups: int, chunks: int) -> None:
    result = simulate(build_schedule("interleaved", ranks, groups * ranks, chunks))
    assert result.makespan == 3 * groups * ranks * chunks + 3 * (ranks - 1)


def test_interleaved_with_a_small_last_group_does_not_deadlock() -> None:
    """Five microbatches in groups of four: the paper's order lets ranks 0 and 3 wait for each other."""
    result = simulate(build_schedule("interleaved", 4, 5, 3))
    assert result.makespan <= 66
    assert max(result.peak_activations) <= 3 * 2 + 2 * 4 + 1


# ---- zero bubble -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", range(1, 17))
def test_zero_bubble_leaves_the_last_rank_no_gap_in_the_memory_of_1f1b(ranks: int) -> None:
    for microbatches in sorted({1, 2, 3, ranks - 1, ranks, ranks + 1, 2 * ranks - 1, 40 - ranks} - {0}):
        result = simulate(build_schedule("zero_bubble", ranks, microbatches))
        plain = simulate(build_schedule("1f1b", ranks, microbatches))
        assert result.makespan <= plain.makespan
        assert max(result.peak_activations) <= ranks
        if microbatches >= ranks:
            assert result.makespan == 3 * microbatches + ranks - 1


@pytest.mark.parametrize(("ranks", "chunks"), [*itertools.product([1, 2, 3, 6], [2, 3])])
def test_zero_bubble_with_chunks_is_as_short_as_can_be(ranks: int, chunks: int) -> None:
    for microbatches in [*range(ranks, 2 * ranks + 3), 3 * ranks + 1]:
        result = simulate(build_schedule("zero_bubble", ranks, microbatches, chunks))
        assert result.makespan == 3 * microbatches * chunks + ranks - 1
        assert max(result.peak_activations) <= 2 * (ranks - 1) + (chunks - 1) * ranks + 1


def test_zero_bubble_does_the_weights_of_a_stage_in_order() -> None:
    schedule = build_schedule("zero_bubble", 4, 9, 2)
    for stage in range(8):
        row = [a for a in schedule.actions[stage % 4] if a.stage == stage and a.kind is Kind.BACKWARD_WEIGHT]
        assert [action.microbatch for action in row] == list(range(9))


@pytest.mark.parametrize("chunks", [1, 2])
def test_zero_bubble_keeps_to_the_memory_it_is_given(chunks: int) -> None:
    for limit in range(chunks, 14):
        schedule = build_schedule("zero_bubble", 4, 7, chunks, max_in_flight=limit)
        schedule.check(4, 7)
        assert max(simulate(schedule).peak_activations) <= limit


def test_more_memory_hides_more_of_the_time_of_messages() -> None:
    makespans = [
        simulate(build_schedule("zero_bubble", 4, 16, max_in_flight=limit), message=1.0).makespan
        for limit in (2, 4, 8, 12)
    ]
    assert makespans == sorted(makespans, reverse=True)
    assert makespans[0] > makespans[1] > makespans[2]


# ---- arguments ---------------------------------------------------------------------------------------------


def test_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ScheduleError, match="one of gpipe, 1f1b, interleaved, zero_bubble, got 'dualpipe'"):
        build_schedule("dualpipe", 2, 2)


@each_name
@pytest.mark.parametrize("wrong", [0, -1, True, 2.0, "2", None])
@pytest.mark.parametrize("which", ["ranks", "microbatches", "chunks"])
def test_number_that_is_none_is_refused(name: str, which: str, wrong: object) -> None:
    numbers: dict[str, object] = {"ranks": 2, "microbatches": 2, "chunks": 1, which: wrong}
    with pytest.raises(ScheduleError, match=f"{which} must be an integer of at least 1"):
        build_schedule(name, **numbers)  # type: ignore[arg-type]


def test_memory_limit_that_cannot_be_kept_is_refused() -> None:
    with pytest.raises(ScheduleError, match="must be left out with 1f1b"):
        build_schedule("1f1b", 2, 2, max_in_flight=2)
    with pytest.raises(ScheduleError, match="max_in_flight must be at least chunks, 3, got 2"):
        build_schedule("zero_bubble", 2, 2, 3, max_in_flight=2)
    with pytest.raises(ScheduleError, match="max_in_flight must be an integer"):
        build_schedule("zero_bubble", 2, 2, max_in_flight=0)


# ---- list scheduling ---------------------------------------------------------------------------------------


@each_name
@pytest.mark.parametrize(("ranks", "microbatches", "chunks"), [(1, 3, 2), (3, 7, 1), (3, 7, 2), (4, 3, 3)])
def test_forwards_alone_keep_all_ranks_at_work(name: str, ranks: int, microbatches: int, chunks: int) -> None:
    forwards = forward_only(build_schedule(name, ranks, microbatches, chunks))
    forwards.check(ranks, microbatches, forward_only=True)
    result = simulate(forwards, forward_only=True)
    groups = -(-microbatches // ranks)
    assert result.makespan <= groups * ranks * chunks + ranks - 1
    assert forward_only(forwards) == forwards


def test_rule_that_admits_nothing_is_refused() -> None:
    with pytest.raises(ScheduleError, match="must admit the oldest one"):
        list_schedule([0, 1], 2, priority=lambda a, p: 0, admit=lambda a, p: a.microbatch < 1)
