"""Schedules as data: names of actions, tables in files, what check() finds, and which messages there are."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcpar.errors import ScheduleError
from hpcpar.nn.pipeline.builders import SCHEDULE_NAMES, build_schedule
from hpcpar.nn.pipeline.schedule import Action, Kind, Message, Schedule, messages

pytestmark = pytest.mark.local

ROWS = [["0F0", "0F1", "", "0B0", "0B1"], ["1F0", "1I0", "1F1", None, "1I1", "1W0", "1W1"]]


def test_action_is_named_after_stage_kind_and_microbatch() -> None:
    action = Action(Kind.FORWARD, 1, 3)
    assert str(action) == "1F3"
    assert Action.parse(" 12W345 ") == Action(Kind.BACKWARD_WEIGHT, 12, 345)
    assert {action, Action.parse("1F3")} == {action}


@pytest.mark.parametrize(
    "text", ["", "F", "1F", "F3", "1X3", "1f3", "-1F3", "1F3 0F1", "1F3.0", "²F1", "1F" + "9" * 99]
)
def test_text_that_is_no_action_is_refused(text: str) -> None:
    with pytest.raises(ScheduleError, match="must be a text like 1F3"):
        Action.parse(text)


@pytest.mark.parametrize("numbers", [(-1, 0), (0, -1), (1.0, 0), (True, 0), ("1", 0)])
def test_action_with_a_number_that_is_none_is_refused(numbers: tuple[int, int]) -> None:
    with pytest.raises(ScheduleError, match="must be an integer of at least 0"):
        Action(Kind.FORWARD, *numbers)


def test_schedule_knows_its_sizes() -> None:
    schedule = Schedule(ROWS, "mine")
    schedule.check(ranks=2, microbatches=2)
    assert (schedule.ranks, schedule.stages, schedule.microbatches) == (2, 2, 2)
    assert schedule.placement == (0, 1)
    assert schedule.splits_backward
    assert schedule.position(Action.parse("1I1")) == (1, 3)
    assert schedule.position(Action.parse("1B1")) is None
    assert not Schedule([["0F0", "0B0"]]).splits_backward


def test_schedules_are_equal_by_their_actions() -> None:
    assert Schedule(ROWS, "one") == Schedule([[cell for cell in row if cell] for row in ROWS], "other")
    assert Schedule(ROWS) != Schedule(ROWS[:1])
    assert len({Schedule(ROWS), Schedule(ROWS)}) == 1


@pytest.mark.parametrize("actions", [None, 3, "0F0", ["0F0"], [None], [[3]], [["0F0", b"0B0"]], [["0G0"]]])
def test_schedule_made_of_anything_else_is_refused(actions: object) -> None:
    with pytest.raises(ScheduleError, match="must be"):
        Schedule(actions)  # type: ignore[arg-type]


# ---- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULE_NAMES)
def test_table_in_a_file_holds_the_schedule_exactly(name: str, tmp_path: Path) -> None:
    schedule = build_schedule(name, 3, 5, 2)
    schedule.to_csv(tmp_path / "s.csv")
    assert Schedule.from_csv(tmp_path / "s.csv") == schedule


@pytest.mark.parametrize("rows", [[], [[]], [["0F0"], []], [[], ["0F0"], [], []]])
def test_ranks_without_actions_survive_a_file(rows: list[list[str]], tmp_path: Path) -> None:
    Schedule(rows).to_csv(tmp_path / "s.csv")
    assert Schedule.from_csv(tmp_path / "s.csv").actions == Schedule(rows).actions


def test_table_may_have_blanks_empty_cells_and_short_rows(tmp_path: Path) -> None:
    text = "\ufeff0F0, 0F1 ,,0B0,0B1\r\n\n,1F0,1I0,1F1\t,,1I1,1W0,1W1,,\n  \n"
    (tmp_path / "s.csv").write_text(text, encoding="utf-8")
    assert Schedule.from_csv(tmp_path / "s.csv") == Schedule(ROWS)


def test_bad_cell_is_named_with_its_row_and_column(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("0F0,0B0\n1F0,,1Q0\n")
    with pytest.raises(ScheduleError, match=r"column 3 in row 2 of .*s\.csv must be .* got '1Q0'"):
        Schedule.from_csv(tmp_path / "s.csv")


def test_file_that_is_missing_or_no_text_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match=r"no\.csv must be a readable file"):
        Schedule.from_csv(tmp_path / "no.csv")
    (tmp_path / "s.csv").write_bytes(b"0F0,\xff\xfe\n")
    with pytest.raises(ScheduleError, match=r"s\.csv must be a CSV file in UTF-8"):
        Schedule.from_csv(tmp_path / "s.csv")


# ---- what check() finds ------------------------------------------------------------------------------------

WRONG = {
    "nothing": ([], "list of actions for each rank, got none"),
    "idle rank": ([["0F0", "0B0"], []], "got no actions for rank 1"),
    "twice": ([["0F0", "0F0", "0B0"]], "got 0F0 twice on rank 0"),
    "two ranks": ([["0F0", "0F1", "0B1"], ["0B0"]], "stage 0 must be on one rank, got 0B0 on rank 1"),
    "twice on two ranks": ([["0F0", "0B0"], ["0F0"]], "stage 0 must be on one rank"),
    "no forward": ([["0F0", "0B0", "0B1"]], "stage 0 has no forward of microbatch 1. Add 0F1"),
    "no backward": (
        [["0F0", "0F1", "0B0", "0B1"], ["1F0", "1F1", "1B0"]],
        "stage 1 has no backward of microbatch 1. Add 1B1, or 1I1 and 1W1",
    ),
    "hole in microbatches": ([["0F0", "0F2", "0B0", "0B2"]], "no forward of microbatch 1"),
    "hole in stages": ([["0F0", "0B0"], ["2F0", "2B0"]], "got stage 2 but no stage 1"),
    "whole and half": ([["0F0", "0B0", "0I0", "0W0"]], "got 0B0 and also 0I0"),
    "whole and weights": ([["0F0", "0B0", "0W0"]], "got 0B0 and also 0W0"),
    "inputs only": ([["0F0", "0I0"]], "got 0I0 without 0W0"),
    "weights only": ([["0F0", "0W0"]], "got 0W0 without 0I0"),
    "weights first": ([["0F0", "0W0", "0I0"]], "have 0I0 before 0W0"),
    "backward first": ([["0B0", "0F0"]], "have 0F0 before 0B0"),
    "inputs first": ([["0I0", "0F0", "0W0"]], "have 0F0 before 0I0"),
}


@pytest.mark.parametrize(("rows", "problem"), WRONG.values(), ids=WRONG)
def test_check_names_the_first_problem(rows: list[list[str]], problem: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        Schedule(rows, "mine").check()
    assert problem in str(caught.value)


def test_check_compares_with_the_expected_sizes() -> None:
    schedule = Schedule(ROWS)
    with pytest.raises(ScheduleError, match="one list of actions per rank, 3, got 2"):
        schedule.check(ranks=3)
    with pytest.raises(ScheduleError, match=r"for 4 microbatch\(es\), got one for 2"):
        schedule.check(microbatches=4)


def test_forwards_alone_are_complete_only_when_that_is_asked_for() -> None:
    forwards = Schedule([["0F0", "0F1"], ["1F0", "1F1"]])
    forwards.check(forward_only=True)
    with pytest.raises(ScheduleError, match="no backward"):
        forwards.check()
    with pytest.raises(ScheduleError, match="forwards only, got 0B0"):
        Schedule(ROWS).check(forward_only=True)


# ---- messages ----------------------------------------------------------------------------------------------


def test_messages_are_what_crosses_ranks_in_the_order_of_sending() -> None:
    expected = [("0F0", "1F0", 0, 1), ("0F1", "1F1", 0, 1), ("1I0", "0B0", 1, 0), ("1I1", "0B1", 1, 0)]
    found = messages(Schedule(ROWS))
    assert found == tuple(Message(Action.parse(a), Action.parse(b), s, d) for a, b, s, d in expected)


@pytest.mark.parametrize("name", SCHEDULE_NAMES)
@pytest.mark.parametrize(("ranks", "chunks"), [(1, 3), (2, 1), (3, 2)])
def test_every_receive_has_one_send(name: str, ranks: int, chunks: int) -> None:
    schedule = build_schedule(name, ranks, 5, chunks)
    found = messages(schedule)
    boundaries = 0 if ranks == 1 else ranks * chunks - 1
    assert len(found) == 2 * 5 * boundaries
    assert len({m.producer for m in found}) == len({m.consumer for m in found}) == len(found)
    for message in found:
        assert (schedule.position(message.producer) or ())[0] == message.source != message.dest
        assert (schedule.position(message.consumer) or ())[0] == message.dest


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([["0F0", "0B0"], ["1F0", "1F1", "1B0"]], "1F1 on rank 1 must have one sender, got 0"),
        ([["0F0", "0F1", "0B0"], ["1F0", "1B0"]], "0F1 on rank 0 must have a receiver"),
        ([["0F0", "0B0"], ["1F0", "1B0", "1I0"]], "0B0 on rank 0 must have one sender, got 2"),
        ([["0F0", "0B0", "0I0"], ["1F0", "1B0"]], "every send must have one receive, got 2 sends and 3"),
    ],
)
def test_message_without_its_other_end_is_refused(rows: list[list[str]], problem: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        messages(Schedule(rows))
    assert problem in str(caught.value)
