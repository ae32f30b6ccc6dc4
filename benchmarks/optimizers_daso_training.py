"""What `optimizers_daso.py` trains: digits, a perceptron, and three ways to keep its replicas together.

scikit-learn's 1797 images of digits, of which 517 are held out; accuracy on these is looked at outside of the
time. Between nodes, models differ while DASO cycles, so it is the mean over all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import hpcpar
from hpcpar.comm import MPI, Communicator

__all__ = ["DASO", "FULL", "FULL_BF16", "SAMPLES_PER_STEP", "Trainer", "load_digits", "make_trainer"]

FULL, FULL_BF16, DASO = "full sync", "full sync bf16", "DASO"
HELD_OUT, SAMPLES_PER_STEP, WIDTH = 517, 64, 768
LEARNING_RATE, MOMENTUM = 0.05, 0.9


@dataclass(frozen=True)
class Digits:
    """scikit-learn's digits, cut into training and held-out images, the same on every rank."""

    images: torch.Tensor
    labels: torch.Tensor

    @property
    def training(self) -> int:
        """Number of images to train with; they come first."""
        return len(self.labels) - HELD_OUT

    @property
    def steps(self) -> int:
        """Number of steps in an epoch; the images that are left over wait for another."""
        return self.training // SAMPLES_PER_STEP

    def batches(self, epoch: int) -> list[torch.Tensor]:
        """The indices of the images of each step, those of all ranks together."""
        shuffled = torch.randperm(self.training, generator=torch.Generator().manual_seed(epoch))
        return list(shuffled[: self.steps * SAMPLES_PER_STEP].split(SAMPLES_PER_STEP))


def load_digits() -> Digits:
    """The data set that scikit-learn brings along. **Local.**"""
    from sklearn.datasets import load_digits as load

    loaded: Any = load()
    mixed = torch.randperm(len(loaded.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(loaded.data, dtype=torch.float32)[mixed] / 16.0
    return Digits(images, torch.tensor(loaded.target)[mixed])


@dataclass
class Trainer:
    """A variant in training; ``bytes_sent`` and ``accuracy`` have an entry for each epoch."""

    comm: Communicator
    module: nn.Module
    model: hpcpar.nn.DataParallel
    optimizer: torch.optim.Optimizer
    end_epoch: Callable[[torch.Tensor], None]
    data: Digits
    epoch: int = 0
    bytes_sent: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)

    def train_epoch(self) -> None:
        """One pass over the training images, an equal part on each rank. **Collective.**"""
        before = sent_by_host()
        own = SAMPLES_PER_STEP // self.comm.size
        total = torch.zeros(())
        for batch in self.data.batches(self.epoch):
            mine = batch[self.comm.rank * own : (self.comm.rank + 1) * own]
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(self.data.images[mine]), self.data.labels[mine])
            loss.backward()
            self.optimizer.step()
            total += loss.detach()
        self.end_epoch(total / self.data.steps)
        self.epoch += 1
        self.bytes_sent.append(sent_by_host() - before)

    def free(self) -> None:
        """Give memory and communicators back. **Collective.**"""
        self.model.free()
        if isinstance(self.optimizer, hpcpar.optim.DASO):
            self.optimizer.free()

    def look(self) -> None:
        """Note the mean accuracy of all ranks' models on what was held out. **Collective.**"""
        with torch.no_grad():
            guesses = self.module(self.data.images[self.data.training :]).argmax(1)
        right = (guesses == self.data.labels[self.data.training :]).double().sum().reshape(1)
        self.comm.Allreduce(MPI.IN_PLACE, right)
        self.accuracy.append(100.0 * float(right) / HELD_OUT / self.comm.size)


def make_trainer(
    comm: Communicator, name: str, data: Digits, *, epochs: int, warmup: int, cooldown: int
) -> Trainer:
    """A variant, not yet trained. DASO's first and last epochs are in full sync. **Collective.**"""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)
    )
    sgd = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, epochs)
    if name != DASO:
        wire = torch.bfloat16 if name == FULL_BF16 else None
        model = hpcpar.nn.DataParallel(net, comm, wire_dtype=wire)
        return Trainer(comm, net, model, sgd, lambda loss: cosine.step(), data)
    daso = hpcpar.optim.DASO(
        sgd,
        comm,
        epochs,
        warmup_epochs=warmup,
        cooldown_epochs=cooldown,
        scheduler=cosine,
    )
    daso.last_batch = data.steps - 1
    model = hpcpar.nn.DataParallelMultiGPU(net, daso, comm)
    return Trainer(comm, net, model, daso, daso.epoch_loss_logic, data)


def sent_by_host() -> int:
    """Bytes that this host's network cards have sent so far, by Linux's account; 0 elsewhere. **Local.**"""
    try:
        lines = Path("/proc/net/dev").read_text(encoding="ascii").splitlines()[2:]
    except OSError:
        return 0
    cards = (line.partition(":") for line in lines)
    return sum(int(numbers.split()[8]) for card, _, numbers in cards if card.strip() != "lo")
