"""The folder of a checkpoint: names of files, what is ours in it, and how it reaches the disk.

::

    step-100/
      manifest.json                       commits one generation; replaced by rename
      18f0c2a7d1e4b300-9a3f51c2-rank0.h5  data of a generation: time in ns, a random number, the rank
      18f0c2a7d1e4b300-9a3f51c2-rank1.h5
      .lock                               held by who commits

A generation's files are written under names that no manifest knows yet, so nothing that is committed is ever
written to. Whoever commits holds the lock, looks whether all its files are still there, and removes those of
older generations: after a crash of their writer nobody needs them, and an older writer that is still at work
(two jobs with one folder) finds its files gone and fails, instead of committing half of a checkpoint.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = [
    "LOCK",
    "MANIFEST",
    "data_name",
    "foreign_files",
    "generation_of",
    "locked",
    "make_folder",
    "new_generation",
    "our_files",
    "remove_folder",
    "sync",
    "sync_folder",
]

MANIFEST = "manifest.json"
LOCK = ".lock"
_OURS = re.compile(r"([0-9a-f]{16}-[0-9a-f]{8})[-.][a-z0-9.-]*")
_LAST_TIME = 16**16 - 1
_CANNOT_SYNC = (errno.EACCES, errno.EINVAL, errno.ENOTSUP)


def new_generation(after: str = "") -> str:
    """A name that no other save has, larger than those before. Local.

    Parameters
    ----------
    after
        Another generation, which may come from a clock that is ahead of this one.
    """
    now = max(time.time_ns(), int(after[:16] or "0", 16) + 1)
    return f"{min(now, _LAST_TIME):016x}-{secrets.token_hex(4)}"


def data_name(generation: str, rank: int) -> str:
    """The file of a rank. Local."""
    return f"{generation}-rank{rank}.h5"


def generation_of(name: str) -> str | None:
    """The generation that a file belongs to; ``None`` for the manifest, the lock, what is not ours. Local."""
    found = _OURS.fullmatch(name)
    return found[1] if found else None


def our_files(folder: Path) -> list[Path]:
    """All files in a folder that belong to a checkpoint, the manifest first. Local."""
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_file(follow_symlinks=False))
    ours = [name for name in names if name in (MANIFEST, LOCK) or generation_of(name)]
    return [folder / name for name in sorted(ours, key=lambda name: name != MANIFEST)]


def foreign_files(folder: Path) -> list[Path]:
    """Everything else in it. Local."""
    ours = set(our_files(folder))
    return sorted(Path(entry.path) for entry in os.scandir(folder) if Path(entry.path) not in ours)


def remove_folder(folder: Path) -> list[Path]:
    """Remove our files, the manifest first, and the folder unless something else is in it; that is returned.

    Local.
    """
    for path in our_files(folder):
        path.unlink(missing_ok=True)
    left = foreign_files(folder)
    if not left:
        with suppress(OSError):
            folder.rmdir()
    return left


def sync(path: Path) -> None:
    """Have the system write a file, or a folder's list of names, to the disk. Local."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(path: Path) -> None:
    """The same for a folder, where the system can: some cannot, or want the right to list it. Local."""
    try:
        sync(path)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, and see that the disk knows of them. Local, on any ranks."""
    if path.is_dir():
        return
    if path.parent != path:
        make_folder(path.parent)
    try:
        path.mkdir()
    except FileExistsError:
        if not path.is_dir():
            raise
        return
    sync_folder(path.parent)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other writers from committing. Local; on file systems without locks it does nothing."""
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        with suppress(OSError):
            os.close(handle)
