"""A real Slurm on this machine, for the time of a ``with`` block: two nodes of four cores and two GPUs.

::

    munged  <--  slurmctld  <--  slurmd n1  -->  slurmstepd, ranks
     (own key     (own ports)    slurmd n2  -->  slurmstepd, ranks
     and socket)

Everything lives in one temporary folder: configuration, logs, the controller's state, munge's key and socket.
Ports are free ones. So a cluster touches no Slurm or munge that the machine may have, and several clusters
may run side by side. Daemons and jobs alike have this cluster's ``SLURM_CONF`` in their environment, and
``/proc`` tells who has: leaving the block ends exactly those and what they started, after a failure, too.

The GPUs are other names of ``/dev/null``. Slurm hands them out like real ones, with ``CUDA_VISIBLE_DEVICES``
in each task, which is what a test of binding wants to see. Both nodes are the same machine, so host names do
not tell them apart; ``SLURMD_NODENAME`` does, and both MPIs see two nodes.

It takes root, and Debian's ``slurm-wlm`` and ``munge``; :func:`why_not` says what is missing.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

__all__ = ["BatchJob", "SlurmCluster", "why_not"]

T = TypeVar("T")

NODES = ("n1", "n2")
CORES_PER_NODE = 4
GPUS_PER_NODE = 2
FINAL_STATES = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "FORGOTTEN")
COMMANDS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
DAEMON_FOLDERS = ("/usr/sbin", "/usr/local/sbin", "/sbin")  # not on everybody's PATH

_CONFIGURATION = """\
ClusterName=hpcpar-test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
TmpFS={folder}/tmp-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=5
MinJobAge=600
SlurmdTimeout=300
SchedulerParameters=sched_interval=1,sched_min_interval=100000,batch_sched_delay=0,bf_interval=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""
_NODE = (
    "NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} Boards=1 SocketsPerBoard=1 "
    "CoresPerSocket={cores} ThreadsPerCore=1 RealMemory=4000 Gres=gpu:{gpus} State=UNKNOWN"
)
_GPUS = "NodeName={name} Name=gpu File={folder}/gpu[0-{last}]"


def why_not() -> str | None:
    """Return why no cluster can be made here, None when one can."""
    if os.getuid() != 0:
        return "a Slurm of our own needs root"
    missing = [command for command in COMMANDS if shutil.which(command, path=_path()) is None]
    if missing:
        return f"needs {', '.join(missing)}, from Debian's slurm-wlm and munge"
    return None


