from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpcpar.data import H5Dataset
from tests.data.files import BOTH, numbers, write

pytestmark = pytest.mark.local


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No thread and no open file outlives an iteration."""
    before = threading.active_count()
    yield
    assert threading.active_count() == before
    opened = [os.path.realpath(entry) for entry in Path("/proc/self/fd").iterdir() if entry.exists()]
    assert not [name for name in opened if name.endswith(".h5")]


def make(path: Path, samples: int = 200) -> H5Dataset:
    return H5Dataset(write(path / "a.h5", samples), BOTH, shuffle=True, block_size=4, window_blocks=2)


def reading() -> bool:
    return any(thread.name == "hpcpar-reader" for thread in threading.enumerate())


def test_the_thread_ends_with_the_epoch(tmp_path: Path) -> None:
    data = make(tmp_path)
    assert len(numbers(data)) == 200
    assert not reading()


def test_the_thread_ends_when_an_iteration_is_abandoned(tmp_path: Path) -> None:
    data = make(tmp_path)
    for _ in data.batches(3):
        break
    assert not reading()
    samples = iter(data)
    next(samples)
    assert reading()
    del samples
    assert not reading()
    never_begun = iter(data)
    del never_begun
    assert not reading()


def test_the_thread_ends_when_the_consumer_fails(tmp_path: Path) -> None:
    def fail(sample: object) -> object:
        raise ArithmeticError("no")

    data = H5Dataset(write(tmp_path / "a.h5", 99), BOTH, transform=fail, block_size=4, window_blocks=1)
    for source in (data, data.batches(2)):
        with pytest.raises(ArithmeticError):
            list(source)
    assert not reading()


def test_close_ends_iterations_with_an_error(tmp_path: Path) -> None:
    data = make(tmp_path)
    batches = data.batches(3)
    iterator = iter(batches)
    next(iterator)
    data.close()
    data.close()
    assert not reading()
    with pytest.raises(RuntimeError, match="after close"):
        list(iterator)
    with pytest.raises(RuntimeError, match="after close"):
        next(iter(batches))


def test_two_iterations_at_once(tmp_path: Path) -> None:
    data = make(tmp_path)
    pairs = list(zip(data, data, strict=True))
    assert numbers(a for a, _ in pairs) == numbers(b for _, b in pairs)
    assert data.state_dict()["taken"] == 200


def test_a_file_that_the_process_has_open_with_locks_can_be_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", 9)
    with h5py.File(path, "r", locking=True):
        assert numbers(H5Dataset(path, BOTH)) == list(range(9))


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    data = make(tmp_path)
    path = tmp_path / "a.h5"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(OSError, match=r"a\.h5 must be"):
        list(data)
    path.unlink()
    with pytest.raises(OSError, match=r"a\.h5 must be an HDF5 file"):
        list(data)


def test_a_chunk_with_a_wrong_checksum_is_an_error_after_what_was_good(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write(path, 64, 8, fletcher32=True)
    with h5py.File(path) as file:
        chunk = file["images"].id.get_chunk_info(6)
    with open(path, "r+b") as raw:
        raw.seek(chunk.byte_offset + 3)
        raw.write(b"\xff\xfe")
    data = H5Dataset(path, BOTH, block_size=8, window_blocks=1)
    found: list[int] = []
    with pytest.raises(OSError, match="in samples 48 to 56"):
        for batch in data.batches(8):
            found += numbers([batch])
    assert found == list(range(48))


def test_a_file_that_has_changed_is_an_error(tmp_path: Path) -> None:
    data = H5Dataset(write(tmp_path / "a.h5", 64), BOTH, block_size=8)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["images"] = np.zeros((64, 5), np.uint8)
    with pytest.raises(OSError, match="must be whole and as it was at first"):
        list(data)


def test_more_files_than_are_kept_open(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{part:02}.h5", 3, first=3 * part) for part in range(40)]
    data = H5Dataset(paths, BOTH, shuffle=True, window_blocks=50)
    assert sorted(numbers(data)) == list(range(120))


def test_a_process_ends_with_an_iteration_under_way(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", 500)
    script = (
        "import hpcpar.data as d; data = d.H5Dataset('a.h5', 'images', block_size=4, window_blocks=1);"
        "kept = iter(data); next(kept)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, timeout=60, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
