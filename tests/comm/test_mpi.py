"""The stand-in for mpi4py.MPI and the check of the launcher; nothing here starts MPI."""

from __future__ import annotations

import inspect
import multiprocessing
from typing import Any

import pytest

from hpcpar.comm import mpi
from hpcpar.comm.mpi import check_launcher
from hpcpar.errors import LauncherError, TopologyError

MATCHING = [
    (1, {}),
    (4, {}),
    (4, {"OMPI_COMM_WORLD_SIZE": "4"}),
    (4, {"PMI_SIZE": "4"}),
    (1, {"PMI_SIZE": "1"}),
    (1, {"OMPI_COMM_WORLD_SIZE": "1"}),
    (8, {"PMI_SIZE": "4"}),  # spawned, or a bigger world than the launcher said: no reason to stop
    (1, {"SLURM_NTASKS": "16"}),  # a batch script, not started by srun
    (4, {"OMPI_COMM_WORLD_SIZE": "4", "SLURM_NTASKS": "16", "SLURM_STEP_ID": "0"}),
    (1, {"PMI_SIZE": "1", "SLURM_NTASKS": "16", "SLURM_STEP_ID": "0"}),  # mpirun inside of Slurm
    (16, {"SLURM_NTASKS": "16", "SLURM_STEP_ID": "0"}),
    (1, {"PMI_SIZE": "many"}),
    (1, {"PMI_SIZE": "4", "HPCPAR_SKIP_LAUNCHER_CHECK": "1"}),
]
FOREIGN = [
    {"OMPI_COMM_WORLD_SIZE": "4"},
    {"PMI_SIZE": "4"},
    {"SLURM_STEP_NUM_TASKS": "4"},
    {"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"},
    {"OMPI_COMM_WORLD_SIZE": "4", "SLURM_NTASKS": "1", "SLURM_STEP_ID": "0"},
]


@pytest.mark.parametrize(("size", "environment"), MATCHING)
def test_launcher_of_this_mpi_passes(size: int, environment: dict[str, str]) -> None:
    check_launcher(size, environment)


@pytest.mark.parametrize("environment", FOREIGN)
def test_launcher_of_another_mpi_is_told_apart(environment: dict[str, str]) -> None:
    with pytest.raises(LauncherError, match=r"got 4 processes by \w+ but a world of 1 rank") as caught:
        check_launcher(1, environment)
    assert "mpirun of the MPI library that Python uses" in str(caught.value)
    assert isinstance(caught.value, TopologyError)


def test_environment_of_the_process_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "HPCPAR_SKIP_LAUNCHER_CHECK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PMI_SIZE", "3")
    with pytest.raises(LauncherError, match="got 3 processes by PMI_SIZE"):
        check_launcher(1)


def test_looking_at_the_stand_in_does_not_start_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    def start() -> None:
        raise AssertionError("MPI was started")

    monkeypatch.setattr(mpi, "_start", start)
    stand_in = type(mpi.MPI)()
    assert inspect.unwrap(stand_in) is stand_in
    assert not hasattr(stand_in, "__test__")
    assert not hasattr(stand_in, "__path__")
    with pytest.raises(AssertionError):
        stand_in.SUM  # noqa: B018


def use_mpi(answers: Any) -> None:
    try:
        _ = mpi.MPI.COMM_WORLD
    except LauncherError as error:
        answers.put(str(error))
    else:
        answers.put("started")


def test_child_of_a_rank_must_not_take_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMI_SIZE", "2")
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    child = context.Process(target=use_mpi, args=(answers,), name="reader")
    child.start()
    answer = answers.get(timeout=60)
    child.join(60)
    assert "got 'reader', a child that one has started" in answer
    assert "if __name__ == '__main__'" in answer
