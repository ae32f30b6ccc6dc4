"""The network of experts: who serves which expert, and how this rank calls them.

Every rank of the communicator has one, whether it serves experts or not. It is made when all ranks enter
their :class:`~hpcpar.nn.experts.server.ExpertServer`: they tell each other once what they serve, so that
afterwards nobody asks where an expert is, what it takes or what it returns::

    uid            ranks     takes               returns
    expert.0.0     0         x (64,)             (64,)
    expert.0.1     1, 3      x (64,), mask ()    (64,)        two replicas

Invariant: a call is begun only while the network is open, and a rank leaves only when no call of any living
rank is under way, not even one whose caller has stopped waiting. So a server that leaves loses no request.
"""

from __future__ import annotations

import difflib
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import torch

from hpcpar.comm import CallExchange
from hpcpar.comm.progress import Patience, timeout_from_environment, wait_until
from hpcpar.errors import HpcparError, MismatchError, RemoteExpertError
from hpcpar.nn.experts.schema import ExpertSchema

if TYPE_CHECKING:
    from hpcpar.comm import Call, Communicator

__all__ = ["ExpertNetwork", "ExpertRecord", "Procedure"]

logger = logging.getLogger(__name__)

_NAME = "experts"
_SLEEP_S = 0.005


class Procedure(IntEnum):
    """What can be asked of an expert."""

    FORWARD = 1
    BACKWARD = 2
    STATISTICS = 3


@dataclass(frozen=True)
class ExpertRecord:
    """What all ranks know of an expert.

    Attributes
    ----------
    uid : str
        Its name.
    number : int
        Its place among all experts, in the order of their names.
    ranks : tuple of int
        Who serves it: one rank, or several replicas.
    schema : ExpertSchema
        What it takes and returns.
    draws : bool
        Whether it draws random numbers in training, so that each request needs a seed.
    """

    uid: str
    number: int
    ranks: tuple[int, ...]
    schema: ExpertSchema
    draws: bool


class ExpertNetwork:
    """All experts of a communicator, seen from one rank. Collective to make and to free.

    Parameters
    ----------
    comm
        The ranks.
    served
        Schema, and whether it draws random numbers, of each expert that this rank serves, by uid.

    Raises
    ------
    MismatchError
        On every rank, when replicas of an expert differ.
    """

    def __init__(self, comm: Communicator, served: dict[str, tuple[ExpertSchema, bool]]) -> None:
        self.comm = comm
        mine = {uid: (schema.to_plain(), draws) for uid, (schema, draws) in served.items()}
        self.records = _merge(comm.allgather(mine))
        self.calls = CallExchange(comm)
        self._lock = threading.Lock()
        self._busy = 0
        self._is_open = True

    @staticmethod
    def of(comm: Communicator) -> ExpertNetwork:
        """The network that runs on ``comm``. Local.

        Raises
        ------
        HpcparError
            When there is none.
        """
        network = comm.attachments.get(_NAME)
        if not isinstance(network, ExpertNetwork):
            raise HpcparError(
                "a remote expert must be called inside `with ExpertServer(comm, ...)` of the same "
                f"communicator object, got {comm!r}, on which no server runs"
            )
        return network

    def attach(self) -> None:
        """Make this the network that :meth:`of` finds. Local."""
        self.comm.attachments[_NAME] = self

    @staticmethod
    def runs_on(comm: Communicator) -> bool:
        """Whether there is a network on ``comm``. Local."""
        return _NAME in comm.attachments

    def record(self, uid: str) -> ExpertRecord:
        """What is known of an expert. Local.

        Raises
        ------
        RemoteExpertError
            When nobody serves it.
        """
        record = self.records.get(uid)
        if record is None:
            close = difflib.get_close_matches(uid, self.records, n=3)
            hint = f"Did you mean {', '.join(close)}?" if close else _list(self.records)
            raise RemoteExpertError(f"uid must be that of a served expert, got {uid!r}. {hint}")
        return record

    def rank_of(self, record: ExpertRecord) -> int:
        """Which replica this rank calls: itself, one on its node, or its share of the others. Local."""
        ranks, rank = record.ranks, self.comm.rank
        if len(ranks) == 1:
            return ranks[0]
        if rank in ranks:
            return rank
        dead = self.calls.peers.dead()
        node_of = self.comm.node_map.nodes
        alive = [other for other in ranks if other not in dead] or list(ranks)
        near = [other for other in alive if node_of[other] == node_of[rank]] or alive
        return near[rank % len(near)]

    def start(
        self,
        record: ExpertRecord,
        procedure: Procedure,
        tensors: Sequence[torch.Tensor],
        *,
        training: bool = False,
        seed: int | None = None,
    ) -> ExpertCall:
        """Start a call of an expert. Point-to-point.

        Parameters
        ----------
        record, procedure
            Whom, and what for.
        tensors
            Flat, in the order of the schema.
        training
            Whether the expert runs in training mode.
        seed
            Of its random numbers, not negative.
        """
        if self.calls.answering_thread == threading.get_ident():
            raise HpcparError(
                f"an expert must not call other experts, got a call of {record.uid!r} from one: a server "
                "computes one batch at a time, and would wait for itself. Call both from outside"
            )
        with self._lock:
            if not self._is_open:
                raise HpcparError(
                    f"expert {record.uid!r} must be called before its server's `with` block ends, got a call "
                    f"when rank {self.comm.rank} was leaving it"
                )
            self._busy += 1
        try:
            words = (procedure, record.number, int(training), -1 if seed is None else seed)
            return ExpertCall(self, record, self.calls.call(self.rank_of(record), words, tensors))
        except BaseException:
            self.end_call()
            raise

    def end_call(self) -> None:
        """One call less is under way. Local."""
        with self._lock:
            self._busy -= 1

    def close(self) -> None:
        """Let no new call begin on this rank, and wait until those of all ranks have ended. Collective.

        That has no deadline: a rank that only serves is here while others train. Ranks that have died are
        not waited for; one that fails sounds the server's alarm.
        """
        with self._lock:
            self._is_open = False
        self._wait(lambda: self._busy == 0 and self.calls.all_answered(), lambda: [self.comm.rank])
        farewell = self.calls.farewell()
        self._wait(farewell.is_over, lambda: farewell.missing)

    def _wait(self, done: Callable[[], bool], missing: Callable[[], Sequence[int]]) -> None:
        patience = _PatienceWithCallers(missing, self.comm._where)
        wait_until(done, patience, sleep_s=_SLEEP_S)  # each look takes a core from the thread that serves

    def detach(self) -> None:
        """Be found no longer. Local."""
        if self.comm.attachments.get(_NAME) is self:
            del self.comm.attachments[_NAME]

    def free(self) -> None:
        """Give the communicators back. Collective."""
        self.detach()
        self.calls.free()


