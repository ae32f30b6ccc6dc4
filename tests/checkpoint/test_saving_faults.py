"""What goes wrong while a save is under way, or after its commit: nothing that was saved is lost."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hpcpar.checkpoint import Saving, latest, load, save
from hpcpar.checkpoint import folder as folder_module
from hpcpar.checkpoint import job as job_module
from hpcpar.checkpoint import saving as saving_module
from hpcpar.errors import CheckpointError, StalledError

pytestmark = pytest.mark.local


def state(number: int) -> dict[str, Any]:
    return {"n": number, "x": torch.full((3000,), float(number))}


def check(path: Path, number: int) -> None:
    loaded = load(path)
    assert loaded["n"] == number and torch.equal(loaded["x"], state(number)["x"])


class Gate:
    """Holds the writing of data until it is opened."""

    def __init__(self) -> None:
        self.is_reached, self.is_open = threading.Event(), threading.Event()
        self._write = job_module.write_data_file

    def __call__(self, *args: Any) -> Any:
        self.is_reached.set()
        assert self.is_open.wait(60.0)
        return self._write(*args)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    monkeypatch.setattr(job_module, "write_data_file", gate)
    yield gate
    gate.is_open.set()


# ---- after the commit --------------------------------------------------------------------------------------


CALLS = ["open", "fsync", "unlink", "rmdir", "scandir", "stat"]


def fail_after_commit(patch: pytest.MonkeyPatch, number: int, folder: Path) -> list[bool]:
    """Fail the n-th call after the rename of a manifest, once; the list is empty until then."""
    failed: list[bool] = []
    left = [-1]

    def failing(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if left[0] > 0:
            left[0] -= 1
            if left[0] == 0:
                failed.append(True)
                raise OSError(errno.EIO, "Input/output error")
        return call(*args, **kwargs)

    def rename(*args: Any, _call: Callable[..., Any] = os.replace) -> None:
        _call(*args)
        left[0] = number

    for name in CALLS:
        original = getattr(os, name)
        patch.setattr(os, name, lambda *args, _call=original, **kwargs: failing(_call, *args, **kwargs))
    patch.setattr(os, "replace", rename)
    return failed


@pytest.mark.parametrize("keep", [None, 1])
def test_failures_after_the_commit_lose_nothing(keep: int | None, tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.CRITICAL)
    step = tmp_path / "step-2"
    for number in range(1, 100):
        save(tmp_path / "step-1", state(0))
        save(step, state(0))
        with pytest.MonkeyPatch.context() as patch:
            failed = fail_after_commit(patch, number, step)
            save(step, state(number), keep=keep)
        check(step, number)
        if not failed:
            break
    assert number > 4  # the folder's sync and the removal of what was replaced, at least
    save(step, state(1000), keep=1)
    assert len(list(step.glob("*.h5"))) == 1 and not (tmp_path / "step-1").exists()


def test_old_data_stay_until_the_new_manifest_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    save(tmp_path / "run", state(1))
    before = set((tmp_path / "run").glob("*.h5"))
    with monkeypatch.context() as patch:
        fail_after_commit(patch, 1, tmp_path / "run")
        save(tmp_path / "run", state(2))
    assert before < set((tmp_path / "run").glob("*.h5"))
    assert "is saved" in caplog.text
    check(tmp_path / "run", 2)


def test_parent_that_cannot_be_listed_or_synced_is_no_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = folder_module.sync

    def forbidden(path: Path) -> None:
        if path == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied")
        sync(path)

    monkeypatch.setattr(folder_module, "sync", forbidden)
    for number in range(2):
        save(tmp_path / "run", state(number))
        check(tmp_path / "run", number)


def test_new_folders_are_on_the_disk_before_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(folder_module, "sync", synced.append)
    save(tmp_path / "a" / "b", state(1))
    assert synced[:2] == [tmp_path, tmp_path / "a"]
    synced.clear()
    save(tmp_path / "a" / "b", state(2))
    assert set(synced) == {tmp_path / "a" / "b"}


def test_interrupt_after_the_commit_leaves_the_new_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "run", state(1))
    with monkeypatch.context() as patch:
        patch.setattr(job_module.SaveJob, "_remove_old", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path / "run", state(2))
    check(tmp_path / "run", 2)


@pytest.mark.parametrize("where", ["_describe", "_write_data", "_committed"])
def test_interrupt_before_the_commit_leaves_the_old_checkpoint(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "run", state(1))
    before = sorted((tmp_path / "run").iterdir())
    with monkeypatch.context() as patch:
        original = getattr(job_module.SaveJob, where)
        calls: list[bool] = []

        def interrupted_once(*args: Any) -> Any:
            calls.append(True)
            return _interrupt() if len(calls) == 1 else original(*args)

        patch.setattr(job_module.SaveJob, where, interrupted_once)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path / "run", state(2))
    assert sorted((tmp_path / "run").iterdir()) == before
    check(tmp_path / "run", 1)


def _interrupt(*args: Any) -> None:
    raise KeyboardInterrupt


# ---- in the background -------------------------------------------------------------------------------------


def interrupted(action: Callable[[], Any]) -> None:
    """Do something that waits, and press Ctrl-C."""
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        action()


def test_interrupted_wait_does_not_end_the_save(tmp_path: Path, gate: Gate) -> None:
    values = state(1)
    first = save(tmp_path / "step-1", values, asynchronous=True)
    assert gate.is_reached.wait(60.0)
    interrupted(first.wait)
    assert not first.done
    values["x"] += 1
    values["n"] += 1
    interrupted(lambda: save(tmp_path / "step-2", values, asynchronous=True))  # waits for the first
    assert not first.done
    gate.is_open.set()
    save(tmp_path / "step-2", values, asynchronous=True).wait()
    check(tmp_path / "step-1", 1)
    check(tmp_path / "step-2", 2)


def test_load_waits_for_the_save_of_the_same_folder(tmp_path: Path, gate: Gate) -> None:
    gate.is_open.set()
    save(tmp_path / "run", state(1))
    gate.is_open.clear()
    pending = save(tmp_path / "run", state(2), asynchronous=True)
    assert gate.is_reached.wait(60.0)
    threading.Timer(0.05, gate.is_open.set).start()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    check(tmp_path / "link", 2)
    assert pending.done


def test_forked_child_waits_for_no_save_of_its_parent(tmp_path: Path, gate: Gate) -> None:
    pending = save(tmp_path / "run", state(1), asynchronous=True)
    assert gate.is_reached.wait(60.0)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if pending.done else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert not pending.done


def run_script(text: str, path: Path) -> subprocess.CompletedProcess[str]:
    head = (
        "import errno, os, signal, sys, threading, time, torch\n"
        "from hpcpar.checkpoint import job, save\n"
        "write = job.write_data_file\n"
        "def slow(*args):\n    time.sleep(0.5)\n    return write(*args)\n"
        "def full(*args):\n    time.sleep(0.2)\n    raise OSError(errno.ENOSPC, 'No space left on device')\n"
    )
    command = [sys.executable, "-c", head + text, str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def test_failure_that_nobody_has_seen_is_the_exit_status(tmp_path: Path) -> None:
    done = run_script(
        "print('trained')\n"
        "job.write_data_file = full\n"
        "save(sys.argv[1], {'x': torch.ones(3)}, asynchronous=True)\n",
        tmp_path / "run",
    )
    assert done.returncode == 1 and "No space left" in done.stderr and done.stdout == "trained\n"


def test_process_that_was_interrupted_in_a_wait_still_saves(tmp_path: Path) -> None:
    done = run_script(
        "job.write_data_file = slow\n"
        "saving = save(sys.argv[1], {'n': 1, 'x': torch.ones(3000)}, asynchronous=True)\n"
        "threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "try:\n    saving.wait()\nexcept KeyboardInterrupt:\n    print('Ctrl-C')\n",
        tmp_path / "run",
    )
    assert done.returncode == 0 and done.stdout == "Ctrl-C\n"
    check(tmp_path / "run", 1)


def test_abort_of_the_job_waits_for_a_save(tmp_path: Path) -> None:
    """As an exception that nobody catches on a rank of several, but for the abort itself."""
    done = run_script(
        "from hpcpar.comm.watchdog import abort_job\n"
        "from hpcpar.comm import MPI\n"
        "job.write_data_file = slow\n"
        "save(sys.argv[1], {'n': 1, 'x': torch.ones(3000)}, asynchronous=True)\n"
        "abort_job(0, 1, ValueError('loss is nan'), '')\n",
        tmp_path / "run",
    )
    assert done.returncode != 0 and "loss is nan" in done.stderr
    check(tmp_path / "run", 1)


# ---- series ------------------------------------------------------------------------------------------------


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


def test_training_that_has_gone_back_keeps_what_it_saves_from_then_on(tmp_path: Path) -> None:
    for step in (800, 900, 1000):
        save(tmp_path / f"step-{step}", state(step))
    kept = []
    for step in (100, 200, 300, 400):
        save(tmp_path / f"step-{step}", state(step), keep=3)
        kept.append(steps(tmp_path))
        assert latest(tmp_path) == tmp_path / f"step-{step}"
    assert kept == [[100, 900, 1000], [100, 200, 1000], [100, 200, 300], [200, 300, 400]]


def test_order_of_saves_does_not_depend_on_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [2 * 10**18]
    monkeypatch.setattr(folder_module.time, "time_ns", lambda: now[0])
    for step in (1, 2, 3):
        save(tmp_path / f"step-{step}", state(step), keep=2)
        now[0] -= 10**15
    assert steps(tmp_path) == [2, 3] and latest(tmp_path) == tmp_path / "step-3"
    save(tmp_path / "step-3", state(4))
    check(tmp_path / "step-3", 4)
    assert len(list((tmp_path / "step-3").glob("*.h5"))) == 1


def test_saving_that_was_at_once_is_done(tmp_path: Path) -> None:
    saving = save(tmp_path / "run", state(1))
    assert isinstance(saving, Saving) and saving.done and saving.wait(0.0) == tmp_path / "run"
    with pytest.raises(CheckpointError, match="keep"):
        save(tmp_path / "run", state(1), keep=0)


def test_nothing_is_saved_with_ranks_that_have_lost_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stalled(*args: Any, **kwargs: Any) -> Any:
        raise StalledError("allgather", [1])

    saver = saving_module._Saver()
    monkeypatch.setattr(saving_module, "_saver_of", lambda comm: saver)
    with monkeypatch.context() as patch:
        patch.setattr(saving_module, "_begin", stalled)
        with pytest.raises(StalledError):
            save(tmp_path / "run", state(1))
    with pytest.raises(CheckpointError, match=r"waiting for rank 1\. Save with a new communicator"):
        save(tmp_path / "run", state(1))
