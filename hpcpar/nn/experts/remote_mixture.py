"""Mixtures of experts that live on other ranks and may be slow, wrong or dead.

:class:`RemoteMixtureOfExperts` takes the best ``k_best`` experts of a grid for each sample and adds up their
outputs with softmax weights (Shazeer et al. 2017; Riabinin and Gusev 2020).
:class:`RemoteSwitchMixtureOfExperts` takes one (Fedus et al. 2021), and returns a loss that keeps the experts
evenly loaded. Both find them by :mod:`product keys <hpcpar.nn.experts.product_key>` and call them by
:mod:`~hpcpar.nn.experts.many_calls`.

All experts of a grid take and return the same. Each expert is trained by its server with the gradients of all
callers; what is trained here is the gate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from hpcpar.errors import MismatchError
from hpcpar.nn.experts.eager import never_compiled
from hpcpar.nn.experts.many_calls import ManyCalls, call_many
from hpcpar.nn.experts.network import ExpertNetwork
from hpcpar.nn.experts.product_key import ExpertGrid, ProductKeyGate
from hpcpar.nn.experts.schema import ExpertSchema

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["RemoteMixtureOfExperts", "RemoteSwitchMixtureOfExperts"]


class _Found(NamedTuple):
    """The experts of a grid that are served now."""

    network: ExpertNetwork
    grid: ExpertGrid
    schema: ExpertSchema


class _RemoteGridLayer(nn.Module):
    """What both mixtures share: the gate, and the calls of what it has chosen."""

    def __init__(
        self,
        in_features: int,
        grid: Sequence[int],
        comm: Communicator,
        *,
        uid_prefix: str,
        k_min: int,
        forward_timeout: float | None,
        backward_timeout: float | None,
    ) -> None:
        super().__init__()
        self.gate = ProductKeyGate(in_features, grid)
        self.uid_prefix = uid_prefix
        self.k_min = k_min
        self._comm = comm
        self._timeouts = forward_timeout, backward_timeout
        self._found: _Found | None = None

    def extra_repr(self) -> str:
        """Grid and prefix."""
        return f"grid={self.gate.grid}, uid_prefix={self.uid_prefix!r}"

    def _find(self) -> _Found:
        """The experts that are served now, and what they take and return."""
        network = ExpertNetwork.of(self._comm)
        if self._found is None or self._found.network is not network:
            grid = ExpertGrid(self.uid_prefix, self.gate.grid, network.records)
            self._found = _Found(network, grid, self._common_schema(network, grid))
        return self._found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_found": None}  # a copy finds its experts itself

    def _common_schema(self, network: ExpertNetwork, grid: ExpertGrid) -> ExpertSchema:
        """What all experts of the grid take and return."""
        first, *others = (network.record(uid) for uid in grid.uids)
        for other in others:
            if other.schema != first.schema:
                raise MismatchError(
                    f"all experts of a grid must have one schema, got different ones of {first.uid!r} "
                    f"and {other.uid!r}"
                )
        if grid.count < self.k_min:
            raise MismatchError(f"k_min must be at most the experts served, {grid.count}, got {self.k_min}")
        return first.schema

    def _call(
        self,
        found: _Found,
        indices: torch.Tensor,
        wanted: torch.Tensor,
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Who answered, and outputs of the experts with ``indices``, (batch, k), where ``wanted``."""
        network, grid, schema = found
        indices, wanted = indices.cpu(), wanted.cpu()
        chosen = torch.unique(indices[wanted])
        records = [network.record(grid.uid(index)) for index in chosen.tolist()]
        choices = torch.full_like(indices, -1)
        choices[wanted] = torch.searchsorted(chosen, indices[wanted])
        inputs = schema.flatten_call(args, kwargs)
        if len(inputs[0]) != len(indices):
            raise MismatchError(f"the batch must be that of the gate, {len(indices)}, got {len(inputs[0])}")
        calls = ManyCalls(network, schema, records, choices, self.training, self.k_min, *self._timeouts)
        return call_many(calls, inputs)