class ExpertCall:
    """A call of an expert that is under way. Made by :meth:`ExpertNetwork.start`; used by one thread."""

    def __init__(self, network: ExpertNetwork, record: ExpertRecord, call: Call) -> None:
        self._network, self._call = network, call
        self.record = record
        self._ended = False

    def test(self) -> bool:
        """Whether it has ended, well or not. Local."""
        if not self._ended and self._call.test():
            self._end()
        return self._ended

    def wait(self, timeout_s: float | None = None) -> list[torch.Tensor]:
        """Wait for the reply. Point-to-point.

        Raises
        ------
        RemoteExpertError
            When the expert failed; with the traceback of its rank.
        StalledError, RankFailedError
            When no reply came in time, or its rank died.
        """
        try:
            self._call.wait(timeout_s)
        finally:
            self._end()
        return self.result()

    def result(self) -> list[torch.Tensor]:
        """The reply of a call that has ended. Local.

        Raises
        ------
        RemoteExpertError
            When the expert failed.
        """
        if self._call.failure is not None:
            comm = self._network.comm
            raise RemoteExpertError(
                f"expert {self.record.uid!r} must answer, got an exception on rank {self._call.dest} of "
                f"{comm.size}:\n{self._call.failure}"
            )
        return self._call.tensors

    def check_alive(self) -> None:
        """Raise :class:`RankFailedError` when the process of the expert's rank is gone. Local."""
        self._call.check_alive()

    def abandon(self) -> None:
        """Stop waiting. Local."""
        if not self._ended:
            self._call.abandon()
            self._end()

    @property
    def rank(self) -> int:
        """The rank that was called. Local."""
        return self._call.dest

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            self._network.end_call()


class _PatienceWithCallers(Patience):
    """Never gives up, since others may train for days; but not in silence."""

    def __init__(self, missing: Callable[[], Sequence[int]], where: str) -> None:
        super().__init__("end of `with ExpertServer`", missing=missing, where=where)
        self._speaks_at_s = timeout_from_environment()

    def tick(self, waited_s: float) -> None:
        """Say now and then who is still busy. Local."""
        if waited_s >= self._speaks_at_s:
            self._speaks_at_s *= 2
            busy = ", ".join(map(str, self._missing()))
            logger.warning(
                "%s is at the %s; rank(s) %s still call experts", self._where, self.operation, busy
            )


def _merge(announced: Sequence[dict[str, tuple[Any, bool]]]) -> dict[str, ExpertRecord]:
    """One record for each uid, from what each rank serves. Local, the same on every rank."""
    ranks: dict[str, list[int]] = {}
    for rank, experts in enumerate(announced):
        for uid in experts:
            ranks.setdefault(uid, []).append(rank)
    records = {}
    for number, (uid, serving) in enumerate(sorted(ranks.items())):
        plain, draws = announced[serving[0]][uid]
        for other in serving[1:]:
            if announced[other][uid] != (plain, draws):
                raise MismatchError(
                    f"replicas of expert {uid!r} must have equal schemas, got {plain} on rank {serving[0]} "
                    f"and {announced[other][uid][0]} on rank {other}"
                )
        records[uid] = ExpertRecord(uid, number, tuple(serving), ExpertSchema.from_plain(plain), draws)
    return records


def _list(uids: object) -> str:
    names = sorted(uids)  # type: ignore[call-overload]
    if not names:
        return "No rank serves any expert"
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"Served are {shown}"
