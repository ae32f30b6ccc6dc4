"""The parts of `serve_experts.py`: feed-forward layers that call experts elsewhere, and the experts.

    client   attention -> RemoteFeedForward: gate -> the best experts of this layer's grid -> attention ...
                                                        |       ^
    server                                     forward, later backward and an update of the expert

A layer's grid has a prefix of its own: the expert at (1, 3) of the first block is ``block0.1.3``.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import common
from expert_load import ExpertLoad
from gpt import Gpt, GptConfig, Mlp, initialise
from hpcpar.comm import Communicator
from hpcpar.nn import (
    BatchTensorDescriptor,
    ExpertBackend,
    RemoteMixtureOfExperts,
    RemoteSwitchMixtureOfExperts,
)

__all__ = [
    "MaskedExperts",
    "RemoteFeedForward",
    "balancing_loss",
    "chosen_experts",
    "make_backends",
    "use_remote_experts",
]


class RemoteFeedForward(nn.Module):
    """A feed-forward layer of remote experts: each byte of each window is a sample of its own.

    Parameters
    ----------
    mixture : takes and returns (samples, width).

    Attributes
    ----------
    balancing_loss : of the last forward; zero but for a switch.
    """

    def __init__(self, mixture: RemoteMixtureOfExperts | RemoteSwitchMixtureOfExperts) -> None:
        super().__init__()
        self.mixture = mixture
        self.balancing_loss = torch.zeros(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = self.mixture(x.flatten(0, 1))
        if isinstance(output, tuple):
            output, self.balancing_loss = output
        result: torch.Tensor = output.view_as(x)
        return result


def use_remote_experts(
    net: Gpt,
    comm: Communicator,
    grid: Sequence[int],
    *,
    switch: bool,
    k_best: int,
    forward_timeout: float | None,
    backward_timeout: float | None,
) -> ExpertLoad:
    """Replace the perceptrons of a model. Returns what counts how often each expert was chosen. **Local.**"""
    prefixes = [f"block{index}" for index in range(len(net.blocks))]
    load = ExpertLoad(prefixes, math.prod(grid))
    for index, (prefix, block) in enumerate(zip(prefixes, net.blocks, strict=True)):
        # k_min=0: a byte that gets no answer at all passes by on the residual connection.
        options: dict[str, Any] = {
            "uid_prefix": prefix,
            "k_min": 0,
            "forward_timeout": forward_timeout,
            "backward_timeout": backward_timeout,
        }
        mixture = (
            RemoteSwitchMixtureOfExperts(net.config.width, grid, comm, **options)
            if switch
            else RemoteMixtureOfExperts(net.config.width, grid, comm, k_best=k_best, **options)
        )
        k = 1 if switch else k_best
        mixture.gate.register_forward_hook(functools.partial(_count, load=load, layer=index, k=k))
        block.mlp = RemoteFeedForward(mixture)
    return load


def balancing_loss(model: nn.Module) -> torch.Tensor | int:
    """The sum over the layers of a model, of the last forward."""
    return sum(part.balancing_loss for part in model.modules() if isinstance(part, RemoteFeedForward))


def chosen_experts(scores: Sequence[torch.Tensor], k: int) -> torch.Tensor:
    """How often each expert of a full grid is among the best `k` of a sample.

    Parameters
    ----------
    scores : one tensor (samples, length) per axis of the grid; an expert's score is the sum.

    Returns
    -------
    int64 of shape (experts,), the last axis of the grid fastest.
    """
    totals = scores[0]
    for of_axis in scores[1:]:
        totals = (totals.unsqueeze(2) + of_axis.unsqueeze(1)).flatten(1)
    best = totals.topk(min(k, totals.shape[1]), dim=1).indices
    return torch.bincount(best.flatten(), minlength=totals.shape[1])


def _count(
    gate: nn.Module, inputs: object, scores: list[torch.Tensor], *, load: ExpertLoad, layer: int, k: int
) -> None:
    """A hook of the gate."""
    if gate.training:
        load.add(layer, chosen_experts([of_axis.detach() for of_axis in scores], k))


# -------------------------------------------------------------------------------------- served experts


class SlowExpert(nn.Module):
    """An expert that takes its time: to see what becomes of the others."""

    def __init__(self, expert: nn.Module, pause_s: float) -> None:
        super().__init__()
        self.expert, self.pause_s = expert, pause_s

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.pause_s)
        output: torch.Tensor = self.expert(x)
        return output


def make_backends(
    config: GptConfig,
    grid: Sequence[int],
    server: int,
    servers: int,
    *,
    learning_rate: float,
    samples_per_update: int | None,
    slow_s: float,
    seed: int,
) -> dict[str, ExpertBackend]:
    """The experts of one of the servers, by uid: a part of the grid of each block. **Local.**

    The last expert of the last block is slow if `slow_s` is not zero.
    """
    places = itertools.product(range(config.layers), itertools.product(*map(range, grid)))
    uids = [".".join([f"block{layer}", *map(str, place)]) for layer, place in places]
    backends = {}
    for number in range(len(uids))[common.shard(len(uids), server, servers)]:
        torch.manual_seed(seed + 1 + number)  # of the expert, wherever it is served
        expert: nn.Module = Mlp(config)
        initialise(expert, config)
        if slow_s and number == len(uids) - 1:
            expert = SlowExpert(expert, slow_s)
        backends[uids[number]] = ExpertBackend(
            uids[number],
            expert,
            # Adam does not mind that each client's gradients are of its own mean, not of the global one.
            functools.partial(torch.optim.Adam, lr=learning_rate),
            args_schema=BatchTensorDescriptor(config.width),
            clip_grad_norm=1.0,
            samples_per_update=samples_per_update,
        )
    return backends


class MaskedExperts(logging.Handler):
    """Counts the experts that were left out, instead of a line on the terminal for each."""

    def __init__(self) -> None:
        super().__init__()
        self.times: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg.startswith("expert %s is masked") and isinstance(record.args, tuple):
            self.times[str(record.args[0])] += 1
        elif logging.lastResort is not None:
            logging.lastResort.handle(record)
