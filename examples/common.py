"""What every training script needs around the model: arguments, errors, sharding, schedules, sums.

The idea that runs through this file: **ranks decide together**. Rank 0 parses the command line
and reads the data, everybody learns the outcome, and everybody goes on or everybody leaves. A
rank that left alone would leave the others waiting in their next collective operation.

Sharding is exact. A global batch of ``n`` samples is cut into one contiguous slice per rank, with
neither padding nor a dropped tail, so a slice may be one shorter than its neighbour, or empty:

    n = 10, 4 ranks      rank 0: 0 1 | rank 1: 2 3 4 | rank 2: 5 6 | rank 3: 7 8 9
    n =  3, 4 ranks      rank 0:     | rank 1: 0     | rank 2: 1   | rank 3: 2

`DataParallel` takes the mean of the gradients over ranks. A rank whose loss is
``sum over its slice * world_size / n`` therefore contributes such that the result is the gradient
of the mean over the global batch, whatever the sizes of the slices. See `local_loss`.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hpcpar.comm import Communicator

__all__ = [
    "UserError",
    "broadcast_tensor",
    "choose_device",
    "local_loss",
    "non_negative_float",
    "non_negative_int",
    "parse_arguments",
    "positive_float",
    "positive_int",
    "set_learning_rate",
    "shard",
    "sum_over_ranks",
    "user_errors_end_the_job",
    "warmup_cosine",
]


class UserError(Exception):
    """A mistake the user can correct: the message is shown without a traceback."""


# ---------------------------------------------------------------------------- errors and arguments


@contextmanager
def user_errors_end_the_job(comm: Communicator) -> Iterator[None]:
    """Let a `UserError` on any rank end the script on all ranks, with one message. **Collective.**

    Every rank enters the block, also those with nothing to do in it. At its end ranks exchange
    what went wrong; if anything did, rank 0 prints the first message and all exit with status 2.
    """
    problem = None
    try:
        yield
    except UserError as error:
        problem = str(error)
    problems = [text for text in comm.allgather(problem) if text is not None]
    if not problems:
        return
    if comm.rank == 0:
        print(f"{sys.argv[0]}: error: {problems[0]}", file=sys.stderr, flush=True)
    comm.Barrier()  # a launcher may kill everybody at the first nonzero exit: print before that
    raise SystemExit(2)


def parse_arguments(parser: argparse.ArgumentParser, comm: Communicator) -> argparse.Namespace:
    """Parse the command line on rank 0 and hand the result, or the exit, to all. **Collective.**"""
    outcome: argparse.Namespace | str | int | None = None
    if comm.rank == 0:
        try:
            outcome = parser.parse_args()
        except SystemExit as ended:  # --help, or a usage error that argparse has printed
            outcome = ended.code
    outcome = comm.bcast(outcome, root=0)
    if not isinstance(outcome, argparse.Namespace):
        raise SystemExit(outcome)
    return outcome


def positive_int(text: str) -> int:
    """An argparse type: 1, 2, 3 and so on."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def non_negative_int(text: str) -> int:
    """An argparse type: 0, 1, 2 and so on."""
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {value}")
    return value


def non_negative_float(text: str) -> float:
    """An argparse type: a finite number, zero or above."""
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"must be a number not below 0, got {text}")
    return value


def positive_float(text: str) -> float:
    """An argparse type: a finite number above zero."""
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text}")
    return value


# ------------------------------------------------------------------------------- data over ranks


def shard(size: int, rank: int, world_size: int) -> slice:
    """The slice of ``range(size)`` that belongs to `rank`. **Local.**

    The slices of all ranks follow each other without gap or overlap; their lengths differ by at
    most one, and some are empty when there are more ranks than elements.
    """
    return slice(size * rank // world_size, size * (rank + 1) // world_size)


def local_loss(loss_sum: torch.Tensor, global_size: int, world_size: int) -> torch.Tensor:
    """Scale this rank's summed loss such that the mean over ranks is the global mean. **Local.**"""
    return loss_sum * (world_size / global_size)


def broadcast_tensor(tensor: torch.Tensor | None, comm: Communicator) -> torch.Tensor:
    """Give every rank a copy of rank 0's tensor; the others pass None. **Collective.**"""
    header = None if tensor is None else (tuple(tensor.shape), tensor.dtype)
    shape, dtype = comm.bcast(header, root=0)
    if comm.rank != 0 or tensor is None:
        tensor = torch.empty(shape, dtype=dtype)
    comm.Bcast(tensor, root=0)
    return tensor


def sum_over_ranks(comm: Communicator, *values: float) -> list[float]:
    """The sum of each value over all ranks, in double precision. **Collective.**"""
    local = torch.tensor(values, dtype=torch.float64)
    total = torch.empty_like(local)
    comm.Allreduce(local, total)
    return [float(value) for value in total]


# --------------------------------------------------------------------------- device and schedule


def choose_device(comm: Communicator, name: str) -> torch.device:
    """The device this rank trains on: ``"cpu"``, ``"cuda"``, or ``"auto"`` for what is there.

    The ranks of a node take its GPUs in turn. Raises `UserError` if a GPU is asked for in vain.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(f"--device cuda: rank {comm.rank} finds no GPU that this PyTorch can use")
    device = torch.device("cuda", comm.node.rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def warmup_cosine(step: int, total_steps: int, warmup_steps: int) -> float:
    """Factor of the peak learning rate: a linear warm-up, then half a cosine down to a tenth.

    A function of the step alone, so that it needs no state and is the same on every rank.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set one learning rate for all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate
