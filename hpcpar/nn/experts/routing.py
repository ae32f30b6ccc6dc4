"""Routing: which tokens go to which experts in one forward, and in which order their rows travel.

A *slot* is one choice of one token: token *t* has the slots ``t * k`` to ``t * k + k - 1``, first choice
first. Slots that are kept become *rows*, sorted by the place they go to::

    slots    t0:e2  t0:e0  t1:e0  t1:e1         (k = 2, slots 0 to 3)
    rows     e0:slot 1   e0:slot 2   e1:slot 3   e2:slot 0

The routing is decided once per forward, from the tokens of all ranks. A recomputation in the backward
replays it (:mod:`~hpcpar.nn.experts.replay`), since a bias that has moved meanwhile, or arithmetic that
differs in the last bit, would send tokens elsewhere than the gradients come from.

Invariant: what is chosen, counted and dropped does not depend on how the global batch is divided among ranks.
The capacity of an expert is filled by all first choices before all second ones, and among these in the order
of the tokens, rank by rank (GShard, Lepikhin et al. 2020, algorithm 1, made exact over ranks).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hpcpar.comm import MPI
from hpcpar.nn.experts.placement import Placement

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["Routing", "RowPlan", "Statistics", "choose", "route"]


@dataclass(frozen=True)
class Statistics:
    """What all ranks together have chosen.

    Attributes
    ----------
    tokens : int
        Of all ranks.
    choices : torch.Tensor
        How often each expert was the first, second, ... choice: shape (k, num_experts), int64, on the host.
    probability : torch.Tensor
        Mean probability of each expert, shape (num_experts,), float64, on the host.
    square : float
        Mean of the squared logarithm of the softmax's denominator.
    """

    tokens: int
    choices: torch.Tensor
    probability: torch.Tensor
    square: float


@dataclass(frozen=True)
class RowPlan:
    """What this rank sends and receives.

    Attributes
    ----------
    slots, tokens : torch.Tensor
        Slot and token of each row that it sends, shape (rows,), int64.
    position : torch.Tensor
        Row of each slot, shape (tokens, k), int64; the number of rows where the slot was dropped.
    sent : list of int
        Rows for each rank.
    received : list of list of int
        Rows from each rank for each expert of this one.
    """

    slots: torch.Tensor
    tokens: torch.Tensor
    position: torch.Tensor
    sent: list[int]
    received: list[list[int]]


@dataclass(eq=False)
class Routing:
    """The decisions of one forward.

    Attributes
    ----------
    serial : int
        Number of the forward, the same on all ranks.
    logits : torch.Tensor
        Of this rank's tokens, shape (tokens, num_experts), without a graph.
    experts : torch.Tensor
        Chosen by this rank's tokens, shape (tokens, k), int64.
    plan : RowPlan
        What travels.
    statistics : Statistics
        Over all ranks.
    load : torch.Tensor
        Rows of each expert over all ranks, shape (num_experts,), int64, on the host.
    replays : int
        How often it was used again.
    training, has_graph : bool
        In which mode, and whether the forward has a graph.
    bias_version : int
        How often the gate's bias had moved before.
    output : tuple or None
        Features and type of what the experts return, once they have.
    """

    serial: int
    logits: torch.Tensor
    experts: torch.Tensor
    plan: RowPlan
    statistics: Statistics
    load: torch.Tensor
    replays: int = 0
    training: bool = False
    has_graph: bool = False
    bias_version: int = 0
    output: tuple[int, torch.dtype] | None = None


def choose(probabilities: torch.Tensor, bias: torch.Tensor | None, top_k: int) -> torch.Tensor:
    """The ``top_k`` experts of each token by biased probability, best first. Local.

    Parameters
    ----------
    probabilities
        Shape (tokens, num_experts).
    bias
        Shape (num_experts,), or ``None``.
    top_k
        At most ``num_experts``.
    """
    scores = probabilities if bias is None else probabilities + bias.to(probabilities.dtype)
    return scores.topk(top_k, dim=-1).indices


def route(
    logits: torch.Tensor,
    probabilities: torch.Tensor,
    experts: torch.Tensor,
    placement: Placement,
    comm: Communicator,
    capacity_factor: float | None,
    serial: int,
) -> Routing:
    """Decide what travels. Collective.

    Parameters
    ----------
    logits, probabilities
        Shape (tokens, num_experts), without graphs.
    experts
        Chosen, shape (tokens, k).
    placement
        Where experts live.
    comm
        The ranks.
    capacity_factor
        Each expert takes at most ``ceil(capacity_factor * k * tokens / num_experts)`` slots of the global
        batch; ``None`` for all.
    serial
        Number of the forward.
    """
    top_k, num_experts = experts.shape[1], placement.num_experts
    own = _count_choices(experts, num_experts)
    statistics = _gather_statistics(logits, probabilities, own, comm)
    load, kept = statistics.choices.sum(0), None
    if capacity_factor is not None:
        capacity = math.ceil(capacity_factor * top_k * statistics.tokens / num_experts)
        kept = _below_capacity(experts, own, statistics.choices, capacity, comm)
        load = load.clamp(max=capacity)
    plan = _plan_rows(experts, kept, placement, comm)
    return Routing(serial, logits, experts, plan, statistics, load)


def _count_choices(experts: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How often this rank's tokens chose each expert first, second, ...: (k, num_experts) on the host."""
    top_k = experts.shape[1]
    keys = experts + torch.arange(top_k, device=experts.device) * num_experts
    return torch.bincount(keys.flatten(), minlength=top_k * num_experts).view(top_k, num_experts).cpu()


