"""Who keeps a reduction waiting: what the flag board, the other ranks and the operating system tell.

Three sources, each of which may know nothing: a transport sees on its board which rank of this node has not
filled or summed a bucket; ranks that wait call each other (:class:`~hpcpar.comm.roll_call.RollCall`), so one
that is silent does not wait; and the process of a neighbour may have died.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from hpcpar.comm.node_processes import NodeProcesses
from hpcpar.comm.progress import Patience
from hpcpar.comm.roll_call import RollCall
from hpcpar.errors import RankFailedError

if TYPE_CHECKING:
    from hpcpar.comm.communicator import Communicator
    from hpcpar.comm.transport import Transport

__all__ = ["ReducerDiagnosis"]


class ReducerDiagnosis:
    """Makes the patience of waits for buckets. Collective to make.

    Parameters
    ----------
    name
        Of the reducer, for errors.
    comm
        The reducer's own communicator, on which nobody sends point-to-point messages.
    transport
        What it reduces with.
    buckets
        How many it has.
    """

    def __init__(self, name: str, comm: Communicator, transport: Transport, buckets: int) -> None:
        self._name, self._comm, self._transport, self._buckets = name, comm, transport, buckets
        self._roll_call = RollCall(comm.mpi) if comm.size > 1 else None
        self._processes = NodeProcesses(comm)

    def patience(
        self, step: int, bucket: int, sent: Callable[[], int], members: Collection[int] | None
    ) -> Patience:
        """How long to wait for a bucket, and whom to name. Local.

        Parameters
        ----------
        step, bucket
            What is waited for.
        sent
            How many buckets this rank has sent by now.
        members
            The ranks that take part, ``None`` for all.
        """
        return _Patience(self, step, bucket, sent, range(self._comm.size) if members is None else members)

    def close(self) -> None:
        """Let go of messages that nobody will read. Local."""
        if self._roll_call is not None:
            self._roll_call.close()

    def title(self, step: int, bucket: int) -> str:
        """The operation, for errors. Local."""
        return f"{self._name}, bucket {bucket} of {self._buckets} in step {step}"

    def explain(self, step: int, bucket: int) -> str:
        """What ranks of this node have yet to do, in a sentence. Local."""
        owed = [self._transport.owes(rank, bucket, step) for rank in range(self._comm.size)]
        facts = [fact for fact in owed if fact]
        return f"On this node, {', '.join(facts)}." if facts else ""

    def silent(self, step: int, bucket: int, members: Collection[int]) -> list[int]:
        """Members that owe something to the bucket and have not said that they wait too. Local."""
        silent = [] if self._roll_call is None else self._roll_call.missing(self._number(step, bucket + 1))
        verdicts = {rank: self._transport.delivered(rank, bucket, step) for rank in members}
        guilty = [rank for rank in silent if rank in members and verdicts[rank] is not True]
        return guilty or [rank for rank, verdict in verdicts.items() if verdict is False]

    def look_around(self, step: int, sent: int, waited_s: float, timeout_s: float) -> list[int]:
        """Exchange signs of life; ranks of this node whose processes have died. Local."""
        if self._roll_call is not None:
            self._roll_call.tick(self._number(step, sent), waited_s, timeout_s)
        return self._processes.dead()

    def _number(self, step: int, bucket: int) -> int:
        """A number that grows with every bucket sent, for roll calls."""
        return step * (self._buckets + 1) + bucket


class _Patience(Patience):
    """Asks around who waits for the same bucket, and looks for dead neighbours."""

    def __init__(
        self,
        diagnosis: ReducerDiagnosis,
        step: int,
        bucket: int,
        sent: Callable[[], int],
        members: Collection[int],
    ) -> None:
        super().__init__(
            diagnosis.title(step, bucket),
            missing=lambda: diagnosis.silent(step, bucket, members),
            where=diagnosis._comm._where,
            details=lambda: diagnosis.explain(step, bucket),
        )
        self._diagnosis, self._step, self._sent_now = diagnosis, step, sent

    def on_tick(self, waited_s: float, timeout_s: float) -> None:
        """Raise for a rank of this node that has died."""
        dead = self._diagnosis.look_around(self._step, self._sent_now(), waited_s, timeout_s)
        if dead:
            raise RankFailedError(
                dead, f"{self.operation}: {self._where} waits for ranks {dead}, whose processes have died"
            )