class RemoteMixtureOfExperts(_RemoteGridLayer):
    """The weighted outputs of the best experts of a grid. Local to make; a call is Point-to-point.

    Parameters
    ----------
    in_features
        Length of the last axis of the first argument, which decides about the experts. Axes between the
        first and the last are averaged for that.
    grid
        Lengths of the grid's axes; the expert at (3, 5) has the uid ``"<uid_prefix>.3.5"``. Not all need be
        served.
    comm
        The communicator of the :class:`~hpcpar.nn.ExpertServer`.
    uid_prefix
        What the uids begin with.
    k_best
        Experts for each sample.
    k_min
        How many of them must answer. With fewer the call raises an error; otherwise the weights of those
        that did not go to the others.
    forward_timeout, backward_timeout
        Seconds until an expert that has not answered is left out; ``HPCPAR_TIMEOUT_S`` by default.

    Raises
    ------
    RemoteExpertError
        In a call, when fewer than ``k_min`` experts of a sample answered.
    MismatchError
        In a call, when no expert of the grid is served, or arguments do not fit.

    Notes
    -----
    The module is called with the arguments of the experts, ``mixture(x, *args, **kwargs)``, and returns what
    they return. Outputs that are not floating cannot be averaged; they are those of the best one.
    """

    def __init__(
        self,
        in_features: int,
        grid: Sequence[int],
        comm: Communicator,
        *,
        uid_prefix: str = "expert",
        k_best: int = 4,
        k_min: int = 1,
        forward_timeout: float | None = None,
        backward_timeout: float | None = None,
    ) -> None:
        if not 0 <= k_min <= k_best or k_best < 1:
            raise MismatchError(f"k_min must be from 0 to k_best, got k_min={k_min}, k_best={k_best}")
        super().__init__(
            in_features,
            grid,
            comm,
            uid_prefix=uid_prefix,
            k_min=k_min,
            forward_timeout=forward_timeout,
            backward_timeout=backward_timeout,
        )
        self.k_best = k_best

    @never_compiled
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Outputs nested as those of an expert. Point-to-point."""
        found = self._find()
        scores = self.gate(x)
        indices, exists = found.grid.best(scores, self.k_best)
        answered, outputs = self._call(found, indices, exists, (x, *args), kwargs)
        chosen = [
            of_axis.gather(1, places)
            for of_axis, places in zip(scores, found.grid.coordinates(indices), strict=True)
        ]
        weights = _masked_softmax(torch.stack(chosen).sum(0), answered)
        return found.schema.unflatten_outputs([_weighted(o, weights, answered) for o in outputs])


class RemoteSwitchMixtureOfExperts(_RemoteGridLayer):
    """The output of the best expert of a grid, times its probability. Local to make; a call Point-to-point.

    Parameters
    ----------
    in_features, grid, comm, uid_prefix, forward_timeout, backward_timeout
        As in :class:`RemoteMixtureOfExperts`.
    jitter
        In training, what the gate sees is multiplied by random numbers from ``1 - jitter`` to ``1 + jitter``.
    capacity_factor
        Each expert takes at most ``capacity_factor * batch / experts`` samples of a call, those that come
        first in the batch; the others get zeros. ``None`` for no limit.
    k_min
        0: samples whose expert does not answer get zeros. 1: that is an error.

    Notes
    -----
    Returns ``(output, balancing_loss)``. The loss is the sum over the grid's axes of ``n * sum(f * p)``, with
    the share ``f`` of samples and the mean probability ``p`` of each of its ``n`` coordinates. It is 1 for
    each axis when the load is even; its gradient is that of ``p``. Weigh it with about 0.01.
    """

    def __init__(
        self,
        in_features: int,
        grid: Sequence[int],
        comm: Communicator,
        *,
        uid_prefix: str = "expert",
        jitter: float = 0.01,
        capacity_factor: float | None = None,
        k_min: int = 1,
        forward_timeout: float | None = None,
        backward_timeout: float | None = None,
    ) -> None:
        if (
            k_min not in (0, 1)
            or not 0 <= jitter < 1
            or (capacity_factor is not None and capacity_factor <= 0)
        ):
            raise MismatchError(
                "k_min must be 0 or 1, jitter from 0 to 1, capacity_factor positive or None, got "
                f"{k_min}, {jitter}, {capacity_factor}"
            )
        super().__init__(
            in_features,
            grid,
            comm,
            uid_prefix=uid_prefix,
            k_min=k_min,
            forward_timeout=forward_timeout,
            backward_timeout=backward_timeout,
        )
        self.jitter, self.capacity_factor = jitter, capacity_factor

    @never_compiled
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[Any, torch.Tensor]:
        """Outputs nested as those of an expert, and the balancing loss. Point-to-point."""
        found = self._find()
        scores = [of_axis.log_softmax(-1) for of_axis in self.gate(self._jittered(x))]
        probabilities = [of_axis.exp() for of_axis in scores]
        indices, exists = found.grid.best(scores, 1)
        coordinates = found.grid.coordinates(indices)
        balancing_loss = _balancing_loss(probabilities, coordinates)
        wanted = exists & self._within_capacity(indices, found.grid.count)
        answered, outputs = self._call(found, indices, wanted, (x, *args), kwargs)
        chosen = [p.gather(1, places) for p, places in zip(probabilities, coordinates, strict=True)]
        weights = torch.stack(chosen).prod(0) * answered
        return found.schema.unflatten_outputs(
            [_weighted(o, weights, answered) for o in outputs]
        ), balancing_loss

    def _jittered(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.jitter == 0:
            return x
        return x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)

    def _within_capacity(self, indices: torch.Tensor, experts: int) -> torch.Tensor:
        """Whether a sample is among the first of its expert."""
        if self.capacity_factor is None:
            return torch.ones_like(indices, dtype=torch.bool)
        capacity = max(1, math.ceil(self.capacity_factor * len(indices) / experts))
        order = indices.flatten().argsort(stable=True)
        ordered = indices.flatten()[order]
        first = torch.searchsorted(ordered, ordered)
        earlier = torch.empty_like(order)
        earlier[order] = torch.arange(len(order), device=order.device) - first
        return earlier.unsqueeze(1) < capacity


def _masked_softmax(scores: torch.Tensor, answered: torch.Tensor) -> torch.Tensor:
    """Softmax over those that answered; zeros where none did."""
    masked = scores.masked_fill(~answered, torch.finfo(scores.dtype).min)
    return masked.softmax(-1) * answered


def _weighted(output: torch.Tensor, weights: torch.Tensor, answered: torch.Tensor) -> torch.Tensor:
    """The sum over the experts of (batch, k, ...); of what has no sums that of the best that answered."""
    if not (output.is_floating_point() or output.is_complex()):
        best = answered.int().argmax(1)
        return output[torch.arange(len(output), device=output.device), best]
    shape = (*weights.shape, *(1 for _ in output.shape[2:]))
    return (output * weights.view(shape)).sum(1).to(output.dtype)


def _balancing_loss(
    probabilities: Sequence[torch.Tensor], coordinates: Sequence[torch.Tensor]
) -> torch.Tensor:
    """``n * sum(f * p)`` of each axis, added up."""
    losses = []
    for p, places in zip(probabilities, coordinates, strict=True):
        share = torch.zeros(p.shape[1], dtype=p.dtype, device=p.device)
        share.index_add_(0, places.flatten(), torch.ones_like(places.flatten(), dtype=p.dtype))
        rows = max(1, len(p))
        losses.append(p.shape[1] * (share / rows * (p.sum(0) / rows)).sum())
    return torch.stack(losses).sum()
