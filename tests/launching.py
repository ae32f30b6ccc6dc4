"""Start ``mpirun`` from a test, watch its ranks, signal one of them, and leave nothing behind.

A launcher has children of its own (proxies, ranks, and what those start), in process groups and sessions of
their own, and the two MPIs arrange them differently. So every job gets a token in its environment, which all
its descendants inherit, and ``/proc`` tells who carries it: that finds the ranks without their help, and ends
exactly the processes that this job started, whatever became of the launcher.

``launch`` is the short way, for a script that ends by itself; ``Launched`` the long one::

    result = launch(2, "import hpcpar; print(hpcpar.comm.world().size)\\n")
    assert result.returncode == 0

    with Launched(4, Path("train.py"), env={"HPCPAR_TIMEOUT_S": "5"}) as job:
        job.wait_for_output("epoch 1")
        job.signal_rank(3, signal.SIGKILL)
        result = job.wait()

Let ranks ``print(..., flush=True)`` what a test waits for or what must survive a kill. That is one write, and
arrives whole. PYTHONUNBUFFERED, which is taken out, writes a line and its end apart, so lines would mix.

Nothing here imports torch or MPI: a process that has initialised MPI cannot start ``mpirun`` reliably.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TypeVar

__all__ = [
    "Job",
    "LaunchResult",
    "Launched",
    "Launcher",
    "check_ended_badly",
    "find_launcher",
    "launch",
    "launched_rank",
    "launched_size",
]

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent

_TOKEN = "HPCPAR_TEST_JOB"
_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")
_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
# What a launcher leaves for its ranks; a nested mpirun that inherits it takes itself for one of them.
_LAUNCHER_VARIABLE = re.compile(
    r"PMI_|PMIX_(?!MCA_)|PRTE_(?!MCA_)|HYDI_|MPI_LOCAL|OMPI_(?!MCA_|ALLOW_RUN_AS_ROOT)"
    r"|OMPI_MCA_(PREFIXES|cpu_type|initial_wdir|num_procs)$"
)


@dataclass(frozen=True)
class LaunchResult:
    """What became of one ``mpirun``; the outputs are those of all ranks together."""

    returncode: int
    stdout: str
    stderr: str
    duration_s: float
    timed_out: bool


def check_ended_badly(result: LaunchResult) -> None:
    """The job has failed by itself, in time and without a crash of the interpreter."""
    assert not result.timed_out, result.stderr
    assert result.returncode != 0, result.stderr
    assert "terminate called" not in result.stderr, result.stderr


@dataclass(frozen=True)
class Launcher:
    """One ``mpirun`` and what it needs to start more ranks than cores, as root too."""

    mpirun: str
    is_openmpi: bool

    def command(self, ranks: int, program: Sequence[str], mpirun_args: Sequence[str] = ()) -> list[str]:
        """Return the command line that starts ``program`` on that many ranks."""
        flags = ["--oversubscribe"] if self.is_openmpi else []
        return [self.mpirun, *flags, "-n", str(ranks), *mpirun_args, *program]

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return this process's environment, fit for a new ``mpirun``, with ``extra`` on top."""
        env = {name: value for name, value in os.environ.items() if not _LAUNCHER_VARIABLE.match(name)}
        if self.is_openmpi and os.getuid() == 0:
            env.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
        env.setdefault("OMP_NUM_THREADS", "1")
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
        env.pop("PYTHONUNBUFFERED", None)
        env["PYTHONFAULTHANDLER"] = "1"  # SIGABRT prints stacks
        env["NO_COLOR"] = "1"  # Open MPI gives its ranks a terminal
        env.update(extra or {})
        return env


@functools.cache
def find_launcher(python: str = sys.executable) -> Launcher:
    """Return the launcher that belongs to an interpreter: the one beside it, else the one on ``PATH``."""
    beside = Path(python).parent / "mpirun"
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun")
    if mpirun is None:
        raise FileNotFoundError(
            f"an mpirun must be beside {python} or on PATH, got none; `make env` makes one"
        )
    version = subprocess.run(
        [mpirun, "--version"], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
    )
    return Launcher(mpirun, is_openmpi="open mpi" in version.stdout.lower())


