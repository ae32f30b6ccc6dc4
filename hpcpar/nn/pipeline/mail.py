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

__all__ = ["Mail", "Task", "broadcast_value"]

_RESULT = "result"


class Task:
    """An action of the step under way, and what it waits for. Compared by identity. Local.

    Parameters
    ----------
    action
        What is to be done.

    Attributes
    ----------
    key : tuple of int
        Stage and microbatch.
    expected : list of (Edge, Incoming or None), or None
        What it consumes, with ``None`` for an edge inside of this rank; ``None`` until receives are posted.
    """

    __slots__ = ("action", "expected", "is_forward", "key", "kind")

    def __init__(self, action: Action) -> None:
        self.action = action
        self.kind = action.kind
        self.is_forward = action.kind is Kind.FORWARD
        self.key = action.stage, action.microbatch
        self.expected: list[tuple[Edge, Incoming | None]] | None = None


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
        ranks = [stage.rank for stage in plan.stages]
        self._is_local = [ranks[edge.source] == ranks[edge.dest] for edge in plan.edges]
        self._labels: dict[int, tuple[Label, bytes]] = {}
        self.begin("")

    def begin(self, context: str) -> None:
        """Before a step; parcels of different contexts have descriptions of their own. Local."""
        self._context = context
        self._local: dict[tuple[int, int], Parcel] = {}
        self._local_gradients: dict[tuple[int, int], Gradients] = {}

    def expect(self, task: Task, activation: Activation | None) -> None:
        """Post the receives of a task, unless that is done or cannot be done yet. Local.

        Parameters
        ----------
        task
            One that will be executed soon.
        activation
            That of its stage and microbatch, if its forward is done.
        """
        if task.expected is not None or task.kind is Kind.BACKWARD_WEIGHT:
            return
        number, microbatch = task.key
        stage = self._plan.stages[number]
        if task.is_forward:
            task.expected = [(edge, self._expect(edge, microbatch)) for edge in stage.incoming]
        elif activation is not None:
            task.expected = [
                (edge, self._expect_gradients(edge, microbatch, specs))
                for edge, specs in zip(stage.outgoing, activation.gradient_specs, strict=True)
                if specs or self._is_local[edge.index]
            ]

    def has_come(self, task: Task) -> bool:
        """Whether everything that a task consumes is here. Local."""
        if task.expected is None:
            return False
        for edge, incoming in task.expected:
            if incoming is not None:
                if not incoming.test():
                    return False
            elif (edge.index, task.key[1]) not in (self._local if task.is_forward else self._local_gradients):
                return False
        return True

    def take_parcels(self, task: Task) -> list[Parcel]:
        """The inputs of a forward, a parcel per incoming edge; none on the first stage. Local."""
        assert task.expected is not None
        parcels = []
        for edge, incoming in task.expected:
            if incoming is None:
                parcels.append(self._local.pop((edge.index, task.key[1])))
            else:
                assert incoming.description is not None
                label = Label.from_bytes(incoming.description.label)
                parcels.append(Parcel(label, [t for t in incoming.tensors if t is not None]))
        task.expected = None
        return parcels

    def take_gradients(self, task: Task) -> list[Gradients]:
        """The gradients that a backward starts from, per outgoing edge. Local."""
        assert task.expected is not None
        arrived = {edge.index: incoming for edge, incoming in task.expected}
        task.expected = None
        gradients: list[Gradients] = []
        for edge in self._plan.stages[task.key[0]].outgoing:
            incoming = arrived.get(edge.index)
            if incoming is not None:
                gradients.append(incoming.tensors)
            elif edge.index in arrived:
                gradients.append(self._local_gradients.pop((edge.index, task.key[1])))
            else:
                gradients.append([])
        return gradients

    def send_parcels(self, task: Task, parcels: Sequence[Parcel]) -> None:
        """Hand on what a forward has computed, a parcel per outgoing edge. Point-to-point, never waits."""
        stage, microbatch = task.key
        for edge, parcel in zip(self._plan.stages[stage].outgoing, parcels, strict=True):
            if self._is_local[edge.index]:
                self._local[edge.index, microbatch] = parcel
            else:
                dest, tag = self._plan.stages[edge.dest].rank, self._tag(edge, microbatch)
                label = self._encode(edge, parcel.label)
                self.exchange.send(dest, tag, parcel.tensors, label, self._context)

    def send_gradients(self, task: Task, gradients: Sequence[Gradients]) -> None:
        """Hand back gradients, per incoming edge. Point-to-point, never waits."""
        stage, microbatch = task.key
        # The first stage has no edge for the gradient of the batch.
        for edge, some in zip(self._plan.stages[stage].incoming, gradients, strict=False):
            if self._is_local[edge.index]:
                self._local_gradients[edge.index, microbatch] = some
            elif some:
                self.exchange.reply(self._plan.stages[edge.source].rank, self._tag(edge, microbatch), some)

    def send_result(self, result: torch.Tensor, microbatches: int) -> None:
        """Tell all ranks what came out of the step; for the last one. Point-to-point, never waits."""
        for rank in range(self._comm.size):
            if rank != self._comm.rank:
                self.exchange.send(rank, self._result_tag(microbatches), [result], b"", _RESULT)

    def expect_result(self, microbatches: int) -> Incoming:
        """What the last rank tells; for the others. Point-to-point."""
        return self.exchange.expect(self._plan.last_rank, self._result_tag(microbatches), _RESULT)

    def describe_missing(self, task: Task) -> tuple[str, list[int]]:
        """For an error: what a task lacks, and the ranks that owe it. Local."""
        lacking = [
            (edge, edge.source if task.is_forward else edge.dest)
            for edge, incoming in task.expected or ()
            if incoming is None or not incoming.test()
        ]
        stage, microbatch = task.key
        what = "the activation" if task.is_forward else "the gradient"
        texts = [
            f"{what} of microbatch {microbatch} from stage {end}"
            + ("" if edge.skip is None else f" (skip {edge.skip})")
            for edge, end in lacking
        ]
        text = f"action {task.action} of pipeline stage {stage}, which needs {' and '.join(texts)},"
        return text, sorted({self._plan.stages[end].rank for _, end in lacking})

    def _encode(self, edge: Edge, label: Label) -> bytes:
        """The bytes of a label, which is that of the microbatch before as a rule."""
        known = self._labels.get(edge.index)
        if known is None or known[0] != label:
            known = self._labels[edge.index] = label, label.to_bytes()
        return known[1]

    def _expect(self, edge: Edge, microbatch: int) -> Incoming | None:
        if self._is_local[edge.index]:
            return None
        source = self._plan.stages[edge.source].rank
        return self.exchange.expect(source, self._tag(edge, microbatch), self._context)

    def _expect_gradients(
        self, edge: Edge, microbatch: int, specs: Sequence[tuple[torch.dtype, torch.Size]]
    ) -> Incoming | None:
        if self._is_local[edge.index]:
            return None
        dest = self._plan.stages[edge.dest].rank
        return self.exchange.expect_reply(dest, self._tag(edge, microbatch), specs)

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
