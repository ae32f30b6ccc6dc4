"""Start MPI for a command that must never hang and must have something to say when MPI does not start.

Two things can go wrong inside MPI, out of Python's reach: the process ends (a login node may forbid MPI, a
small ``/dev/shm`` is a segmentation fault), or a call never returns. So a process that no launcher started
tries MPI in a child first; and a watcher, a second small process, has the last word::

    rank  --- starts ---> watcher: waits for word from the rank, or for the deadline
    rank  says goodbye    it leaves
    rank  ends without    it says what the rank had told it to expect, and who ended first
    rank  hangs           it says who is missing, and kills the rank

The watcher (:mod:`hpcpar.cli.watcher`) is started before MPI, inherits nothing but its input, and lives in a
session of its own, so that the launcher, which ends the other ranks, leaves it time to speak. Only the first
rank's has words to say. Launchers differ in how they take a rank that leaves before MPI has started: Open MPI
ends the whole job for any status but 0, before the first rank may have spoken; MPICH waits for the others for
ever. So ranks without MPI leave with status 0, and a rank that is the only one without speaks and ends by a
signal, which ends the job under both.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import click
import torch

from hpcpar.cli import watcher as watching
from hpcpar.cli.facts import ProcessFacts, gather_process_facts, with_mpi
from hpcpar.cli.output import format_bytes, is_first_process
from hpcpar.comm import Communicator, world
from hpcpar.comm.environment import job_key, memory_sharers, read_launcher
from hpcpar.comm.progress import timeout_from_environment
from hpcpar.errors import HpcparError

__all__ = ["Watcher", "fatal_shortage", "start", "timeout_option", "watched"]

_TRIAL_S = 60.0
_SHM_BASE, _SHM_PER_RANK = 16 << 20, 4 << 20
_FIRST_S = 8.0


timeout_option = click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    default=120.0,
    show_default=True,
    metavar="SECONDS",
    help="End with an error when it takes longer; 0 means never.",
)
"""Of commands that look at all ranks."""


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
        launcher = read_launcher()
        key = job_key()
        name = None if key is None else f"hpcpar-{os.geteuid()}-{key}"
        self.folder = None if name is None else os.path.join(tempfile.gettempdir(), name)
        record: watching.Record = {
            "rank": launcher.rank or 0,
            "size": launcher.size or 1,
            "local_size": launcher.local_size,
            "host": os.uname().nodename,
            "pid": os.getpid(),
            "phase": "its start",
            "step": 0,
            "words": "this process was ended from outside when it started",
            "failure": "",
            "problem": "",
            "memory": "",
            "tidy": [],
            "ended": None,
            "by_launcher": False,
            "gone": False,
        }
        setup = json.dumps([record, self.folder, seconds, command])
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", watching.__file__, setup],
            stdin=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        assert self._process.stdin is not None  # it was asked for
        self.descriptor = self._process.stdin.fileno()

    def expect(self, words: str) -> None:
        """What to say when this process ends without a goodbye; one short text. Local."""
        self._send({"words": words})

    def enter(self, phase: str) -> None:
        """What this rank does from now on, as in "still in <phase>"; the same on all ranks. Local."""
        self._send({"phase": phase})

    def tell(self, **facts: object) -> None:
        """Change other parts of the :data:`~hpcpar.cli.watcher.Record`. Local."""
        self._send(facts)

    def dismiss(self) -> None:
        """Say goodbye. Local."""
        assert self._process.stdin is not None
        self._send(None)
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.wait()

    def _send(self, word: object) -> None:
        line = json.dumps(word).encode() + b"\n"
        with contextlib.suppress(OSError):  # somebody has ended it
            while line:
                line = line[os.write(self.descriptor, line) :]


@contextmanager
def watched(seconds: float, command: str) -> Iterator[Watcher]:
    """Run the block with a :class:`Watcher` beside it, which learns of SIGTERM, too. Local."""
    watcher = Watcher(seconds, command)
    with contextlib.ExitStack() as stack:
        stack.callback(watcher.dismiss)
        if threading.current_thread() is threading.main_thread():
            stack.enter_context(_signals_told(watcher.descriptor))
        yield watcher


@contextmanager
def _signals_told(descriptor: int) -> Iterator[None]:
    """Write the number of each signal there, in C: Python's own handlers do not run inside MPI."""
    os.set_blocking(descriptor, False)  # as set_wakeup_fd demands
    handler = signal.signal(signal.SIGTERM, lambda *arguments: None)  # the watcher ends this process
    before = signal.set_wakeup_fd(descriptor, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGTERM, handler)


def _look_further(facts: ProcessFacts) -> str:
    return "MPI ended this process when it started. `hpcpar doctor` may say why"


