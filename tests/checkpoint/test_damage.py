"""Damaged and foreign checkpoints, full disks, writers that die: an error, or the right state."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from hpcpar.checkpoint import PerRank, load, save, verify
from hpcpar.checkpoint.folder import data_name, new_generation
from hpcpar.errors import CheckpointError

pytestmark = pytest.mark.local


def state(number: int) -> dict[str, Any]:
    return {"n": number, "x": torch.full((3000,), float(number)), "y": [b"abc" * 100, PerRank(number)]}


def is_state(loaded: Any, number: int) -> bool:
    if not isinstance(loaded, dict) or list(loaded) != ["n", "x", "y"] or loaded["n"] != number:
        return False
    return torch.equal(loaded["x"], torch.full((3000,), float(number))) and loaded["y"] == [
        b"abc" * 100,
        number,
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "run", state(1)).wait()


def problem_of(folder: Path) -> str | None:
    """What the loading of a state says; without a word it must be right: a byte between two slices."""
    try:
        loaded = load(folder)
    except CheckpointError as error:
        return str(error)
    assert is_state(loaded, 1)
    return None


def files_of(folder: Path) -> list[Path]:
    return [folder / "manifest.json", *folder.glob("*.h5")]


# ---- damage ------------------------------------------------------------------------------------------------


def test_changed_bytes_are_noticed_wherever_they_are(folder: Path) -> None:
    for path in files_of(folder):
        whole = path.read_bytes()
        draw = random.Random(1)
        noticed = 0
        for place in {*range(0, len(whole), max(1, len(whole) // 150)), *draw.sample(range(len(whole)), 50)}:
            path.write_bytes(
                whole[:place] + bytes([whole[place] ^ draw.randrange(1, 256)]) + whole[place + 1 :]
            )
            problem = problem_of(folder)
            assert problem is None or str(path) in problem
            noticed += problem is not None
        assert noticed > 150
        path.write_bytes(whole)
    assert is_state(load(folder), 1)


def test_truncated_and_extended_files_are_noticed(folder: Path) -> None:
    for path in files_of(folder):
        whole = path.read_bytes()
        for length in {0, 1, len(whole) - 1, *range(0, len(whole) - 1, len(whole) // 40)}:
            path.write_bytes(whole[:length])
            with pytest.raises(CheckpointError, match=path.name):
                load(folder)
        path.write_bytes(whole + b"?")
        with pytest.raises(CheckpointError, match=path.name):
            load(folder)
        path.write_bytes(whole)


def test_missing_and_foreign_files_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere.*no such folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file in the place"):
        load(tmp_path / "file")
    with pytest.raises(CheckpointError, match="has not finished"):
        load(tmp_path)
    data = next(folder.glob("*.h5"))
    data.rename(folder / "away")
    with pytest.raises(CheckpointError, match=data.name):
        verify(folder)
    for text in ("[]", '"a"', "{}", '{"format": "something else"}', "\x00", "[" * 100_000):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            load(folder)


def test_later_versions_are_refused_by_name(folder: Path) -> None:
    document = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**document, "version": 2}))
    with pytest.raises(CheckpointError, match="version 1 or older, got 2"):
        load(folder)


def test_files_of_others_cannot_be_named(folder: Path) -> None:
    document = json.loads((folder / "manifest.json").read_text())
    body = document["checkpoint"]
    body["files"][0][0] = "../" + body["files"][0][0]
    document["checksum"] = zlib.crc32(json.dumps(body).encode())
    (folder / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="names of data files"):
        load(folder)


def test_damage_is_not_looked_for_when_nobody_wants_to_know(folder: Path) -> None:
    data = next(folder.glob("*.h5"))
    whole = data.read_bytes()
    place = whole.index(torch.full((3000,), 1.0).numpy().tobytes())
    data.write_bytes(whole[:place] + b"?" + whole[place + 1 :])
    with pytest.raises(CheckpointError, match="checksum"):
        load(folder)
    assert load(folder, verify=False)["x"][0] != 1.0
    assert load(folder, {"n": 0}) == {"n": 1}  # what is not asked for is not read


# ---- writers that fail -------------------------------------------------------------------------------------


@contextmanager
def small_disk(nbytes: int) -> Iterator[None]:
    """No file may become larger: the system then fails writes as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("nbytes", [0, 100, 5000, 14_000])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_full_disk_leaves_the_previous_checkpoint(nbytes: int, asynchronous: bool, folder: Path) -> None:
    before = sorted(folder.iterdir())
    with small_disk(nbytes), pytest.raises(CheckpointError, match="must be writable"):
        save(folder, state(2), asynchronous=asynchronous).wait()
    assert sorted(folder.iterdir()) == before
    assert is_state(load(folder), 1)
    with small_disk(nbytes), pytest.raises(CheckpointError, match="must be writable"):
        save(folder.parent / "new", state(2))
    assert not (folder.parent / "new").exists()


