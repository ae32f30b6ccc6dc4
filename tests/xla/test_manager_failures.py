"""What fails on one rank is an error on all, in the same step, with words; and the next step is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import default_collate

from hpcpar.comm import Communicator
from hpcpar.errors import HpcparError, RankFailedError
from hpcpar.xla import TPUManager
from tests.xla.models import Regression, Sample, assert_gradients, close, reference, samples_of_step, shares

pytestmark = pytest.mark.mpi

BATCH = 2
FAULTY = 4  # the first sample of the third batch


class Faulty(Exception):
    """Nothing that hpcpar raises itself."""


class FaultyDataset:
    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        if index == FAULTY:
            raise Faulty("cannot read")
        return self.samples[index]


class FaultyModel(Regression):
    """Raises in its third pass."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        self.passes += 1
        if self.passes == 3:
            raise Faulty("cannot compute")
        return super().forward(x, y)


def faulty(kind: str, samples: list[Sample]) -> dict[str, Any]:
    def collate(batch: list[Sample]) -> Any:
        if any(sample is samples[FAULTY] for sample in batch):
            raise Faulty("cannot collate")
        return default_collate(batch)

    return {
        "dataset": {"dataset": FaultyDataset(samples)},
        "collate function": {"collate_fn": collate},
        "model": {"model": FaultyModel()},
    }[kind]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", ["dataset", "collate function", "model"])
def test_failure_of_one_rank_is_everybodys_and_the_next_step_is_right(
    kind: str, accumulation: int, comm: Communicator
) -> None:
    guilty = comm.size - 1
    parts = shares([16] * comm.size)
    given: dict[str, Any] = {"model": Regression(), "dataset": parts[comm.rank]}
    if comm.rank == guilty:
        given |= faulty(kind, parts[comm.rank])
    per_step = BATCH * accumulation
    fails_at = 2 // accumulation
    options = {"batch_size_per_device": BATCH, "grad_accumulation_steps": accumulation, "devices": [0]}
    with TPUManager(**given, **options, comm=comm) as manager:
        for step in range(fails_at + 2):
            before = manager.get_aggregated_gradients()
            if step == fails_at:
                with pytest.raises((Faulty, RankFailedError)) as caught:
                    manager.step()
                assert "cannot " in str(caught.value)
                if comm.rank == guilty:
                    assert type(caught.value) is Faulty
                else:
                    assert isinstance(caught.value, RankFailedError)
                    assert caught.value.ranks == (guilty,)
                    assert f"rank {guilty} of {comm.size}: Faulty" in str(caught.value)
                assert_gradients(manager.get_aggregated_gradients(), before)
                continue
            manager.zero_grad()
            loss, count = manager.step()
            expected, gradients = reference(Regression(), samples_of_step(parts, step, per_step))
            assert count == per_step * comm.size
            close(loss, expected)
            assert_gradients(given["model"], gradients)


def test_model_without_a_loss_is_an_error_on_all(comm: Communicator) -> None:
    class NoLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 1)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.first(x)

    parts = shares([2] * comm.size)
    with TPUManager(NoLoss(), parts[comm.rank], batch_size_per_device=2, comm=comm) as manager:
        with pytest.raises(ValueError, match="scalar, got a tensor of shape"):
            manager.step()
        assert manager.step() == (0.0, 0)  # the samples of the step are lost


def test_use_after_shutdown_is_an_error_and_a_second_shutdown_is_none(comm: Communicator) -> None:
    manager = TPUManager(Regression(), shares([2])[0], comm=comm)
    manager.step()
    manager.shutdown()
    manager.shutdown()
    with pytest.raises(HpcparError, match="must be open, got one that was shut down"):
        manager.step()
