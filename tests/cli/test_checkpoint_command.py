"""``hpcpar checkpoint``: tables, figures for programs, exit statuses, files for others."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner, Result

from hpcpar.checkpoint import PerRank, save
from hpcpar.cli.checkpoint import checkpoint
from hpcpar.cli.main import main

pytestmark = pytest.mark.local


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["checkpoint", *map(str, arguments)], prog_name="hpcpar")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    state = {"model": {"weight": torch.ones(2, 3).bfloat16()}, "epoch": 7, "rank": PerRank(0)}
    return save(tmp_path / "run", state).wait()


def test_command_is_one_of_hpcpar() -> None:
    assert main.get_command(click.Context(main), "checkpoint") is checkpoint


def test_info_shows_a_table(folder: Path) -> None:
    result = run("info", folder)
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["model.weight", "bfloat16", "2", "×", "3", "12", "B", "all"] in rows
    assert ["epoch", "int", "7", "all"] in rows and ["rank", "int", "0", "0"] in rows
    assert "by 1 rank(s)" in result.stdout and torch.__version__ in result.stdout


def test_info_for_programs(folder: Path) -> None:
    found = json.loads(run("info", folder, "--json").stdout)
    assert found["ranks"] == 1 and found["path"] == str(folder)
    assert [entry["name"] for entry in found["entries"]] == ["model.weight", "epoch", "rank"]


def test_verify_tells_by_its_status_and_names_the_file(folder: Path) -> None:
    assert run("verify", folder).exit_code == 0
    assert json.loads(run("verify", folder, "--json").stdout)["whole"] is True
    data = next(folder.glob("*.h5"))
    data.write_bytes(data.read_bytes()[:-1])
    result = run("verify", folder)
    assert result.exit_code == 1 and data.name in result.stderr
    result = run("verify", folder, "--json")
    assert result.exit_code == 1 and data.name in json.loads(result.stdout)["problem"]


def test_export_writes_what_safetensors_reads(folder: Path, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    result = run("export", folder, tmp_path / "model.safetensors", "--prefix", "model.")
    assert result.exit_code == 0 and "1 tensor(s)" in result.stdout
    assert torch.equal(
        safetensors.load_file(tmp_path / "model.safetensors")["weight"], torch.ones(2, 3).bfloat16()
    )


def test_export_without_the_package_says_what_to_install(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    result = run("export", folder, tmp_path / "model.safetensors")
    assert result.exit_code == 2 and "pip install safetensors" in result.stderr


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    result = run("info", tmp_path / "nothing")
    assert (
        result.exit_code == 2 and len(result.stderr.splitlines()) == 1 and "no such folder" in result.stderr
    )
