"""Experts are saved by uid and load on another number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from hpcpar.checkpoint import load_experts, save_experts
from hpcpar.comm import Communicator
from hpcpar.errors import CheckpointError


class Expert:
    """The least that can be saved."""

    def __init__(self, value: float) -> None:
        self.weight = torch.full((3,), value)

    def get_full_state(self) -> dict[str, Any]:
        return {"weight": self.weight.clone()}

    def load_full_state(self, state: Mapping[str, Any]) -> None:
        self.weight = state["weight"]


@pytest.fixture
def folder(comm: Communicator, tmp_path: Path) -> Path:
    return Path(comm.bcast(str(tmp_path), 0))


def share(comm: Communicator, count: int, value: float | None = None) -> dict[str, Expert]:
    """This rank's block of experts; each holds its number, unless a value is given."""
    mine = range(count * comm.rank // comm.size, count * (comm.rank + 1) // comm.size)
    return {f"expert.{n}": Expert(float(n) if value is None else value) for n in mine}


def test_experts_load_on_another_number_of_ranks(comm: Communicator, folder: Path) -> None:
    save_experts(folder, share(comm, 5), comm)
    alone = comm.Split(comm.rank)
    assert alone is not None
    experts = {f"expert.{n}": Expert(-1.0) for n in range(5)}
    load_experts(folder, experts, alone)
    for number in range(5):
        assert torch.equal(experts[f"expert.{number}"].weight, torch.full((3,), float(number)))
    comm.Barrier()  # nobody removes the folder before all have read
    alone.Free()


def test_replica_of_the_first_rank_is_saved(comm: Communicator, folder: Path) -> None:
    expert = Expert(10.0 + comm.rank)
    save_experts(folder, {"expert": expert}, comm)
    load_experts(folder, {"expert": expert}, comm)
    assert torch.equal(expert.weight, torch.full((3,), 10.0))
    comm.Barrier()


def test_missing_file_is_an_error_on_all_ranks(comm: Communicator, folder: Path) -> None:
    experts = {"expert.7": Expert(0.0)} if comm.rank == comm.size - 1 else {}
    with pytest.raises(CheckpointError, match=rf"expert\.7\.h5 .*rank {comm.size - 1} of {comm.size}"):
        load_experts(folder, experts, comm)
    comm.Barrier()


def test_uid_that_is_no_file_name_is_an_error_on_all_ranks(comm: Communicator, folder: Path) -> None:
    experts = {"../escape": Expert(0.0)} if comm.rank == 0 else {}
    with pytest.raises(CheckpointError, match="uid must be fit"):
        save_experts(folder, experts, comm)
    comm.Barrier()
