"""An activation: one microbatch on one stage, from its forward to the end of its backward.

It owns what must live in between, and nothing else: the leaves whose gradients go back, the gradient edges
from which backward starts (not the outputs: those have been sent and freed), or, with checkpointing, the
inputs from which all that is computed again.

::

    forward ---> [recompute] ---> backward                       whole
                             ---> backward_inputs ---> backward_weights       split

With checkpointing the forward runs without a graph. Which outputs will want a gradient must be known all the
same, since the next stage is told; so the first microbatch of each kind runs with a graph, which is dropped.

Invariant: the value of an activation is a function of its inputs, and these do not change. A first layer
that works in place gets a copy; any other change of the inputs is noticed when it is too late for a
recomputation, and is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from hpcpar.comm import TensorSpec
from hpcpar.errors import HpcparError
from hpcpar.nn.pipeline.backward import DeferredWeights, backward_inputs, backward_whole, separate, storages
from hpcpar.nn.pipeline.label import Label, Parcel, pack
from hpcpar.nn.pipeline.randomness import Contexts, without_autocast
from hpcpar.nn.pipeline.stage import Stage

__all__ = ["Activation", "Gradients"]

_KINDS = 256

Gradients = list[torch.Tensor | None]
"""Of the tensors of a parcel that want one."""


class Activation:
    """See the module's description. Local.

    Parameters
    ----------
    stage
        Where.
    microbatch
        Its number.
    incoming
        A parcel per incoming edge; on the first stage the one that was made from the batch.
    finish
        On the last stage: makes the scaled loss from the output; called again in a recomputation.
    checkpoint
        Whether to drop the graph and compute it again.
    device
        Where the stage computes.
    """

    def __init__(
        self,
        stage: Stage,
        microbatch: int,
        incoming: Sequence[Parcel],
        finish: Callable[[Any, Label], torch.Tensor] | None,
        *,
        checkpoint: bool,
        device: torch.device,
    ) -> None:
        self._stage = stage
        self._microbatch = microbatch
        self._incoming = list(incoming)
        self._finish = finish
        self._checkpoint = checkpoint
        self._device = device
        self._contexts = Contexts.capture(device) if checkpoint else None
        self._leaves = self._mark(incoming)
        self._versions: list[int] = []
        self._sent: set[int] = set()
        self._roots: list[list[GradientEdge]] | None = None
        self._deferred: DeferredWeights | None = None
        self.gradient_specs: list[list[TensorSpec]] = []

    @property
    def is_split(self) -> bool:
        """Whether the weights' gradients are left to compute. Local."""
        return self._deferred is not None

    @property
    def needs_recompute(self) -> bool:
        """Whether backward has no graph to run through. Local."""
        return self._roots is None

    def forward(
        self, known: dict[Hashable, list[tuple[bool, ...]]], *, training: bool
    ) -> tuple[list[Parcel], Any]:
        """Compute the stage. Local.

        Parameters
        ----------
        known
            Which outputs want gradients, by kind of input; filled and used by checkpointing.
        training
            Whether a backward will follow.

        Returns
        -------
        list of Parcel, value
            One per outgoing edge, without graph; and the output of the chain, for the last stage.
        """
        if self._incoming and self._incoming[0].label.is_empty:
            self._roots = [[] for _ in self._stage.plan.outgoing]
            self.gradient_specs = [[] for _ in self._stage.plan.outgoing]
            return [Parcel(self._incoming[0].label, []) for _ in self._stage.plan.outgoing], None
        kind, flags = None, None
        if self._checkpoint:
            kind = tuple(parcel.label for parcel in self._incoming)
            flags = known.get(kind)
            self._versions = [t._version for parcel in self._incoming for t in parcel.tensors]
        recomputed = training and self._checkpoint
        with self._stage.to_be_recomputed(self._microbatch) if recomputed else nullcontext():
            if training and flags is None:
                outputs, value, loss = self._compute(self._stage.overwrites_input)
            else:
                # What autocast caches without a graph must not reach a forward that needs one.
                with torch.no_grad(), Contexts.capture(self._device).restored():
                    outputs, value, loss = self._compute(self._stage.overwrites_input)
        if not training:
            self._incoming, self._leaves, self._roots = [], [], []
        elif self._checkpoint:
            flags = flags or [label.wants_gradient for label, _ in outputs]
            if len(known) >= _KINDS:
                known.clear()  # a constant that changes with every batch makes every input a new kind
            known[kind] = flags
        else:
            self._keep_roots(outputs, loss)
            self._incoming = []
        parcels = []
        for place, (label, tensors) in enumerate(outputs):
            if flags is not None:
                label = label._replace(wants_gradient=flags[place])
            wanted = label.wants_gradient
            self.gradient_specs.append(
                [(t.dtype, t.shape) for t, is_wanted in zip(tensors, wanted, strict=True) if is_wanted]
            )
            parcels.append(Parcel(label, [tensor.detach() for tensor in tensors]))
        return parcels, value

    def recompute(self) -> None:
        """Compute the graph that the forward dropped, in the same contexts, with the same random numbers.

        Raises
        ------
        HpcparError
            When something has changed the inputs in place.
        """
        versions = [t._version for parcel in self._incoming for t in parcel.tensors]
        if versions != self._versions:
            raise HpcparError(
                f"the inputs of a checkpointed stage must not be changed in place, got a change in stage "
                f"{self._stage.plan.index}. Use checkpoint='never', or layers that do not work in place"
            )
        # Leaves of their own: hooks that the first computation has set on its inputs must not act twice. Not
        # for the batch, which may be a part of a leaf of the user's.
        if self._stage.plan.incoming:
            self._incoming = [Parcel(p.label, [t.detach() for t in p.tensors]) for p in self._incoming]
        self._leaves = self._mark(self._incoming)
        assert self._contexts is not None  # only a checkpointed forward leaves anything to compute again
        with torch.enable_grad(), self._contexts.restored(), self._stage.recomputing(self._microbatch):
            outputs, _, loss = self._compute(self._stage.overwrites_input)
        self._keep_roots(outputs, loss)
        self._incoming = []

    def backward(self, gradients: Sequence[Gradients]) -> list[Gradients]:
        """Run the whole backward; returns the gradients of the inputs, per incoming edge. Local."""
        fresh = self._stage.without_gradient()
        with without_autocast(self._device):
            backward_whole(*self._start(gradients))
        results = [[leaf.grad for leaf in leaves] for leaves in self._leaves]
        separate(fresh, storages(gradient for some in results for gradient in some))
        self._leaves = []
        return results

    def backward_inputs(self, gradients: Sequence[Gradients]) -> list[Gradients]:
        """Compute the gradients of the inputs only. Local."""
        leaves = [leaf for leaves in self._leaves for leaf in leaves]
        fresh = self._stage.without_gradient()
        with without_autocast(self._device):
            found, self._deferred = backward_inputs(*self._start(gradients), leaves)
        self._sent = storages(found)
        separate(fresh, self._sent)
        rest = iter(found)
        results = [[next(rest) for _ in leaves] for leaves in self._leaves]
        self._leaves = []
        return results

    def backward_weights(self) -> None:
        """Compute the gradients of the parameters that :meth:`backward_inputs` has left. Local."""
        fresh = self._stage.without_gradient()
        if self._deferred is not None:
            with without_autocast(self._device):
                self._deferred.run()
        separate(fresh, self._sent)
        self._deferred = None

    # Parts -----------------------------------------------------------------------------------------------

    @staticmethod
    def _mark(parcels: Sequence[Parcel]) -> list[list[torch.Tensor]]:
        """Make leaves of the inputs that want a gradient; returns them per edge."""
        return [
            [
                t.requires_grad_()
                for t, wanted in zip(p.tensors, p.label.wants_gradient, strict=True)
                if wanted
            ]
            for p in parcels
        ]

    def _compute(
        self, copy_input: bool
    ) -> tuple[list[tuple[Label, list[torch.Tensor]]], Any, torch.Tensor | None]:
        """The outputs per outgoing edge, the value of the chain, and the loss on the last stage."""
        plan = self._stage.plan
        chain = self._incoming[0]
        if copy_input:
            chain = Parcel(chain.label, [tensor.clone() for tensor in chain.tensors])
        popped = {
            edge.skip: parcel.value()
            for edge, parcel in zip(plan.incoming, self._incoming[-len(plan.incoming) :], strict=False)
            if edge.skip is not None
        }
        samples, total = chain.label.samples, chain.label.total
        self._stage.weigh_losses(samples / total)
        value, stashed = self._stage.run(self._microbatch, chain.value(), popped)
        outputs = [
            pack(value if edge.skip is None else stashed[edge.skip], samples, total) for edge in plan.outgoing
        ]
        loss = None
        if self._finish is not None:
            loss = self._finish(value, chain.label)
        return outputs, value, loss

    def _keep_roots(self, outputs: list[tuple[Label, list[torch.Tensor]]], loss: torch.Tensor | None) -> None:
        self._roots = [[get_gradient_edge(t) for t in tensors if t.requires_grad] for _, tensors in outputs]
        if loss is not None and loss.requires_grad:
            self._roots.append([get_gradient_edge(loss)])
            self._seed = torch.ones_like(loss)

    def _start(self, gradients: Sequence[Gradients]) -> tuple[list[GradientEdge], list[torch.Tensor]]:
        """Where backward starts, and with what: outputs for which a gradient has come, and the loss."""
        assert self._roots is not None
        roots, arrived = self._roots, [list(part) for part in gradients]
        if len(roots) > len(arrived):
            arrived.append([self._seed])
        self._roots = []
        pairs = [
            (root, gradient)
            for some_roots, some in zip(roots, arrived, strict=True)
            for root, gradient in zip(some_roots, some, strict=True)
            if gradient is not None
        ]
        return [root for root, _ in pairs], [gradient for _, gradient in pairs]
