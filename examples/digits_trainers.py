"""Training the digits net in lock-step: plain data parallel, with a split optimizer, and node by node.

    sgd        gradients are averaged over all ranks; each rank computes the whole update
    sharded    each rank gets the mean gradient of its part, and updates its part
    daso       gradients are averaged inside a node, parameters between nodes every few steps

A trainer is a model, an optimizer and two loops, over training and test set. These three are alike up to the
objects they make: every rank computes on its slice of each global batch. The collaborative one, in
`digits_collaborative`, has a training loop of its own.
"""

from __future__ import annotations

import math
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import common
import hpcpar
import reporting
from digits import LabelledImages, epoch_batches
from digits_options import Options
from hpcpar.comm import Communicator

__all__ = [
    "DasoTrainer",
    "DataParallelTrainer",
    "Interrupted",
    "LockStepTrainer",
    "ShardedTrainer",
    "TrainedEpoch",
    "Trainer",
    "make_sgd",
]

MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4


@dataclass(frozen=True)
class TrainedEpoch:
    """What is known after an epoch of training; the same on every rank.

    Attributes
    ----------
    loss : mean over the samples.
    samples_per_s : of all ranks together.
    exposed_share : part of the time in which a rank, on average, waited for others.
    note : what an optimizer has to say.
    """

    loss: float
    samples_per_s: float
    exposed_share: float
    note: str = ""


class Interrupted(Exception):
    """The job is to stop, in the middle of an epoch; the trainer's state says where. On all ranks."""


@dataclass
class Position:
    """Where an epoch stands: its steps so far, and this rank's part of the loss of their samples."""

    epoch: int
    step: int
    loss_sum: torch.Tensor

    @classmethod
    def start_of(cls, epoch: int, device: torch.device) -> Position:
        """Nothing of it is done."""
        return cls(epoch, 0, torch.zeros((), dtype=torch.float64, device=device))


def make_sgd(net: nn.Module, options: Options) -> torch.optim.SGD:
    """The optimizer of one rank."""
    return torch.optim.SGD(net.parameters(), lr=options.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)


