"""A failure on one rank ends the job within seconds, with a message that says which rank and why."""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path

import pytest

from tests.launching import Job, Launched, Launcher, LaunchResult, check_ended_badly, find_launcher, launch

RANKS = 3
SOON_S = 40.0  # far above what any of these takes, far below the default deadline of ten minutes

PREPARE = """
import os, signal, sys, threading, time
import torch, hpcpar
from hpcpar.errors import StalledError
comm = hpcpar.comm.world()
ones = torch.ones(1000)
comm.Barrier()
"""


def run(body: str, *, timeout_s: str = "3", ranks: int = RANKS) -> LaunchResult:
    return launch(ranks, PREPARE + body, env={"HPCPAR_TIMEOUT_S": timeout_s}, timeout_s=SOON_S)


def test_exception_on_one_rank_ends_the_job() -> None:
    """Long before the others' deadline."""
    result = run(
        "if comm.rank == 1: raise ValueError('bad batch')\ncomm.Allreduce(ones, ones.clone())\n",
        timeout_s="600",
    )
    check_ended_badly(result)
    assert f"hpcpar: rank 1 of {RANKS} failed; the job ends." in result.stderr
    assert "ValueError: bad batch" in result.stderr
    assert result.stderr.count("Traceback") == 1


def test_exception_in_a_thread_ends_the_job() -> None:
    result = run(
        """
def work():
    raise ValueError('bad file')
if comm.rank == 1:
    threading.Thread(target=work, name='loader').start()
comm.Recv(ones, source=comm.rank)
""",
        timeout_s="600",
    )
    check_ended_badly(result)
    assert f"hpcpar: rank 1 of {RANKS} failed in thread 'loader'; the job ends." in result.stderr
    assert "ValueError: bad file" in result.stderr


def test_thread_may_end_itself_and_a_forked_child_may_fail() -> None:
    """Neither is a failure of the rank."""
    result = run(
        """
import multiprocessing

def fail():
    raise ValueError('in the child')

def fail_in_a_thread():
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()

thread = threading.Thread(target=sys.exit, args=(5,))
thread.start()
thread.join()
child = multiprocessing.get_context('fork').Process(target=fail_in_a_thread)
child.start()
child.join()
comm.Barrier()
print('done', comm.rank)
""",
        ranks=2,
    )
    assert result.stderr.count("ValueError: in the child") == 2
    assert "the job ends" not in result.stderr
    assert result.stdout.count("done") == 2, result.stderr


