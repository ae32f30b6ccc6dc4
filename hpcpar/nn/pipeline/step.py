"""A step: what one call of the pipeline brings in, and what comes out of it.

The runtime asks it for the microbatches on the first stage, for the loss on the last, and tells it when a
stage's gradients are about to be complete. The mean loss over the batch is the sum of the microbatches'
losses weighted by their samples, and the backward of each starts from its weighted loss, so that the
gradients add up to those of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from hpcpar.comm import MPI
from hpcpar.errors import MismatchError
from hpcpar.nn.pipeline.label import Label, Parcel, pack
from hpcpar.nn.pipeline.microbatch import Microbatch, join
from hpcpar.nn.pipeline.randomness import may_draw

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["CHECKPOINT_MODES", "LOSS_REDUCTIONS", "LossFunction", "MicrobatchLosses", "Step"]

LossFunction = Callable[..., torch.Tensor]

CHECKPOINT_MODES: dict[str, Callable[[int, int], bool]] = {
    "never": lambda microbatch, count: False,
    "except_last": lambda microbatch, count: microbatch < count - 1,
    "always": lambda microbatch, count: True,
}
"""Whether a microbatch is computed again in backward, given its number and how many there are."""

LOSS_REDUCTIONS = ("mean", "sum")


class Step:
    """One training or evaluation step on this rank. Local.

    Parameters
    ----------
    count
        Number of microbatches.
    training
        Whether gradients are wanted.
    inputs
        The microbatches, on the rank of the first stage.
    loss
        Makes a loss of the output of each microbatch, on the rank of the last stage.
    checkpoint
        One of :data:`CHECKPOINT_MODES`.
    backward_of
        Entered around each backward that adds to a stage's parameters, with the number of the stage and
        whether it is the last one of the step.

    Attributes
    ----------
    result : torch.Tensor or None
        Float64, of shape (2,): whether there is a loss, and the loss. On all ranks after the step.
    """

    def __init__(
        self,
        count: int,
        *,
        training: bool,
        inputs: Sequence[Microbatch] | None,
        loss: MicrobatchLosses | None,
        checkpoint: str,
        backward_of: Callable[[int, bool], AbstractContextManager[None]],
    ) -> None:
        self._count = count
        self.training = training
        self.context = "train" if training else "evaluate"
        self._inputs = inputs
        self._loss = loss
        self._checkpoint = CHECKPOINT_MODES[checkpoint]
        self.backward_of = backward_of
        self._outputs: dict[int, Any] = {}
        self._forwards = 0
        self.result: torch.Tensor | None = None

    def __len__(self) -> int:
        return self._count

    def entry(self, microbatch: int) -> Parcel:
        """What the first stage gets. Local."""
        if self._inputs is None:
            raise MismatchError("inputs must be given on the rank of the first stage, got None")
        part = self._inputs[microbatch]
        if part.samples == 0:
            return Parcel(Label(None, (), 0, part.total), [])
        label, tensors = pack(part.value, part.samples, part.total)
        # The batch is the user's own: no gradient is sent anywhere, and nothing marks its tensors.
        return Parcel(Label(label.structure, (False,) * len(tensors), part.samples, part.total), tensors)

    def finish(self, microbatch: int) -> Callable[[Any, Label], torch.Tensor] | None:
        """What makes the weighted loss of a microbatch on the last stage, if one is wanted. Local."""
        loss = self._loss
        if loss is None:
            return None
        return lambda value, label: loss.of(microbatch, value, label)

    def is_checkpointed(self, microbatch: int) -> bool:
        """Whether the graph of a microbatch is dropped and computed again. Local."""
        return self.training and self._checkpoint(microbatch, self._count)

    def output(self, microbatch: int, value: Any) -> None:
        """Count a forward of the last stage, and keep its output in evaluation. Local."""
        self._forwards += 1
        if not self.training and value is not None:
            self._outputs[microbatch] = value

    @property
    def loss_may_draw(self) -> bool:
        """Whether the loss could use random numbers. Local."""
        return self._loss is not None and self._loss.may_draw

    @property
    def is_complete(self) -> bool:
        """Whether the last stage has done all its forwards. Local."""
        return self._forwards == self._count

    @property
    def has_replicas(self) -> bool:
        """Whether the result depends on other replicas. Local."""
        return self._loss is not None and self._loss.has_replicas

    def joined_output(self) -> Any:
        """The output of the whole batch, on the rank of the last stage. Local."""
        return join([self._outputs[index] for index in sorted(self._outputs)])

    def finish_loss(self) -> torch.Tensor:
        """Set the result, on the rank of the last stage. Collective over the replicas."""
        facts = (0.0, 0.0) if self._loss is None else (1.0, self._loss.total())
        self.result = torch.tensor(facts, dtype=torch.float64)
        return self.result


class MicrobatchLosses:
    """Calls the loss function, checks what it returns, and adds it up. Local.

    Parameters
    ----------
    function
        ``loss_fn(output, target)``, ``loss_fn(output)`` without targets; ``None`` if the output of the model
        is the loss.
    targets
        The microbatches of the targets; ``None`` without.
    reduction
        ``"mean"``: the loss of a microbatch is a mean over its samples. ``"sum"``: a sum.
    scale
        Factor of the gradients.
    replicas
        Ranks over which the loss of the batch is averaged.
    """

    def __init__(
        self,
        function: LossFunction | None,
        targets: Sequence[Microbatch] | None,
        *,
        reduction: str,
        scale: float,
        replicas: Communicator | None,
    ) -> None:
        self._function = function
        self._targets = targets
        self._reduction = reduction
        self._scale = scale
        self._replicas = replicas
        self.may_draw = function is not None and may_draw(function)
        self._losses: dict[int, tuple[float, torch.Tensor]] = {}

    def of(self, microbatch: int, value: Any, label: Label) -> torch.Tensor:
        """The loss of one microbatch, weighted and scaled for backward. Local.

        Raises
        ------
        MismatchError
            When it is no scalar, or the targets do not fit the inputs.
        """
        loss: Any = value
        if self._function is not None:
            loss = self._function(value, *self._target(microbatch, label))
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.dtype.is_floating_point:
            found = repr(loss)
            if isinstance(loss, torch.Tensor):
                found = f"a tensor of shape {tuple(loss.shape)} and {loss.dtype}"
            raise MismatchError(
                f"{'the output of the model' if self._function is None else 'the result of loss_fn'} must be "
                "a loss, a floating-point tensor of one element per microbatch, got "
                f"{found}. Reduce it by .mean(), or pass a loss_fn that does"
            )
        weight = label.samples / label.total if self._reduction == "mean" else 1.0
        self._losses[microbatch] = weight, loss.detach()  # a recomputation finds the same again
        return loss * (weight * self._scale)

    @property
    def has_replicas(self) -> bool:
        """Whether the loss is averaged with others. Local."""
        return self._replicas is not None

    def total(self) -> float:
        """The loss of the batch. Collective over the replicas."""
        losses = [weight * float(loss) for weight, loss in self._losses.values()]
        total = torch.tensor([sum(losses)], dtype=torch.float64)
        if self._replicas is not None:
            self._replicas.Allreduce(MPI.IN_PLACE, total)
            total /= self._replicas.size
        return float(total)

    def _target(self, microbatch: int, label: Label) -> tuple[Any, ...]:
        if self._targets is None:
            return ()
        target = self._targets[microbatch]
        if (target.samples, target.total) != (label.samples, label.total):
            raise MismatchError(
                f"targets must have as many samples as the inputs, got {target.total} targets for "
                f"{label.total} inputs"
            )
        return (target.value,)