def _one_line(facts: ProcessFacts) -> str:
    return f"MPI does not start: {facts.mpi_problem}"


def start(
    watcher: Watcher,
    explain: Callable[[ProcessFacts], str] = _look_further,
    complain: Callable[[ProcessFacts], str] = _one_line,
) -> tuple[ProcessFacts, Communicator | None]:
    """Facts about this process, and all ranks of the job where MPI starts. Collective.

    Where it does not start, ``mpi_problem`` of the facts says why, and the communicator is ``None``: the
    first rank should explain that, and the others leave with status 0. A rank that is the only one to have a
    problem says so itself and ends the job; there is no return then.

    Parameters
    ----------
    watcher
        Is told what to say should MPI end this process.
    explain
        Makes that from the facts that are known before.
    complain
        Makes what a rank says that has a problem of its own.
    """
    watcher.enter("the look at its machine")
    facts = gather_process_facts()
    watcher.tell(words=explain(facts), memory=facts.shm_device)
    watcher.enter("MPI's start (MPI_Init)")
    problem = _wrong_setting()
    if problem is None:
        problem = _try_in_child() if facts.launcher.rank is None else fatal_shortage(facts)
        problem = problem or _separation(facts, watcher)
    facts = with_mpi(facts) if problem is None else replace(facts, mpi_problem=problem)
    if facts.mpi is None:
        return _without_mpi(facts, watcher, complain), None
    watcher.enter("the meeting of all ranks")
    try:
        comm = world()
    except Exception as error:
        facts = replace(facts, mpi_problem=f"{type(error).__name__}: {error}")
        return _without_mpi(facts, watcher, complain), None
    sharer = memory_sharers(comm.mpi)
    watcher.expect("this rank was ended from outside, or by a fault inside MPI")
    return replace(facts, torch_threads=torch.get_num_threads(), sharer=sharer), comm


def _wrong_setting() -> str | None:
    """What every wait would stumble over."""
    try:
        timeout_from_environment()
    except HpcparError as error:
        return str(error)
    return None


def _separation(facts: ProcessFacts, watcher: Watcher) -> str | None:
    """Ranks of one machine that have different ``/dev/shm``: MPICH waits there for ever.

    The rank that comes last sees it. Open MPI starts, and it is found later.
    """
    if facts.launcher.family == "Open MPI":
        return None
    found = watching.different_memory([*watching.read_records(watcher.folder).values()])
    return f"not tried, as {found[0]}" if found else None


def _without_mpi(
    facts: ProcessFacts, watcher: Watcher, complain: Callable[[ProcessFacts], str]
) -> ProcessFacts:
    """Let the first rank speak where it has a problem, too; speak up and end the job where it has none."""
    watcher.tell(problem=facts.mpi_problem)
    if is_first_process() or "LauncherError" in (facts.mpi_problem or ""):
        return facts
    rank = facts.launcher.rank or 0
    end = time.monotonic() + _FIRST_S
    while not (below := _troubled(watcher.folder, range(rank))) and time.monotonic() < end:
        time.sleep(0.1)
    if below:
        return facts
    click.echo(f"rank {rank} of {facts.launcher.size} on {facts.host}: {complain(facts)}", err=True)
    sys.stdout.flush()
    sys.stderr.flush()
    watcher.dismiss()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)
    return facts


def _troubled(folder: str | None, ranks: Sequence[int]) -> bool:
    """Whether one of these ranks, on this machine, has told of a problem."""
    records = watching.read_records(folder)
    return any(records[rank]["problem"] for rank in ranks if rank in records)


def fatal_shortage(facts: ProcessFacts) -> str | None:
    """Why MPICH would end in a segmentation fault, which would leave nothing to explain it. Local.

    It puts its queues in ``/dev/shm`` when it starts, a few MiB per rank, and touches what is not there.
    Measured for MPICH 5.0 with 2, 4 and 8 ranks; Open MPI finds other places.
    """
    ranks = facts.launcher.local_size or 1
    needed = _SHM_BASE + ranks * _SHM_PER_RANK
    if facts.launcher.family == "Open MPI":
        return None
    if facts.shm_problem is not None and facts.shm_total > 0:
        return f"not tried, as MPICH must write to /dev/shm of {facts.host}: {facts.shm_problem}"
    if facts.shm_total == 0 or facts.shm_free >= needed:  # 0: nothing is known
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
    lines = (done.stderr or done.stdout).strip().splitlines()
    words = lines[-1] if "Traceback" in done.stderr else " ".join(" ".join(lines).split())[-600:]
    return f"a process that starts MPI ends with status {done.returncode}: {words}"
