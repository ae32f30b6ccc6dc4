"""Calls: what all ranks find out together about one forward before tokens travel.

Each rank states facts about its own call, and one small message tells all of them the largest and the
smallest value of each. Facts that must be equal are, or every rank raises the same error. Others are true for
all when they are for one: where any rank needs a gradient, all ranks take part in that backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from hpcpar.comm.agreement import largest_and_smallest
from hpcpar.errors import MismatchError
from hpcpar.nn.experts.exchange import Exchange
from hpcpar.nn.experts.gate import TopKGate, router_dtype
from hpcpar.nn.experts.replay import RoutingMemory
from hpcpar.nn.experts.routing import Routing

__all__ = ["Call", "Judged", "agree_on_call", "agree_on_output", "judge"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_ALIKE = ("features", "type", "logits", "training", "gradient mode", "recomputation")


@dataclass(frozen=True)
class Call:
    """What the ranks have agreed upon for one forward.

    Attributes
    ----------
    replayed : Routing or None
        The routing of the forward that is computed again.
    needs_graph : bool
        Whether anything needs a gradient, on any rank.
    rows_need_gradient : bool
        Whether the tokens of any rank do.
    """

    replayed: Routing | None
    needs_graph: bool
    rows_need_gradient: bool


class Judged(NamedTuple):
    """Tokens as they will travel, and the gate's logits, float32 or float64; or what is wrong with them."""

    tokens: torch.Tensor
    logits: torch.Tensor
    problem: Exception | None


def judge(gate: nn.Module, inputs: torch.Tensor) -> Judged:
    """Ask the gate. Local; errors are for :func:`agree_on_call` to raise, on all ranks.

    Parameters
    ----------
    gate
        Called without autocast.
    inputs
        Shape (..., features).
    """
    try:
        return Judged(*_judge(gate, inputs), None)
    except Exception as error:
        return Judged(torch.empty(0, 0), torch.empty(0, 0), error)


def _judge(gate: nn.Module, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if inputs.dim() == 0 or inputs.dtype not in _DTYPES:
        raise MismatchError(
            "the input of a mixture of experts must be a tensor (..., features) of float32, float64, "
            f"bfloat16 or float16, got shape {tuple(inputs.shape)} of {inputs.dtype}"
        )
    tokens = inputs.reshape(inputs.shape[:-1].numel(), inputs.shape[-1])
    kind, judged = tokens.device.type, tokens
    if not isinstance(gate, TopKGate):
        judged = tokens.to(next((p.dtype for p in gate.parameters()), router_dtype(tokens.dtype)))
    with torch.autocast(kind, enabled=False):
        logits = gate(judged)
    if logits.dim() != 2 or len(logits) != len(tokens):
        raise MismatchError(
            f"a gate must return a row of logits for each of {len(tokens)} tokens, got {tuple(logits.shape)}"
        )
    if torch.is_autocast_enabled(kind) and tokens.dtype is torch.float32:
        tokens = tokens.to(torch.get_autocast_dtype(kind))  # half the bytes
    return tokens, logits.to(router_dtype(logits.dtype))


def agree_on_call(
    exchange: Exchange,
    memory: RoutingMemory,
    judged: Judged,
    *,
    num_experts: int,
    training: bool,
    trainable: bool,
) -> Call:
    """Whether all ranks call alike, what needs gradients, and which forward is replayed. Collective.

    Parameters
    ----------
    exchange, memory
        Of the layer.
    judged
        From :func:`judge`.
    num_experts
        Columns that the logits must have.
    training, trainable
        Whether the layer trains, and whether any of this rank's experts does.

    Raises
    ------
    MismatchError
        On every rank, when they do not call alike, or one of them could not judge its tokens.
    """
    tokens, logits, problem = judged
    gradients = torch.is_grad_enabled()
    facts: dict[str, int | None] = {
        "problem": problem is not None,
        "features": tokens.shape[1],
        "type": _DTYPES.index(tokens.dtype),
        "logits": logits.shape[1],
        "training": training,
        "gradient mode": gradients,
        "recomputation": memory.is_replay,
        "rows need gradient": gradients and tokens.requires_grad,
        "graph": gradients and (tokens.requires_grad or logits.requires_grad or trainable),
    }
    with exchange.armed():
        found = largest_and_smallest(exchange.comm, facts)
    if problem is not None:
        raise problem
    if found["problem"][0]:
        raise MismatchError("the input of a mixture of experts must be fit on all ranks, got one that is not")
    _check_alike(facts, found)
    if logits.shape[1] != num_experts:
        raise MismatchError(
            f"a gate must have an output for each of {num_experts} experts, got {logits.shape[1]}"
        )
    return Call(
        _replayed(exchange, memory, logits, training) if memory.is_replay else None,
        bool(found["graph"][0]),
        bool(found["rows need gradient"][0]),
    )


def agree_on_output(
    exchange: Exchange, answers: Sequence[torch.Tensor | None]
) -> tuple[int, torch.dtype] | None:
    """Features and type of what experts return, ``None`` if none has a row on any rank. Collective.

    Parameters
    ----------
    exchange
        Of the layer.
    answers
        Of this rank's experts, ``None`` of those without rows.

    Raises
    ------
    MismatchError
        On every rank, when they are not the same of all experts.
    """
    kinds = {(a.shape[1], _DTYPES.index(a.dtype)) for a in answers if a is not None}
    features, dtype = (-1, -1) if len(kinds) > 1 else next(iter(kinds), (None, None))
    with exchange.armed():
        found = largest_and_smallest(exchange.comm, {"features": features, "type": dtype})
    (widest, narrowest), (last, first) = found["features"], found["type"]
    if widest < narrowest:
        return None
    if widest != narrowest or last != first or widest < 0:
        mine = sorted((width, str(_DTYPES[number])) for width, number in kinds)
        raise MismatchError(
            "experts must all return the same number of features of the same type, got different ones: "
            f"{mine or 'none'} on rank {exchange.comm.rank}"
        )
    return widest, _DTYPES[last]


def _check_alike(facts: dict[str, int | None], found: dict[str, tuple[int, int]]) -> None:
    for name in _ALIKE:
        largest, smallest = found[name]
        if largest != smallest:
            raise MismatchError(
                f"a mixture of experts must be called alike on all ranks, got {name} {facts[name]} here, and "
                f"{smallest} to {largest} over the ranks"
            )


def _replayed(
    exchange: Exchange, memory: RoutingMemory, logits: torch.Tensor, training: bool
) -> Routing | None:
    """The routing of the forward that is computed again on all ranks, if any of them know one. Collective."""
    mine = memory.candidates(logits.detach(), training)
    with exchange.armed():
        everyone = exchange.comm.allgather(mine) if exchange.comm.size > 1 else [mine]
    return memory.take(sorted(set(everyone[0]).intersection(*everyone[1:])))