class Trainer(ABC):
    """A model, an optimizer and two loops. Collective in everything, unless a method says otherwise.

    Attributes
    ----------
    model, optimizer : set by the subclass.
    batch_size : samples of all ranks together that make a step.
    steps_per_epoch : steps of one pass over the training set.
    stops : says after each step, the same on all ranks, whether the job is to stop.
    """

    model: nn.Module
    optimizer: Any

    def __init__(
        self, train: LabelledImages, comm: Communicator, options: Options, device: torch.device
    ) -> None:
        self.train, self.comm, self.options, self.device = train, comm, options, device
        self.batch_size = options.target_batch_size or options.batch_size
        self.steps_per_epoch = math.ceil(len(train) / self.batch_size)
        self.stops: Callable[[], bool] = lambda: False
        self.position = Position.start_of(1, device)

    @property
    def flag_carrier(self) -> nn.Module | None:
        """The model whose reductions can tell all ranks that the job is to stop. Local."""
        return self.model if isinstance(self.model, hpcpar.nn.DataParallel) else None

    @property
    def steps_done(self) -> int:
        """Steps since the first epoch began. Local."""
        return (self.position.epoch - 1) * self.steps_per_epoch + self.position.step

    @abstractmethod
    def train_epoch(self, epoch: int, reporter: reporting.Reporter) -> TrainedEpoch:
        """One epoch, counted from 1, or the rest of it. Raises `Interrupted` when the job is to stop."""

    def samples(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and labels of these numbers in the training set. Local."""
        return self.train.images[numbers].to(self.device), self.train.labels[numbers].to(self.device)

    @torch.no_grad()
    def evaluate(self, test: LabelledImages) -> tuple[float, float]:
        """Mean loss and accuracy over the test set, of which each rank takes a slice."""
        self.model.eval()
        mine = common.shard(len(test), self.comm.rank, self.comm.size)
        loss_sum, correct = 0.0, 0
        slices = test.images[mine].split(500), test.labels[mine].split(500)
        for images, labels in zip(*slices, strict=True):
            scores, labels = self.model(images.to(self.device)), labels.to(self.device)
            loss_sum += float(F.cross_entropy(scores, labels, reduction="sum"))
            correct += int((scores.argmax(dim=1) == labels).sum())
        loss, right = common.sum_over_ranks(self.comm, loss_sum, correct)
        return loss / len(test), right / len(test)

    def state_dict(self) -> dict[str, Any]:
        """Everything the next epoch depends on; it loads on any number of ranks."""
        optimizer = self.optimizer.state_dict()  # first: DASO makes the nodes' models one for it
        loss_sums = self.comm.allgather(float(self.position.loss_sum))
        position = {"epoch": self.position.epoch, "step": self.position.step, "loss_sums": loss_sums}
        return {"model": self.model.state_dict(), "optimizer": optimizer, "position": position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, which all ranks have."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        position = state["position"]
        loss_sums = position["loss_sums"]
        if len(loss_sums) != self.comm.size:  # only their sum matters then
            loss_sums = [math.fsum(loss_sums)] + [0.0] * (self.comm.size - 1)
        self.position = Position.start_of(position["epoch"], self.device)
        self.position.step = position["step"]
        self.position.loss_sum += loss_sums[self.comm.rank]

    def figures(self) -> dict[str, Any]:
        """More for the history; rank 0's counts."""
        return {}

    def close(self) -> list[int]:
        """End the training, and free what the ranks share. Returns a checksum of each rank's parameters."""
        self.free()
        parameters = [p.detach().cpu().contiguous() for p in self.model.parameters()]
        contents = b"".join(parameter.numpy().tobytes() for parameter in parameters)
        checksums: list[int] = self.comm.allgather(zlib.crc32(contents))
        return checksums

    @abstractmethod
    def free(self) -> None:
        """Free what the ranks share."""


class LockStepTrainer(Trainer):
    """All ranks work on the same batch, each on its slice."""

    model: hpcpar.nn.DataParallel

    def train_epoch(self, epoch: int, reporter: reporting.Reporter) -> TrainedEpoch:
        """One epoch, counted from 1, or the rest of it. Raises `Interrupted` when the job is to stop."""
        samples = len(self.train)
        batches = epoch_batches(samples, self.batch_size, self.options.seed, epoch)
        if self.position.epoch != epoch:
            self.position = Position.start_of(epoch, self.device)
        position = self.position
        still_to_do = sum(len(batch) for batch in batches[position.step :])
        exposed_before_s, start_s = self.exposed_s(), time.perf_counter()
        self.model.train()
        for batch in batches[position.step :]:
            factor = common.warmup_cosine(self.steps_done, self.options.epochs * len(batches), warmup_steps=0)
            position.loss_sum += self.train_step(batch, self.options.lr * factor)
            position.step += 1
            reporter.step()
            time.sleep(self.options.step_delay)
            if self.stops():
                raise Interrupted
        exposed_s = self.exposed_s() - exposed_before_s
        wall_s = time.perf_counter() - start_s
        sums = common.sum_over_ranks(self.comm, float(position.loss_sum), exposed_s, wall_s)
        loss, exposed_s, wall_s = sums  # times of all ranks, so that the figures are the same on each
        return TrainedEpoch(loss / samples, still_to_do * self.comm.size / wall_s, exposed_s / wall_s)

    def train_step(self, batch: torch.Tensor, learning_rate: float) -> torch.Tensor:
        """One optimizer step on a global batch. Returns the summed loss of this rank's slice.

        A rank whose slice is empty does the same with a batch of size zero: its gradients are
        zeros and it takes part in the reduction.
        """
        mine = batch[common.shard(len(batch), self.comm.rank, self.comm.size)]
        images, labels = self.samples(mine)
        self.optimizer.zero_grad()
        loss_sum = F.cross_entropy(self.model(images), labels, reduction="sum")
        common.local_loss(loss_sum, len(batch), self.comm.size).backward()
        common.set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.step()
        return loss_sum.detach()

    def exposed_s(self) -> float:
        """Seconds that this rank has waited for gradients so far. Local."""
        return self.model.stats().exposed_s

    def free(self) -> None:
        """Free what the ranks share."""
        self.model.free()


class DataParallelTrainer(LockStepTrainer):
    """`DataParallel` and a torch optimizer."""

    def __init__(
        self,
        net: nn.Module,
        train: LabelledImages,
        comm: Communicator,
        options: Options,
        device: torch.device,
    ) -> None:
        super().__init__(train, comm, options, device)
        self.optimizer = make_sgd(net, options)
        if options.forward_overlap:
            # The wrapped optimizer lets each layer's update wait until that layer runs again, so
            # that the reduction overlaps the next forward as well as the backward.
            self.optimizer = hpcpar.optim.DataParallelOptimizer(self.optimizer)
            self.model = hpcpar.nn.DataParallel(net, comm, optimizer=self.optimizer)
        else:
            self.model = hpcpar.nn.DataParallel(net, comm, blocking_parameter_updates=options.blocking)


class ShardedTrainer(LockStepTrainer):
    """`DataParallel` and an optimizer whose state and update are split over the ranks."""

    def __init__(
        self,
        net: nn.Module,
        train: LabelledImages,
        comm: Communicator,
        options: Options,
        device: torch.device,
    ) -> None:
        super().__init__(train, comm, options, device)
        self.model = hpcpar.nn.DataParallel(net, comm)
        self.optimizer = hpcpar.optim.ShardedOptimizer(
            self.model, torch.optim.SGD, comm, lr=options.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
        )

    def free(self) -> None:
        """Free what the ranks share; parameters get memory of their own again."""
        self.optimizer.free()
        super().free()


class DasoTrainer(LockStepTrainer):
    """`DataParallelMultiGPU`, the GPUs being optional, and `DASO`."""

    optimizer: hpcpar.optim.DASO

    def __init__(
        self,
        net: nn.Module,
        train: LabelledImages,
        comm: Communicator,
        options: Options,
        device: torch.device,
    ) -> None:
        super().__init__(train, comm, options, device)
        warmup, cooldown, fifth = options.warmup_epochs, options.cooldown_epochs, options.epochs // 5
        self.optimizer = hpcpar.optim.DASO(
            make_sgd(net, options),
            comm,
            options.epochs,
            warmup_epochs=fifth if warmup is None else warmup,
            cooldown_epochs=fifth if cooldown is None else cooldown,
        )
        self.model = hpcpar.nn.DataParallelMultiGPU(net, self.optimizer, comm)

    def train_epoch(self, epoch: int, reporter: reporting.Reporter) -> TrainedEpoch:
        """One epoch, counted from 1; its loss decides how often nodes meet in the next."""
        self.optimizer.last_batch = self.steps_per_epoch - 1
        note = self.optimizer.phase.value
        if self.optimizer.global_skip:
            note += f", parameters averaged every {self.optimizer.global_skip} steps"
        trained = super().train_epoch(epoch, reporter)
        self.optimizer.epoch_loss_logic(trained.loss, loss_globally_averaged=True)
        return TrainedEpoch(trained.loss, trained.samples_per_s, trained.exposed_share, note)

    def exposed_s(self) -> float:
        """Seconds that this rank has waited for gradients and for parameters so far. Local."""
        return super().exposed_s() + self.optimizer.stats().exposed_s

    def free(self) -> None:
        """Free what the ranks share."""
        super().free()
        self.optimizer.free()
