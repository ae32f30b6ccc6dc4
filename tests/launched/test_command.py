"""The command under ``mpirun``: one voice, the launcher's mistakes, and ranks that hang."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.broken_setups import SETUPS, faults, lacking, run
from tests.launching import LaunchResult, launch

COMMANDS = """
import sys
from hpcpar.cli.main import main
main(sys.argv[1:])
"""
WATCHED = """
import os, signal, sys, time
from hpcpar.cli.session import watched
with watched(float(sys.argv[1]), "doctor") as watcher:
    watcher.expect("it was the test")
    if sys.argv[2] == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(600)
"""


def hpcpar(ranks: int, *arguments: str, env: dict[str, str] | None = None) -> LaunchResult:
    return launch(ranks, COMMANDS, *arguments, env=env, timeout_s=100.0)


def test_info_is_one_object_about_all_ranks() -> None:
    result = hpcpar(3, "info", "--json", env={"HPCPAR_RANKS_PER_NODE": "2"})
    assert result.returncode == 0, result.stderr
    content = json.loads(result.stdout)
    assert [facts["mpi"]["rank"] for facts in content["ranks"]] == [0, 1, 2]
    assert content["nodes"] == [0, 0, 1]
    assert [facts["sharer"] for facts in content["ranks"]] == [0, 0, 0]


def test_doctor_finds_nothing_wrong_and_measures(tmp_path: Path) -> None:
    result = hpcpar(2, "doctor", "--json", "--folder", str(tmp_path))
    content = json.loads(result.stdout)
    errors = [finding for finding in content["findings"] if finding["severity"] == "error"]
    assert errors == [] and result.returncode == 0, result.stderr
    checks = {finding["check"]: finding["severity"] for finding in content["findings"]}
    assert checks["launcher.starts"] == checks["storage.writable"] == checks["network.memory"] == "ok"
    assert "doctor.facts" not in checks
    assert [message["nbytes"] for message in content["messages"]] == [8, 1 << 20, 8 << 20]
    assert content["memcpy_bytes_per_s"] > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["binding", "launcher-2", "launcher-late"])
def test_broken_job_is_explained_once(name: str) -> None:
    lack = lacking(SETUPS[name])
    if lack is not None:
        pytest.skip(f"needs {lack}")
    _, words, status = run(SETUPS[name])
    assert faults(SETUPS[name], words, status) == [], words


@pytest.mark.large
@pytest.mark.parametrize("name", sorted(SETUPS))
def test_every_broken_set_up_is_recognised(name: str) -> None:
    test_broken_job_is_explained_once(name)


def test_watcher_ends_a_process_that_hangs_and_speaks_for_one_that_dies() -> None:
    late = _python(WATCHED, "0.1", "hang")
    assert late.returncode == -9 and "not finished after 0.1 s" in late.stderr
    dead = _python(WATCHED, "0", "die")
    assert dead.returncode == -11 and "hpcpar doctor: error: it was the test" in dead.stderr


def _python(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60
    )
