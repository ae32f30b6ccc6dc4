"""The GPT of `train_text.py` over a pipeline: `--pipeline 2 [--data-parallel 2] --schedule zero_bubble`.

    ranks of `--pipeline 2 --data-parallel 2`

                     stage 0    stage 1
        replica 0    rank 0     rank 1       a batch is shared by the replicas,
        replica 1    rank 2     rank 3       each part is cut into microbatches

The model is handed over as a list of layers. The head shares its matrix with the embedding, which
lives on the first stage; by default the pipeline sends the last activation there and the logits back
(`reuse="route"`), with `--reuse replicate` both stages keep a copy.

The loss is a sum over bytes, scaled to the mean over the global batch, so that unequal parts count as they
should; the curve is that of one process, up to rounding.

With ``--experts`` the replicas of a stage share its experts, and tokens travel between them, a microbatch
at a time. The gates' losses are then means over microbatches, not one over the batch: a little different.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import common
import hpcpar
import reporting
from gpt import Gpt
from hpcpar.comm import Communicator, ProcessGrid
from hpcpar.nn.pipeline import Timeline
from trainer import VALIDATION_BATCH, Options, Trainer, make_adamw

__all__ = ["PipelineTrainer", "as_layers"]

TRACED_STEP = 3
NOT_SAVED = "--save and --resume are for data parallelism alone; leave --pipeline out"


class Embedding(nn.Module):
    """Bytes to vectors: (batch, time) integers to (batch, time, width)."""

    def __init__(self, net: Gpt) -> None:
        super().__init__()
        self.token, self.position = net.token, net.position

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        embedded: torch.Tensor = self.token(tokens) + self.position(positions)
        return embedded


def as_layers(net: Gpt) -> list[nn.Module]:
    """The model as layers of one argument each; they share the parameters of `net`."""
    return [Embedding(net), *net.blocks, net.norm, net.head]


class PipelineTrainer(Trainer):
    """Trains the model over a grid of replicas and stages. Collective to make."""

    def __init__(self, net: Gpt, comm: Communicator, options: Options, device: torch.device) -> None:
        self.grid = ProcessGrid(comm, data=options.data_parallel, pipeline=options.pipeline)
        super().__init__(net, comm, self.grid.data, options, device)
        self.replicas = self.grid.data.size
        # The mean over replicas of (replicas / bytes) x (sum over own bytes) is the global mean.
        self.loss_scale = self.replicas / (options.batch_size * options.context)
        self.pipe = hpcpar.nn.Pipeline(
            as_layers(net),
            self.grid.pipeline,
            microbatches=options.microbatches,
            schedule=options.schedule,
            chunks=options.chunks,
            checkpoint=options.checkpoint,
            reuse=options.reuse,
            loss_fn=self.scaled_loss,
            loss_reduction="sum",
            data_comm=self.grid.data,
            device=device,
        )
        self.model = self.pipe
        self.optimizer = make_adamw(self.pipe.named_parameters(), options)

    def train_step(self, step: int, text: torch.Tensor) -> torch.Tensor:
        options = self.options
        if options.trace is not None and step == TRACED_STEP:
            with self.pipe.trace() as timeline:
                loss = self.run_step(step, text)
                traced = timeline()
            if self.comm.rank == 0:
                self.write(traced, options.trace)
            return loss
        return self.run_step(step, text)

    def write(self, traced: Timeline, path: Path) -> None:
        """Write the timeline of a step for chrome://tracing, and a picture beside it."""
        traced.to_chrome(path.with_suffix(".json"))
        title = f"one step, {self.options.schedule}, {self.options.microbatches} microbatches"
        try:
            traced.draw(path.with_suffix(".png"), title=title)
        except hpcpar.errors.HpcparError as error:  # no matplotlib
            print(error, file=sys.stderr)

    def run_step(self, step: int, text: torch.Tensor) -> torch.Tensor:
        """One optimizer step. Returns this rank's share of the summed loss: the last stages have it all."""
        options = self.options
        inputs, targets = self.windows_of_step(step, text, self.grid.data)
        self.optimizer.zero_grad()
        with self.autocast():
            loss = self.pipe.train_step(inputs, targets)
        if options.clip:
            self.pipe.clip_grad_norm_(options.clip)
        self.set_learning_rate(step)
        self.optimizer.step()
        # train_step returns the mean over replicas, the same on all ranks; the caller sums over ranks.
        return loss * self.replicas / self.loss_scale / self.comm.size

    def scaled_loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross entropy in nats, summed over all bytes and scaled as `loss_scale` says."""
        total = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
        return total * self.loss_scale

    def waiting_s(self) -> float:
        return self.pipe.stats().waited_s

    def summed_validation_loss(self, text: torch.Tensor) -> float:
        """This rank's share of the validation loss, summed over bytes. Collective."""
        total = 0.0
        for inputs, targets in self.validation_batches(text, self.grid.data):
            with self.autocast():
                _, loss = self.pipe.eval_step(inputs, targets)
            assert loss is not None
            total += float(loss) / self.loss_scale
        return total / self.grid.pipeline.size

    def save(self, folder: Path, step: int) -> Path:
        raise common.UserError(NOT_SAVED)

    def resume(self, folder: Path) -> int:
        raise common.UserError(NOT_SAVED)

    def gather_into(self, net: Gpt) -> None:
        """Give `net` the parameters of all stages. Collective."""
        state = self.pipe.state_dict()
        names = {f"{index}": layer for index, layer in enumerate(as_layers(net))}
        for index, layer in names.items():
            prefix = f"{index}."
            layer.load_state_dict(
                {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            )


def check_options(options: Options, comm: Communicator) -> None:
    """Raise `UserError` for options that do not fit together or the number of ranks."""
    wanted = options.pipeline * options.data_parallel
    if wanted != comm.size:
        raise common.UserError(
            f"--pipeline {options.pipeline} and --data-parallel {options.data_parallel} need {wanted} "
            f"ranks, got {comm.size}"
        )
    if options.batch_size < options.data_parallel:
        raise common.UserError(f"--batch-size {options.batch_size} leaves some replicas without a window")
    stages, layers = options.pipeline * options.chunks, options.layers + 3
    if stages > layers:
        raise common.UserError(f"{stages} stages are too many for {layers} layers; raise --layers")
    if options.blocking or options.forward_overlap:
        raise common.UserError("--blocking and --forward-overlap are modes of data parallelism alone")
    if options.experts:
        _check_microbatches("--batch-size", options.batch_size, options)
        for windows in (VALIDATION_BATCH, options.eval_windows % VALIDATION_BATCH):
            if windows <= options.eval_windows:
                _check_microbatches("--eval-windows", windows, options)
    if options.save is not None or options.resume is not None:
        raise common.UserError(NOT_SAVED)
    if options.trace is not None:
        if options.steps <= TRACED_STEP:
            raise common.UserError(f"--trace shows step {TRACED_STEP}; --steps {options.steps} ends before")
        reporting.prepare_output(Path(options.trace).parent)


def _check_microbatches(name: str, windows: int, options: Options) -> None:
    """Replicas exchange tokens in each microbatch, and empty ones are left out: all must have as many."""
    replicas = options.data_parallel
    if windows % replicas and windows // replicas < options.microbatches:
        raise common.UserError(
            f"{name} leaves {windows} windows for {replicas} replicas, too few for {options.microbatches} "
            "microbatches each; with --experts give a multiple of --data-parallel, or fewer --microbatches"
        )
