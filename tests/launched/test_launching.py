"""The launcher of the tests itself: nothing a job started may outlive it, whatever the job does."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.launching import Launched, launch

HELLO = """
from mpi4py import MPI
comm = MPI.COMM_WORLD
print(f"rank {comm.allgather(comm.rank)[comm.rank]} of {comm.size}", flush=True)
"""
HANG = """
import sys, time
from mpi4py import MPI
print("ready", flush=True)

def wait_for_nobody():
    time.sleep(600)

wait_for_nobody()
"""


def test_script_runs_on_all_ranks() -> None:
    result = launch(3, HELLO)
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.split("\n")[:3]) == ["rank 0 of 3", "rank 1 of 3", "rank 2 of 3"]
    assert not result.timed_out


def test_status_arguments_and_environment_pass_through(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os, sys; print(sys.argv[1], os.environ['COLOUR']); sys.exit(7)")
    result = launch(1, script, "sky", env={"COLOUR": "blue"})
    assert result.returncode == 7
    assert "sky blue" in result.stdout


def test_job_over_its_limit_prints_stacks_and_is_gone() -> None:
    with Launched(2, HANG) as launched:
        launched.wait_for_output(r"(?s)ready.*ready")
        pids = [launched.rank_pid(rank) for rank in (0, 1)]
        result = launched.wait(timeout_s=0.0)
    assert result.timed_out
    assert result.returncode != 0
    assert "wait_for_nobody" in result.stderr
    assert not any(is_running(pid) for pid in pids)


def test_leaving_early_ends_all_ranks() -> None:
    with Launched(2, HANG) as launched:
        launched.wait_for_output(r"(?s)ready.*ready")
        pids = [launched.rank_pid(rank) for rank in (0, 1)]
        assert all(is_running(pid) for pid in pids)
    assert not any(is_running(pid) for pid in pids)


def test_killing_one_rank_ends_the_job() -> None:
    with Launched(2, HANG) as launched:
        launched.wait_for_output(r"(?s)ready.*ready")
        launched.signal_rank(1, signal.SIGKILL)
        result = launched.wait(timeout_s=60.0)
    assert result.returncode != 0
    assert not result.timed_out


def test_waiting_for_output_of_a_job_that_ended_tells_what_it_said() -> None:
    with (
        Launched(1, "import sys\nsys.exit('no luck')\n") as launched,
        pytest.raises(TimeoutError, match="no luck"),
    ):
        launched.wait_for_output("never printed")


def is_running(pid: int) -> bool:
    deadline_s = time.monotonic() + 2.0
    while time.monotonic() < deadline_s:
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            return False
        if state == "Z":  # ended; whoever inherited it has not looked yet
            return False
        time.sleep(0.05)
    return True
