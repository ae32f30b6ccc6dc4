"""The two passes of a served expert: forward without a graph, and the recomputation that backward needs.

What the recomputation must see as the first time, and must not do twice:

===============  ==========================================================================================
random numbers   each request has a seed; an expert that draws runs each request by itself, under its seed
buffers          running statistics move in the forward pass of training; the recomputation is undone
in-place layers  an expert that writes to its inputs gets copies
rows             every request gets what it would get alone, unless the expert mixes rows (batch norm)
===============  ==========================================================================================

Rows are run in pieces: the whole batch as one, or each request by itself when the expert draws::

    requests            a a a | b b | c c c c
    without drawing     ─────────────────────     one piece
    drawing             ───── | ─── | ───────     under the seeds of a, b and c
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hpcpar.errors import MismatchError
from hpcpar.nn.experts.batching import Request
from hpcpar.nn.experts.private_random import PrivateRandom
from hpcpar.nn.experts.probe import Traits, buffers_restored, in_mode
from hpcpar.nn.experts.schema import ExpertSchema
from hpcpar.nn.pipeline.randomness import without_autocast

__all__ = ["ExpertPasses", "joined"]


class ExpertPasses:
    """Runs an expert forward and backward on batches of requests. Local, not thread-safe.

    Parameters
    ----------
    expert
        The expert.
    schema
        Of its inputs and outputs.
    traits
        What it does besides computing.
    """

    def __init__(self, expert: nn.Module, schema: ExpertSchema, traits: Traits) -> None:
        self.expert = expert
        self.schema = schema
        self.traits = traits

    def forward(self, tensors: Sequence[torch.Tensor], requests: Sequence[Request]) -> list[torch.Tensor]:
        """Flat outputs of flat inputs; buffers stay as they are when it fails. Local."""
        training = requests[0].training
        pieces = self._pieces(requests, 0, len(tensors[0]))
        with torch.no_grad(), in_mode(self.expert, training), buffers_restored(self.expert, always=False):
            parts = []
            for piece in pieces:
                with _seeded(piece.seed):
                    parts.append(self._call([tensor[piece.run] for tensor in tensors]))
            outputs = joined(parts)
            # A caller must not get hold of the expert's own state, or see it change.
            return [out.clone() if self.traits.shares_outputs else out.detach() for out in outputs]

    def backward(
        self, tensors: Sequence[torch.Tensor], requests: Sequence[Request], start: int, stop: int
    ) -> list[list[torch.Tensor | None]]:
        """Gradients of the inputs, in parts to be joined; those of parameters go to ``.grad``. Local.

        Parameters
        ----------
        tensors
            Flat inputs, then the gradients of the outputs.
        requests
            Of all rows.
        start, stop
            Rows that are wanted.
        """
        return [self._differentiate(piece, tensors) for piece in self._pieces(requests, start, stop)]

    def empty_outputs(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Outputs of a batch without rows: few modules run on none, so it runs on one and drops it. Local."""
        descriptors = self.schema.flat_outputs
        if all(descriptor.has_fixed_shape for descriptor in descriptors):
            return [descriptor.make_zeros(0).detach() for descriptor in descriptors]
        dummies = [tensor.new_zeros(1, *tensor.shape[1:]) for tensor in tensors]
        with (
            torch.no_grad(),
            in_mode(self.expert, False),
            buffers_restored(self.expert, always=True),
            PrivateRandom(0),
        ):
            return [output.detach()[:0] for output in self._call(dummies)]

    def _differentiate(self, piece: _Piece, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        schema, count = self.schema, self.schema.num_inputs
        leaves = [tensor[piece.run].detach() for tensor in tensors[:count]]
        for leaf, flag in zip(leaves, schema.differentiable_inputs, strict=True):
            leaf.requires_grad_(flag)
        with torch.enable_grad(), buffers_restored(self.expert, always=True), _seeded(piece.seed):
            outputs = self._call(leaves)
            outputs = [o for o, flag in zip(outputs, schema.differentiable_outputs, strict=True) if flag]
            grads = [piece.kept_of(tensor) for tensor in tensors[count:]]
            roots = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
            if roots:
                torch.autograd.backward([o for o, _ in roots], [g for _, g in roots])
        return [self._gradient(leaf)[piece.kept] if leaf.requires_grad else None for leaf in leaves]

    def _gradient(self, leaf: torch.Tensor) -> torch.Tensor:
        if leaf.grad is None:
            return torch.zeros_like(leaf, requires_grad=False)
        # That of an input which is returned as it is may be the caller's own tensor.
        return leaf.grad.clone() if self.traits.shares_outputs else leaf.grad

    def _call(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if self.traits.writes_inputs:
            tensors = [tensor.clone() for tensor in tensors]
        args, kwargs = self.schema.unflatten_call(tensors)
        # A caller's autocast is not the server's: outputs must have the dtypes of the schema.
        with without_autocast(tensors[0].device):
            outputs = self.schema.flatten_outputs(self.expert(*args, **kwargs))
        if any(len(output) != len(tensors[0]) for output in outputs):
            raise MismatchError(
                f"outputs of an expert must have {len(tensors[0])} rows like its inputs, got "
                f"{[len(output) for output in outputs]}"
            )
        return outputs

    def _pieces(self, requests: Sequence[Request], start: int, stop: int) -> list[_Piece]:
        if self.traits.draws and requests[0].training:
            return _by_request(requests, start, stop)
        if self.traits.mixes_rows:
            return [_Piece(0, sum(request.rows for request in requests), start, stop, None)]
        return [_Piece(start, stop, start, stop, None)]


def _seeded(seed: int | None) -> AbstractContextManager[object]:
    return nullcontext() if seed is None else PrivateRandom(seed)


def joined(parts: Sequence[Sequence[Any]]) -> list[Any]:
    """Concatenate the rows of parts, tensor by tensor; ``None`` stays. Local."""
    if len(parts) == 1:
        return list(parts[0])
    columns = zip(*parts, strict=True)
    return [None if column[0] is None else torch.cat(column) for column in columns]


# ---- rows --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Piece:
    """Rows ``start`` to ``stop`` that are run together, of which ``first`` to ``last`` are wanted.

    They differ when an update cuts a request: its random numbers are drawn for all of its rows.
    """

    start: int
    stop: int
    first: int
    last: int
    seed: int | None

    @property
    def run(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def kept(self) -> slice:
        return slice(self.first - self.start, self.last - self.start)

    def kept_of(self, gradient: torch.Tensor) -> torch.Tensor:
        """The rows that are run, zero unless wanted."""
        rows = gradient[self.run]
        if (self.first, self.last) == (self.start, self.stop):
            return rows
        wanted = torch.zeros_like(rows)
        wanted[self.kept] = rows[self.kept]
        return wanted


def _by_request(requests: Sequence[Request], start: int, stop: int) -> list[_Piece]:
    pieces = []
    begin = 0
    for request in requests:
        end = begin + request.rows
        first, last = max(begin, start), min(end, stop)
        if first < last:
            pieces.append(_Piece(begin, end, first, last, request.seed))
        begin = end
    return pieces