class BatchJob:
    """A job that was submitted, and where its output goes."""

    def __init__(self, cluster: SlurmCluster, number: str, log: Path) -> None:
        self.cluster, self.number, self._log = cluster, number, log

    @property
    def log(self) -> str:
        """What the job has printed so far."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def fields(self) -> dict[str, str]:
        """What ``scontrol show job`` knows about it now; empty once Slurm has forgotten the job."""
        shown = self.cluster.command("scontrol", "--oneliner", "show", "job", self.number, check=False)
        words = (word.partition("=") for word in shown.split())
        return {name: value for name, is_pair, value in words if is_pair}

    @property
    def state(self) -> str:
        return self.fields().get("JobState", "FORGOTTEN")

    def wait_for_log(self, pattern: str, *, timeout_s: float = 60.0) -> re.Match[str]:
        """Wait until the log matches a regular expression."""

        def look() -> re.Match[str] | None:
            has_ended = self.state in FINAL_STATES  # asked first: what it printed last is there by now
            found = re.search(pattern, self.log)
            if has_ended and not found:
                raise AssertionError(self._report(f"log must match {pattern!r}"))
            return found

        return self.cluster.poll(look, lambda: self._report(f"log must match {pattern!r}"), timeout_s)

    def wait_for_state(self, state: str, *, timeout_s: float = 60.0) -> None:
        """Wait until the job is in a state, and fail as soon as it can never be."""

        def look() -> bool | None:
            now = self.state
            if now != state and now in FINAL_STATES:
                raise AssertionError(self._report(f"job must become {state}"))
            return now == state or None

        self.cluster.poll(look, lambda: self._report(f"job must become {state}"), timeout_s)

    def start_now(self, *changes: str, timeout_s: float = 30.0) -> None:
        """Let a requeued job start; Slurm itself waits two minutes for what is left of the earlier run.

        ``changes`` are those of ``scontrol update``, such as ``timelimit=10``.
        """
        self.wait_for_state("PENDING", timeout_s=timeout_s)
        self.cluster.wait_for_silence(self.number)
        # slurmd tells credentials apart by the second: one as old as the end of the last run is refused.
        time.sleep(2.0)
        self.cluster.command("scontrol", "update", f"jobid={self.number}", "starttime=now", *changes)

    def signal(self, name: str, *arguments: str) -> None:
        """``scancel --signal``; ``--batch`` reaches the batch shell, ``--full`` steps and shell."""
        self.cluster.command("scancel", f"--signal={name}", *arguments, self.number)

    def _report(self, rule: str) -> str:
        return f"{rule}, got {self.fields()}\n--- log of job {self.number}\n{self.log}\n{self.cluster.logs()}"


class SlurmCluster:
    """Slurm with two nodes for the time of a ``with`` block.

    Commands get ``SLURM_CONF`` from :attr:`environment`; ``submit`` is ``sbatch``.
    """

    def __init__(self) -> None:
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        self._temporary = tempfile.TemporaryDirectory(prefix="hpcpar-slurm-", ignore_cleanup_errors=True)
        self.folder = Path(self._temporary.name)
        try:
            self._configure()
            self._start_munge()
            self._start("slurmctld", "-D", "-i")
            for node in NODES:
                self.start_node(node)
            self.wait_for_nodes("idle")
        except BaseException as error:
            error.add_note(self.logs())
            self._stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._stop()

    @property
    def configuration(self) -> Path:
        """What ``SLURM_CONF`` says for this cluster's daemons, commands and jobs."""
        return self.folder / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment, pointing at this cluster and free of any job it may be part of."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        return {**kept, "SLURM_CONF": str(self.configuration), "PATH": _path()}

    # ---- jobs ----------------------------------------------------------------------------------------------

    def submit(
        self,
        script: Path | str,
        *options: str,
        arguments: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> BatchJob:
        """``sbatch`` a script; its output goes to a file of this cluster unless ``options`` say otherwise."""
        log = self.folder / "jobs" / f"{time.monotonic_ns()}.log"
        command = ["sbatch", "--parsable", f"--output={log}", *options, str(script), *arguments]
        printed = self.command(*command, env=env, cwd=cwd)
        return BatchJob(self, printed.strip().partition(";")[0], log)

    def command(
        self,
        *words: str,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> str:
        """Run one of Slurm's commands and return what it printed."""
        done = subprocess.run(
            words,
            env={**self.environment, **(env or {})},
            cwd=cwd or self.folder / "jobs",
            capture_output=True,
            text=True,
            timeout=30,
            stdin=subprocess.DEVNULL,
        )
        if check and done.returncode:
            raise RuntimeError(
                f"{' '.join(words)} ended with {done.returncode}: {done.stderr}\n{self.logs()}"
            )
        return done.stdout if done.returncode == 0 else done.stdout + done.stderr

    # ---- nodes ---------------------------------------------------------------------------------------------

    def start_node(self, node: str) -> None:
        """Start the daemon of a node."""
        self._start("slurmd", "-D", "-N", node, SLURMD_NODENAME=node)

    def crash_node(self, node: str) -> None:
        """End a node as a power cut would: its daemon, and all that runs on it."""
        self._kill({"SLURMD_NODENAME": node})
        self.command("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def repair_node(self, node: str) -> None:
        """Start a crashed node again, and let it have jobs."""
        self.start_node(node)
        self.command("scontrol", "update", f"nodename={node}", "state=resume", check=False)
        self.wait_for_nodes("idle", (node,))

    def wait_for_nodes(self, state: str, nodes: Iterable[str] = NODES, *, timeout_s: float = 30.0) -> None:
        """Wait until nodes are in a state, such as ``idle``."""
        wanted = set(nodes)

        def look() -> bool | None:
            shown = self.command("sinfo", "--noheader", "--Node", "--format=%N %T", check=False)
            found = {line.split()[0] for line in shown.splitlines() if line.split()[1:] == [state]}
            return wanted <= found or None

        self.poll(look, lambda: f"nodes {sorted(wanted)} must be {state}\n{self.logs()}", timeout_s)

    def wait_for_silence(self, job: str, *, timeout_s: float = 20.0) -> None:
        """Wait until no process of a job is left."""
        marks = {"SLURM_CONF": str(self.configuration), "SLURM_JOB_ID": job}
        self.poll(lambda: not _marked_processes(marks) or None, lambda: f"job {job} must be gone", timeout_s)

    # ---- help ----------------------------------------------------------------------------------------------

    def poll(self, look: Callable[[], T | None], complaint: Callable[[], str], timeout_s: float) -> T:
        """Call ``look`` until it returns something, or raise a TimeoutError with the complaint."""
        deadline_s = time.monotonic() + timeout_s
        while (found := look()) is None:
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"{complaint()}\n(after {timeout_s} s)")
            time.sleep(0.1)
        return found

    def logs(self, lines: int = 30) -> str:
        """The ends of the daemons' logs."""
        parts = []
        for path in sorted((self.folder / "log").glob("*")):
            end = path.read_text(errors="replace").splitlines()[-lines:]
            parts.append("\n".join([f"--- {path.name}", *end]))
        return "\n".join(parts)

    def _configure(self) -> None:
        folder = self.folder
        folder.chmod(0o755)  # munge's clients must reach the socket
        of_nodes = (f"{purpose}-{node}" for purpose in ("spool", "tmp") for node in NODES)
        for name in ("munge", "state", "log", "jobs", *of_nodes):
            (folder / name).mkdir(mode=0o755)
        for index in range(GPUS_PER_NODE):
            os.mknod(folder / f"gpu{index}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        controller_port, *ports = _free_ports(1 + len(NODES))
        size = {"cores": CORES_PER_NODE, "gpus": GPUS_PER_NODE}
        nodes = "\n".join(
            _NODE.format(name=name, port=port, **size) for name, port in zip(NODES, ports, strict=True)
        )
        text = _CONFIGURATION.format(folder=folder, controller_port=controller_port, nodes=nodes)
        self.configuration.write_text(text)
        gpus = (_GPUS.format(name=name, folder=folder, last=GPUS_PER_NODE - 1) for name in NODES)
        (folder / "gres.conf").write_text("\n".join(gpus) + "\n")

    def _start_munge(self) -> None:
        own = self.folder / "munge"
        subprocess.run(
            ["mungekey", "--create", f"--keyfile={own}/key"], env=self.environment, check=True, timeout=30
        )
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed"}
        options = [f"--{option}={own}/{name}" for option, name in files.items()]
        log = f"--log-file={self.folder}/log/munged.log"  # used in the background only
        self._start("munged", *options, log)
        reachable = own / "socket"
        self.poll(lambda: reachable.exists() or None, lambda: f"munged must start\n{self.logs()}", 20.0)

    def _start(self, *command: str, **env: str) -> None:
        daemon = subprocess.Popen(  # each writes a log of its own
            command,
            env={**self.environment, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._daemons.append(daemon)

    def _stop(self) -> None:
        self._kill({})
        for daemon in self._daemons:
            daemon.wait(timeout=10)
        self._temporary.cleanup()

    def _kill(self, marks: Mapping[str, str]) -> None:
        """End all processes of this cluster with these marks in their environment, and their descendants."""
        marks = {"SLURM_CONF": str(self.configuration), **marks}
        deadline_s = time.monotonic() + 10.0
        while doomed := _marked_processes(marks):
            for pid in doomed:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for daemon in self._daemons:
                daemon.poll()  # bury it, or it would be found again
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"processes {sorted(doomed)} must end when killed, got them alive")
            time.sleep(0.02)


def _marked_processes(marks: Mapping[str, str]) -> set[int]:
    """Living processes whose environment has these variables, and all that descend from them."""
    wanted = {f"{name}={value}".encode() for name, value in marks.items()}
    processes = dict(_living_processes())
    found = {pid for pid, (_, environment) in processes.items() if wanted <= environment}
    while children := {pid for pid, (parent, _) in processes.items() if parent in found} - found:
        found |= children
    return found


def _living_processes() -> Iterator[tuple[int, tuple[int, set[bytes]]]]:
    """Yield (process id, (its parent's, its environment)); zombies are gone, though still listed."""
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        folder = Path(entry.path)
        with contextlib.suppress(OSError):
            # The name may contain spaces and parentheses; what follows its last parenthesis is plain.
            status, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if status not in "ZX":
                yield int(entry.name), (int(parent), set((folder / "environ").read_bytes().split(b"\0")))


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", os.defpath), *DAEMON_FOLDERS])


def _free_ports(count: int) -> list[int]:
    """Ports that were free just now; all are held until all are chosen, so that they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