def launched_rank(environ: Mapping[str, str] = os.environ) -> int | None:
    """Return this process's rank as its launcher tells it, before MPI starts; None outside of ``mpirun``."""
    return _first_number(environ, _RANK_VARIABLES)


def launched_size(environ: Mapping[str, str] = os.environ) -> int | None:
    """Return the number of ranks as the launcher tells it, where it does."""
    return _first_number(environ, _SIZE_VARIABLES)


class Job:
    """A command in a session of its own, together with everything that descends from it.

    Use it as a context manager: leaving it ends what is left of the job.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        stdout: IO[str] | int | None = None,
        stderr: IO[str] | int | None = None,
        cwd: Path | str | None = None,
    ) -> None:
        self._token = uuid.uuid4().hex
        # A job inside of a job carries both tokens, so that ending the outer one ends the inner one.
        tokens = ":".join(filter(None, [env.get(_TOKEN), self._token]))
        self.started_s = time.monotonic()
        self.process = subprocess.Popen(
            command,
            env={**env, _TOKEN: tokens},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            cwd=cwd,
            start_new_session=True,
        )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.end()

    def wait(self, timeout_s: float) -> bool:
        """Wait for the launcher to end; False if the time was up first."""
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def rank_pids(self) -> dict[int, int]:
        """Return ``{rank: pid}`` of the ranks that live now."""
        members = dict(self._members())
        ranks = {pid: rank for pid, env in members.items() if (rank := launched_rank(env)) is not None}
        # A process that a rank has started shows that rank's environment, and has a rank for its parent.
        return {rank: pid for pid, rank in ranks.items() if _parent(pid) not in ranks}

    def signal_ranks(self, signum: signal.Signals) -> None:
        """Send a signal to every living rank."""
        _signal(self.rank_pids().values(), signum)

    def end(self, grace_s: float = 3.0) -> None:
        """End the job: politely, so that the launcher can tidy up, then each process that is left."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.wait(grace_s)
        deadline_s = time.monotonic() + 10.0
        while pids := [pid for pid, _ in self._members()]:
            _signal(pids, signal.SIGKILL)
            if time.monotonic() > deadline_s:  # stuck in the kernel; no signal helps
                break
            if self.process.poll() is None:
                self.wait(0.1)
            time.sleep(0.02)
        self.wait(1.0)

    def _members(self) -> Iterator[tuple[int, dict[str, str]]]:
        for entry in os.scandir("/proc"):
            if not entry.name.isdigit():
                continue
            env = _environment_of(int(entry.name))
            if self._token in env.get(_TOKEN, "").split(":"):
                yield int(entry.name), env


