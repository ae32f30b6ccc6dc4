"""Several hosts on one machine, joined by links of a chosen speed.

Each host is a network namespace with an address of its own, joined to a bridge by a pair of virtual cards;
the launcher's remote shell is a script that enters the namespace and gives it a host name, by which MPI tells
nodes apart. What crosses a link is counted by the kernel, on the card::

    host 1   eth0 10.77.0.1 ----- rate ----- bridge ----- rate ----- eth0 10.77.0.2   host 2

It takes root and Debian's ``iproute2``; :func:`why_not` says what is missing. Two settings matter:

* Open MPI binds the ranks of both hosts to the same core unless told ``--bind-to none``.
* MPICH's UCX moves bytes through shared memory, past the link, unless told ``UCX_TLS=tcp,self``.

Nothing here imports torch or MPI: a process that has initialised MPI cannot start ``mpirun`` reliably.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["Hosts", "find_mpirun", "why_not"]

_SUBNET = "10.77.0"


def why_not() -> str | None:
    """Return why hosts cannot be made here, None when they can."""
    if os.getuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "needs ip and tc, from Debian's iproute2"
    probe = f"hpcpar-probe-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True).returncode:
        return "network namespaces are not allowed here"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return None


def find_mpirun() -> tuple[str, bool]:
    """The launcher beside this interpreter, else the one on ``PATH``, and whether it is Open MPI's."""
    beside = Path(sys.executable).parent / "mpirun"
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun")
    if mpirun is None:
        raise SystemExit(f"mpirun must be beside {sys.executable} or on PATH, got none")
    version = subprocess.run([mpirun, "--version"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return mpirun, "open mpi" in version.stdout.lower()


class Hosts:
    """``count`` hosts for the time of a ``with`` block, which ends what still runs on them.

    Parameters
    ----------
    count
        How many.
    rate
        Of each host's link, both ways, as ``tc`` writes it: ``"1gbit"``. None for no limit.
    """

    def __init__(self, count: int, rate: str | None = None) -> None:
        self._rate = rate
        self._tag = f"h{secrets.token_hex(3)}"  # not one whose removal the kernel has not ended
        self._bridge = f"{self._tag}br"
        self.names = [f"{self._tag}n{number}" for number in range(1, count + 1)]
        self.addresses = [f"{_SUBNET}.{number}" for number in range(1, count + 1)]

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="hpcpar-hosts-")
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._remove()

    def command(
        self, mpirun: str, is_openmpi: bool, ranks_per_host: int, program: Sequence[str]
    ) -> list[str]:
        """The command line that starts ``program`` on all hosts, from the first one."""
        ranks = str(ranks_per_host * len(self.names))
        places = self._openmpi(ranks_per_host) if is_openmpi else self._mpich(ranks_per_host)
        return self._inside(self.names[0], [mpirun, *places, "-n", ranks, *program])

    @staticmethod
    def variables(is_openmpi: bool) -> dict[str, str]:
        """The environment that keeps messages between hosts on the link."""
        return {} if is_openmpi else {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": "eth0"}

    def _openmpi(self, ranks_per_host: int) -> list[str]:
        hostfile = Path(self._folder.name) / "hosts"
        hostfile.write_text("".join(f"{address} slots={ranks_per_host}\n" for address in self.addresses))
        words = (
            f"--hostfile {hostfile} --bind-to none --prtemca plm_ssh_agent {self._remote_shell} "
            "--prtemca plm_ssh_no_tree_spawn 1 --mca pml ob1 --mca btl tcp,sm,self "
            "--mca btl_tcp_if_include eth0 --mca mpi_yield_when_idle 1 -x PATH -x PYTHONPATH "
            "-x OMP_NUM_THREADS"
        )
        return words.split()

    def _mpich(self, ranks_per_host: int) -> list[str]:
        words = (
            f"-hosts {','.join(self.addresses)} -ppn {ranks_per_host} -launcher ssh "
            f"-launcher-exec {self._remote_shell} -iface eth0"
        )
        return words.split()

    def _build(self) -> None:
        _run(f"ip link add {self._bridge} type bridge")
        _run(f"ip link set {self._bridge} up")
        for name, address in zip(self.names, self.addresses, strict=True):
            _run(f"ip netns add {name}")
            _run(f"ip link add {name}v type veth peer name eth0 netns {name}")
            _run(f"ip link set {name}v master {self._bridge} up")
            _run(f"ip -n {name} addr add {address}/24 dev eth0")
            _run(f"ip -n {name} link set eth0 up")
            _run(f"ip -n {name} link set lo up")
            if self._rate:
                shape = f"root tbf rate {self._rate} burst 2mb limit 20mb"
                _run(f"tc qdisc add dev {name}v {shape}")
                _run(f"ip netns exec {name} tc qdisc add dev eth0 {shape}")
        self._remote_shell = Path(self._folder.name) / "remote-shell"
        cases = "".join(
            f'  {address}|{name}) set -- {name} "$@" ;;\n'
            for name, address in zip(self.names, self.addresses, strict=True)
        )
        self._remote_shell.write_text(
            "#!/bin/sh\n# like ssh: [options] host command...\n"
            'while [ "${1#-}" != "$1" ]; do shift; done\nhost=$1; shift\n'
            f'case "$host" in\n{cases}  *) echo "unknown host $host" >&2; exit 1 ;;\nesac\n'
            'name=$1; shift\nexec ip netns exec "$name" unshare --uts sh -c "hostname $name; $*"\n'
        )
        self._remote_shell.chmod(0o755)

    def _inside(self, name: str, command: Sequence[str]) -> list[str]:
        start = f'hostname {name}; exec "$@"'
        return ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", start, "sh", *command]

    def _remove(self) -> None:
        for name in self.names:
            for pid in _processes_in(name):
                _end(pid)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        subprocess.run(["ip", "link", "del", self._bridge], capture_output=True)
        self._folder.cleanup()


def _processes_in(name: str) -> list[int]:
    """What still runs on a host; a launcher that was interrupted may leave ranks behind."""
    found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def _end(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:  # it has just ended
        return


def _run(command: str) -> None:
    subprocess.run(command.split(), check=True, capture_output=True, text=True)
