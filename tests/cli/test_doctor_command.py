"""``hpcpar doctor``: what it concludes from facts, and the command on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hpcpar.cli.doctor.command import CHECKS, examine, report
from hpcpar.cli.doctor.findings import (
    Check,
    Finding,
    JobFacts,
    Severity,
    judge,
    name_ranks,
    warning,
    worst,
)
from hpcpar.cli.doctor.folder_probe import probe
from hpcpar.cli.doctor.gather import look_at_folder
from hpcpar.cli.facts import ProcessFacts
from hpcpar.cli.main import main
from hpcpar.cli.session import fatal_shortage
from tests.cli.doctor_cases import BROKEN, HEALTHY, HYDRA, SOUND, job, link

pytestmark = pytest.mark.local


def problems(facts: JobFacts) -> list[Finding]:
    return [f for f in examine(facts) if f.severity in (Severity.WARNING, Severity.ERROR)]


def only(facts: JobFacts) -> Finding:
    """The one thing that is wrong."""
    found = problems(facts)
    assert len(found) == 1, found
    assert found[0].why and found[0].remedy
    return found[0]


def test_healthy_job_has_no_problems() -> None:
    assert problems(job()) == []
    assert worst(examine(job())) is Severity.OK
    assert report(examine(job()), quiet=True) == "Nothing is wrong."


@pytest.mark.parametrize(("facts", "severity", "check", "phrases"), BROKEN.values(), ids=BROKEN)
def test_broken_set_up_is_explained(facts: JobFacts, severity: str, check: str, phrases: list[str]) -> None:
    finding = only(facts)
    assert (finding.severity.value, finding.check) == (severity, check)
    text = f"{finding.seen} {finding.why} {finding.remedy}"
    assert all(phrase in text for phrase in phrases), text


@pytest.mark.parametrize("facts", SOUND.values(), ids=SOUND)
def test_sound_set_up_is_left_alone(facts: JobFacts) -> None:
    assert problems(facts) == []


def test_speed_is_not_judged_where_ranks_outnumber_cores() -> None:
    crowded = [replace(HEALTHY, cores=(0,), machine_cores=(0,), torch_threads=1)] * 2
    found = problems(job(*crowded, links=[link(0, 1, 5e-3, 1e6)], memcpy_bytes_per_s=1e10))
    assert [finding.check for finding in found] == ["binding.cores"]


def test_check_that_crashes_is_a_finding() -> None:
    def crash(facts: JobFacts) -> list[Finding]:
        raise ZeroDivisionError("nothing left")

    findings = judge([Check("a.b", crash), CHECKS[0]], job())
    assert findings[0].check == "a.b" and findings[0].severity is Severity.WARNING
    assert "ZeroDivisionError: nothing left" in findings[0].seen
    assert len(findings) > 1


def test_facts_of_an_empty_machine_crash_no_check() -> None:
    findings = examine(JobFacts([ProcessFacts()]))
    assert not [finding for finding in findings if "the check itself failed" in finding.seen]


def test_report_shows_the_worst_last_and_counts() -> None:
    findings = [
        Finding(Severity.ERROR, "bad", "because", "do this", "x.bad"),
        Finding(Severity.OK, "good", check="x.good"),
        replace(warning("odd", "so", "that"), check="x.odd"),
    ]
    text = report(findings)
    assert text.index("x.good: good") < text.index("x.odd: odd") < text.index("x.bad: bad")
    assert text.endswith("1 warning(s), 1 error(s)")
    assert "x.good" not in report(findings, quiet=True)


def test_report_shows_the_first_of_many_machines() -> None:
    findings = [Finding(Severity.WARNING, f"n{i} is odd", "so", "that", "x.odd") for i in range(100)]
    text = report(findings)
    assert "n3 is odd" in text and "n4 is odd" not in text
    assert "x.odd: and 96 more like these" in text and text.endswith("100 warning(s)")


def test_many_ranks_are_named_in_short() -> None:
    assert name_ranks([3]) == "rank 3"
    assert name_ranks([0, 1]) == "ranks 0 and 1"
    assert name_ranks(range(64)) == "ranks 0, 1, 2 and 61 more"


def test_mpich_is_not_started_where_its_queues_do_not_fit() -> None:
    small = replace(HEALTHY, shm_total=16 << 20, shm_free=16 << 20)
    assert "needs about 20 MiB" in (fatal_shortage(small) or "")
    assert fatal_shortage(replace(small, shm_free=64 << 20)) is None
    by_open_mpi = replace(HYDRA, family="Open MPI")
    assert fatal_shortage(replace(small, launcher=by_open_mpi)) is None


# ---- folders, for real -------------------------------------------------------------------------------------


def test_folder_is_tried_by_writing_and_locking(tmp_path: Path) -> None:
    written = probe(tmp_path, "token", "write")
    assert written["lock_problem"] is None and "problem" not in written
    assert [path.name for path in tmp_path.iterdir()] == ["token"]
    assert probe(tmp_path, "token", "look")["shared"] is True


def test_folder_that_is_missing_or_without_the_token_is_told(tmp_path: Path) -> None:
    missing = look_at_folder(tmp_path / "no", True, "n1", "token", True)
    assert missing.problem == "No such file or directory (ENOENT)" and missing.shared is None
    alone = look_at_folder(tmp_path, True, "n1", "token", None)
    assert alone.problem is None and alone.shared is None


def test_token_that_does_not_appear_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpcpar.cli.doctor.folder_probe._PATIENCE_S", 0.0)
    assert probe(tmp_path, "token", "look")["shared"] is False


def test_folder_that_does_not_answer_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpcpar.cli.doctor.gather._FOLDER_S", 0.0)
    assert "no answer within" in (look_at_folder(tmp_path, True, "n1", "token", False).problem or "")


# ---- the command -------------------------------------------------------------------------------------------


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["doctor", *arguments], prog_name="hpcpar")


def doctor(*arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PMI", "OMPI_COMM"))}
    return subprocess.run(
        [sys.executable, "-m", "hpcpar", "doctor", *arguments],
        env={**clean, **env},
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_json_of_an_environment_without_mpi4py(tmp_path: Path) -> None:
    (tmp_path / "mpi4py.py").write_text("raise ModuleNotFoundError(\"No module named 'mpi4py'\")\n")
    done = doctor("--json", "--folder", str(tmp_path), env={"PYTHONPATH": f"{tmp_path}:{os.getcwd()}"})
    content = json.loads(done.stdout)
    assert done.returncode == 1, done.stderr
    assert content["status"] == "error" and content["ranks"] == 1
    errors = [finding for finding in content["findings"] if finding["severity"] == "error"]
    assert [finding["check"] for finding in errors] == ["launcher.starts"]
    assert "pip install mpi4py" in errors[0]["remedy"]
    assert not list(tmp_path.glob(".hpcpar*"))


def test_mistake_gives_one_line_and_status_2() -> None:
    result = invoke("--nonsense")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1


def test_mistake_is_reported_by_the_first_rank_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMI_RANK", "1")
    monkeypatch.setenv("PMI_SIZE", "2")
    result = invoke("--nonsense")
    assert (result.exit_code, result.stderr) == (0, "")


def test_help_has_an_example_and_the_exit_status() -> None:
    text = " ".join(invoke("--help").stdout.split())
    assert "Example: mpirun -n 4 hpcpar doctor" in text and "exit status is 0" in text


needs_mounts = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare"
)


@needs_mounts
def test_folder_mounted_read_only_is_an_error(tmp_path: Path) -> None:
    script = Path(probe.__code__.co_filename)
    command = f"mount --bind {tmp_path} {tmp_path} && mount -o remount,ro,bind {tmp_path} && exec "
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f"{command} {sys.executable} -I -S {script} {tmp_path} token write"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    if done.returncode != 0:
        pytest.skip(f"this root may not mount: {done.stderr}")
    assert json.loads(done.stdout)["problem"] == "Read-only file system (EROFS)"
