"""The gate's losses: values over the tokens of all ranks, gradients through those of this one.

A differentiable all-reduce would need a collective in the backward. The sums over all ranks are known from
the forward, and the losses are linear in this rank's part of them but for the choices, which have no
gradient. So the backward needs no other rank.

Invariant: on each rank the gradient is ``comm.size`` times the derivative of the value with respect to what
this rank computed. Every rank adds the same value to its loss; the mean of the ranks' gradients, which data
parallelism takes, is then the gradient of the value.
"""

from __future__ import annotations

from typing import Any

import torch

from hpcpar.nn.experts.routing import Statistics

__all__ = ["balancing_loss", "z_loss"]


class _WithValue(torch.autograd.Function):
    """A scalar with the gradient of ``part`` and the given value."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, value: float) -> torch.Tensor:
        return torch.full_like(part, value)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


def balancing_loss(
    probabilities: torch.Tensor, statistics: Statistics, size: int, coefficient: float
) -> torch.Tensor:
    """``coefficient * E * sum_e f_e P_e`` over all ranks. Local.

    Parameters
    ----------
    probabilities
        Of this rank's tokens, shape (tokens, E), with a graph.
    statistics
        Over all ranks.
    size
        Number of ranks.
    coefficient
        Of the loss.
    """
    choices = statistics.choices.sum(0).double()
    fractions = choices / choices.sum().clamp(min=1.0)
    factor = coefficient * len(choices)
    value = factor * float((fractions * statistics.probability).sum())
    part = (probabilities.sum(0) * fractions.to(probabilities)).sum()
    return _value_of(part * (factor * size / max(statistics.tokens, 1)), value)


def z_loss(logits: torch.Tensor, statistics: Statistics, size: int, coefficient: float) -> torch.Tensor:
    """``coefficient`` times the mean of ``logsumexp(logits) ** 2`` over all ranks. Local.

    Parameters are those of :func:`balancing_loss`, with ``logits`` of shape (tokens, E).
    """
    part = logits.logsumexp(-1).square().sum()
    return _value_of(part * (coefficient * size / max(statistics.tokens, 1)), coefficient * statistics.square)


def _value_of(part: torch.Tensor, value: float) -> torch.Tensor:
    result: torch.Tensor = _WithValue.apply(part, value)  # type: ignore[no-untyped-call]
    return result
