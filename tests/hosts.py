"""The hosts of ``benchmarks/hosts.py``, on which a test starts a job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import benchmarks.hosts
from benchmarks.hosts import why_not
from tests.launching import Job, Launcher

__all__ = ["Hosts", "why_not"]


class Hosts(benchmarks.hosts.Hosts):
    """Hosts for the time of a ``with`` block; see :class:`benchmarks.hosts.Hosts`."""

    def job(
        self,
        launcher: Launcher,
        ranks_per_host: int,
        program: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
    ) -> Job:
        """Start ``program`` on all hosts, from the first one."""
        command = self.command(launcher.mpirun, launcher.is_openmpi, ranks_per_host, program)
        variables = {**self.variables(launcher.is_openmpi), **(env or {})}
        return Job(command, env=launcher.environment(variables), stdout=stdout, stderr=stderr)
