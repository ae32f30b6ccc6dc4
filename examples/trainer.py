"""Training a GPT on text: what the ways to do so have in common, and the first of them, data parallel.

A trainer takes steps, evaluates, and knows how long its ranks waited for each other. The batch of step k is a
function of seed and k, sliced by ranks or replicas.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import common
import expert_gpt
import hpcpar
import reporting
import saved_run
import text_corpus
from gpt import Gpt
from hpcpar.comm import Communicator

__all__ = ["VALIDATION_BATCH", "DataParallelTrainer", "Options", "Trainer", "make_adamw"]

VALIDATION_BATCH = 64
"""Windows that all ranks evaluate at once."""
BETAS = (0.9, 0.95)
# Large enough that Adam does not blow up gradients which are nothing but rounding: those of the key
# biases are zero in exact arithmetic, and differ with the order of summation, so with the ranks.
EPSILON = 1e-6


@dataclass(frozen=True)
class Options:
    """The command line."""

    text: Path | None
    limit: int | None
    layers: int
    width: int
    heads: int
    context: int
    tied_head: bool
    experts: int
    experts_every: int
    top_k: int
    capacity_factor: float | None
    balancing: float
    z_loss: float
    steps: int
    batch_size: int
    lr: float
    warmup: int
    weight_decay: float
    clip: float
    bf16: bool
    forward_overlap: bool
    blocking: bool
    pipeline: int
    data_parallel: int
    schedule: str
    microbatches: int
    chunks: int
    checkpoint: str
    reuse: str
    trace: Path | None
    xla: bool
    accumulate: int
    save: Path | None
    resume: Path | None
    eval_every: int
    eval_windows: int
    sample: int
    seed: int
    device: str
    output: Path
    plot: bool
    compare: Path | None


class Trainer(ABC):
    """One step, a stretch of steps, an evaluation. Subclasses say how a step is taken.

    Parameters
    ----------
    net : the model, the same on all ranks; experts are put in here if wanted.
    comm : all ranks.
    data : those that train on different data.
    """

    model: nn.Module
    optimizer: Any

    def __init__(
        self, net: Gpt, comm: Communicator, data: Communicator, options: Options, device: torch.device
    ) -> None:
        self.comm, self.options, self.device = comm, options, device
        if options.experts:
            expert_gpt.put_in_experts(net, options, data)
        self.mixtures = expert_gpt.expert_layers(net)
        self.expert_load = expert_gpt.watch_load(self.mixtures)

    @abstractmethod
    def train_step(self, step: int, text: torch.Tensor) -> torch.Tensor:
        """One optimizer step. Returns the summed loss such that the sum over ranks is the batch's."""

    @abstractmethod
    def summed_validation_loss(self, text: torch.Tensor) -> float:
        """The validation loss, summed over bytes, such that the sum over ranks is that of all windows."""

    @abstractmethod
    def save(self, folder: Path, step: int) -> Path:
        """Write what is needed to go on. **Collective.** Returns where it is."""

    @abstractmethod
    def resume(self, folder: Path) -> int:
        """Read it. **Collective.** Returns the steps done so far."""

    @abstractmethod
    def waiting_s(self) -> float:
        """Seconds so far in which this rank could do nothing but wait for others."""

    @abstractmethod
    def gather_into(self, net: Gpt) -> None:
        """Give `net` what was trained. **Collective.**"""

    def close(self) -> None:  # noqa: B027
        """Give back what only training needs: nothing, unless a trainer says so. **Collective.**"""

    def run_stretch(
        self, steps: range, text: torch.Tensor, reporter: reporting.Reporter
    ) -> tuple[float, float, float]:
        """Train for some steps. Returns mean loss, bytes per second, share of the time spent waiting."""
        loss_sum = torch.zeros((), dtype=torch.float64)
        waited_before_s, start_s = self.waiting_s(), time.perf_counter()
        self.model.train()
        for step in steps:
            loss_sum += self.train_step(step, text).cpu()
            self.expert_load.end_step()
            reporter.step()
        waited_s = self.waiting_s() - waited_before_s
        loss, waited_s = common.sum_over_ranks(self.comm, float(loss_sum), waited_s)
        wall_s = time.perf_counter() - start_s
        trained_bytes = len(steps) * self.options.batch_size * self.options.context
        return loss / trained_bytes, trained_bytes / wall_s, waited_s / self.comm.size / wall_s

    @torch.no_grad()
    def validate(self, text: torch.Tensor) -> float:
        """Mean loss over windows spread through the text, shared among ranks. **Collective.**"""
        self.model.eval()
        total = common.sum_over_ranks(self.comm, self.summed_validation_loss(text))[0]
        return total / (self.options.eval_windows * self.options.context)

    def windows_of_step(
        self, step: int, text: torch.Tensor, comm: Communicator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The part of the global batch of `step` that belongs to this rank of `comm`."""
        options = self.options
        offsets = text_corpus.windows_of_step(
            options.seed, step, options.batch_size, len(text), options.context
        )
        mine = offsets[common.shard(len(offsets), comm.rank, comm.size)]
        return text_corpus.cut_windows(text, mine, options.context)

    def validation_batches(
        self, text: torch.Tensor, comm: Communicator
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """This rank's part of the validation windows, in batches: as many on all ranks, perhaps empty."""
        context = self.options.context
        offsets = text_corpus.spread_windows(self.options.eval_windows, len(text), context)
        for start in range(0, len(offsets), VALIDATION_BATCH):
            batch = offsets[start : start + VALIDATION_BATCH]
            yield text_corpus.cut_windows(
                text, batch[common.shard(len(batch), comm.rank, comm.size)], context
            )

    def set_learning_rate(self, step: int) -> None:
        """That of a step; warm-up and cosine."""
        factor = common.warmup_cosine(step, self.options.steps, self.options.warmup)
        common.set_learning_rate(self.optimizer, self.options.lr * factor)

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision, if wanted."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.options.bf16)


class DataParallelTrainer(Trainer):
    """Every rank has the whole model and its own part of the batch."""

    def __init__(self, net: Gpt, comm: Communicator, options: Options, device: torch.device) -> None:
        super().__init__(net, comm, comm, options, device)
        self.net = net
        self.adamw = make_adamw(net.named_parameters(), options)
        self.optimizer: Any = self.adamw
        if options.forward_overlap:
            self.optimizer = hpcpar.optim.DataParallelOptimizer(self.adamw)
            self.model = hpcpar.nn.DataParallel(net, comm, optimizer=self.optimizer)
        else:
            self.model = hpcpar.nn.DataParallel(net, comm, blocking_parameter_updates=options.blocking)

    def train_step(self, step: int, text: torch.Tensor) -> torch.Tensor:
        options = self.options
        self.optimizer.zero_grad()
        loss_sum = self.summed_loss(*self.windows_of_step(step, text, self.comm))
        global_bytes = options.batch_size * options.context
        loss = common.local_loss(loss_sum, global_bytes, self.comm.size)
        (loss + expert_gpt.gate_losses(self.mixtures.values())).backward()
        if options.clip:
            hpcpar.nn.clip_grad_norm_(self.model, options.clip)  # by the norm over all experts
        self.set_learning_rate(step)
        self.optimizer.step()
        return loss_sum.detach()

    def save(self, folder: Path, step: int) -> Path:
        return saved_run.save_run(folder, self.net, self.adamw, step, self.comm)

    def resume(self, folder: Path) -> int:
        return saved_run.resume_run(folder, self.net, self.adamw, self.comm)

    def summed_loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross entropy in nats, summed over all bytes of this rank's windows."""
        with self.autocast():
            logits = self.model(inputs.to(self.device))
        return F.cross_entropy(
            logits.float().flatten(0, 1), targets.to(self.device).flatten(), reduction="sum"
        )

    def summed_validation_loss(self, text: torch.Tensor) -> float:
        return sum(float(self.summed_loss(*batch)) for batch in self.validation_batches(text, self.comm))

    def waiting_s(self) -> float:
        stats: hpcpar.comm.ReducerStats = self.model.stats()
        return stats.exposed_s

    def gather_into(self, net: Gpt) -> None:
        """Every rank has trained `net` itself."""


def make_adamw(named: Iterable[tuple[str, nn.Parameter]], options: Options) -> torch.optim.AdamW:
    """AdamW that lets only matrices decay."""
    parameters = [parameter for _, parameter in named]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.lr, betas=BETAS, eps=EPSILON)
