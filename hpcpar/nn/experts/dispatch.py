"""Dispatch and combine: the two exchanges of rows, as autograd functions.

::

    forward   tokens --dispatch--> rows of each expert --experts--> outputs --combine--> outputs of tokens
    backward  gradient <--dispatch-- gradients of rows <---------- gradients <--combine-- gradient

Each token has exactly k slots. So where many rows meet in one token, in combine's forward and dispatch's
backward, it is a gather of k rows, and nothing is scattered. A dropped slot points at a row of zeros.

Invariants:

* Whether the backward of each function runs is the same on all ranks, whatever this rank's tensors require:
  the *anchor*, a leaf without elements, requires a gradient where any rank's inputs do; the *tether* leads
  from dispatch to combine, so that the backward of dispatch runs where no row came, too.
* The backward of combine comes before, and that of dispatch after, the backward of all of the rank's experts.
* ``scales`` multiply the gradients that the experts of each rank see; those of tokens are divided by them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hpcpar.nn.experts.exchange import Exchange
from hpcpar.nn.experts.routing import Routing, RowPlan

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["combine", "dispatch", "without_rows"]

_WIDE = (torch.float32, torch.float64)


def dispatch(
    tokens: torch.Tensor,
    exchange: Exchange,
    routing: Routing,
    scales: torch.Tensor | None,
    *,
    needs_gradient: bool,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Bring tokens to their experts. Collective, as is its backward.

    Parameters
    ----------
    tokens
        Shape (tokens, features).
    exchange, routing
        Over which ranks, and what.
    scales
        See the module's description; shape (ranks,), on the host, ``None`` for ones.
    needs_gradient
        Whether the tokens of any rank do.

    Returns
    -------
    tuple
        The tether, and the rows of each expert of this rank, shape (rows, features).
    """
    outputs = _Dispatch.apply(tokens, _anchor(needs_gradient), exchange, routing, scales)  # type: ignore[no-untyped-call]
    return outputs[0], list(outputs[1:])


def combine(
    tether: torch.Tensor,
    outputs: Sequence[torch.Tensor],
    weights: torch.Tensor,
    loss: torch.Tensor | None,
    exchange: Exchange,
    routing: Routing,
    scales: torch.Tensor | None,
    loss_scale: float,
    *,
    needs_gradient: bool,
) -> torch.Tensor:
    """Bring the outputs of experts back and add them up, weighted. Collective, as is its backward.

    Parameters
    ----------
    tether
        From :func:`dispatch`.
    outputs
        Of each expert of this rank, shape (rows, features).
    weights
        Of the slots, shape (tokens, k), float32 or float64.
    loss
        A scalar whose gradient is to be ``loss_scale``, or ``None``.
    exchange, routing, scales
        As in :func:`dispatch`.
    loss_scale
        See ``loss``.
    needs_gradient
        Whether anything does, on any rank.

    Returns
    -------
    torch.Tensor
        Shape (tokens, features), in the type of the outputs; summed in float32 at least.
    """
    result: torch.Tensor = _Combine.apply(  # type: ignore[no-untyped-call]
        _anchor(needs_gradient), tether, weights, loss, exchange, routing, scales, loss_scale, *outputs
    )
    return result


