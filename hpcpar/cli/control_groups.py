"""Limits by control groups: every group around a process counts, not only the innermost.

Slurm nests job, step and task, a container adds groups of its own, and the limit may stand in any of them::

    /sys/fs/cgroup/system.slice/slurmstepd.scope/job_7     memory.max = 4 GiB      <- this one holds
                                                 /step_0   memory.max = max
                                                 /task_1   memory.max = max        <- the process is here

Both versions are read: of the newer one all controllers are in one tree, of the older one each has its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

__all__ = ["read_cpu_quota", "read_innermost", "read_memory_limit"]

_ROOT = Path("/sys/fs/cgroup")
_TABLE = Path("/proc/self/cgroup")
_UNLIMITED = 1 << 60


def _levels(controller: str, root: Path, table: Path) -> Iterator[tuple[Path, bool]]:
    """Folders of the groups around this process, innermost first, and whether they are of version 2."""
    for line in table.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = root / controllers if controllers else root
        if not base.is_dir():  # a link for one of "cpu,cpuacct" is what there is
            base = root / controller
        if not controllers and (root / "unified").is_dir():
            base = root / "unified"
        inner = base / path.lstrip("/")
        for folder in (inner, *inner.parents):
            if folder.is_relative_to(base):
                yield folder, not controllers


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(text: str) -> int | None:
    number = int(text) if text.isdigit() else _UNLIMITED
    return number if number < _UNLIMITED else None


def read_innermost(
    controller: str, newer: str, older: str, root: Path = _ROOT, table: Path = _TABLE
) -> str | None:
    """A setting that groups inherit, under its name in either version; ``None`` without it. Local."""
    found = (
        _read(folder / (newer if is_new else older)) for folder, is_new in _levels(controller, root, table)
    )
    return next((text for text in found if text), None)


def read_memory_limit(root: Path = _ROOT, table: Path = _TABLE) -> tuple[int | None, int | None]:
    """The smallest limit in bytes, and what is left under the one that has least left. Local.

    Files that the kernel keeps in memory and could drop do not count as used.
    """
    limits, rooms = [], []
    for folder, is_new in _levels("memory", root, table):
        limit = _number(_read(folder / ("memory.max" if is_new else "memory.limit_in_bytes")))
        if limit is None:
            continue
        used = _number(_read(folder / ("memory.current" if is_new else "memory.usage_in_bytes"))) or 0
        name = "inactive_file" if is_new else "total_inactive_file"
        lines = (line.split() for line in _read(folder / "memory.stat").splitlines())
        cached = sum(int(value) for key, value in lines if key == name)
        limits.append(limit)
        rooms.append(max(0, limit - max(0, used - cached)))
    return min(limits, default=None), min(rooms, default=None)


def read_cpu_quota(root: Path = _ROOT, table: Path = _TABLE) -> float | None:
    """Cores' worth of time that the strictest group grants; ``None`` without a limit. Local."""
    quotas = []
    for folder, is_new in _levels("cpu", root, table):
        names = ["cpu.max"] if is_new else ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        numbers = " ".join(_read(folder / name) for name in names).split()
        if len(numbers) == 2 and numbers[0].isdigit() and int(numbers[1]) > 0:
            quotas.append(int(numbers[0]) / int(numbers[1]))
    return min(quotas, default=None)
