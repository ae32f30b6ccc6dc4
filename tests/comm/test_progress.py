"""Waiting: deadlines and the progress engine, without MPI."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hpcpar.comm.progress import ENGINE, Patience, ProgressEngine, timeout_from_environment, wait_until
from hpcpar.errors import HpcparError, StalledError


class Counter:
    """Something with stages; ``then`` is called in each."""

    def __init__(self, then=lambda: None, *, needed_by_others: bool = True) -> None:
        self.count = 0
        self.then = then
        self.needed_by_others = needed_by_others

    def progress(self) -> None:
        self.count += 1
        self.then()


@pytest.fixture
def engine() -> Iterator[ProgressEngine]:
    """An engine of our own, left empty: a process that exits waits for what its engines still have."""
    engine = ProgressEngine()
    yield engine
    for item in engine._items:
        engine.discard(item)


def patience(timeout_s: float | None = None, missing: tuple[int, ...] = (2, 5), **options) -> Patience:
    return Patience("Something", missing=lambda: missing, where="rank 0 of 8", timeout_s=timeout_s, **options)


def test_engine_advances_what_it_has_until_it_is_discarded(engine: ProgressEngine) -> None:
    one, two = Counter(), Counter()
    for item in (one, two, one):
        engine.add(item)
    engine.advance()
    engine.discard(one)
    engine.discard(one)
    engine.advance()
    assert (one.count, two.count) == (1, 2)


def test_item_may_discard_itself_and_add_others_while_it_is_advanced(engine: ProgressEngine) -> None:
    follower = Counter()
    first = Counter(lambda: (engine.discard(first), engine.add(follower)))
    engine.add(first)
    engine.advance()
    engine.advance()
    assert (first.count, follower.count) == (1, 1)


def test_engine_is_not_advanced_inside_itself(engine: ProgressEngine) -> None:
    item = Counter(engine.advance)
    engine.add(item)
    engine.advance()
    assert item.count == 1


def test_engine_works_on_after_an_error(engine: ProgressEngine) -> None:
    errors = iter([ValueError("once")])

    def fail_once() -> None:
        for error in errors:
            raise error

    item = Counter(fail_once)
    engine.add(item)
    with pytest.raises(ValueError, match="once"):
        engine.advance()
    engine.advance()
    assert item.count == 2


def test_adopted_item_is_advanced_too(engine: ProgressEngine) -> None:
    item = Counter()
    with engine._lock:  # as when a finalizer runs inside of add
        engine.adopt(item)
    engine.advance()
    assert item.count == 1


def test_wait_advances_the_engine() -> None:
    item = Counter()
    ENGINE.add(item)
    try:
        wait_until(lambda: item.count >= 3, patience(10.0))
    finally:
        ENGINE.discard(item)
    assert item.count == 3


def test_deadline_names_operation_and_ranks() -> None:
    with pytest.raises(
        StalledError, match=r"Something must end within 0.02 s.*rank 0 of 8 waits for ranks 2, 5\."
    ) as caught:
        wait_until(lambda: False, patience(0.02))
    assert (caught.value.operation, caught.value.waiting_for) == ("Something", (2, 5))
    assert "HPCPAR_TIMEOUT_S" in str(caught.value)


def test_deadline_tells_details() -> None:
    with pytest.raises(StalledError, match=r"bucket 3 of step 7 is empty\. Ranks"):
        wait_until(lambda: False, patience(0.01, (1,), details=lambda: "Their bucket 3 of step 7 is empty."))


def test_deadline_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCPAR_TIMEOUT_S", "0.1")
    with pytest.raises(StalledError):
        wait_until(lambda: False, patience())
    monkeypatch.delenv("HPCPAR_TIMEOUT_S")
    assert timeout_from_environment() == 600.0
    monkeypatch.setenv("HPCPAR_TIMEOUT_S", "0")
    assert timeout_from_environment() == float("inf")


@pytest.mark.parametrize("text", ["soon", "-1", "nan", ""])
def test_wrong_deadline_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("HPCPAR_TIMEOUT_S", text)
    with pytest.raises(HpcparError, match="HPCPAR_TIMEOUT_S must be a number of seconds"):
        timeout_from_environment()


def test_exit_waits_for_operations_but_not_for_what_was_dropped(
    engine: ProgressEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three calls complete the operation; the other item never is complete, and nobody needs it."""

    def finish_in_time() -> None:
        if operation.count == 3:
            engine.discard(operation)

    monkeypatch.setenv("HPCPAR_TIMEOUT_S", "30")
    dropped, operation = Counter(needed_by_others=False), Counter(finish_in_time)
    engine.adopt(dropped)
    engine.add(operation)
    engine.drain()
    assert operation.count == 3


def test_exit_waits_no_longer_than_the_deadline(
    engine: ProgressEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPCPAR_TIMEOUT_S", "0.05")
    engine.add(Counter())
    engine.drain()
