"""Training the digits net with ranks of unequal speed, and a record of who has contributed what.

Each rank draws micro-batches of its own, at its own pace, and a step is made when all together have enough
samples. An epoch is the number of such steps in which the ranks together draw as many samples as there are.

    rank 0, slow   m           m           m        |            m: a micro-batch
    rank 1         m   m   m   m   m   m   m   m    |  step  ...
                   ---------------------------------
                   samples of rank 0 and of rank 1 in this step: a column of the picture

A rank is slowed down by sleeping in proportion to the time that its micro-batch took.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common
import hpcpar
import reporting
from digits import LabelledImages, endless_batches
from digits_options import Options
from digits_trainers import Position, TrainedEpoch, Trainer, make_sgd
from hpcpar.comm import Communicator, wait_for_peers

__all__ = ["CollaborativeTrainer", "Contributions", "draw_contributions"]


class Contributions:
    """Samples that this rank has contributed to each global step. Local.

    Parameters
    ----------
    step : the first global step, from 0.

    Attributes
    ----------
    samples : those of each step since.

    Notes
    -----
    What was drawn and is not accumulated any more went into the newest step. That holds for a round that runs
    behind, too, and for a rank that was left out and keeps its gradients for the next round. Samples of one
    that came back too late, and were dropped, are counted to the step that it came back with.
    """

    def __init__(self, step: int) -> None:
        self.first_step = step
        self.samples: list[int] = []
        self._outstanding = 0

    def update(self, drawn: int, step: int, accumulated: int) -> int:
        """After a call of the optimizer. Returns how many global steps there were in it.

        Parameters
        ----------
        drawn : samples of the micro-batch.
        step : global steps so far.
        accumulated : samples towards the next one.
        """
        self._outstanding += drawn
        new_steps = step - self.first_step - len(self.samples)
        if new_steps:
            self.samples += [0] * (new_steps - 1) + [self._outstanding - accumulated]
            self._outstanding = accumulated
        return new_steps


class CollaborativeTrainer(Trainer):
    """A plain module and a `CollaborativeOptimizer`."""

    optimizer: hpcpar.optim.CollaborativeOptimizer

    def __init__(
        self,
        net: nn.Module,
        train: LabelledImages,
        comm: Communicator,
        options: Options,
        device: torch.device,
    ) -> None:
        super().__init__(train, comm, options, device)
        self.model = net
        self.slowness = dict(options.slow).get(comm.rank, 1.0)
        self.micro_batch_size = options.micro_batch_size or max(1, self.batch_size // (4 * comm.size))
        sgd, steps = make_sgd(net, options), options.epochs * self.steps_per_epoch
        self.optimizer = hpcpar.optim.CollaborativeOptimizer(
            sgd,
            comm,
            target_batch_size=self.batch_size,
            scheduler=torch.optim.lr_scheduler.LambdaLR(
                sgd, lambda step: common.warmup_cosine(step, steps, warmup_steps=0)
            ),
            delayed_averaging=options.delayed_averaging,
            averaging_timeout=options.averaging_timeout,
        )
        self._begin()

    def _begin(self) -> None:
        """Start to draw and to count. A resumed training draws on, rather than the same again."""
        step = self.optimizer.local_step
        seed = [self.options.seed, self.comm.rank, step]
        self._micro_batches = endless_batches(len(self.train), self.micro_batch_size, seed)
        self._contributions = Contributions(step)

    def train_epoch(self, epoch: int, reporter: reporting.Reporter) -> TrainedEpoch:
        """As many global steps as there are in an epoch, with whatever this rank has time for.

        Ranks at a pace of their own have no step in common at which to stop, so a stop waits for the end.
        """
        start_s, loss_sum, drawn, waited_s = time.perf_counter(), 0.0, 0, 0.0
        goal = self.optimizer.local_step + self.steps_per_epoch
        self.model.train()
        while self.optimizer.local_step < goal:
            batch = next(self._micro_batches)
            loss_sum += self.compute(batch) * len(batch)
            drawn += len(batch)
            time.sleep(self.options.step_delay)
            before_s = time.perf_counter()
            self.optimizer.step(len(batch))
            waited_s += time.perf_counter() - before_s
            accumulated = self.optimizer.training_state.samples_accumulated
            for _ in range(self._contributions.update(len(batch), self.optimizer.local_step, accumulated)):
                reporter.step()
        self.meet()
        self.position = Position(epoch, self.steps_per_epoch, torch.zeros((), dtype=torch.float64))
        wall_s = time.perf_counter() - start_s
        counts: list[int] = self.comm.allgather(drawn)
        loss, waited_s, wall_s = common.sum_over_ranks(self.comm, loss_sum, waited_s, wall_s)
        note = f"{min(counts)} to {max(counts)} samples per rank"
        samples = sum(counts)
        return TrainedEpoch(loss / samples, samples * self.comm.size / wall_s, waited_s / wall_s, note)

    def compute(self, batch: torch.Tensor) -> float:
        """Forward and backward of a micro-batch, as slowly as this rank is. Returns the mean loss. Local."""
        before_s = time.perf_counter()
        images, labels = self.samples(batch)
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(images), labels)
        loss.backward()
        value = float(loss.detach())
        time.sleep((self.slowness - 1.0) * (time.perf_counter() - before_s))
        return value

    def meet(self) -> None:
        """Wait until all ranks have made the last step of the epoch. **Collective.**

        A rank that was left out of it needs a state from another, which looks for such requests here.
        """
        arrived = self.comm.Ibarrier()
        goal = self.optimizer.local_step

        def describe() -> tuple[str, list[int]]:
            states = self.optimizer.training_states
            return "meeting after an epoch", [s.rank for s in states if s.optimizer_step < goal]

        wait_for_peers(lambda: self.optimizer.is_synchronized and arrived.test(), self.comm, describe)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, which all ranks have."""
        super().load_state_dict(state)
        self._begin()

    def figures(self) -> dict[str, Any]:
        """Samples of each rank in each global step."""
        samples = self.comm.gather(self._contributions.samples, root=0)
        return {"first_step": self._contributions.first_step, "samples_per_rank": samples}

    def free(self) -> None:
        """End the collaboration."""
        self.optimizer.shutdown()


def draw_contributions(path: Path, samples_per_rank: list[list[int]], first_step: int) -> Path | None:
    """Draw what each rank has contributed to each step; None where matplotlib is missing. For rank 0."""
    rows = np.array(samples_per_rank, dtype=np.float64)
    return reporting.draw_shares(path, rows, first_step + 1, ("global step", "rank", "samples"))
