"""What the ranks find out together: folders, clocks, the speed of messages, device buffers.

Every part is collective and ends in an agreement on whether it worked everywhere: if not, it is left out on
all ranks. A rank that fails while another one waits for its message cannot be agreed upon; its watcher knows
of the failure, and names it when it ends the job. Parts that ask the operating system do so in a small
process with a time limit.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from hpcpar.cli import measure
from hpcpar.cli.device_check import CRASHED, DeviceVerdict, check_device_messages
from hpcpar.cli.doctor import folder_probe
from hpcpar.cli.doctor.findings import FolderFacts, JobFacts
from hpcpar.cli.facts import ProcessFacts
from hpcpar.cli.session import Watcher
from hpcpar.comm import Communicator

__all__ = ["gather", "look_at_folder"]

T = TypeVar("T")

_FOLDER_S = 10.0
_SIZES = (8, 1 << 20, 8 << 20)
_MEASURE_S = 2.0
_MEMCPY_BYTES = 32 << 20
_CLOCK_ROUNDS = 5


def gather(
    facts: ProcessFacts,
    comm: Communicator | None,
    folders: Sequence[tuple[Path, bool]],
    watcher: Watcher,
) -> JobFacts:
    """All facts about the job; the same on every rank. Collective.

    Parameters
    ----------
    facts, comm
        As :func:`hpcpar.cli.session.start` gives them.
    folders
        To look at, each with whether the user named it.
    watcher
        Is told what to say should a part end this process.
    """
    if comm is None:
        token = f".hpcpar-doctor-{secrets.token_hex(6)}"
        seen = [look_at_folder(path, named, facts.host, token, None) for path, named in folders]
        return JobFacts([facts], folders=seen)
    everyone = comm.allgather(facts)
    problems: dict[str, str] = {}

    def together(name: str, part: Callable[[], T], default: T) -> T:
        result, problem = default, None
        watcher.enter(f"the look at {name}")
        try:
            result = part()
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
            watcher.tell(failure=problem)
        told = [f"rank {rank}: {text}" for rank, text in enumerate(comm.allgather(problem)) if text]
        if told:
            problems[name] = told[0]
            watcher.tell(failure="")
        return default if told else result

    return JobFacts(
        ranks=everyone,
        nodes=comm.node_map.nodes,
        folders=together("folders", lambda: _folders(comm, everyone, folders, watcher), []),
        clock_offsets_s=together("clocks", lambda: _clocks(comm, everyone), {}),
        memcpy_bytes_per_s=together("memcpy", lambda: measure.measure_memcpy(comm, _MEMCPY_BYTES, 0.2), None),
        links=together("messages", lambda: _links(comm), []),
        gpu=together("device buffers", lambda: _device_buffers(comm, everyone, watcher), None),
        problems=problems,
    )


# ---- folders -----------------------------------------------------------------------------------------------


def _folders(
    comm: Communicator,
    everyone: Sequence[ProcessFacts],
    folders: Sequence[tuple[Path, bool]],
    watcher: Watcher,
) -> list[FolderFacts]:
    """Each folder from each machine (or container), by its first rank: rank 0 writes, the others look."""
    spaces = [(facts.machine, facts.mount_space) for facts in everyone]
    is_first = spaces.index(spaces[comm.rank]) == comm.rank
    found: list[FolderFacts] = []
    for path, named in folders:
        token = comm.bcast(f".hpcpar-doctor-{secrets.token_hex(6)}")
        mine = None
        if comm.rank == 0:
            watcher.tell(tidy=[str(path / token)])
            mine = look_at_folder(path, named, everyone[0].host, token, True)
        written = comm.bcast(mine is not None and mine.problem is None)
        if is_first and comm.rank != 0:
            mine = look_at_folder(path, named, everyone[comm.rank].host, token, False if written else None)
        found += [one for one in comm.allgather(mine) if one is not None]
        if comm.rank == 0:
            _remove(path / token)
            watcher.tell(tidy=[])
    return found


def look_at_folder(path: Path, named: bool, host: str, token: str, writes: bool | None) -> FolderFacts:
    """Try a folder in a process of its own, which is left behind when the folder does not answer. Local.

    Parameters
    ----------
    path, named, host
        As in the facts.
    token
        Name of the file that is written or looked for.
    writes
        Write it and leave it (True), look for it (False), or neither (None).
    """
    task = {True: "write", False: "look", None: "try"}[writes]
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", folder_probe.__file__, str(path), token, task],
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
    )
    try:
        answer, _ = child.communicate(timeout=_FOLDER_S)
        facts = json.loads(answer)
    except subprocess.TimeoutExpired:
        child.kill()  # and no wait for it: a process in a dead file system does not even die
        return FolderFacts(str(path), host, named, problem=f"no answer within {_FOLDER_S:g} s")
    except ValueError:
        return FolderFacts(str(path), host, named, problem="the process that tries it ended early")
    return FolderFacts(str(path), host, named, **facts)


def _remove(path: Path) -> None:
    try:
        os.unlink(path)
    except OSError:
        return  # it was never written


# ---- clocks, messages, device buffers ----------------------------------------------------------------------


def _clocks(comm: Communicator, everyone: Sequence[ProcessFacts]) -> dict[int, float]:
    """How far the clock of each machine's first rank is ahead of rank 0's: half a round trip assumed."""
    machines = [facts.machine for facts in everyone]
    offsets: dict[int, float] = {}
    for rank in sorted({machines.index(machine) for machine in machines} - {0}):
        if comm.rank == 0:
            offsets[rank] = min((_ask_clock(comm, rank) for _ in range(_CLOCK_ROUNDS)), key=abs)
        elif comm.rank == rank:
            for _ in range(_CLOCK_ROUNDS):
                comm.recv(source=0)
                comm.send(time.time(), dest=0)
    return dict(comm.bcast(offsets))


def _ask_clock(comm: Communicator, rank: int) -> float:
    before = time.time()
    comm.send(None, dest=rank)
    theirs = float(comm.recv(source=rank))
    return theirs - (before + time.time()) / 2


def _links(comm: Communicator) -> list[measure.PairResult]:
    pairs = measure.choose_pairs(comm.node_map)
    share_s = _MEASURE_S / max(1, len(pairs) * len(_SIZES))
    return [measure.measure_pair(comm, pair, nbytes, share_s) for pair in pairs for nbytes in _SIZES]


def _device_buffers(
    comm: Communicator, everyone: Sequence[ProcessFacts], watcher: Watcher
) -> DeviceVerdict | None:
    """Last of all, and only where MPI claims to know them: one that does not may end the process."""
    if not all(facts.gpus and facts.mpi and facts.mpi.gpu_claim for facts in everyone):
        return None
    watcher.expect(CRASHED)
    return check_device_messages(comm)
