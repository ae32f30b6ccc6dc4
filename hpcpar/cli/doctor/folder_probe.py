"""Try a folder, in a process of its own: a file system that does not answer must not stop the doctor.

Run as a script, ``python folder_probe.py FOLDER TOKEN write|look|try``, it imports the standard library only
and prints one JSON object. ``write`` leaves the token's file for others to look for; who wrote it removes it.
The lock is taken on a file of its own, as HDF5 takes it (``flock``).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
import time
from pathlib import Path

__all__ = ["probe"]

_PATIENCE_S = 3.0


def probe(folder: Path, token: str, task: str) -> dict[str, object]:
    """What :class:`~hpcpar.cli.doctor.findings.FolderFacts` says of a folder, but for who asked. Local.

    Parameters
    ----------
    folder
        Where to try.
    token
        Name of the file that is left, or looked for.
    task
        ``"write"`` leaves it, ``"look"`` looks for it, ``"try"`` does neither.
    """
    facts: dict[str, object] = {"file_system": _file_system(folder)}
    own = folder / f"{token}.{os.getpid()}"
    try:
        with open(own, "w") as file:
            own.unlink()  # at once: should the lock never return, nothing is left behind
            file.write(token)
            file.flush()
            facts["lock_problem"] = _try_lock(file.fileno())
        if task == "write":
            (folder / token).write_text(token)
    except OSError as error:
        facts["problem"] = f"{error.strerror} ({errno.errorcode.get(error.errno or 0, '?')})"
    if task == "look":
        facts["shared"] = _appears(folder, token)
    return facts


def _try_lock(descriptor: int) -> str | None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    except OSError as error:
        return f"{error.strerror} ({errno.errorcode.get(error.errno or 0, '?')})"
    return None


def _appears(folder: Path, token: str) -> bool:
    """Network file systems remember for seconds that a file was not there; listing the folder asks anew."""
    end = time.monotonic() + _PATIENCE_S
    while True:
        try:
            if token in os.listdir(folder):
                return True
        except OSError:
            return False
        if time.monotonic() > end:
            return False
        time.sleep(0.1)


def _file_system(folder: Path) -> str:
    """Type of the mount that holds the folder; octal escapes of blanks do not matter for that."""
    best = ("", "unknown")
    try:
        path = os.path.realpath(folder)
        with open("/proc/self/mountinfo") as table:
            for line in table:
                mount, kind = line.split()[4], line.split(" - ")[1].split()[0]
                inside = path == mount or path.startswith(mount.rstrip("/") + "/")
                if inside and len(mount) >= len(best[0]):
                    best = (mount, kind)
    except OSError:
        return "unknown"
    return best[1]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(probe(Path(sys.argv[1]), sys.argv[2], sys.argv[3])))
