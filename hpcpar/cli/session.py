"""Start MPI for a command that must never hang and must have something to say when MPI does not start.

Two things can go wrong inside MPI, out of Python's reach: the process ends (a login node may forbid MPI, a
small ``/dev/shm`` is a segmentation fault), or a call never returns. So a process that no launcher started
tries MPI in a child first; and a watcher, a second small process, has the last word::

    rank  --- starts ---> watcher: waits for word from the rank, or for the deadline
    rank  says goodbye    it leaves
    rank  ends without    it says what the rank had told it to expect
    rank  hangs           it says that, and kills the rank

The watcher is started before MPI, inherits nothing but its input, and lives in a session of its own, so that
the launcher, which ends the other ranks, leaves it time to speak. Only the first rank's has words to say.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from hpcpar.cli.facts import ProcessFacts, gather_process_facts, with_mpi
from hpcpar.cli.output import format_bytes, is_first_process
from hpcpar.comm import Communicator, world
from hpcpar.comm.environment import memory_sharers

__all__ = ["Watcher", "fatal_shortage", "start", "watched"]

_TRIAL_S = 60.0
_SHM_BASE, _SHM_PER_RANK = 16 << 20, 4 << 20
_WATCHER = """
import json, os, select, signal, sys, time
pid, seconds, late, words = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3], ""
end = time.monotonic() + seconds if seconds > 0 else None
while True:
    left = None if end is None else max(0, end - time.monotonic())
    if not select.select([0], [], [], left)[0]:
        sys.stderr.write(late)
        sys.stderr.flush()
        os.kill(pid, signal.SIGKILL)
        break
    word = os.read(0, 1 << 20)
    if not word:
        sys.stderr.write(words)
        break
    words = json.loads(word.splitlines()[-1])
    if words is None:
        break
"""


class Watcher:
    """The small process that speaks when this one cannot. Local.

    Parameters
    ----------
    seconds
        Until this process is taken to hang, and ended; 0 means never.
    command
        Its name, for the explanation.
    """

    def __init__(self, seconds: float, command: str) -> None:
        self._command = command
        late = (
            f"hpcpar {command}: error: not finished after {seconds:g} s, the ranks wait for each other "
            "inside "
            "MPI. Either not all ranks were started, or messages do not arrive: a network interface that "
            "does "
            "not reach the other nodes, or a firewall. Try one node first, then two; --timeout sets the "
            "limit\n"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _WATCHER, str(os.getpid()), str(seconds), _voice(late)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    def expect(self, words: str) -> None:
        """What to say when this process ends without a goodbye; one short text. Local."""
        self._send(_voice(f"hpcpar {self._command}: error: {words}\n"))

    def dismiss(self) -> None:
        """Say goodbye. Local."""
        self._send(None)
        assert self._process.stdin is not None  # it was asked for
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.wait()

    def _send(self, words: str | None) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # somebody has ended it
            self._process.stdin.write(json.dumps(words).encode() + b"\n")
            self._process.stdin.flush()


@contextmanager
def watched(seconds: float, command: str) -> Iterator[Watcher]:
    """Run the block with a :class:`Watcher` beside it. Local."""
    watcher = Watcher(seconds, command)
    try:
        yield watcher
    finally:
        watcher.dismiss()


def _voice(words: str) -> str:
    return words if is_first_process() else ""


def _look_further(facts: ProcessFacts) -> str:
    return "MPI ended this process when it started. `hpcpar doctor` may say why"


def start(
    watcher: Watcher, explain: Callable[[ProcessFacts], str] = _look_further
) -> tuple[ProcessFacts, Communicator | None]:
    """Facts about this process, and all ranks of the job where MPI starts. Collective.

    Where it does not start, ``mpi_problem`` of the facts says why, and the communicator is ``None``.

    Parameters
    ----------
    watcher
        Is told what to say should MPI end this process.
    explain
        Makes that from the facts that are known before.
    """
    facts = gather_process_facts()
    watcher.expect(explain(facts))
    problem = _try_in_child() if facts.launcher.rank is None else fatal_shortage(facts)
    facts = with_mpi(facts) if problem is None else replace(facts, mpi_problem=problem)
    if facts.mpi is None:
        return facts, None
    try:
        comm = world()
    except Exception as error:
        return replace(facts, mpi_problem=f"{type(error).__name__}: {error}"), None
    sharer = memory_sharers(comm.mpi)
    watcher.expect("this rank was ended from outside, or by a fault inside MPI")
    return replace(facts, torch_threads=torch.get_num_threads(), sharer=sharer), comm


def fatal_shortage(facts: ProcessFacts) -> str | None:
    """Why MPICH would end in a segmentation fault, which would leave nothing to explain it. Local.

    It puts its queues in ``/dev/shm`` when it starts, a few MiB per rank, and touches what is not there.
    Measured for MPICH 5.0 with 2, 4 and 8 ranks; Open MPI finds other places.
    """
    ranks = facts.launcher.local_size or 1
    needed = _SHM_BASE + ranks * _SHM_PER_RANK
    enough = facts.shm_total == 0 or facts.shm_free >= needed  # 0: nothing is known
    if enough or facts.launcher.family == "Open MPI":
        return None
    return (
        f"not tried, as /dev/shm of {facts.host} has {format_bytes(facts.shm_free)} free and MPICH needs "
        "about "
        f"{format_bytes(needed)} for {ranks} rank(s)"
    )


def _try_in_child() -> str | None:
    """Why a process that starts MPI ends in failure; ``None`` when it does not."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", "import mpi4py.MPI"],
            capture_output=True,
            text=True,
            timeout=_TRIAL_S,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return f"a process that starts MPI did not finish within {_TRIAL_S:g} s"
    if done.returncode == 0:
        return None
    words = " ".join((done.stderr or done.stdout).split())[-600:]
    return f"a process that starts MPI ends with status {done.returncode}: {words}"
