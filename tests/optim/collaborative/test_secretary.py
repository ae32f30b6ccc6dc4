"""Decisions from rows and a clock, without ranks."""

from __future__ import annotations

import numpy as np
import pytest

from hpcpar.optim.collaborative.performance import PerformanceEMA
from hpcpar.optim.collaborative.progress import CollaborationState, Column, is_due, summarize, training_states
from hpcpar.optim.collaborative.secretary import Decision, Secretary

pytestmark = pytest.mark.local

TARGET = 10


class Table:
    """Rows that are changed by name."""

    def __init__(self, size: int, timeout_s: float | None = None) -> None:
        self.rows = np.zeros((size, len(Column)))
        self.secretary = Secretary(size, TARGET, timeout_s)

    def set(self, rank: int, **values: float) -> None:
        for name, value in values.items():
            self.rows[rank, Column[name.upper()]] = value

    def join(self, *ranks: int) -> None:
        for rank in ranks:
            self.set(rank, joined=1)

    def advance(self, *ranks: int, version: int, number: int) -> None:
        for rank in ranks:
            self.set(rank, round=version, step=version, samples=0, joined=0, acted=number)

    def decide(self, now_s: float = 0.0) -> Decision:
        return Decision.from_numbers(self.secretary.decide(self.rows, now_s))


def test_round_begins_when_all_have_joined() -> None:
    table = Table(3)
    table.set(1, samples=TARGET)
    assert table.decide().due == 0
    table.join(0, 1)
    assert table.decide(1e6).number == 0
    table.join(2)
    decision = table.decide()
    assert (decision.number, decision.round) == (1, 0)
    assert decision.members.tolist() == [1, 1, 1]


def test_decision_is_made_once() -> None:
    table = Table(2)
    table.join(0, 1)
    assert table.decide().number == 1
    assert table.decide().number == 1
    table.advance(0, version=1, number=1)
    table.join(0)
    assert table.decide().number == 1, "rank 1 is still in the round before"
    table.advance(1, version=1, number=1)
    table.join(1)
    assert (table.decide().number, table.decide().round) == (2, 1)


def test_timeout_counts_from_the_first_that_joined() -> None:
    table = Table(3, timeout_s=5.0)
    assert table.decide(100.0).number == 0
    table.join(0)
    assert table.decide(100.0).number == 0
    table.join(1)
    assert table.decide(104.9).number == 0
    decision = table.decide(105.0)
    assert decision.number == 1
    assert decision.members.tolist() == [1, 1, 0]


def test_rank_that_was_left_out_is_not_waited_for_until_it_comes_back() -> None:
    table = Table(3, timeout_s=5.0)
    table.join(0, 1)
    table.decide(0.0)
    assert table.decide(5.0).number == 1
    table.join(2)  # too late: joins nothing
    assert table.decide(50.0).number == 1
    table.advance(0, 1, version=1, number=1)
    table.join(0, 1)
    assert table.decide(50.0).members.tolist() == [1, 1, 0]
    table.advance(0, 1, version=2, number=2)
    table.set(2, joined=0, wants=2, asked=1)
    table.join(0, 1)
    assert table.decide(60.0).number == 2, "a rank that loads is waited for"
    table.set(2, wants=0, round=2, joined=1)
    decision = table.decide(61.0)
    assert decision.number == 3
    assert decision.members.tolist() == [1, 1, 1]


def test_donors_rotate_among_the_newest() -> None:
    table = Table(4)
    for rank in (0, 1, 2):
        table.set(rank, round=7)
    donors = []
    for asked in range(1, 7):
        table.set(3, wants=8, asked=asked)
        decision = table.decide()
        assert decision.asked[3] == asked
        donors.append(int(decision.donors[3]))
    assert sorted(donors[:3]) == [0, 1, 2]
    assert donors[3:] == donors[:3]


