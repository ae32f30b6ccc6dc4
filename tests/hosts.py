"""The hosts of ``benchmarks/hosts.py``, on which a test starts a job."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import benchmarks.hosts
from benchmarks.hosts import why_not
from tests.launching import Job, Launcher, find_launcher

__all__ = ["Hosts", "facts_from_two_hosts", "why_not"]


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


def facts_from_two_hosts(script: str, folder: Path, *, rate: str, timeout_s: float) -> list[Any]:
    """What a script prints as ``FACTS`` and JSON, one per line, on two hosts of two ranks.

    Skips the test where hosts cannot be made.
    """
    reason = why_not()
    if reason:
        pytest.skip(reason)
    path = folder / "script.py"
    path.write_text(script)
    with (
        Hosts(2, rate=rate) as hosts,
        hosts.job(
            find_launcher(),
            2,
            [sys.executable, str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={"HPCPAR_TIMEOUT_S": "60"},
        ) as job,
    ):
        output = job.process.communicate(timeout=timeout_s)[0].decode()
    assert job.process.returncode == 0, output
    facts = [json.loads(line[6:]) for line in output.splitlines() if line.startswith("FACTS ")]
    assert facts, output
    return facts