def test_rank_that_sleeps_is_named_by_all_others() -> None:
    result = run(
        """
try:
    if comm.rank == 1:
        time.sleep(6)
    request = comm.Iallreduce(ones, ones.clone())
    request.wait()
except StalledError as error:
    print('late:', error.waiting_for, error.operation, flush=True)
    request.wait(timeout=30)
comm.Barrier()
"""
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("late: (1,) Allreduce") == RANKS - 1


def test_rank_that_sleeps_for_ever_ends_the_job() -> None:
    result = run("if comm.rank == 1: time.sleep(600)\ncomm.Allreduce(ones, ones.clone())\n")
    check_ended_badly(result)
    assert "StalledError: Allreduce must end within 3 s" in result.stderr
    assert f"of {RANKS} waits for rank 1." in result.stderr


def test_killed_rank_ends_the_job() -> None:
    result = run(
        "if comm.rank == 1: os.kill(os.getpid(), signal.SIGKILL)\ncomm.Allreduce(ones, ones.clone())\n"
    )
    check_ended_badly(result)


def test_stopped_rank_is_named_and_the_job_ends() -> None:
    script = (
        PREPARE
        + "print('ready', flush=True)\nwhile True: comm.Allreduce(ones, ones.clone()); time.sleep(0.01)\n"
    )
    with Launched(RANKS, script, env={"HPCPAR_TIMEOUT_S": "4"}, timeout_s=SOON_S) as job:
        job.wait_for_output(r"(?s)(ready.*){3}")
        job.signal_rank(1, signal.SIGSTOP)
        result = job.wait()
    check_ended_badly(result)
    assert "StalledError: Allreduce must end within 4 s" in result.stderr
    assert f"of {RANKS} waits for rank 1." in result.stderr


def test_rank_that_exits_early_with_a_status_ends_the_job() -> None:
    result = run("if comm.rank == 1: sys.exit(3)\ncomm.Allreduce(ones, ones.clone())\n")
    check_ended_badly(result)
    assert "rank 1" in result.stderr


def test_rank_that_vanishes_ends_the_job() -> None:
    """Without a chance for Python to say anything; the launcher notices."""
    result = run("if comm.rank == 1: os._exit(3)\ncomm.Allreduce(ones, ones.clone())\n")
    check_ended_badly(result)


def test_launcher_of_another_mpi_is_named(other_launcher: Launcher, tmp_path: Path) -> None:
    script, output = tmp_path / "script.py", tmp_path / "output"
    script.write_text("import hpcpar\nhpcpar.comm.world()\nprint('went on')\n")
    command = other_launcher.command(2, [sys.executable, str(script)])
    with open(output, "w") as stream:
        job = Job(command, env=other_launcher.environment(), stdout=stream, stderr=stream)
    with job:
        ended = job.wait(SOON_S)
    text = output.read_text()
    assert ended, text
    assert job.process.returncode != 0, text
    assert "LauncherError: the launcher must belong to the MPI library that Python uses" in text
    assert "went on" not in text


@pytest.fixture
def other_launcher() -> Launcher:
    """The launcher of an environment beside ours, with another MPI."""
    environment = Path(sys.executable).parent.parent
    for python in sorted(environment.parent.glob(".venv*/bin/python")):
        if (python.parent / "mpirun").exists():
            launcher = find_launcher(str(python))
            if launcher.is_openmpi != find_launcher().is_openmpi:
                return launcher
    pytest.skip("no other MPI beside this environment")


def test_world_shares_the_cores_among_the_ranks() -> None:
    script = """
import os, sys, torch
if len(sys.argv) > 1:
    os.environ.pop('OMP_NUM_THREADS')
import hpcpar
before = torch.get_num_threads()
comm = hpcpar.comm.world()
print('changed', torch.get_num_threads() - before)
cores = os.sched_getaffinity(0)
sharers = sum(bool(cores & others) for others in comm.allgather(cores))
print('threads', torch.get_num_threads(), max(1, len(cores) // sharers))
"""
    result = launch(2, script, "unset")
    threads = re.findall(r"threads (\d+) (\d+)", result.stdout)
    assert len(threads) == 2, result.stderr
    assert all(got == share for got, share in threads)
    for asked in ("1", "2"):
        result = launch(2, script, env={"OMP_NUM_THREADS": asked})
        assert result.stdout.count("changed 0") == 2, result.stderr


def test_process_of_one_rank_fails_as_python_does() -> None:
    result = launch(1, "import hpcpar\nhpcpar.comm.world()\nraise SystemExit(4)\n")
    assert result.returncode == 4
    result = launch(1, "import hpcpar\nhpcpar.comm.world()\nraise ValueError('plain')\n")
    assert result.returncode == 1
    assert "the job ends" not in result.stderr
    assert "ValueError: plain" in result.stderr


def test_dropped_work_does_not_delay_the_exit() -> None:
    result = run(
        """
comm.Irecv(ones.clone(), source=(comm.rank + 1) % comm.size)
other = comm.Iallreduce(torch.ones(9).half(), torch.ones(9).half())
del other
""",
        timeout_s="600",
    )
    assert result.returncode == 0, result.stderr


def test_failed_exit_of_one_rank_ends_the_job_with_its_status() -> None:
    result = run("if comm.rank == 1: sys.exit(3)\ncomm.Allreduce(ones, ones.clone())\n", timeout_s="600")
    check_ended_badly(result)
    assert f"rank 1 of {RANKS} left with exit status 3" in result.stderr
    assert result.returncode == 3


def test_failed_exit_of_all_ranks_is_no_news() -> None:
    result = run("sys.exit(2)\n", timeout_s="600")
    assert result.returncode == 2
    assert "hpcpar:" not in result.stderr


def test_rank_that_waits_for_others_to_end_says_so() -> None:
    result = run("if comm.rank == 1: time.sleep(6)\n", timeout_s="2")
    assert result.returncode == 0, result.stderr
    assert f"rank 0 of {RANKS} has ended and waits" in result.stderr
