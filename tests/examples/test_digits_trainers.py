"""The trainers of the digits example, over all ranks, on a few random images."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

import digits
import digits_trainers
import reporting
import train_digits
from digits_options import Options, build_parser

EPOCHS = 2
SAMPLES = 25
BATCH = 9


def make_trainer(comm, optimizer: str, *arguments: str) -> digits_trainers.Trainer:
    command = ["--optimizer", optimizer, "--batch-size", str(BATCH), "--epochs", str(EPOCHS), *arguments]
    options = Options(**vars(build_parser().parse_args(command)))
    torch.manual_seed(0)
    images = torch.randint(0, 256, (SAMPLES, 1, 4, 4), dtype=torch.uint8)
    train = digits.LabelledImages(images, torch.arange(SAMPLES) % 3)
    net = digits.build_net(images, classes=3)
    return train_digits.TRAINERS[optimizer](net, train, comm, options, torch.device("cpu"))


def train(trainer: digits_trainers.Trainer, *epochs: int) -> list[float]:
    silent = reporting.Reporter(trainer.comm, total_steps=0)
    return [trainer.train_epoch(epoch, silent).loss for epoch in epochs]


@pytest.mark.parametrize("optimizer", ["sharded", "daso"])
def test_losses_are_those_of_plain_data_parallel(comm, optimizer: str) -> None:
    plain, other = (make_trainer(comm, name) for name in ("sgd", optimizer))
    assert train(other, 1, 2) == pytest.approx(train(plain, 1, 2), rel=1e-4)  # DASO: on one node
    plain.close()
    assert len(set(other.close())) == 1


@pytest.mark.parametrize("optimizer", ["sgd", "sharded", "daso"])
def test_training_goes_on_from_a_state_as_if_without_a_break(comm, optimizer: str) -> None:
    first, second = (make_trainer(comm, optimizer) for _ in range(2))
    train(first, 1)
    second.load_state_dict(deepcopy(first.state_dict()))  # through a file it would be a copy, too
    assert train(second, 2) == pytest.approx(train(first, 2), rel=1e-6)
    first.close()
    second.close()


@pytest.mark.parametrize("arguments", [[], ["--delayed-averaging"], ["--averaging-timeout", "0.01"]])
def test_each_collaborative_step_has_the_samples_it_waited_for(comm, arguments: list[str]) -> None:
    slow = ["--slow", f"{comm.size - 1}:3", "--micro-batch-size", "4"]
    trainer = make_trainer(comm, "collaborative", *slow, *arguments)
    train(trainer, 1, 2)
    figures = trainer.figures()
    assert len(set(trainer.close())) == 1
    if comm.rank == 0:
        totals = torch.tensor(figures["samples_per_rank"]).sum(dim=0)
        assert len(totals) == EPOCHS * trainer.steps_per_epoch
        assert bool((totals >= BATCH).all())


def test_collaborative_training_counts_on_from_a_state(comm) -> None:
    first = make_trainer(comm, "collaborative")
    train(first, 1)
    state = first.state_dict()
    first.close()
    second = make_trainer(comm, "collaborative")
    second.load_state_dict(state)
    train(second, 2)
    assert second.optimizer.local_step == EPOCHS * second.steps_per_epoch
    assert second.figures()["first_step"] == second.steps_per_epoch
    assert len(set(second.close())) == 1
