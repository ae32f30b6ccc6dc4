"""Job scripts: requests are checked against a site's nodes, and what is written parses and is what ships."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hpcpar.cli.main import main
from hpcpar.errors import HpcparError
from hpcpar.jobs.scripts import JobRequest, seconds_of, write_script
from hpcpar.jobs.sites import SITES, find_site

pytestmark = pytest.mark.local

JOBS = Path(__file__).resolve().parents[2] / "jobs"
SCRIPTS = sorted(path for path in JOBS.rglob("*") if path.suffix in (".sbatch", ".sh"))
TEMPLATES = sorted((JOBS / "sites").glob("*.sbatch"))
COMMAND = ("python", "train.py")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["job", *map(str, arguments)], prog_name="hpcpar")


def directives(text: str) -> dict[str, str]:
    """The ``#SBATCH`` lines as a dict; flags have an empty value."""
    lines = (line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH "))
    return dict(line.partition("=")[::2] for line in lines)


def parses(text: str) -> bool:
    return subprocess.run(["bash", "-n"], input=text, text=True, timeout=30).returncode == 0


# ---- the scripts that ship ---------------------------------------------------------------------------------


def test_every_script_parses_and_stops_at_mistakes() -> None:
    assert len(SCRIPTS) >= 8 + len(SITES)
    for path in SCRIPTS:
        text = path.read_text()
        assert parses(text), path
        assert text.startswith("#!/bin/bash\n") and "\nset -euo pipefail" in text, path


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_template_is_what_its_command_writes(path: Path) -> None:
    text = path.read_text()
    made_by = next(line for line in text.splitlines() if line.startswith("# Made by: "))
    words = shlex.split(made_by.removeprefix("# Made by: "))
    assert words[:2] == ["hpcpar", "job"]
    assert run(*words[2:]).stdout == text


def test_there_is_a_template_for_each_kind_of_node() -> None:
    pages = {kind.page for site in SITES.values() for kind in (site.cpu, site.gpu) if kind}
    texts = "".join(path.read_text() for path in TEMPLATES)
    assert all(page in texts for page in pages)
    assert {path.stem.partition("_")[0] for path in TEMPLATES} == set(SITES)


def test_the_table_of_the_folder_names_every_script() -> None:
    readme = (JOBS / "README.md").read_text()
    assert [path.name for path in SCRIPTS if path.parent == JOBS and f"`{path.name}`" not in readme] == []


# ---- what is written ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_script_of_every_site_parses_and_asks_for_what_was_requested(name: str, launcher: str) -> None:
    site = SITES[name]
    for kind in filter(None, (site.cpu, site.gpu)):
        gpus = 0 if kind is site.cpu else (kind.gpus or 2)
        request = JobRequest(
            COMMAND,
            nodes=3,
            ranks_per_node=gpus or 4,
            gpus_per_node=gpus,
            account="p1",
            requeue=True,
            array="0-3%2",
            launcher=launcher,
        )
        text = write_script(site, request)
        assert parses(text), text
        found = directives(text)
        assert (found["nodes"], found["ntasks-per-node"], found["array"]) == ("3", str(gpus or 4), "0-3%2")
        assert found["signal"] == "B:USR1@120" and "requeue" in found
        assert ("gpus-per-node" in found or "gres" in found) is bool(gpus)
        assert kind.page in text and "%A_%a" in found["output"]
        started = next(line for line in text.splitlines() if line.startswith(launcher + " "))
        assert started.endswith("python train.py &")


def test_cores_are_divided_and_counted_as_the_site_counts_them() -> None:
    cases = {
        ("perlmutter", 8, 0): ("32", "16"),  # hardware threads, threads of a rank
        ("perlmutter", 4, 4): ("32", "16"),
        ("perlmutter", 2, 2): ("32", "16"),  # the other two GPUs keep their cores
        ("frontier", 8, None): ("7", "7"),
        ("archer2", 16, None): ("8", "8"),
        ("juwels", 4, 4): ("12", "12"),
        ("generic", 5, None): ("1", "1"),
    }
    for (name, ranks, gpus), (cpus, threads) in cases.items():
        request = JobRequest(COMMAND, ranks_per_node=ranks, gpus_per_node=gpus, account="p1")
        text = write_script(find_site(name), request)
        assert directives(text)["cpus-per-task"] == cpus, name
        assert f"export OMP_NUM_THREADS={threads}\n" in text, name


def test_masks_bind_each_rank_to_the_cores_next_to_its_gpu() -> None:
    request = JobRequest(COMMAND, ranks_per_node=2, gpus_per_node=2, account="p1", cpus_per_rank=3)
    masks = write_script(find_site("lumi"), request).partition("mask_cpu:")[2].split()[0].split(",")
    cores = [[core for core in range(64) if int(mask, 16) >> core & 1] for mask in masks]
    assert cores == [[49, 50, 51], [57, 58, 59]]


def test_words_of_the_command_arrive_as_they_were() -> None:
    words = ["python", "train.py", "--title", "two words; $HOME 'quoted'", ""]
    text = run("--launcher", "mpirun", "--", *words).stdout
    line = next(line for line in text.splitlines() if line.startswith("mpirun"))
    printed = subprocess.run(
        ["bash", "-c", f"mpirun() {{ shift 2; printf '%s\\0' \"$@\"; }}\nSLURM_NTASKS=1\n{line}"],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert printed.stdout.split("\0")[:-1] == words


def test_nothing_waits_for_signals_unless_wanted() -> None:
    plain, signalled = run("--", *COMMAND).stdout, run("--signal-before", 60, "--", *COMMAND).stdout
    assert "trap" not in plain and "signal" not in directives(plain)
    assert directives(signalled)["signal"] == "B:USR1@60"
    assert "trap" in signalled and "requeue" not in signalled and signalled.endswith('exit "$status"\n')


def test_script_goes_to_a_file_or_to_the_screen(tmp_path: Path) -> None:
    path = tmp_path / "job.sbatch"
    shown = run("--nodes", 2, "--", *COMMAND).stdout
    written = run("--nodes", 2, "--output", path, "--", *COMMAND)
    assert written.exit_code == 0 and f"sbatch {path}" in written.stdout
    assert path.read_text() == shown


# ---- mistakes ----------------------------------------------------------------------------------------------

MISTAKES = {
    "no command": ([], "command must be a program"),
    "time": (["--time", "120", "--", "x"], "time must be hours:minutes:seconds"),
    "short": (["--time", "00:00:10", "--", "x"], "at least a minute"),
    "signal after the end": (
        ["--time", "00:01:00", "--signal-before", "60", "--", "x"],
        "less than the time",
    ),
    "unknown site": (["--site", "moon", "--", "x"], "perlmutter"),
    "no account": (["--site", "lumi", "--", "x"], "account must be given on LUMI"),
    "too long": (
        ["--site", "archer2", "--account", "a", "--time", "25:00:00", "--", "x"],
        "at most 24 hours",
    ),
    "too many ranks": (
        ["--site", "archer2", "--account", "a", "--ranks-per-node", "129", "--", "x"],
        "at most the node's 128 cores",
    ),
    "too many cores": (
        ["--site", "archer2", "--account", "a", "--ranks-per-node", "16", "--cpus-per-rank", "9", "--", "x"],
        "must be at most 128, the node's cores, got 9 x 16",
    ),
    "too many GPUs": (
        ["--site", "juwels", "--account", "a", "--gpus-per-node", "8", "--", "x"],
        "0 to 4 on JUWELS",
    ),
    "no such GPUs": (["--site", "archer2", "--account", "a", "--gpus-per-node", "1", "--", "x"], "no GPUs"),
    "only GPUs": (
        ["--site", "frontier", "--account", "a", "--gpus-per-node", "0", "--", "x"],
        "only nodes with",
    ),
    "ranks and GPUs": (
        ["--gpus-per-node", "4", "--ranks-per-node", "2", "--", "x"],
        "must equal gpus_per_node",
    ),
    "more cores than next to a GPU": (
        "--site lumi --account a --gpus-per-node 2 --ranks-per-node 2 --cpus-per-rank 8 -- x".split(),
        "at most 7",
    ),
    "name": (["--name", "two words", "--", "x"], "name must be one word"),
    "account with a directive": (["--account", "a\n#SBATCH -x", "--", "x"], "account must be one word"),
    "array": (["--array", "1..4", "--", "x"], "array must be like 0-9"),
    "unwritable": (["--output", "/nowhere/job.sbatch", "--", "x"], "/nowhere/job.sbatch"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_gives_one_line_and_status_2(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("hpcpar")
    assert message in result.stderr


def test_requests_from_python_are_checked_too() -> None:
    for request in (JobRequest(COMMAND, nodes=0), JobRequest(COMMAND, launcher="ssh"), JobRequest(())):
        with pytest.raises(HpcparError, match="must"):
            write_script(find_site("generic"), request)
    with pytest.raises(HpcparError, match="site must be one of"):
        find_site("moon")


def test_time_limits_are_understood() -> None:
    assert seconds_of("00:01:00") == 60
    assert seconds_of("1-02:03:04") == ((24 + 2) * 60 + 3) * 60 + 4
    for wrong in ("90", "1:2:3", "01:60:00", "1-", "", "01:00"):
        with pytest.raises(HpcparError, match="time must be"):
            seconds_of(wrong)


@pytest.mark.parametrize(
    ("variable", "name"), [("CUDA_VISIBLE_DEVICES", "generic"), ("ROCR_VISIBLE_DEVICES", "lumi")]
)
@pytest.mark.parametrize("number", ["MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK"])
def test_ranks_of_mpirun_take_a_gpu_each(variable: str, name: str, number: str) -> None:
    command = ("printenv", variable)
    request = JobRequest(command, ranks_per_node=4, gpus_per_node=4, account="p1", launcher="mpirun")
    text = write_script(find_site(name), request)
    line = next(line for line in text.splitlines() if line.startswith("mpirun"))
    script = f'mpirun() {{ shift 2; "$@"; }}\nexport {number}=3\n{line}'
    environment = {"PATH": "/usr/bin:/bin", "SLURM_NTASKS": "4"}
    printed = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=30, env=environment
    )
    assert printed.stdout == "3\n"
