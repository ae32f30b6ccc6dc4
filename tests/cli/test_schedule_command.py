"""``hpcpar schedule``: figures for people and programs, files, and one line for every mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hpcpar.cli.main import main
from hpcpar.nn.pipeline.builders import build_schedule
from hpcpar.nn.pipeline.schedule import Schedule

pytestmark = pytest.mark.local


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["schedule", *map(str, arguments)], prog_name="hpcpar")


def figures(*arguments: object) -> dict[str, object]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    answer: dict[str, object] = json.loads(result.stdout)
    return answer


def test_report_shows_figures_and_chart() -> None:
    result = run("--ranks", 4, "--microbatches", 8, "--width", 60)
    assert result.exit_code == 0
    assert "1f1b, 4 rank(s), 4 stage(s), 8 microbatch(es)" in result.stdout
    assert "makespan          33 s" in result.stdout
    assert "ideal             24 s" in result.stdout
    assert "bubble            27.3 %" in result.stdout
    assert "peak activations  4 3 2 1" in result.stdout
    assert [line[:8] for line in result.stdout.splitlines() if line.startswith("rank")] == [
        f"rank {rank} |" for rank in range(4)
    ]
    assert all(len(line) <= 60 for line in result.stdout.splitlines() if line.startswith("rank"))


def test_json_has_the_figures_and_the_actions() -> None:
    answer = figures("--ranks", 2, "--microbatches", 3, "--schedule", "zero_bubble")
    assert (answer["makespan_s"], answer["ideal_s"], answer["peak_activations"]) == (10, 9, [2, 2])
    assert answer["bubble"] == pytest.approx(0.1)
    assert Schedule(answer["actions"]) == build_schedule("zero_bubble", 2, 3)  # type: ignore[arg-type]


def test_stages_are_ranks_times_chunks() -> None:
    answer = figures("--stages", 8, "--chunks", 2, "--microbatches", 4, "--schedule", "interleaved")
    assert (answer["ranks"], answer["stages"], answer["placement"]) == (4, 8, [0, 1, 2, 3] * 2)


def test_costs_are_per_stage_where_they_have_commas() -> None:
    costs = ["--forward", "1,2", "--backward-input", 3, "--backward-weight", "1,0", "--message", 0.5]
    assert figures("--ranks", 2, "--microbatches", 2, *costs)["makespan_s"] == 16


def test_limit_of_zero_bubble_is_passed_on() -> None:
    answer = figures("--ranks", 4, "--microbatches", 8, "--schedule", "zero_bubble", "--max-in-flight", 2)
    assert answer["peak_activations"] == [2, 2, 2, 2]


def test_files_are_written_and_a_table_is_read_back(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    table, trace, picture = tmp_path / "s.csv", tmp_path / "t.json", tmp_path / "t.png"
    written = ["--csv", table, "--chrome", trace, "--picture", picture]
    first = figures("--ranks", 3, "--microbatches", 4, "--schedule", "zero_bubble", *written)
    assert Schedule.from_csv(table) == build_schedule("zero_bubble", 3, 4)
    assert len(json.loads(trace.read_text())["traceEvents"]) == 3 + 3 * 3 * 4
    assert picture.read_bytes().startswith(b"\x89PNG")
    second = figures("--file", table, "--ranks", 3, "--stages", 3, "--microbatches", 4)
    assert second == {**first, "schedule": "s"}


MISTAKES = {
    "no size": (["--microbatches", "4"], "--ranks or --stages must be given"),
    "no microbatches": (["--ranks", "4"], "--microbatches must be given"),
    "zero ranks": (["--ranks", "0", "--microbatches", "4"], "--ranks"),
    "not divisible": (
        ["--stages", "5", "--chunks", "2", "--microbatches", "4"],
        "must be a multiple of --chunks",
    ),
    "contradiction": (
        ["--stages", "5", "--ranks", "2", "--microbatches", "4"],
        "must be ranks times chunks, 2",
    ),
    "unknown schedule": (["--ranks", "2", "--microbatches", "4", "--schedule", "x"], "zero_bubble"),
    "unknown option": (["--rank", "2"], "--rank"),
    "cost is no number": (
        ["--ranks", "2", "--microbatches", "4", "--forward", "1,x"],
        "one per stage as in 1,1,2",
    ),
    "negative cost": (["--ranks", "2", "--microbatches", "4", "--message", "-1"], "message must be"),
    "costs of other stages": (
        ["--ranks", "2", "--microbatches", "4", "--forward", "1,2,3"],
        "one number per stage",
    ),
    "memory": (["--ranks", "4", "--microbatches", "4", "--max-activations", "2"], "rank 0 must hold"),
    "limit of another": (
        ["--ranks", "4", "--microbatches", "4", "--max-in-flight", "2"],
        "left out with 1f1b",
    ),
    "missing file": (["--file", "/nowhere/s.csv"], "/nowhere/s.csv must be a readable file"),
    "file and name": (["--file", "/nowhere/s.csv", "--schedule", "1f1b"], "--schedule must be left out"),
    "unwritable": (["--ranks", "2", "--microbatches", "4", "--csv", "/nowhere/s.csv"], "/nowhere/s.csv"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_gives_one_line_and_status_2(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("hpcpar")
    assert message in result.stderr


def test_table_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("0F0,0B0\n1F0,1G0\n")
    assert "column 2 in row 2" in run("--file", tmp_path / "s.csv").stderr
    (tmp_path / "s.csv").write_text("0F0,0B0\n1F0,1B0\n")
    assert run("--file", tmp_path / "s.csv").exit_code == 0
    for option in ("--ranks", "--stages", "--microbatches"):
        assert "got" in run("--file", tmp_path / "s.csv", option, 3).stderr


def test_help_lists_the_options_and_ends_well() -> None:
    result = CliRunner().invoke(main, ["schedule", "--help"])
    assert result.exit_code == 0
    assert all(option in result.stdout for option in ("--max-activations", "--picture", "--file", "--width"))
    assert "schedule" in CliRunner().invoke(main, []).stdout
