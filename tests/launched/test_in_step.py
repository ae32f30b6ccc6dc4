"""The test run itself: a test that fails or hangs on one rank does so on all, and the run ends."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import pytest

from tests.launching import Job, LaunchResult, find_launcher

TESTS = Path(__file__).resolve().parent.parent


def run_pytest(folder: Path, source: str, *, ranks: int = 2) -> LaunchResult:
    """Run a test file under our conftest.py on some ranks."""
    shutil.copy(TESTS / "conftest.py", folder / "conftest.py")
    (folder / "test_it.py").write_text(
        "import pytest, time\nfrom mpi4py import MPI\nrank = MPI.COMM_WORLD.rank\n" + source
    )
    marker = "timeout_s(seconds): as in the real one"
    (folder / "pytest.ini").write_text(f"[pytest]\naddopts = -p no:cacheprovider\nmarkers =\n    {marker}\n")
    command = find_launcher().command(
        ranks, [sys.executable, "-m", "pytest", "-v", "--tb=short", str(folder)]
    )
    outputs = folder / "stdout", folder / "stderr"
    with open(outputs[0], "w") as stdout, open(outputs[1], "w") as stderr:
        job = Job(command, env=find_launcher().environment(), stdout=stdout, stderr=stderr, cwd=folder)
    with job:
        ended = job.wait(80.0)
        duration_s = time.monotonic() - job.started_s
    texts = [path.read_text(errors="replace") for path in outputs]
    return LaunchResult(job.process.returncode, *texts, duration_s, not ended)


def test_failure_on_one_rank_is_a_failure_on_all(tmp_path: Path) -> None:
    result = run_pytest(
        tmp_path,
        "def test_a():\n    assert rank != 1, 'only here'\ndef test_b():\n    MPI.COMM_WORLD.Barrier()\n",
    )
    assert not result.timed_out
    assert result.returncode != 0
    assert result.stdout.count("1 failed, 1 passed") == 2
    assert "failed on rank 1: AssertionError: only here" in result.stdout


def test_failure_in_setup_on_one_rank_keeps_all_from_the_test(tmp_path: Path) -> None:
    result = run_pytest(
        tmp_path,
        "@pytest.fixture\ndef broken():\n    assert rank != 0\n"
        "def test_a(broken):\n    MPI.COMM_WORLD.Barrier()\n"
        "def test_b():\n    if rank == 1:\n        pytest.skip('no device')\n",
    )
    assert not result.timed_out
    assert result.stdout.count("1 skipped, 1 error") == 2
    assert "on rank 1: Skipped: no device" in result.stdout


def test_hang_on_one_rank_ends_the_run_with_all_stacks(tmp_path: Path) -> None:
    result = run_pytest(
        tmp_path,
        "def rank_that_hangs():\n    MPI.COMM_WORLD.Recv(bytearray(1), source=1)\n"
        "def rank_that_fails():\n    assert False, 'this is why'\n"
        "@pytest.mark.timeout_s(7)\n"
        "def test_a():\n    [rank_that_hangs, rank_that_fails][rank]()\n",
    )
    assert not result.timed_out
    assert result.returncode != 0
    assert "in rank_that_hangs" in result.stderr
    assert "in _exchange" in result.stderr  # the other rank, waiting for agreement
    assert "this is why" in result.stderr  # and it has said what it knows


def test_ranks_that_collect_different_tests_stop_at_once(tmp_path: Path) -> None:
    result = run_pytest(tmp_path, "if rank == 0:\n    def test_a():\n        MPI.COMM_WORLD.Barrier()\n")
    assert not result.timed_out
    assert result.returncode != 0
    assert (
        "all ranks must collect the same tests, got rank 0: 1 (0 errors), rank 1: 0 (0 errors)"
        in result.stdout
    )


@pytest.mark.parametrize("phase", ["collection", "test"])
def test_interrupt_on_one_rank_ends_the_run(tmp_path: Path, phase: str) -> None:
    interrupt = "if rank == 1: raise KeyboardInterrupt\n"
    source = (
        interrupt
        if phase == "collection"
        else f"def test_a():\n    {interrupt}    MPI.COMM_WORLD.Barrier()\n"
    )
    result = run_pytest(tmp_path, source)
    assert not result.timed_out
    assert result.returncode != 0