def test_no_donor_before_somebody_has_the_version() -> None:
    table = Table(2)
    table.set(1, wants=2, asked=1)
    assert table.decide().donors[1] == -1
    table.set(0, round=1)
    assert table.decide().donors[1] == 0


def test_one_keeps_what_it_has_when_all_ask() -> None:
    table = Table(3)
    for rank in range(3):
        table.set(rank, wants=1, asked=1)
    donors = table.decide().donors.astype(int).tolist()
    (source,) = [rank for rank, donor in enumerate(donors) if rank == donor]
    assert donors == [source] * 3
    table.set(1, round=4)
    for rank in range(3):
        table.set(rank, asked=2)
    assert table.decide().donors.tolist() == [1, 1, 1]


def test_all_may_leave_when_no_round_is_open() -> None:
    table = Table(2)
    table.set(0, left=1, samples=4)
    assert not table.decide().all_left
    table.set(1, left=1, samples=6)
    assert table.decide().all_left, "samples that suffice begin no round when all have left"
    table.set(1, joined=1)
    assert not table.decide().all_left, "a round that somebody has joined is ended"
    table.set(1, joined=0, samples=5)
    assert table.decide().all_left
    table.set(1, wants=1)
    assert not table.decide().all_left
    table.set(1, wants=0, round=1)
    assert not table.decide().all_left


def test_decision_survives_the_bulletin() -> None:
    decision = Decision(3, 7, -1, True, np.array([1.0, 0]), np.array([-1.0, 0]), np.array([0.0, 2]))
    again = Decision.from_numbers(decision.to_numbers())
    assert again.to_numbers().tolist() == decision.to_numbers().tolist()
    assert again.all_left is True


# ---- what users see ----------------------------------------------------------------------------------------


def test_state_counts_the_ranks_with_the_newest_parameters() -> None:
    table = Table(3)
    table.set(0, round=5, step=4, samples=3, rate=2.0)
    table.set(1, round=5, step=4, samples=2, rate=3.0, joined=1)
    table.set(2, round=4, step=3, samples=9, rate=0.0, left=1)
    state = summarize(table.rows, TARGET)
    assert state == CollaborationState(4, 5, TARGET, 3, 2, 5.0, 1.0)
    assert not state.ready_for_step
    assert is_due(table.rows, 5, TARGET), "a rank has joined"
    assert [s.samples_accumulated for s in training_states(table.rows)] == [3, 2, 9]
    assert training_states(table.rows)[2].has_left


def test_eta_without_anybody_who_computes() -> None:
    table = Table(2)
    assert summarize(table.rows, TARGET).eta_next_step == float("inf")
    table.set(0, samples=TARGET)
    assert summarize(table.rows, TARGET).eta_next_step == 0.0
    assert summarize(table.rows, TARGET).ready_for_step


# ---- speed -------------------------------------------------------------------------------------------------


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_speed_of_steady_work_is_exact_from_the_first_batch() -> None:
    clock = Clock()
    speed = PerformanceEMA(0.1, clock=clock)
    assert speed.samples_per_second == 0.0
    for samples in (4, 1, 10):
        clock.now_s += samples / 20.0
        assert speed.update(samples) == pytest.approx(20.0)


def test_speed_follows_a_change() -> None:
    clock = Clock()
    speed = PerformanceEMA(0.5, clock=clock)
    clock.now_s += 1.0
    speed.update(1)
    for _ in range(30):
        clock.now_s += 0.1
        speed.update(1)
    assert speed.samples_per_second == pytest.approx(10.0, rel=1e-3)


def test_pauses_do_not_count() -> None:
    clock = Clock()
    speed = PerformanceEMA(0.1, clock=clock)
    clock.now_s += 0.5
    with speed.pause():
        clock.now_s += 50.0
        with speed.pause():
            clock.now_s += 50.0
    clock.now_s += 0.5
    assert speed.update(10) == pytest.approx(10.0)