def without_rows(output: torch.Tensor, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """``output``, with zeros for the gradients of parameters that had no part in it. Local.

    For an expert that got no rows: hooks of its parameters run, and its replicas are not kept waiting.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if not trainable or not torch.is_grad_enabled():
        return output
    result: torch.Tensor = _WithoutRows.apply(output, *trainable)  # type: ignore[no-untyped-call]
    return result


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens: torch.Tensor,
        anchor: torch.Tensor | None,
        exchange: Exchange,
        routing: Routing,
        scales: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.exchange, ctx.routing, ctx.scales = exchange, routing, scales
        rows = exchange.to_experts(tokens.index_select(0, routing.plan.tokens), routing.plan)
        ctx.rows = [(row.shape, row.dtype, row.device) for row in rows]
        return tokens.new_empty(0), *rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        given = [
            torch.zeros(shape, dtype=dtype, device=device) if gradient is None else gradient
            for gradient, (shape, dtype, device) in zip(gradients[1:], ctx.rows, strict=True)
        ]
        plan = ctx.routing.plan
        rows = ctx.exchange.from_experts(given, plan, extra=1)
        gradient = None
        if ctx.needs_input_grad[0]:
            factors = None
            if ctx.scales is not None:
                factors = _per_row(1.0 / ctx.scales, plan, rows.device)
                factors = torch.cat([factors, factors.new_zeros(1)])[plan.position]
            gradient = _sum_of_slots(rows, plan.position, factors).to(rows.dtype)
        return gradient, None, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchor: torch.Tensor | None,
        tether: torch.Tensor,
        weights: torch.Tensor,
        loss: torch.Tensor | None,
        exchange: Exchange,
        routing: Routing,
        scales: torch.Tensor | None,
        loss_scale: float,
        *outputs: torch.Tensor,
    ) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.exchange, ctx.routing = exchange, routing
        ctx.scales, ctx.loss_scale = scales, loss_scale
        rows = exchange.from_experts(outputs, routing.plan, extra=1)
        # Saved on every rank and after the exchange: a checkpoint's recomputation stops at the last saved
        # tensor that it needs, and must not stop before the exchange on some ranks only.
        ctx.save_for_backward(weights, rows if ctx.needs_input_grad[2] else None)
        return _sum_of_slots(rows, routing.plan.position, weights).to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        ctx.exchange.watch_backward()
        weights, rows = ctx.saved_tensors
        plan = ctx.routing.plan
        gradient = gradients[0].index_select(0, plan.tokens)
        of_weights = None
        if rows is not None:
            of_weights = _dot(gradient, rows[:-1]).to(weights.dtype)
            of_weights = torch.cat([of_weights, of_weights.new_zeros(1)])[plan.position]
        factors = weights.reshape(-1)[plan.slots]
        if ctx.scales is not None:
            factors.mul_(_per_row(ctx.scales, plan, factors.device))
        gradient.mul_(factors[:, None])
        of_outputs = ctx.exchange.to_experts(gradient, plan)
        of_loss = weights.new_tensor(ctx.loss_scale) if ctx.needs_input_grad[3] else None
        return None, weights.new_empty(0), of_weights, of_loss, None, None, None, None, *of_outputs


class _WithoutRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.parameters = parameters
        return output.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0], *(torch.zeros_like(parameter) for parameter in ctx.parameters)


def _anchor(needs_gradient: bool) -> torch.Tensor | None:
    return torch.empty(0, requires_grad=True) if needs_gradient and torch.is_grad_enabled() else None


def _per_row(per_rank: torch.Tensor, plan: RowPlan, device: torch.device) -> torch.Tensor:
    """For each row that this rank sends the number of the rank that it goes to."""
    return per_rank.repeat_interleave(torch.tensor(plan.sent)).to(device)


def _sum_of_slots(rows: torch.Tensor, position: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """For each token the weighted sum of its k rows, in float32 or wider: shape (tokens, features)."""
    if rows.dtype in _WIDE:
        # Gathers and adds in one pass.
        weights = None if weights is None else weights.to(rows.dtype)
        return F.embedding_bag(position, rows, per_sample_weights=weights, mode="sum")
    wide = torch.promote_types(torch.float32, rows.dtype)
    total = torch.zeros(len(position), rows.shape[1], dtype=wide, device=rows.device)
    for choice in range(position.shape[1]):
        part = rows.index_select(0, position[:, choice])
        if weights is None:
            total.add_(part)
        else:
            total.addcmul_(part, weights[:, choice, None].to(wide))
    return total


def _dot(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The dot product of each pair of rows, in float32 or wider."""
    if first.dtype in _WIDE:
        return (first * second).sum(-1)
    return (first.float() * second.float()).sum(-1)
