"""DASO's phases and skips: arithmetic on the losses of epochs."""

from __future__ import annotations

import math
from typing import Any

import pytest

from hpcpar.errors import MismatchError
from hpcpar.optim.daso.plateau import PlateauDetector
from hpcpar.optim.daso.schedule import Phase, ScheduleOptions, SkipSchedule

pytestmark = pytest.mark.local


def options(**changes: Any) -> ScheduleOptions:
    values: dict[str, Any] = {
        "total_epochs": 20,
        "warmup_epochs": 2,
        "cooldown_epochs": 3,
        "max_global_skips": 8,
        "skip_reduction_factor": 2,
        "stability_level": 0.05,
        "patience": 0,
    }
    return ScheduleOptions(**{**values, **changes})


def skips(schedule: SkipSchedule, losses: list[float]) -> list[tuple[int, int]]:
    """The skips of the present epoch and of those that follow the losses."""
    rows = [(schedule.global_skip, schedule.batches_to_wait)]
    for loss in losses:
        schedule.end_epoch(loss)
        rows.append((schedule.global_skip, schedule.batches_to_wait))
    return rows


def test_a_falling_loss_is_no_plateau() -> None:
    detector = PlateauDetector(0.05, patience=0)
    assert not any(detector.observe(0.9**epoch) for epoch in range(20))


def test_a_loss_that_falls_too_little_is_a_plateau_after_patience() -> None:
    detector = PlateauDetector(0.05, patience=2)
    assert [detector.observe(1.0 - 0.001 * epoch) for epoch in range(8)] == [
        False,  # the first is the best
        False,
        False,
        True,
        False,
        False,
        True,
        False,
    ]


def test_slow_progress_adds_up() -> None:
    detector = PlateauDetector(0.05, patience=2)
    assert not any(detector.observe(1.0 - 0.02 * epoch) for epoch in range(20))


def test_losses_below_zero_must_fall_too() -> None:
    detector = PlateauDetector(0.1, patience=0)
    assert [detector.observe(loss) for loss in (-1.0, -1.05, -1.2, -1.0)] == [False, True, False, True]


def test_a_loss_that_is_no_number_is_never_better() -> None:
    detector = PlateauDetector(0.1, patience=0)
    assert [detector.observe(loss) for loss in (math.nan, 1.0, math.nan, 0.5)] == [True, False, True, False]


def test_phases_follow_the_epoch() -> None:
    schedule = SkipSchedule(options(total_epochs=7))
    phases = []
    for _ in range(9):
        phases.append(schedule.phase)
        schedule.end_epoch(1.0)
    assert phases == [Phase.WARM_UP] * 2 + [Phase.CYCLING] * 2 + [Phase.COOL_DOWN] * 5


def test_without_warm_up_cycling_comes_first_and_without_cool_down_training_ends_in_full_sync() -> None:
    schedule = SkipSchedule(options(total_epochs=2, warmup_epochs=0, cooldown_epochs=0))
    assert skips(schedule, [1.0, 0.5]) == [(4, 1), (4, 1), (0, 0)]


def test_skips_are_halved_at_each_plateau_and_begin_anew_at_the_bottom() -> None:
    schedule = SkipSchedule(options())
    assert skips(schedule, [1.0] * 12) == [
        (0, 0),
        (0, 0),
        (4, 1),  # its loss is the first that is compared
        (4, 1),
        (2, 1),
        (1, 1),
        (8, 2),
        (4, 1),
        (2, 1),
        (1, 1),
        (8, 2),
        (4, 1),
        (2, 1),
    ]


def test_skips_stay_while_the_loss_falls() -> None:
    schedule = SkipSchedule(options(warmup_epochs=0))
    assert skips(schedule, [0.8**epoch for epoch in range(10)]) == [(4, 1)] * 11


@pytest.mark.parametrize(
    ("most", "factor", "expected"),
    [
        (1, 2, [(1, 1), (1, 1), (1, 1), (1, 1)]),
        (3, 2, [(3, 1), (3, 1), (1, 1), (3, 1)]),
        (32, 4, [(4, 1), (4, 1), (1, 1), (32, 8)]),
        (4, 8, [(4, 1), (4, 1), (1, 1), (4, 1)]),
    ],
)
def test_skips_stay_within_their_bounds(most: int, factor: int, expected: list[tuple[int, int]]) -> None:
    schedule = SkipSchedule(options(warmup_epochs=0, max_global_skips=most, skip_reduction_factor=factor))
    assert skips(schedule, [1.0] * 3) == expected


def test_state_continues_in_another_schedule() -> None:
    losses = [1.0, 0.9, 0.97, 0.8, 0.8, 0.8, 0.7, 0.71, 0.69, 0.7, 0.7]
    whole, first, second = (SkipSchedule(options(patience=1)) for _ in range(3))
    skips(first, losses[:6])
    second.load_state_dict(first.state_dict())
    assert skips(second, losses[6:]) == skips(whole, losses)[6:]
    assert second.epoch == len(losses)


def test_state_fits_options_that_have_changed() -> None:
    finished = SkipSchedule(options(total_epochs=6))
    skips(finished, [1.0] * 6)
    longer, tighter = SkipSchedule(options(total_epochs=30)), SkipSchedule(options(max_global_skips=2))
    longer.load_state_dict(finished.state_dict())
    assert (longer.phase, longer.epoch, longer.global_skip) == (Phase.CYCLING, 6, 4)
    tighter.load_state_dict({**finished.state_dict(), "global_skip": 8, "batches_to_wait": 2})
    assert (tighter.global_skip, tighter.batches_to_wait) == (2, 2)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"total_epochs": 0}, "total_epochs"),
        ({"total_epochs": 4}, "fit into total_epochs=4"),
        ({"warmup_epochs": -1}, "warmup_epochs"),
        ({"cooldown_epochs": 1.5}, "cooldown_epochs"),
        ({"max_global_skips": 0}, "max_global_skips"),
        ({"skip_reduction_factor": 1}, "skip_reduction_factor"),
        ({"patience": True}, "patience"),
        ({"stability_level": 1.0}, "stability_level"),
        ({"stability_level": math.nan}, "stability_level"),
    ],
)
def test_wrong_options_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(MismatchError, match=text):
        options(**changes)
