"""What goes wrong on one rank of several that save: no other one waits in vain, or gives up too early."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from hpcpar.checkpoint import job as job_module
from hpcpar.checkpoint import latest, load, save, saving
from hpcpar.comm import Communicator
from hpcpar.errors import CheckpointError


@pytest.fixture
def folder(comm: Communicator) -> Iterator[Path]:
    """One for all ranks."""
    path = Path(comm.bcast(tempfile.mkdtemp() if comm.rank == 0 else None))
    yield path
    comm.Barrier()
    if comm.rank == 0:
        shutil.rmtree(path, ignore_errors=True)


def full_disk(*args: Any) -> Any:
    raise OSError(28, "No space left on device")


def test_error_that_one_rank_has_not_seen_is_raised_by_the_next_save_of_all(
    comm: Communicator, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(job_module, "write_data_file", full_disk)
        failing = save(folder / "run", {"x": torch.full((5,), comm.rank)}, comm, asynchronous=True)
        if comm.rank != comm.size - 1 or comm.size == 1:
            with suppress(CheckpointError):
                failing.wait()
        while not failing.done:
            time.sleep(0.001)
    if comm.size > 1:
        with pytest.raises(CheckpointError, match="No space left"):
            save(folder / "run", {"n": 1}, comm)
    save(folder / "run", {"n": 2}, comm)
    assert load(folder / "run", comm=comm) == {"n": 2}


class FileWhenWarned(logging.Handler):
    """Tells all ranks that somebody has been named as missing."""

    def __init__(self, path: Path, name: str) -> None:
        super().__init__()
        self._path, self._name = path, name

    def emit(self, record: logging.LogRecord) -> None:
        if self._name in record.getMessage():
            self._path.touch()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("by", ["the program", "threads", "files"])
def test_ranks_wait_for_one_that_has_much_to_write_and_name_it(
    by: str, comm: Communicator, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, named = comm.size - 1, folder / "named"
    write = job_module.SaveJob._write_data

    def write_slowly(self: job_module.SaveJob, rank: int, share: Any) -> Any:
        monkeypatch.setenv("HPCPAR_TIMEOUT_S", "0.05")
        while rank == slow and not named.exists():
            time.sleep(0.005)
        return write(self, rank, share)

    monkeypatch.setattr(job_module.SaveJob, "_write_data", write_slowly)
    if by == "files":
        monkeypatch.setattr(saving, "threads_allowed", lambda: False)
    handler = FileWhenWarned(named, f"{slow} of {comm.size}")
    logger = logging.getLogger("hpcpar.checkpoint.ranks")
    if comm.rank == 0:
        logger.addHandler(handler)
    try:
        save(folder / "run", {"n": 1, "rank": comm.rank}, comm, asynchronous=by != "the program").wait()
    finally:
        logger.removeHandler(handler)
        monkeypatch.undo()
    assert load(folder / "run", comm=comm) == {"n": 1, "rank": comm.rank}


class InterruptedOnLast:
    def __init__(self, comm: Communicator) -> None:
        self._comm = comm

    def state_dict(self) -> dict[str, Any]:
        if self._comm.rank == self._comm.size - 1:
            raise KeyboardInterrupt
        return {}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_interrupt_of_one_rank_is_an_error_on_the_others(
    asynchronous: bool, comm: Communicator, folder: Path
) -> None:
    expected = KeyboardInterrupt if comm.rank == comm.size - 1 else CheckpointError
    with pytest.raises(expected):
        save(folder / "run", {"x": InterruptedOnLast(comm)}, comm, asynchronous=asynchronous)
    assert not (folder / "run").exists()
    comm.Barrier()
    save(folder / "run", {"n": 1}, comm, asynchronous=asynchronous).wait()
    assert load(folder / "run", comm=comm) == {"n": 1}


def test_all_ranks_hear_of_the_same_newest_checkpoint(comm: Communicator, folder: Path) -> None:
    assert latest(folder, comm) is None
    for step in (2, 1):
        save(folder / f"step-{step}", {"n": step}, comm)
    assert latest(folder if comm.rank == 0 else folder / "elsewhere", comm) == folder / "step-1"
