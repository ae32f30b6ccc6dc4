"""Are the processes of my node still alive? Asked of the operating system, in waits that are slow.

A rank that was killed never answers, and a launcher that does not end the job at once would leave its
neighbours waiting until their deadline. Process numbers mean the same to all ranks only inside one process
namespace; ranks in containers with namespaces of their own prove nothing, and nobody is reported then.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpcpar.comm.communicator import Communicator

__all__ = ["NodeProcesses"]


class NodeProcesses:
    """The processes of the ranks on this node. Collective to make.

    Parameters
    ----------
    comm
        All ranks.
    """

    def __init__(self, comm: Communicator) -> None:
        members = comm.node_map.ranks_of(comm.node_rank)
        answers = comm.node.allgather((_namespace(), os.getpid()))
        comparable = len({namespace for namespace, _ in answers}) == 1
        pids = [pid for _, pid in answers]
        self._pid_of = dict(zip(members, pids, strict=True)) if comparable else {}

    def dead(self) -> list[int]:
        """Ranks, numbered in ``comm``, whose processes are gone. Local."""
        return [rank for rank, pid in self._pid_of.items() if not _is_alive(pid)]


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return f"unknown, of process {os.getpid()}"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    """Whether it has ended, and a launcher that goes on without it has not asked for its status."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in (b"Z", b"X")
    except (OSError, IndexError):
        return False
