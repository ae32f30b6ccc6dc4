"""Calls of several experts at once, each for some rows of a batch, of which some may fail.

::

    sample        choices            calls                    answers
    0             a b                a: rows 0, 2             in time
    1             b c                b: rows 0, 1             too late: masked in samples 0 and 1
    2             a c                c: rows 1, 2             in time

There is one message for each expert and call, with all its rows. Calls are under way together. What does not
arrive until the deadline, raises on its rank, or dies with it, is masked: its output and its gradient are
zero, and its weight goes to the other experts of the sample. A sample must keep ``k_min`` of its experts.

Invariant: the backward pass calls exactly the experts that answered in the forward pass, with the same rows,
mode and seed.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from hpcpar.comm.progress import Patience, timeout_from_environment, wait_until
from hpcpar.errors import RankFailedError, RemoteExpertError
from hpcpar.nn.experts.client import draw_seed
from hpcpar.nn.experts.network import ExpertCall, ExpertNetwork, ExpertRecord, Procedure
from hpcpar.nn.experts.schema import ExpertSchema

__all__ = ["ManyCalls", "call_many"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Part:
    """The part of a batch that one expert computes."""

    record: ExpertRecord
    rows: torch.Tensor
    slots: torch.Tensor
    seed: int | None


@dataclass
class ManyCalls:
    """Who is asked for what; the same for forward and backward.

    Parameters
    ----------
    network
        Where the experts are.
    schema
        What all of them take and return.
    records
        The experts that are chosen by at least one sample.
    choices
        For each sample the places in ``records`` of its experts, -1 for none; int64 of (batch, k).
    training
        Whether they run in training mode.
    k_min
        How many of its experts each sample must keep.
    forward_timeout_s, backward_timeout_s
        Seconds until what has not answered is masked; ``HPCPAR_TIMEOUT_S`` by default.
    """

    network: ExpertNetwork
    schema: ExpertSchema
    records: Sequence[ExpertRecord]
    choices: torch.Tensor
    training: bool
    k_min: int
    forward_timeout_s: float | None
    backward_timeout_s: float | None
    parts: list[_Part] = field(init=False)

    def __post_init__(self) -> None:
        self.parts = []
        for place, record in enumerate(self.records):
            rows, slots = (self.choices == place).nonzero(as_tuple=True)
            seed = draw_seed() if record.draws and self.training else None
            self.parts.append(_Part(record, rows, slots, seed))

    def perform(
        self,
        procedure: Procedure,
        parts: Sequence[_Part],
        tensors: Sequence[Sequence[torch.Tensor]],
        timeout_s: float | None,
    ) -> list[list[torch.Tensor] | None]:
        """Call the experts of some parts at once; ``None`` for those that failed. Point-to-point.

        Raises
        ------
        RemoteExpertError
            When fewer than ``k_min`` of a sample's experts answered, of those that could.
        """
        outcomes = _Outcomes(len(parts))
        calls: dict[int, ExpertCall] = {}
        for place, (part, sent) in enumerate(zip(parts, tensors, strict=True)):
            try:
                calls[place] = self.network.start(
                    part.record, procedure, sent, training=self.training, seed=part.seed
                )
            except RankFailedError as error:
                outcomes.fail(place, part.record.uid, error)
            except BaseException:
                _abandon(calls)
                raise
        _collect(self.network, calls, outcomes, timeout_s)
        self._check(procedure, parts, outcomes)
        return outcomes.answers

    def _check(self, procedure: Procedure, parts: Sequence[_Part], outcomes: _Outcomes) -> None:
        asked = torch.zeros(len(self.choices), dtype=torch.int64)
        answered = asked.clone()
        for part, answer in zip(parts, outcomes.answers, strict=True):
            asked.index_add_(0, part.rows, torch.ones_like(part.rows))
            if answer is not None:
                answered.index_add_(0, part.rows, torch.ones_like(part.rows))
        lacking = int((answered < asked.clamp(max=self.k_min)).sum())
        if lacking:
            raise RemoteExpertError(
                f"each sample must have {self.k_min} experts that answer, got fewer for {lacking} of "
                f"{len(asked)} samples in {procedure.name.lower()}. First failure: {outcomes.first_error}"
            )


def call_many(calls: ManyCalls, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Have each sample computed by each of its experts; differentiable. Point-to-point.

    Parameters
    ----------
    calls
        Which experts.
    inputs
        Of all samples, flat; the first axis is the batch.

    Returns
    -------
    answered : torch.Tensor
        Whether the expert answered, bool of (batch, k).
    outputs : list of torch.Tensor
        Flat outputs, of (batch, k, ...); zero where nobody answered.
    """
    trigger = torch.empty(0, requires_grad=True) if torch.is_grad_enabled() else None
    answered, *outputs = _ManyComputations.apply(trigger, calls, *inputs)  # type: ignore[no-untyped-call]
    return answered, outputs


