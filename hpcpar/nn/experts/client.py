"""Remote experts: modules that are computed, and trained, on another rank.

::

    caller                                       rank that serves the expert
    forward   inputs ─────────────────────────>  batch, forward without a graph
              outputs <────────────────────────
    backward  inputs, gradients of outputs ───>  forward again, backward, optimizer step
              gradients of inputs <────────────

The server keeps nothing between the two: a caller that never comes back costs it no memory, and a forward may
have no backward or several. What makes both computations equal is the request's *seed*, which decides the
random numbers of an expert that draws some, such as a dropout mask. It is drawn from the caller's own
generator, so it is the same after ``torch.manual_seed``, and when a checkpoint computes the forward again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from hpcpar.nn.experts.eager import never_compiled
from hpcpar.nn.experts.network import ExpertNetwork, ExpertRecord, Procedure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hpcpar.comm import Communicator

__all__ = ["RemoteExpert", "draw_seed"]


class RemoteExpert(nn.Module):
    """An expert that some rank serves, as a module. Local to make; a call is Point-to-point.

    The expert's own parameters are not here: they are updated by its server, with every backward. In
    ``eval()`` mode the expert runs in evaluation mode, and is not updated; its inputs still get gradients.

    Parameters
    ----------
    uid
        Its name, such as ``"expert.3.5"``.
    comm
        The communicator of the :class:`~hpcpar.nn.ExpertServer`.
    forward_timeout, backward_timeout
        Seconds to wait for a reply; ``HPCPAR_TIMEOUT_S`` by default.

    Raises
    ------
    RemoteExpertError
        When nobody serves it; in a call, when the expert raised an exception, with its traceback.
    MismatchError
        In a call, when the arguments do not fit the expert's schema; nothing is sent then.
    StalledError, RankFailedError
        In a call, when no reply comes in time, or the rank that serves it has died.

    Examples
    --------
    >>> expert = hpcpar.nn.RemoteExpert("expert.0", comm)
    >>> loss_fn(expert(x), y).backward()  # trains it, and gives x.grad
    """

    def __init__(
        self,
        uid: str,
        comm: Communicator,
        *,
        forward_timeout: float | None = None,
        backward_timeout: float | None = None,
    ) -> None:
        super().__init__()
        self.uid = uid
        self._comm = comm
        self._timeouts = forward_timeout, backward_timeout
        if ExpertNetwork.runs_on(comm):
            self.record  # noqa: B018  raises for an unknown uid

    @property
    def record(self) -> ExpertRecord:
        """What is known of the expert: ranks, schema. Local."""
        return ExpertNetwork.of(self._comm).record(self.uid)

    @never_compiled
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the expert; outputs are nested as it returns them. Point-to-point."""
        network = ExpertNetwork.of(self._comm)
        record = network.record(self.uid)
        inputs = record.schema.flatten_call(args, kwargs)
        seed = draw_seed() if record.draws and self.training else None
        request = _Request(network, record, self.training, seed, *self._timeouts)
        if torch.is_grad_enabled():
            # Backward must come by even when no input needs a gradient: it is what trains the expert.
            trigger = torch.empty(0, requires_grad=True)
            outputs = _RemoteComputation.apply(trigger, request, *inputs)  # type: ignore[no-untyped-call]
        else:
            outputs = request.forward(inputs)
        return record.schema.unflatten_outputs(outputs)

    def get_stats(self) -> dict[str, int]:
        """Number of updates and of examples in them so far, as the server counts. Point-to-point."""
        network = ExpertNetwork.of(self._comm)
        call = network.start(network.record(self.uid), Procedure.STATISTICS, [])
        updates, examples = call.wait(self._timeouts[0])[0].tolist()
        return {"updates": updates, "examples_processed": examples}

    def extra_repr(self) -> str:
        """Uid and rank."""
        return f"{self.uid!r}"


def draw_seed() -> int:
    """A seed for a request, from this rank's generator. Local."""
    return int(torch.randint(1 << 48, ()))


@dataclass(frozen=True)
class _Request:
    """What forward and backward of one call have in common."""

    network: ExpertNetwork
    record: ExpertRecord
    training: bool
    seed: int | None
    forward_timeout_s: float | None
    backward_timeout_s: float | None

    def call(
        self, procedure: Procedure, tensors: Sequence[torch.Tensor], timeout_s: float | None
    ) -> list[torch.Tensor]:
        call = self.network.start(self.record, procedure, tensors, training=self.training, seed=self.seed)
        return call.wait(timeout_s)

    def forward(self, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        replies = self.call(Procedure.FORWARD, inputs, self.forward_timeout_s)
        return tuple(reply.to(inputs[0].device) for reply in replies)


class _RemoteComputation(torch.autograd.Function):
    """One call of an expert, and the call for its gradients."""

    @staticmethod
    def forward(
        ctx: Any, trigger: torch.Tensor, request: _Request, *inputs: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.request = request
        ctx.save_for_backward(*inputs)
        outputs = request.forward(inputs)
        differentiable = request.record.schema.differentiable_outputs
        ctx.mark_non_differentiable(
            *(
                output
                for output, has_gradient in zip(outputs, differentiable, strict=True)
                if not has_gradient
            )
        )
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        request: _Request = ctx.request
        schema = request.record.schema
        inputs = ctx.saved_tensors
        given = [
            gradient
            for gradient, has_gradient in zip(grad_outputs, schema.differentiable_outputs, strict=True)
            if has_gradient
        ]
        replies = iter(request.call(Procedure.BACKWARD, [*inputs, *given], request.backward_timeout_s))
        gradients = [
            next(replies).to(value.device) if has_gradient else None
            for value, has_gradient in zip(inputs, schema.differentiable_inputs, strict=True)
        ]
        return None, None, *gradients
