"""The small process beside each rank that has the last word, and knows what became of its neighbours.

Run as a script by :class:`hpcpar.cli.session.Watcher`, it imports the standard library only. It reads one
JSON object per line from its input, each of which updates the *record* of its rank, and keeps that record in
a folder that the watchers of one job on one machine share. So the first rank's can tell who is missing,
stopped, behind, or dead, although MPI tells nothing::

    rank 0 --> watcher 0 ---- writes ----> /tmp/hpcpar-<user>-<job>/0   and reads the others' when it has to
    rank 1 --> watcher 1 ---- writes ----> /tmp/hpcpar-<user>-<job>/1   speak; the others are silent

The rank says goodbye by ``null``. A byte that is the number of SIGTERM comes from the rank's signal handler
in C, which works even inside MPI: the launcher wants the rank to end. The end of the input without either is
the end of the rank. On other machines the folder is another one; of ranks there the first watcher knows
nothing, and a failure there is spoken there.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

__all__ = ["Record", "different_memory", "explain_end", "explain_lateness", "read_records", "watch"]

Record = dict[str, Any]
"""Of one rank: ``rank``, ``size``, ``local_size``, ``host``, ``pid``, ``phase`` and its number ``step``,
``words`` for its end, ``failure`` (an exception that others do not know of), ``problem`` (why it has no MPI),
``memory`` (which ``/dev/shm``), ``tidy`` (files to remove), ``ended`` (monotonic seconds), ``by_launcher``,
``gone``."""

_POLL_S = 0.5
_GATHER_S = 0.6
_AFTER_FAILURE_S = 30.0
_OTHERS_LATER_S = 10.0


def read_records(folder: str | None) -> dict[int, Record]:
    """What the ranks of this machine have told, by rank. Local."""
    found: dict[int, Record] = {}
    with suppress(OSError):
        for name in os.listdir(folder) if folder else ():
            with suppress(OSError, ValueError), open(os.path.join(folder or "", name)) as file:
                record = json.load(file)
                found[int(name)] = record
    return dict(sorted(found.items()))


def explain_lateness(own: Record, records: Mapping[int, Record], seconds: float) -> str:
    """Whom the ranks wait for at the deadline, as far as this machine knows. Local."""
    everyone = [*records.values()] or [own]
    furthest = max(record["step"] for record in everyone)
    missing = [rank for rank in range(own["size"]) if records and rank not in records]
    reasons = [f"{_who(r)} failed in {r['phase']}: {r['failure']}" for r in everyone if r["failure"]]
    reasons += [f"{_who(r)} is stopped (pid {r['pid']}, state T)" for r in everyone if _is_stopped(r)]
    reasons += [f"{_who(r)} has left" for r in everyone if r["gone"] or r["ended"] is not None]
    if missing and own["local_size"] == own["size"]:
        reasons.append(f"{_ranks(missing)} never came as far as hpcpar")
    behind = [r for r in everyone if r["step"] < furthest and not r["failure"] and not r["gone"]]
    reasons += [f"{_who(r)} is still in {r['phase']}" for r in behind]
    if not reasons:
        elsewhere = f"; of {_ranks(missing)} nothing is known here" if missing else ""
        reasons = [
            f"the ranks wait for each other in {own['phase']}{elsewhere}. Either not all ranks were "
            "started, or "
            "messages do not arrive: a network interface that does not reach the other nodes, or a firewall. "
            "Try one node first, then two"
        ]
    reasons += different_memory(everyone)
    return f"not finished after {seconds:g} s: {'; '.join(reasons)}. --timeout sets the limit"


def explain_end(own: Record, records: Mapping[int, Record]) -> str:
    """Who ended first, and what that rank expected. Local."""
    ended = [r for r in records.values() if r["ended"] is not None and not r["by_launcher"]]
    without = [r for r in records.values() if r["problem"] and r["rank"] != own["rank"]]
    if without and not own["problem"]:
        other = without[0]
        return f"{_who(own)} was ended by the launcher, since {_who(other)} has no MPI: {other['problem']}"
    first = min(ended, key=lambda record: float(record["ended"]), default=None)
    if first is None and not own["by_launcher"]:
        first = own
    if first is None:
        text = f"{_who(own)} was ended by the launcher in {own['phase']}, probably since another rank died"
    elif first["rank"] == own["rank"]:
        text = str(first["words"])
    else:
        why = first["failure"] or first["words"]
        text = f"{_who(own)} was ended by the launcher, since {_who(first)} died in {first['phase']}: {why}"
    return "; ".join([text, *different_memory([*records.values()])])


def different_memory(records: Sequence[Record]) -> list[str]:
    """What to say of ranks of one machine that cannot meet in ``/dev/shm``; nothing where they can. Local."""
    known = [record for record in records if record["memory"]]
    others = [r["rank"] for r in known if r["memory"] != known[0]["memory"]]
    if not others:
        return []
    return [
        f"{_ranks(others)} and rank {known[0]['rank']} are on one machine but have different /dev/shm, over "
        "which MPI and hpcpar share memory: use one container per node, or `--ipc=host`"
    ]


def _who(record: Record) -> str:
    return f"rank {record['rank']} of {record['size']} on {record['host']}"


def _ranks(ranks: Sequence[int]) -> str:
    names = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {names}"


def _is_stopped(record: Record) -> bool:
    """Whether its process was stopped by a signal; a process of another container is not found."""
    try:
        with open(f"/proc/{record['pid']}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "T"
    except (OSError, IndexError):
        return False


class _Watch:
    """One watcher at work."""

    def __init__(self, record: Record, folder: str | None, seconds: float, command: str) -> None:
        self._record, self._folder, self._command = record, folder, command
        self._seconds = seconds
        self._speaks = record["rank"] == 0
        later = 0.0 if self._speaks else _OTHERS_LATER_S  # the first one must not find its rank killed
        self._end = time.monotonic() + seconds + later if seconds > 0 else float("inf")
        self._failed_at = float("inf")
        self._unread = b""
        self._publish()

    def run(self) -> None:
        while True:
            end = min(self._end, self._failed_at + _AFTER_FAILURE_S)
            left = end - time.monotonic()
            if left <= 0:
                return self._finish(explain_lateness, self._seconds)
            if not select.select([0], [], [], min(left, _POLL_S))[0]:
                if self._first_gave_up():
                    return self._finish(None)
                continue
            data = os.read(0, 1 << 20)
            if not data or signal.SIGTERM in data:
                self._record.update(ended=time.monotonic(), by_launcher=bool(data))
                return self._finish(explain_end)
            if self._take(data):
                self._record["gone"] = True
                self._publish()
                return self._leave()

    def _take(self, data: bytes) -> bool:
        """Read what the rank says, without bytes of other signals; true for a goodbye."""
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            word = json.loads(bytes(byte for byte in line if byte >= 32))
            if word is None:
                return True
            self._record["step"] += "phase" in word
            if "failure" in word:
                self._failed_at = time.monotonic() if word["failure"] else float("inf")
            self._record.update(word)
        self._publish()
        return False

    def _first_gave_up(self) -> bool:
        """Whether rank 0 has left since it has no MPI: nobody will ever answer this rank."""
        if self._speaks or not self._folder:
            return False
        first = read_records(self._folder).get(0)
        return first is not None and first["gone"] and bool(first["problem"]) and not self._record["problem"]

    def _finish(self, explain: Callable[..., str] | None, *arguments: object) -> None:
        """Say what there is to say, end the rank if it has not ended, and tidy up."""
        self._publish()
        if self._speaks and explain is not None:
            if explain is explain_end and self._record["size"] > 1:
                time.sleep(_GATHER_S)  # until the others' watchers have told, too
            self._say(explain(self._record, read_records(self._folder), *arguments))
        elif self._record["failure"] and 0 not in read_records(self._folder):
            self._say(f"{_who(self._record)} failed in {self._record['phase']}: {self._record['failure']}")
        if self._record["ended"] is None or self._record["by_launcher"]:  # else it lives no more
            with suppress(OSError):
                os.kill(self._record["pid"], signal.SIGKILL)
        self._record["ended"] = self._record["ended"] or time.monotonic()
        self._publish()
        if not self._speaks and self._folder:
            time.sleep(2 * _GATHER_S)  # who is last removes the folder, which the first one is about to read
        self._leave()
        for path in self._record["tidy"]:  # last, since a dead file system does not answer
            with suppress(OSError):
                os.unlink(path)

    def _say(self, words: str) -> None:
        sys.stderr.write(f"hpcpar {self._command}: error: {words}\n")
        sys.stderr.flush()

    def _publish(self) -> None:
        if self._folder is None:
            return
        path = os.path.join(self._folder, str(self._record["rank"]))
        with suppress(OSError):
            with open(f"{path}.new", "w") as file:
                json.dump(self._record, file)
            os.replace(f"{path}.new", path)

    def _leave(self) -> None:
        """The last of a machine removes the folder."""
        records = read_records(self._folder)
        left = [record for record in records.values() if record["gone"] or record["ended"] is not None]
        if self._folder is None or len(left) < (self._record["local_size"] or self._record["size"]):
            return
        with suppress(OSError):
            for name in os.listdir(self._folder):
                os.unlink(os.path.join(self._folder, name))
            os.rmdir(self._folder)


def watch(record: Record, folder: str | None, seconds: float, command: str) -> None:
    """Watch a rank until it says goodbye, ends or is late; 0 seconds means never late. Local."""
    if folder is not None:
        try:
            os.makedirs(folder, mode=0o700, exist_ok=True)
            if os.stat(folder).st_uid != os.geteuid():
                folder = None
        except OSError:
            folder = None
    _Watch(record, folder, seconds, command).run()


if __name__ == "__main__":
    watch(*json.loads(sys.argv[1]))
