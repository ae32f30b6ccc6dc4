"""The synchronous expert layer beside what it is compared with, forward and backward.

::

    hpcpar             gate, all-to-all, experts, all-to-all back
    torch over gloo    the same by torch.distributed.all_to_all_single, with the same weights and routing
    dense              a feed-forward layer of the same active size on this rank's tokens, no messages
    experts only       this rank's experts on as many rows as they get above, already in place

*Outside* is the share of the layer's step in which no expert computes: 1 - experts only / hpcpar. Outputs and
gradients of the first two are compared before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from common import Timings, measure
from hpcpar.comm import MPI, Communicator
from hpcpar.nn import MixtureOfExperts, TopKGate

__all__ = ["DENSE", "EXPERTS_ONLY", "HPCPAR", "TORCH", "LayerWork", "measure_layer"]

HPCPAR, TORCH, DENSE, EXPERTS_ONLY = "hpcpar", "torch over gloo", "dense", "experts only"
TOLERANCE = 1e-3


@dataclass(frozen=True)
class LayerWork:
    """A layer and its tokens."""

    features: int
    hidden: int
    experts: int
    top_k: int
    tokens: int  # of each rank

    @property
    def text(self) -> str:
        """One line for people."""
        return (
            f"{self.experts} experts {self.features} - {self.hidden}, top {self.top_k}, "
            f"{self.tokens} tokens per rank"
        )


def feed_forward(features: int, hidden: int) -> nn.Module:
    """Two layers with a GELU between."""
    return nn.Sequential(nn.Linear(features, hidden), nn.GELU(), nn.Linear(hidden, features))


def measure_layer(comm: Communicator, work: LayerWork, repetitions: int, *, with_torch: bool) -> Timings:
    """Time all variants. gloo must be up over ``comm`` for torch's. **Collective.**"""
    torch.manual_seed(0)
    gate = TopKGate(work.features, work.experts, top_k=work.top_k)
    experts = [feed_forward(work.features, work.hidden) for _ in range(work.experts)]
    layer = MixtureOfExperts(gate, experts, comm)
    torch.manual_seed(1 + comm.rank)
    x, gradient = torch.randn(work.tokens, work.features), torch.randn(work.tokens, work.features)
    dense = feed_forward(work.features, work.top_k * work.hidden)
    step = _stepper(x, gradient)
    variants: dict[str, Callable[[], Any]] = {HPCPAR: lambda: step(layer)}
    if with_torch:
        peer = _Torch(comm, gate, experts)
        _check(step, layer, peer, comm)
        variants[TORCH] = lambda: step(peer)
    variants[DENSE] = lambda: step(dense)
    step(layer)
    rows = _rows_here(comm, layer)
    parts = [(layer.experts[str(number)], torch.randn(count, work.features)) for number, count in rows]

    def experts_only() -> None:
        for expert, part in parts:
            if len(part):
                y = expert(part.requires_grad_())
                y.backward(part.detach())

    variants[EXPERTS_ONLY] = experts_only
    for call in variants.values():
        call()
    timings = measure(comm, variants, repetitions)
    layer.free()
    return timings


def _stepper(x: torch.Tensor, gradient: torch.Tensor) -> Callable[[nn.Module], torch.Tensor]:
    """One forward and backward, with gradients of the inputs and dropped gradients of the parameters."""

    def step(module: nn.Module) -> torch.Tensor:
        for parameter in module.parameters():
            parameter.grad = None
        inputs = x.detach().requires_grad_()
        output = module(inputs)
        output.backward(gradient)
        assert inputs.grad is not None
        return torch.cat([output.detach(), inputs.grad])

    return step


def _rows_here(comm: Communicator, layer: MixtureOfExperts) -> list[tuple[int, int]]:
    """Number and rows of this rank's experts in the last step."""
    load = layer.load.tolist()
    return [
        (number, load[number] // len(layer.placement.ranks_of(number)))
        for number in layer.placement.experts_of(comm.rank)
    ]


class _Exchange(torch.autograd.Function):
    """Rows to other ranks; gradients back."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        ctx.splits = sent, received
        output = rows.new_empty(sum(received), rows.shape[1])
        dist.all_to_all_single(output, rows.contiguous(), received, sent)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        sent, received = ctx.splits
        output = gradient.new_empty(sum(sent), gradient.shape[1])
        dist.all_to_all_single(output, gradient.contiguous(), sent, received)
        return output, None, None


class _Torch(nn.Module):
    """The same layer the way it is usually written in plain torch, experts divided evenly."""

    def __init__(self, comm: Communicator, gate: TopKGate, experts: list[nn.Module]) -> None:
        super().__init__()
        self.gate, self.size = gate, comm.size
        self.count, self.each = len(experts), len(experts) // comm.size
        self.experts = nn.ModuleList(experts[comm.rank * self.each : (comm.rank + 1) * self.each])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Dispatch, compute, combine."""
        probabilities = (x @ self.gate.weight.T).softmax(-1)
        weights, chosen = probabilities.topk(self.gate.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        order = chosen.flatten().argsort(stable=True)
        token = order // self.gate.top_k
        counts = torch.bincount(chosen.flatten(), minlength=self.count)
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts)
        sent = counts.view(self.size, self.each).sum(1).tolist()
        received = theirs.view(self.size, self.each).sum(1).tolist()
        rows = _Exchange.apply(x[token], sent, received)  # type: ignore[no-untyped-call]
        pieces = rows.split(theirs.tolist())  # by rank, then by expert
        answers: list[list[torch.Tensor]] = [[] for _ in range(self.size)]
        for place, expert in enumerate(self.experts):
            mine = [pieces[rank * self.each + place] for rank in range(self.size)]
            output = expert(torch.cat(mine)).split([len(piece) for piece in mine])
            for rank in range(self.size):
                answers[rank].append(output[rank])
        back = torch.cat([piece for part in answers for piece in part])
        back = _Exchange.apply(back, received, sent)  # type: ignore[no-untyped-call]
        scaled = back * weights.flatten()[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, token, scaled)


def _check(
    step: Callable[[nn.Module], torch.Tensor], layer: nn.Module, peer: nn.Module, comm: Communicator
) -> None:
    """Raise on all ranks unless both compute the same."""
    worst = comm.allreduce(float((step(layer) - step(peer)).abs().max()), MPI.MAX)
    if not worst < TOLERANCE:
        raise RuntimeError(
            f"outputs and gradients must agree within {TOLERANCE}, got a difference of {worst}"
        )