class Launched:
    """A script under ``mpirun`` while it runs, for tests that interfere with it.

    Parameters
    ----------
    ranks
        How many.
    script
        A path, or the source text itself (a string of more than one line).
    args
        Arguments of the script.
    env
        Variables to set on top of this process's environment.
    timeout_s
        Seconds until ``wait`` has the ranks print their stacks and ends the job.
    mpirun_args
        More arguments for ``mpirun``, such as ``("--with-ft", "ulfm")``.
    """

    def __init__(
        self,
        ranks: int,
        script: str | Path,
        *args: str,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 60.0,
        mpirun_args: Sequence[str] = (),
        cwd: Path | str | None = None,
    ) -> None:
        self._ranks, self._script, self._args = ranks, script, args
        self._env, self._mpirun_args, self._cwd = env, mpirun_args, cwd
        self.timeout_s = timeout_s

    def __enter__(self) -> Launched:
        self._folder = tempfile.TemporaryDirectory(prefix="hpcpar-launch-")
        folder = Path(self._folder.name)
        self._outputs = folder / "stdout", folder / "stderr"
        launcher = find_launcher()
        program = [sys.executable, str(_as_file(self._script, folder)), *self._args]
        with open(self._outputs[0], "w") as stdout, open(self._outputs[1], "w") as stderr:
            self.job = Job(
                launcher.command(self._ranks, program, self._mpirun_args),
                env=launcher.environment(self._env),
                stdout=stdout,
                stderr=stderr,
                cwd=self._cwd or folder,
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.job.end()
        self._folder.cleanup()

    @property
    def stdout(self) -> str:
        """What the ranks have printed so far."""
        return self._outputs[0].read_text(errors="replace")

    @property
    def stderr(self) -> str:
        """What the ranks and the launcher have complained about so far."""
        return self._outputs[1].read_text(errors="replace")

    def wait(self, timeout_s: float | None = None) -> LaunchResult:
        """Wait for the end; past the time limit print the ranks' stacks to ``stderr`` and end them."""
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        ended = self.job.wait(limit_s - (time.monotonic() - self.job.started_s))
        duration_s = time.monotonic() - self.job.started_s
        if not ended:
            self.job.signal_ranks(signal.SIGABRT)
            self.job.wait(2.0)
        self.job.end()
        return LaunchResult(self.job.process.returncode, self.stdout, self.stderr, duration_s, not ended)

    def wait_for_output(self, pattern: str, *, timeout_s: float = 60.0) -> re.Match[str]:
        """Wait until the ranks' standard output matches a regular expression, and return the match."""

        def look() -> re.Match[str] | None:
            return re.search(pattern, self.stdout)

        return self._poll(look, f"output must match {pattern!r}", timeout_s)

    def rank_pid(self, rank: int, *, timeout_s: float = 30.0) -> int:
        """Return the process id of a rank, waiting for it to be started."""

        def look() -> int | None:
            return self.job.rank_pids().get(rank)

        return self._poll(look, f"rank {rank} must be running", timeout_s)

    def signal_rank(self, rank: int, signum: signal.Signals) -> None:
        """Send a signal to one rank."""
        os.kill(self.rank_pid(rank), signum)

    def _poll(self, look: Callable[[], T | None], rule: str, timeout_s: float) -> T:
        deadline_s = time.monotonic() + timeout_s
        while (found := look()) is None:
            state = self.job.process.poll()
            if state is not None or time.monotonic() > deadline_s:
                happened = (
                    f"got no such thing in {timeout_s} s" if state is None else f"but mpirun ended: {state}"
                )
                raise TimeoutError(
                    f"{rule}, {happened}\n--- stdout\n{self.stdout}\n--- stderr\n{self.stderr}"
                )
            time.sleep(0.02)
        return found


def launch(
    ranks: int,
    script: str | Path,
    *args: str,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 60.0,
    mpirun_args: Sequence[str] = (),
    cwd: Path | str | None = None,
) -> LaunchResult:
    """Run a script under ``mpirun`` until it ends; see `Launched` for the parameters."""
    with Launched(
        ranks, script, *args, env=env, timeout_s=timeout_s, mpirun_args=mpirun_args, cwd=cwd
    ) as launched:
        return launched.wait()


def _as_file(script: str | Path, folder: Path) -> Path:
    if isinstance(script, Path) or "\n" not in script:
        return Path(script).resolve(strict=True)
    path = folder / "script.py"
    path.write_text(textwrap.dedent(script))
    return path


def _first_number(environ: Mapping[str, str], names: Sequence[str]) -> int | None:
    return next((int(environ[name]) for name in names if name in environ), None)


def _environment_of(pid: int) -> dict[str, str]:
    """Return what a process was started with; nothing if it has ended or is somebody else's."""
    try:
        content = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    pairs = (entry.partition("=") for entry in content.decode(errors="replace").split("\0"))
    return {name: value for name, _, value in pairs}


def _parent(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[1])  # the name in front may hold blanks and brackets


def _signal(pids: Iterable[int], signum: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, signum)
        except ProcessLookupError:  # it has just ended
            continue
