"""The GPT of `train_text.py` on devices of torch-xla: `--xla [--accumulate 2]`.

    windows of step k    | 0 1 | 2 3 | 4 5 | 6 7 |      --batch-size 8, 2 ranks of 2 devices
                           rank 0      rank 1
                         xla:0 xla:1 xla:0 xla:1

The manager of each rank reads a stream: the rank's windows of one step after the other. It deals them to the
devices, sums the gradients of all, and leaves their mean in `.grad` of the model on the host, where the
optimizer and the validation are. So the curve is that of the plain run, up to rounding.

The stream begins at any step, so a run that goes on needs nothing of the manager's state.

To try it without a TPU: `PJRT_DEVICE=CPU CPU_NUM_DEVICES=2 mpirun -n 2 python examples/train_text.py --xla`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import common
import hpcpar
import saved_run
import text_corpus
from gpt import Gpt
from hpcpar.comm import Communicator
from trainer import Options, Trainer, make_adamw

__all__ = ["Share", "WindowStream", "XlaTrainer", "check_options", "share_batch"]


class GptWithLoss(nn.Module):
    """What a device runs: windows to the mean of their losses, in nats per byte."""

    def __init__(self, net: Gpt) -> None:
        super().__init__()
        self.net = net

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.net(inputs).flatten(0, 1), targets.flatten())


@dataclass(frozen=True)
class Share:
    """What a rank takes of each step's windows, and each of its devices at once."""

    windows: slice
    batch_size_per_device: int


@dataclass(frozen=True)
class WindowStream:
    """The windows of a rank, from a step on: pairs of int64 of shape (context,), inputs and targets."""

    text: torch.Tensor
    options: Options
    windows: slice
    first_step: int

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        options = self.options
        for step in range(self.first_step, options.steps):
            offsets = text_corpus.windows_of_step(
                options.seed, step, options.batch_size, len(self.text), options.context
            )
            mine = text_corpus.cut_windows(self.text, offsets[self.windows], options.context)
            yield from zip(*mine, strict=True)


class XlaTrainer(Trainer):
    """Trains the model on the devices of all ranks. Collective to make."""

    def __init__(self, net: Gpt, comm: Communicator, options: Options, device: torch.device) -> None:
        super().__init__(net, comm, comm, options, device)
        counts = count_devices(comm)
        with common.user_errors_end_the_job(comm):
            self.share = share_batch(options, counts, comm.rank)
        self.net = net
        self.model = GptWithLoss(net)
        self.optimizer = make_adamw(net.named_parameters(), options)
        self.manager: Any = None

    def train_step(self, step: int, text: torch.Tensor) -> torch.Tensor:
        options = self.options
        if self.manager is None:  # only now it is known where to begin
            self.manager = self.make_manager(WindowStream(text, options, self.share.windows, step))
        self.optimizer.zero_grad()
        loss, windows = self.manager.step()
        if options.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), options.clip)
        self.set_learning_rate(step)
        self.optimizer.step()  # the devices have the new parameters at the next step
        # Every rank has the mean over all; the caller sums over bytes and ranks.
        return torch.tensor(loss * windows * options.context / self.comm.size)

    def make_manager(self, stream: WindowStream) -> Any:
        """Put a copy of the model on each device. Collective."""
        return hpcpar.xla.TPUManager(
            self.model,
            stream,
            batch_size_per_device=self.share.batch_size_per_device,
            grad_accumulation_steps=self.options.accumulate,
            comm=self.comm,
        )

    def summed_validation_loss(self, text: torch.Tensor) -> float:
        """On the host."""
        batches = self.validation_batches(text, self.comm)
        return sum(float(self.model(*batch)) * batch[1].numel() for batch in batches if batch[1].numel())

    def waiting_s(self) -> float:
        """Seconds in which the gradients are added up: over devices, and over ranks."""
        return 0.0 if self.manager is None else float(self.manager.stats().reducing_s)

    def save(self, folder: Path, step: int) -> Path:
        return saved_run.save_run(folder, self.net, self.optimizer, step, self.comm)

    def resume(self, folder: Path) -> int:
        return saved_run.resume_run(folder, self.net, self.optimizer, self.comm)

    def gather_into(self, net: Gpt) -> None:
        """The host has trained `net` itself."""

    def close(self) -> None:
        if self.manager is not None:
            self.manager.shutdown()


def count_devices(comm: Communicator) -> list[int]:
    """How many devices each rank has. **Collective.** Starts the runtime of torch-xla."""
    count = 0
    with common.user_errors_end_the_job(comm):
        try:
            count = len(hpcpar.xla.local_devices())
        except (OSError, RuntimeError) as error:
            raise common.UserError(f"--xla: rank {comm.rank} has no device: {error}") from error
    return list(comm.allgather(count))


def share_batch(options: Options, devices: list[int], rank: int) -> Share:
    """Cut the windows of a step into parts of one size. **Local.**

    Parameters
    ----------
    devices : how many each rank has; they may differ.
    """
    passes = sum(devices) * options.accumulate
    size, rest = divmod(options.batch_size, passes)
    if rest or not size:
        raise common.UserError(
            f"--batch-size {options.batch_size} must be a multiple of {passes}: {sum(devices)} device(s) on "
            f"{len(devices)} rank(s), --accumulate {options.accumulate}"
        )
    ends = [size * options.accumulate * count for count in itertools.accumulate(devices)]
    return Share(slice(ends[rank] - size * options.accumulate * devices[rank], ends[rank]), size)


def check_options(options: Options) -> None:
    """Raise `UserError` for options that do not go with ``--xla``, and where torch-xla is missing."""
    others = {
        "--pipeline": options.pipeline > 1,
        "--experts": options.experts,
        "--forward-overlap": options.forward_overlap,
        "--blocking": options.blocking,
        "--bf16": options.bf16,
        "--device cuda": options.device == "cuda",
    }
    if wrong := [name for name, is_given in others.items() if is_given]:
        raise common.UserError(f"--xla is for plain data parallel training; leave {', '.join(wrong)} out")
    try:
        _ = hpcpar.xla
    except ImportError as error:
        raise common.UserError(f"--xla: {error}") from error
