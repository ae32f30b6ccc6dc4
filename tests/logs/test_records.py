"""Every record names its rank; rank 0 shows what happens, the others what is wrong."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import hpcpar
from hpcpar.errors import HpcparError
from hpcpar.logs import RankFilter, configure, configure_by_default
from hpcpar.logs import records as module

pytestmark = pytest.mark.local

logger = logging.getLogger("hpcpar")
part = logging.getLogger("hpcpar.comm.peers")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A logger that nobody has set up."""
    kept = logger.handlers[:], logger.level, logger.propagate
    root_level = logging.getLogger().level
    monkeypatch.delenv("HPCPAR_LOG_LEVEL", raising=False)
    monkeypatch.delenv("HPCPAR_LOG_DIR", raising=False)
    logger.handlers, logger.propagate = [], True
    logger.setLevel(logging.NOTSET)
    yield
    for handler in logger.handlers:
        handler.close()
    logger.handlers, logger.propagate = kept[0], kept[2]
    logger.setLevel(kept[1])
    logging.getLogger().setLevel(root_level)


@pytest.fixture
def bare_root(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Takes the handlers away that pytest gives the root logger in each test: as in a script."""
    return lambda: monkeypatch.setattr(logging.getLogger(), "handlers", [])


def say_all() -> None:
    part.debug("fine detail")
    part.info("a step of %d samples", 64)
    part.warning("rank %d is gone", 5)


@pytest.mark.parametrize(("rank", "levels"), [(0, ["INFO", "WARNING"]), (3, ["WARNING"])])
def test_rank_0_shows_what_happens_and_the_others_what_is_wrong(
    rank: int, levels: list[str], bare_root: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    bare_root()
    configure_by_default(rank, 8)
    say_all()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[5] for line in lines] == levels
    assert re.fullmatch(
        rf"\d\d:\d\d:\d\d rank {rank} of 8 WARNING hpcpar\.comm\.peers: rank 5 is gone", lines[-1]
    )


def test_file_per_rank_holds_what_all_have_to_say(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bare_root: Callable[[], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    bare_root()
    monkeypatch.setenv("HPCPAR_LOG_DIR", str(tmp_path / "logs"))
    monkeypatch.setenv("HPCPAR_LOG_LEVEL", "debug")
    configure_by_default(3, 128)
    say_all()
    text = (tmp_path / "logs/rank-003.log").read_text()
    assert [line.split()[6] for line in text.splitlines()] == ["DEBUG", "INFO", "WARNING"]
    assert "WARNING" in (shown := capsys.readouterr().err) and "INFO" not in shown


def test_restarted_job_appends(tmp_path: Path) -> None:
    for _ in range(2):
        configure(SimpleNamespace(rank=0, size=1), folder=tmp_path)
        part.info("started")
    assert (tmp_path / "rank-0.log").read_text().count("started") == 2


def test_program_that_logs_itself_sees_each_record_once(capsys: pytest.CaptureFixture[str]) -> None:
    configure_by_default(0, 2)
    logging.basicConfig(level="INFO", format="mine %(message)s", force=True)
    say_all()
    shown = capsys.readouterr().err.splitlines()
    assert shown == ["mine a step of 64 samples", "mine rank 5 is gone"]
    configure(SimpleNamespace(rank=0, size=2))  # and asked for explicitly, also once
    say_all()
    assert capsys.readouterr().err.count("rank 5 is gone") == 1


@pytest.mark.parametrize("how", ["level", "handler"])
def test_what_a_program_has_set_up_stays(how: str) -> None:
    handler = logging.NullHandler()
    if how == "level":
        logger.setLevel("ERROR")
    else:
        logger.addHandler(handler)
    configure_by_default(0, 2)
    assert logger.handlers == ([] if how == "level" else [handler])


def test_program_that_wants_less_or_more_gets_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPCPAR_LOG_DIR", str(tmp_path))
    configure_by_default(3, 8)
    logging.basicConfig(level="WARNING", format="mine %(message)s", force=True)
    say_all()
    assert capsys.readouterr().err.splitlines() == ["mine rank 5 is gone"]
    assert "a step of 64 samples" in (tmp_path / "rank-3.log").read_text()
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)
    logging.basicConfig(level="DEBUG", format="mine %(message)s", force=True)
    configure_by_default(3, 8)  # after the program has said what it wants
    say_all()
    assert len(capsys.readouterr().err.splitlines()) == 3


@pytest.mark.parametrize("name", ["hpcpar", "hpcpar.comm", "hpcpar.comm.peers"])
def test_level_that_the_program_sets_later_counts(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    configure_by_default(3, 8)
    logging.basicConfig(level="WARNING", format="mine %(message)s", force=True)
    before = logging.getLogger(name).level
    logging.getLogger(name).setLevel(logging.INFO)
    try:
        say_all()
    finally:
        logging.getLogger(name).setLevel(before)
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_folder_that_cannot_be_written_does_not_end_the_job(
    bare_root: Callable[[], None],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HPCPAR_LOG_DIR", str(tmp_path / "file/logs"))
    bare_root()
    configure_by_default(1, 2)
    assert "Not a directory. This rank writes no file" in capsys.readouterr().err


def test_filter_gives_the_rank_to_formats_of_ones_own() -> None:
    record = part.makeRecord("x", logging.INFO, "f", 1, "text", (), None)
    assert RankFilter(2, 4).filter(record)
    assert logging.Formatter("[%(rank)d/%(world_size)d] %(message)s").format(record) == "[2/4] text"


def test_wrong_level_and_folder_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for level in ("loud", "notset", None):
        with pytest.raises(HpcparError, match=rf"must be one of .*WARNING.* got {level!r}"):
            configure(SimpleNamespace(rank=0, size=1), level=level)
    (tmp_path / "file").touch()
    with pytest.raises(
        HpcparError, match=r"must be writable, got .*file/logs: Not a directory \(rank 1 of 2"
    ):
        configure(SimpleNamespace(rank=1, size=2), folder=tmp_path / "file/logs")
    monkeypatch.setenv("HPCPAR_LOG_LEVEL", "loud")
    with pytest.raises(HpcparError, match="loud"):
        configure_by_default(0, 1)
    assert logger.handlers == []


def test_the_first_communicator_sets_it_up() -> None:
    assert hpcpar.comm.communicator.configure_by_default is module.configure_by_default