def test_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file.*must be"):
        save(tmp_path / "file", {})
    with pytest.raises(CheckpointError, match=r"file.*must be"):
        save(tmp_path / "file" / "run", {})


def test_what_dead_writers_left_is_removed(folder: Path) -> None:
    left = folder / data_name("0" * 16 + "-" + "a" * 8, 3)
    left.write_bytes(b"half")
    foreign = folder / "notes.txt"
    foreign.write_text("mine")
    save(folder, state(2))
    assert not left.exists() and foreign.exists()
    assert is_state(load(folder), 2)


def test_slower_of_two_writers_fails_and_damages_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another job saves to the same folder, from begin to end, before this one commits its files."""
    from hpcpar.checkpoint import job

    commit = job.SaveJob._commit

    def late(self: job.SaveJob, *args: Any) -> None:
        monkeypatch.setattr(job.SaveJob, "_commit", commit)
        other = job.SaveJob(folder, new_generation(), job.Tree(node=5), None)
        other.run(_alone())
        commit(self, *args)

    monkeypatch.setattr(job.SaveJob, "_commit", late)
    with pytest.raises(CheckpointError, match="no other job"):
        save(folder, state(2))
    assert load(folder) == 5


def _alone() -> Any:
    from hpcpar.checkpoint.ranks import Alone

    return Alone()


# ---- writers that die --------------------------------------------------------------------------------------


CALLS = ["open", "ftruncate", "pwrite", "fsync", "replace", "unlink", "rmdir", "mkdir"]


def in_child(action: Callable[[], None]) -> int:
    """Run something in a fork that ends without cleaning up; its status or signal."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        finally:
            os._exit(0)
    return os.waitpid(pid, 0)[1]


def die_in_call(number: int) -> None:
    """Kill this process when it is about to make its n-th call that changes the disk."""
    count = [0]

    def dying(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] > number:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)

    for name in CALLS:
        original = getattr(os, name)
        setattr(os, name, lambda *args, _call=original, **kwargs: dying(_call, *args, **kwargs))


@pytest.mark.parametrize("keep", [None, 1])
def test_writer_killed_at_any_call_leaves_a_whole_checkpoint(keep: int | None, tmp_path: Path) -> None:
    """The n-th save of a series is killed at its n-th call, until one is not."""
    torch.set_num_threads(1)  # a fork has no threads
    step = tmp_path / "step-1"
    save(step, state(0))
    outcomes = []
    for call in range(200):
        wanted = call + 1

        def attempt(call: int = call, number: int = wanted) -> None:
            die_in_call(call)
            save(step, state(number), keep=keep)

        status = in_child(attempt)
        loaded = load(step)
        outcomes.append(is_state(loaded, wanted))
        assert outcomes[-1] or is_state(loaded, loaded["n"])
        if not os.WIFSIGNALED(status):
            break
    assert outcomes[-1] and not outcomes[0] and len(outcomes) > 10
    save(step, state(1000))
    assert len(list(step.glob("*.h5"))) == 1  # and none of them has left anything
    shutil.rmtree(step)