def _gather_statistics(
    logits: torch.Tensor, probabilities: torch.Tensor, own: torch.Tensor, comm: Communicator
) -> Statistics:
    """Add up over the ranks, in one message; counts are exact in float64."""
    squares = logits.logsumexp(-1).double().square().sum()
    sums = probabilities.sum(0, dtype=torch.float64)
    numbers = torch.cat([own.flatten().double(), sums.cpu(), squares.cpu()[None]])
    numbers = torch.cat([numbers, numbers.new_tensor([logits.shape[0]])])
    if comm.size > 1:
        comm.Allreduce(MPI.IN_PLACE, numbers)
    choices = numbers[: own.numel()].round().long().view_as(own)
    tokens = int(numbers[-1])
    return Statistics(
        tokens, choices, numbers[own.numel() : -2] / max(tokens, 1), float(numbers[-2]) / max(tokens, 1)
    )


def _below_capacity(
    experts: torch.Tensor, own: torch.Tensor, choices: torch.Tensor, capacity: int, comm: Communicator
) -> torch.Tensor:
    """Which slots their experts have room for, shape (tokens, k), bool."""
    before = torch.zeros_like(own)
    if comm.size > 1:
        comm.Exscan(own, before)
        if comm.rank == 0:
            before.zero_()  # MPI leaves it undefined
    starts = (choices.cumsum(0) - choices + before).flatten().to(experts.device)
    keys = (experts + torch.arange(experts.shape[1], device=experts.device) * own.shape[1]).T.flatten()
    order = keys.argsort(stable=True)
    counts = own.flatten().to(experts.device)
    firsts = counts.cumsum(0) - counts
    within = torch.empty_like(keys)
    within[order] = torch.arange(len(keys), device=keys.device) - firsts[keys[order]]
    return (starts[keys] + within < capacity).view(experts.shape[1], -1).T


def _plan_rows(
    experts: torch.Tensor, kept: torch.Tensor | None, placement: Placement, comm: Communicator
) -> RowPlan:
    """Sort the kept slots by expert, and tell each rank how many of them it gets. Collective."""
    keys = experts if kept is None else experts.where(kept, placement.num_experts)
    keys = keys.flatten()
    counts = torch.bincount(keys, minlength=placement.num_experts)[: placement.num_experts].cpu()
    order = keys.argsort(stable=True)
    rows = int(counts.sum())
    position = torch.empty_like(order)
    position[order] = torch.arange(len(order), device=order.device)
    send = placement.divide(counts, comm.rank)
    receive = send
    if comm.size > 1:
        receive = torch.empty_like(send)
        comm.Alltoall(send, receive)
    columns = len(placement.experts_of(comm.rank))
    slots = order[:rows]
    return RowPlan(
        slots=slots,
        tokens=slots // experts.shape[1],
        position=position.clamp_(max=rows).view_as(experts),
        sent=send.sum(1).tolist(),
        received=receive[:, :columns].tolist(),
    )
