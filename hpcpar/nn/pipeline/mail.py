"""Mail: which messages each action consumes and produces, between ranks and between stages of one rank.

Actions are independent of where their neighbours live. An edge between ranks is a parcel one way and replies
the other (:mod:`hpcpar.comm.parcels`); an edge between two stages of one rank is an entry in a dict.

The receives of an action are posted by :meth:`Mail.expect`, before it is its turn. Those of a backward can
only be posted after its forward, which knows the shapes of the gradients that will come; gradients that
nobody wants are neither sent nor waited for.

Invariant: an edge and a microbatch make the tag, so every message of a step has a key of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from hpcpar.comm import Incoming, ParcelExchange
from hpcpar.nn.pipeline.activation import Activation, Gradients
from hpcpar.nn.pipeline.label import Label, Parcel
from hpcpar.nn.pipeline.plan import Edge, PipelinePlan
from hpcpar.nn.pipeline.schedule import Action, Kind
from hpcpar.nn.pipeline.structure import flatten, unflatten

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["Mail", "broadcast_value"]

_RESULT = "result"


class Mail:
    """The messages of this rank's stages. Collective to make and to free.

    Parameters
    ----------
    plan
        What travels between which stages.
    comm
        The ranks of the pipeline.
    device
        Where received tensors are wanted.

    Attributes
    ----------
    exchange : ParcelExchange
        What carries them.
    """

    def __init__(self, plan: PipelinePlan, comm: Communicator, device: torch.device) -> None:
        self._plan = plan
        self._comm = comm
        self.exchange = ParcelExchange(comm, device)
        self.begin("")

    def begin(self, context: str) -> None:
        """Before a step; parcels of different contexts have descriptions of their own. Local."""
        self._context = context
        self._local: dict[tuple[Edge, int], Parcel] = {}
        self._local_gradients: dict[tuple[Edge, int], Gradients] = {}
        self._expected: dict[Action, list[tuple[Edge, Incoming | None]]] = {}

    def expect(self, action: Action, activation: Activation | None) -> None:
        """Post the receives of an action, unless that is done or cannot be done yet. Local.

        Parameters
        ----------
        action
            One that will be executed soon.
        activation
            That of its stage and microbatch, if its forward is done.
        """
        if action in self._expected or action.kind is Kind.BACKWARD_WEIGHT:
            return
        stage = self._plan.stages[action.stage]
        if action.kind is Kind.FORWARD:
            self._expected[action] = [(e, self._expect(e, action.microbatch)) for e in stage.incoming]
        elif activation is not None:
            self._expected[action] = [
                (edge, self._expect_gradients(edge, action.microbatch, specs))
                for edge, specs in zip(stage.outgoing, activation.gradient_specs, strict=True)
                if specs or self._is_local(edge)
            ]

    def has_come(self, action: Action) -> bool:
        """Whether everything that an action consumes is here. Local."""
        if action not in self._expected:
            return False
        local = self._local if action.kind is Kind.FORWARD else self._local_gradients
        return all(
            (edge, action.microbatch) in local if incoming is None else incoming.test()
            for edge, incoming in self._expected[action]
        )

    def take_parcels(self, action: Action) -> list[Parcel]:
        """The inputs of a forward, a parcel per incoming edge; none on the first stage. Local."""
        parcels = []
        for edge, incoming in self._expected.pop(action):
            if incoming is None:
                parcels.append(self._local.pop((edge, action.microbatch)))
            else:
                assert incoming.description is not None
                label = Label.from_bytes(incoming.description.label)
                parcels.append(Parcel(label, [t for t in incoming.tensors if t is not None]))
        return parcels

    def take_gradients(self, action: Action) -> list[Gradients]:
        """The gradients that a backward starts from, per outgoing edge. Local."""
        arrived = dict(self._expected.pop(action))
        gradients: list[Gradients] = []
        for edge in self._plan.stages[action.stage].outgoing:
            incoming = arrived.get(edge)
            if incoming is not None:
                gradients.append(incoming.tensors)
            elif edge in arrived:
                gradients.append(self._local_gradients.pop((edge, action.microbatch)))
            else:
                gradients.append([])
        return gradients

    def send_parcels(self, action: Action, parcels: Sequence[Parcel]) -> None:
        """Hand on what a forward has computed, a parcel per outgoing edge. Point-to-point, never waits."""
        for edge, parcel in zip(self._plan.stages[action.stage].outgoing, parcels, strict=True):
            if self._is_local(edge):
                self._local[edge, action.microbatch] = parcel
            else:
                dest, tag = self._plan.stages[edge.dest].rank, self._tag(edge, action.microbatch)
                self.exchange.send(dest, tag, parcel.tensors, parcel.label.to_bytes(), self._context)

    def send_gradients(self, action: Action, gradients: Sequence[Gradients]) -> None:
        """Hand back gradients, per incoming edge. Point-to-point, never waits."""
        # The first stage has no edge for the gradient of the batch.
        for edge, some in zip(self._plan.stages[action.stage].incoming, gradients, strict=False):
            if self._is_local(edge):
                self._local_gradients[edge, action.microbatch] = some
            elif some:
                source = self._plan.stages[edge.source].rank
                self.exchange.reply(source, self._tag(edge, action.microbatch), some)

    def send_result(self, result: torch.Tensor, microbatches: int) -> None:
        """Tell all ranks what came out of the step; for the last one. Point-to-point, never waits."""
        for rank in range(self._comm.size):
            if rank != self._comm.rank:
                self.exchange.send(rank, self._result_tag(microbatches), [result], b"", _RESULT)

    def expect_result(self, microbatches: int) -> Incoming:
        """What the last rank tells; for the others. Point-to-point."""
        return self.exchange.expect(self._plan.last_rank, self._result_tag(microbatches), _RESULT)

    def describe_missing(self, action: Action) -> tuple[str, list[int]]:
        """For an error: what an action lacks, and the ranks that owe it. Local."""
        is_forward = action.kind is Kind.FORWARD
        lacking = [
            (edge, edge.source if is_forward else edge.dest)
            for edge, incoming in self._expected.get(action, [])
            if incoming is None or not incoming.test()
        ]
        what = "the activation" if is_forward else "the gradient"
        texts = [
            f"{what} of microbatch {action.microbatch} from stage {end}"
            + ("" if edge.skip is None else f" (skip {edge.skip})")
            for edge, end in lacking
        ]
        text = f"action {action} of pipeline stage {action.stage}, which needs {' and '.join(texts)},"
        return text, sorted({self._plan.stages[end].rank for _, end in lacking})

    def _expect(self, edge: Edge, microbatch: int) -> Incoming | None:
        if self._is_local(edge):
            return None
        source = self._plan.stages[edge.source].rank
        return self.exchange.expect(source, self._tag(edge, microbatch), self._context)

    def _expect_gradients(
        self, edge: Edge, microbatch: int, specs: Sequence[tuple[torch.dtype, torch.Size]]
    ) -> Incoming | None:
        if self._is_local(edge):
            return None
        dest = self._plan.stages[edge.dest].rank
        return self.exchange.expect_reply(dest, self._tag(edge, microbatch), specs)

    def _is_local(self, edge: Edge) -> bool:
        return self._plan.stages[edge.source].rank == self._plan.stages[edge.dest].rank

    def _tag(self, edge: Edge, microbatch: int) -> int:
        return microbatch * len(self._plan.edges) + edge.index

    def _result_tag(self, microbatches: int) -> int:
        return microbatches * len(self._plan.edges)


def broadcast_value(value: Any, comm: Communicator, root: int, device: torch.device) -> Any:
    """A nested value of tensors on every rank; those that are not ``root`` pass anything. Collective."""
    tensors, structure = flatten(value) if comm.rank == root else ([], None)
    structure, specs = comm.bcast((structure, [(t.shape, t.dtype) for t in tensors]), root)
    if comm.rank != root:
        tensors = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in specs]
    for tensor in tensors:
        comm.Bcast(tensor, root)
    return unflatten(structure, tensors)
