"""What the watchers of a job know of each other, and what the first one says of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hpcpar.cli.control_groups import read_cpu_quota, read_memory_limit
from hpcpar.cli.doctor.settings import KNOWN
from hpcpar.cli.watcher import Record, explain_end, explain_lateness

pytestmark = pytest.mark.local


def record(rank: int, **changes: object) -> Record:
    """A rank of three on one machine, in the middle of its work."""
    facts = {"rank": rank, "size": 3, "local_size": 3, "host": "n1", "pid": 0, "phase": "messages", "step": 4}
    texts = {"words": "a fault inside MPI", "failure": "", "problem": "", "memory": "26"}
    return {**facts, **texts, "tidy": [], "ended": None, "by_launcher": False, "gone": False, **changes}


def records(**changes: object) -> dict[int, Record]:
    """Three, the second of which is changed."""
    return {0: record(0), 1: record(1, **changes), 2: record(2)}


def test_rank_that_never_came_is_named() -> None:
    late = explain_lateness(record(0), {0: record(0), 1: record(1)}, 10)
    assert "not finished after 10 s: rank 2 never came as far as hpcpar" in late and "firewall" not in late


@pytest.mark.parametrize(
    ("changes", "phrase"),
    [
        ({"step": 3, "phase": "MPI's start"}, "rank 1 of 3 on n1 is still in MPI's start"),
        ({"failure": "RuntimeError: boom"}, "rank 1 of 3 on n1 failed in messages: RuntimeError: boom"),
        ({"gone": True}, "rank 1 of 3 on n1 has left"),
        ({"memory": "31"}, "different /dev/shm"),
        ({}, "firewall"),
    ],
)
def test_rank_that_is_waited_for_is_named(changes: dict[str, object], phrase: str) -> None:
    assert phrase in explain_lateness(record(0), records(**changes), 10)


def test_rank_that_died_first_is_named() -> None:
    everyone = records(ended=5.0)
    everyone[0].update(ended=5.1)
    text = explain_end(everyone[0], everyone)
    assert "rank 0 of 3 on n1 was ended by the launcher, since rank 1 of 3 on n1 died in messages" in text


def test_rank_that_died_by_itself_says_what_it_expected() -> None:
    own = record(0, ended=5.0)
    assert explain_end(own, {**records(ended=5.1), 0: own}) == "a fault inside MPI"


def test_launcher_that_ends_a_job_for_a_rank_elsewhere_is_not_blamed_on_mpi() -> None:
    text = explain_end(record(0, ended=5.0, by_launcher=True), {})
    assert "ended by the launcher in messages, probably since another rank died" in text


def test_rank_without_mpi_is_the_cause() -> None:
    assert "since rank 1 of 3 on n1 has no MPI: no mpi4py" in explain_end(
        record(0, ended=5.0), records(problem="no mpi4py", gone=True)
    )


def test_limits_of_outer_control_groups_count(tmp_path: Path) -> None:
    inner = tmp_path / "job" / "step" / "task"
    inner.mkdir(parents=True)
    for folder, limit, used in (
        (inner, "max", 10),
        (inner.parent, "4000", 100),
        (tmp_path / "job", "5000", 4700),
    ):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
    (tmp_path / "job" / "memory.stat").write_text("anon 4200\ninactive_file 500\n")
    (inner / "cpu.max").write_text("max 100000\n")
    (tmp_path / "job" / "cpu.max").write_text("250000 100000\n")
    table = tmp_path / "cgroup"
    table.write_text("0::/job/step/task\n")
    assert read_memory_limit(tmp_path, table) == (4000, 800)
    assert read_cpu_quota(tmp_path, table) == 2.5


def test_every_variable_that_is_read_is_known() -> None:
    package = Path(__file__).resolve().parents[2] / "hpcpar"
    found = {
        name
        for path in package.rglob("*.py")
        for name in re.findall(r"HPCPAR_[A-Z_]+[A-Z]", path.read_text())
    }
    assert found <= {*KNOWN, "HPCPAR_TEST"} | {name for name in found if name.startswith("HPCPAR_TEST")}