class _Outcomes:
    """What became of several calls."""

    def __init__(self, count: int) -> None:
        self.answers: list[list[torch.Tensor] | None] = [None] * count
        self.first_error: str | None = None

    def fail(self, place: int, uid: str, error: Exception | str) -> None:
        self.first_error = self.first_error or f"{uid}: {error}"
        lines = str(error).strip().splitlines() or [""]
        logger.warning("expert %s is masked: %s", uid, lines[-1])
        logger.debug("expert %s is masked: %s", uid, error)


def _collect(
    network: ExpertNetwork, calls: dict[int, ExpertCall], outcomes: _Outcomes, timeout_s: float | None
) -> None:
    """Wait until each call has ended or failed, or the time is over."""
    limit_s = timeout_from_environment() if timeout_s is None else timeout_s
    deadline_s = time.monotonic() + limit_s

    def done() -> bool:
        late = time.monotonic() > deadline_s
        for place, call in list(calls.items()):
            try:
                if call.test():
                    outcomes.answers[place] = call.result()
                else:
                    call.check_alive()
                    if not late:
                        continue
                    call.abandon()
                    outcomes.fail(place, call.record.uid, f"rank {call.rank} gave no answer in {limit_s:g} s")
            except (RemoteExpertError, RankFailedError) as error:
                call.abandon()
                outcomes.fail(place, call.record.uid, error)
            del calls[place]
        return not calls

    # The deadline is in `done`, so that what is late is masked; the wait has none of its own.
    patience = Patience("experts", missing=list, where=network.comm._where, timeout_s=math.inf)
    try:
        wait_until(done, patience)
    finally:
        _abandon(calls)


def _abandon(calls: dict[int, ExpertCall]) -> None:
    for call in calls.values():
        call.abandon()


class _ManyComputations(torch.autograd.Function):
    """The calls of a batch, and those for their gradients."""

    @staticmethod
    def forward(
        ctx: Any, trigger: torch.Tensor | None, calls: ManyCalls, *inputs: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        sent = [
            [value.index_select(0, part.rows.to(value.device)) for value in inputs] for part in calls.parts
        ]
        answers = calls.perform(Procedure.FORWARD, calls.parts, sent, calls.forward_timeout_s)
        ctx.calls = calls
        ctx.alive = [part for part, answer in zip(calls.parts, answers, strict=True) if answer is not None]
        ctx.save_for_backward(*inputs)
        device = inputs[0].device
        answered = torch.zeros(calls.choices.shape, dtype=torch.bool)
        outputs: list[torch.Tensor] = []
        for part, answer in zip(calls.parts, answers, strict=True):
            if answer is None:
                continue
            answered[part.rows, part.slots] = True
            if not outputs:
                outputs = [
                    part_of.new_zeros((*calls.choices.shape, *part_of.shape[1:])) for part_of in answer
                ]
            for output, part_of in zip(outputs, answer, strict=True):
                output[part.rows, part.slots] = part_of
        if not outputs:
            outputs = _empty_outputs(calls, inputs)
        moved = [output.to(device) for output in outputs]
        flat = [output for output in moved if not (output.is_floating_point() or output.is_complex())]
        answered = answered.to(device)
        ctx.mark_non_differentiable(answered, *flat)
        return answered, *moved

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: torch.Tensor, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        calls: ManyCalls = ctx.calls
        inputs = ctx.saved_tensors
        schema = calls.schema
        given = [
            gradient.cpu()
            for gradient, has_gradient in zip(grad_outputs, schema.differentiable_outputs, strict=True)
            if has_gradient
        ]
        sent = [
            [value.index_select(0, part.rows.to(value.device)) for value in inputs]
            + [gradient[part.rows, part.slots] for gradient in given]
            for part in ctx.alive
        ]
        answers = calls.perform(Procedure.BACKWARD, ctx.alive, sent, calls.backward_timeout_s)
        gradients = [
            torch.zeros_like(value) if has_gradient else None
            for value, has_gradient in zip(inputs, schema.differentiable_inputs, strict=True)
        ]
        wanted = [gradient for gradient in gradients if gradient is not None]
        for part, answer in zip(ctx.alive, answers, strict=True):
            for gradient, part_of in zip(wanted, answer or [], strict=False):
                gradient.index_add_(0, part.rows.to(gradient.device), part_of.to(gradient.device))
        return None, None, *gradients


def _empty_outputs(calls: ManyCalls, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Zeros for a batch for which nobody answered, or was asked.

    Axes of any length get the length that such axes of the inputs have.
    """
    lengths = {
        length
        for descriptor, value in zip(calls.schema.inputs, inputs, strict=True)
        for wanted, length in zip(descriptor.shape, value.shape[1:], strict=True)
        if wanted is None
    }
    if len(lengths) != 1 and not all(output.has_fixed_shape for output in calls.schema.flat_outputs):
        raise RemoteExpertError(
            "the length of an output's axis must be that of the inputs' axes of any length when no expert "
            f"answers, got {sorted(lengths)}"
        )
    free = next(iter(lengths), 0)
    lead = calls.choices.shape
    return [
        torch.zeros((*lead, *(free if n is None else n for n in output.shape)), dtype=output.dtype)
        for output in calls.schema.flat_outputs
    ]
