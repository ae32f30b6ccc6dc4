"""Progress is a bar on a terminal, whole lines elsewhere, and silence on all ranks but the first."""

from __future__ import annotations

import io
import logging
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from torch.utils.data import DataLoader, IterableDataset

from hpcpar.logs import Progress, track
from hpcpar.logs.progress import _duration

pytestmark = pytest.mark.local


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> SimpleNamespace:
    """A clock that goes when it is told to."""
    caplog.set_level(logging.INFO, "hpcpar")
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    return clock


def test_log_gets_lines_now_and_then(clock: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    with Progress("training", 1000, done=200) as progress:
        for _ in range(400):
            clock.now += 0.5
            progress.advance()
    assert caplog.messages == [
        "training: 800 steps to do",
        "training: 320 of 1000 steps (32 %), 2 steps/s, 6 min left",
        "training: 440 of 1000 steps (44 %), 2 steps/s, 5 min left",
        "training: 560 of 1000 steps (56 %), 2 steps/s, 4 min left",
        "training: 600 of 1000 steps (60 %), 2 steps/s, ended after 3 min",
    ]


def test_unknown_length_and_nothing_to_do(clock: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    with Progress("reading", unit="files", interval_s=1.0) as progress:
        clock.now += 4.0
        progress.advance(2)
    with Progress("nothing", 0):
        clock.now += 1.0
    assert caplog.messages == [
        "reading: files to do",
        "reading: 2 files, 0.5 files/s, for 4 s",
        "reading: 2 files, 0.5 files/s, ended after 4 s",
        "nothing: 0 steps to do",
        "nothing: 0 of 0 steps, 0 steps/s, ended after 1 s",
    ]


def test_more_than_there_were_said_to_be(clock: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    with Progress("training", 2) as progress:
        clock.now += 2.0
        progress.advance(3)
    assert caplog.messages[-1] == "training: 3 steps, 1.5 steps/s, ended after 2 s"


def test_loader_without_a_length_is_gone_through(caplog: pytest.LogCaptureFixture) -> None:
    class Endless(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(5))

    assert len(list(track(DataLoader(Endless()), "reading"))) == 5


def test_interrupted_work_does_not_look_finished(
    clock: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(KeyboardInterrupt), Progress("training", 10) as progress:
        progress.advance(3)
        clock.now += 1.5
        raise KeyboardInterrupt
    assert caplog.messages[-1] == "training: 3 of 10 steps (30 %), 2 steps/s, interrupted after 2 s"


def test_only_the_first_rank_tells(clock: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    for rank in range(3):
        assert list(track([1, 2], "training", SimpleNamespace(rank=rank))) == [1, 2]
    assert [text.split(":")[0] for text in caplog.messages] == ["training"] * 2
    assert "2 of 2" in caplog.messages[1]


class Terminal(io.StringIO):
    """Somebody looks at it."""

    def isatty(self) -> bool:
        return True


def test_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("rich")
    caplog.set_level(logging.INFO, "hpcpar")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Progress("training", 10) as progress:
        progress.advance(7)
        assert progress.console is not None
        progress._bar.refresh()
    assert "7/10" in terminal.getvalue() and "steps" in terminal.getvalue()
    assert progress.console is None and caplog.messages == []


def test_log_never_sees_a_carriage_return(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(list(track(range(100), "training", interval_s=0.0))) == 100
    assert "\r" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (5900, "98 min"), (12000, "3 h 20 min")]
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert _duration(seconds) == text
