"""The reducer: a sequence of buckets, summed over the ranks while the program goes on computing.

It is a small state machine per bucket and step::

    open --publish--> queued --(all lower ones sent)--> sent --progress--> done

The program fills the flat tensor of a bucket and calls :meth:`Reducer.publish`. Buckets may be published in
any order, which may differ between ranks; they are *sent* strictly in index order, because MPI wants
collectives in one order. Everything after that happens in :meth:`Reducer.progress`, which never waits and is
called by the program between its own work, by every waiting loop of this process
(:mod:`hpcpar.comm.progress`), or by a thread of its own.

When a bucket is done, its flat tensor holds the mean over the ranks, weighted if :meth:`Reducer.begin` was
given weights, or the sum if it was told so. Until then nobody may touch it.

A rank that has nothing to contribute publishes zeros; a rank that is late is named by whoever waits for it
too long, with the bucket that it has not delivered.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hpcpar.comm.bucket import BucketLayout
from hpcpar.comm.mpi import MPI
from hpcpar.comm.partition import Partition
from hpcpar.comm.progress import ENGINE, wait_until
from hpcpar.comm.progress_thread import ProgressThread
from hpcpar.comm.reducer_diagnosis import ReducerDiagnosis
from hpcpar.comm.request import Request
from hpcpar.comm.staging import Staging
from hpcpar.comm.transport_choice import choose_transport
from hpcpar.errors import CommunicatorFreedError, HpcparError

if TYPE_CHECKING:
    from hpcpar.comm.communicator import Communicator

__all__ = ["Reducer", "ReducerStats"]


@dataclass(frozen=True)
class ReducerStats:
    """What the reductions of this rank have cost since the start.

    Attributes
    ----------
    steps, buckets : int
        Reductions begun; buckets in each.
    bytes_reduced : int
        Bytes of buckets that went into reductions.
    communication_s : float
        Seconds in reduction code of any kind: copying, summing, sending, waiting.
    exposed_s : float
        Seconds of these in which the program could only wait.
    transport : str
        ``"shared_memory"``, ``"shared_memory+rails"``, ``"mpi"`` or ``"none"`` (one rank).
    """

    steps: int
    buckets: int
    bytes_reduced: int
    communication_s: float
    exposed_s: float
    transport: str


class Reducer:
    """Averages buckets over the ranks of a communicator. Collective to make and to free.

    Parameters
    ----------
    comm
        The ranks. The reducer sends on a duplicate.
    layouts
        The buckets; the same on every rank.
    transport
        ``"auto"`` takes shared memory where ranks share nodes and ``/dev/shm`` has room.
    wire_dtype
        A 16-bit type in which wider buckets cross the network, or ``torch.int8``: a code of eight bits for
        wide floats, of which what rounding keeps back goes with the next reduction. Buckets without slots
        hold flags, and stay exact under ``torch.int8``. Shared memory keeps their own.
    devices
        Device of each bucket's flat tensor, the host by default. Others are staged through pinned memory.
    partitions
        Of each bucket, for one of which every rank wants its own part of the result only; ``None`` for one
        that all want whole.
    name
        For error messages.

    Attributes
    ----------
    flats : list of torch.Tensor
        The flat tensor of each bucket, to be filled before ``publish``. They belong to the reducer.
    """

    def __init__(
        self,
        comm: Communicator,
        layouts: Sequence[BucketLayout],
        *,
        transport: str = "auto",
        wire_dtype: torch.dtype | None = None,
        devices: Sequence[torch.device] | None = None,
        partitions: Sequence[Partition | None] | None = None,
        name: str = "gradient reduction",
    ) -> None:
        self._comm = comm.Dup()
        self._comm.skip_checks()
        self._layouts = list(layouts)
        self._transport, self._kind = choose_transport(
            self._comm,
            self._layouts,
            transport,
            wire_dtype,
            partitions or [None] * len(self._layouts),
            pinned=any(d.type == "cuda" for d in devices or ()),
        )
        self._stagings = [
            Staging(host, device)
            for host, device in zip(
                self._transport.storage, devices or [torch.device("cpu")] * len(self._layouts), strict=True
            )
        ]
        self.flats = [staging.flat for staging in self._stagings]
        self._is_partitioned = any(partitions or ())
        self._diagnosis = ReducerDiagnosis(name, self._comm, self._transport, len(self._layouts))
        self._busy = threading.Lock()
        self._step = 0
        self._scale = 1.0
        self._average = True
        self._within_node = False
        self._weights: torch.Tensor | None = None
        self._weights_request: Request | None = None
        self._published = [False] * len(layouts)
        self._sent = 0
        self._pending: list[int] = []
        self._done = [True] * len(layouts)
        self._open = False
        self._waiting = False
        self._communication_s = self._exposed_s = 0.0
        self._thread: ProgressThread | None = None

    @property
    def comm(self) -> Communicator:
        """The reducer's own communicator; collectives on it must keep the order of all ranks. Local."""
        return self._comm

    @property
    def step(self) -> int:
        """Number of reductions begun. Local."""
        return self._step

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way. Local."""
        return not self._open and not self._pending

    @property
    def scope(self) -> Communicator:
        """The ranks of the reduction begun last: all, or those of this node. Local."""
        return self._comm.node if self._within_node else self._comm

    def begin(
        self,
        weight: float | None = None,
        *,
        active: bool = True,
        average: bool = True,
        within_node: bool = False,
    ) -> None:
        """Start a reduction of all buckets. Collective, does not wait.

        Parameters
        ----------
        weight
            Of this rank in the mean; buckets must be filled with ``weight`` times the contribution. All
            ranks give weights or none does (``None``: equal weights, nothing to multiply).
        active
            Weighted reductions count the active ranks, see :meth:`active_ranks`.
        average
            Divide the sum by the number of ranks, or by the sum of the weights; ``False`` leaves it.
        within_node
            Over the ranks of this node only, all of which must say so; the other nodes take no part.

        Raises
        ------
        HpcparError
            When the previous reduction is still under way, or buckets with partitions are to stay within
            the node.
        """
        self._check_alive()
        if within_node and self._is_partitioned:
            raise HpcparError(
                f"buckets with partitions must be reduced over all ranks, got a node ({self._where})"
            )
        self._check_idle("the next begins")
        with self._busy:  # a progress thread may still be looking
            self._step += 1
            self._sent = 0
            self._published = [False] * len(self._layouts)
            self._done = [False] * len(self._layouts)
            self._average, self._within_node = average, within_node
            self._scale = 1.0 / self.scope.size if average else 1.0
            self._weights = None
            if weight is not None:
                self._weights = torch.tensor([weight, float(active)], dtype=torch.float64)
                self._weights_request = self.scope.Iallreduce(MPI.IN_PLACE, self._weights)
            self._open = True

    def active_ranks(self) -> int:
        """Wait for the weights of a weighted reduction; how many ranks are active. Collective."""

        def known() -> bool:
            self.progress()  # takes the weights when they are there, in whichever thread
            return self._weights_request is None

        if self._weights_request is not None:
            wait_until(known, self._comm._collective_patience("weights of a reduction", None))
        return self.scope.size if self._weights is None else int(self._weights[1])

    def abandon(self) -> None:
        """Drop the reduction that was begun, before any bucket was published. All ranks must. Local."""
        if self._sent or any(self._published):
            raise HpcparError(
                f"a reduction must not be abandoned after a bucket was published ({self._where})"
            )
        self._open = False
        self._done = [True] * len(self._layouts)

    def give_up(self) -> None:
        """Leave what is under way unfinished, since another rank has failed. Nothing may follow. Local.

        Otherwise this rank would wait for it when it exits, for the sake of ranks that need it.
        """
        with self._busy:
            ENGINE.discard(self)
            self._pending, self._open = [], False

    def publish(self, bucket: int) -> None:
        """Declare the contents of a bucket final; it is sent when all lower ones are. Never waits.

        Raises
        ------
        HpcparError
            Before :meth:`begin`, or when this reduction has had the bucket already.
        """
        self._check_alive()
        if not self._open or self._published[bucket]:
            raise HpcparError(
                f"a bucket must be published once after begin(), got bucket {bucket} in step {self._step} "
                f"{'twice' if self._published[bucket] else 'before'} ({self._where})"
            )
        start = time.perf_counter()
        with self._busy:
            self._published[bucket] = True
            ENGINE.add(self)  # before it is sent: weights or a copy may hold that up
            self._stagings[bucket].begin_out()
            self._send_queued()
            self._advance_pending()
        self._communication_s += time.perf_counter() - start
        if self._thread is not None:
            self._thread.wake()

    def progress(self) -> None:
        """Send what can be sent, sum what can be summed. Never waits; safe from any thread. Local."""
        if not self._pending and not self._open:
            return
        if not self._busy.acquire(blocking=False):
            return  # another thread is at it
        start = time.perf_counter()
        try:
            self._send_queued()
            self._advance_pending()
        finally:
            self._busy.release()
        if not self._waiting:
            self._communication_s += time.perf_counter() - start

    def is_done(self, bucket: int) -> bool:
        """Whether the flat tensor of ``bucket`` holds the mean. Local."""
        return self._done[bucket]

    def wait(self, bucket: int) -> None:
        """Wait until a bucket is done. Collective in effect: every rank must have published it.

        Raises
        ------
        StalledError
            At the deadline, naming the ranks that have not delivered.
        RankFailedError
            When a rank of this node has died.
        """
        if not self._done[bucket]:
            self._wait(bucket)
        self._stagings[bucket].order()

    def wait_all(self) -> None:
        """Wait until every bucket is done, as :meth:`wait`."""
        for bucket in range(len(self._layouts)):
            self.wait(bucket)

    def use_progress_thread(self, wanted: bool) -> None:
        """Start or stop a thread of this process that makes the progress. Local.

        Raises
        ------
        HpcparError
            When MPI does not allow several threads.
        """
        if wanted and self._thread is None and self._comm.size > 1:
            self._thread = ProgressThread(self)
        elif not wanted and self._thread is not None:
            self._thread.stop()
            self._thread = None

    def residuals(self) -> list[torch.Tensor]:
        """What ``wire_dtype=torch.int8`` has kept back so far, over all ranks; zeros without it. Collective.

        Returns
        -------
        list of torch.Tensor
            For each bucket a flat tensor on the host, in units of its result, the same on every rank.
        """
        self._check_idle("its residuals are asked for")
        totals = [self._transport.outstanding(bucket) for bucket in range(len(self._layouts))]
        for total in totals:
            self._comm.Allreduce(MPI.IN_PLACE, total)
        return totals

    def load_residuals(self, residuals: Sequence[torch.Tensor]) -> None:
        """Go on from what :meth:`residuals` returned on these or other ranks. All ranks must. Local."""
        self._check_idle("residuals are loaded")
        for bucket, total in enumerate(residuals):
            self._transport.load_outstanding(bucket, total)

    def stats(self) -> ReducerStats:
        """What reductions have cost so far. Local."""
        return ReducerStats(
            steps=self._step,
            buckets=len(self._layouts),
            bytes_reduced=self._step * sum(layout.nbytes for layout in self._layouts),
            communication_s=self._communication_s,
            exposed_s=self._exposed_s,
            transport=self._kind,
        )

    def account(self, seconds: float) -> None:
        """Count time that a caller spent on its part of the communication, such as copies. Local."""
        self._communication_s += seconds

    def free(self) -> None:
        """Give memory, thread and communicator back; a second call is fine. Collective."""
        if self._comm.is_freed:
            return
        self._comm.Barrier()  # it has a deadline, which freeing a window has not
        if self._thread is not None:
            self._thread.stop()
        ENGINE.discard(self)
        self._diagnosis.close()
        self.flats = []
        self._stagings = []
        self._transport.free()
        self._comm.Free()

    @property
    def needed_by_others(self) -> bool:
        """Whether published buckets are under way, to which all ranks contribute. Local."""
        queued = self._open and self._sent < len(self._layouts) and self._published[self._sent]
        return queued or bool(self._pending)

    @property
    def _where(self) -> str:
        return f"rank {self._comm.rank} of {self._comm.size}"

    def _wait(self, bucket: int) -> None:
        start = time.perf_counter()
        self._waiting = True
        try:
            members = self._comm.node_map.ranks_of(self._comm.node_rank) if self._within_node else None
            patience = self._diagnosis.patience(self._step, bucket, lambda: self._sent, members)
            wait_until(lambda: self._try(bucket), patience)
        finally:
            self._waiting = False
        elapsed = time.perf_counter() - start
        self._communication_s += elapsed
        self._exposed_s += elapsed

    @property
    def _is_queued(self) -> bool:
        return self._sent < len(self._layouts) and self._published[self._sent]

    def _check_alive(self) -> None:
        if self._comm.is_freed:
            raise CommunicatorFreedError("a reducer must not be used after free()")

    def _check_idle(self, before: str) -> None:
        self._check_alive()
        if not self.is_idle:
            raise HpcparError(
                f"a reduction must be complete before {before}, got step {self._step} still under way "
                f"({self._where}). Did an exception end a backward pass half-way?"
            )

    def _try(self, bucket: int) -> bool:
        if not self._done[bucket]:
            self.progress()
        return self._done[bucket]

    def _send_queued(self) -> None:
        if self._weights_request is not None:
            if not self._weights_request.advance():
                return
            self._take_weights()
        while self._is_queued:
            if not self._stagings[self._sent].is_out():
                return
            self._transport.publish(self._sent, self._step, self._scale, within_node=self._within_node)
            self._pending.append(self._sent)
            self._sent += 1
        if self._sent == len(self._layouts):
            self._open = False

    def _advance_pending(self) -> None:
        if not self._pending:
            return
        left = []
        for bucket in self._pending:
            if self._transport.advance(bucket, self._step):
                self._stagings[bucket].bring_in()
                self._done[bucket] = True
            else:
                left.append(bucket)
        self._pending = left
        if not left and not self._is_queued:
            ENGINE.discard(self)

    def _take_weights(self) -> None:
        assert self._weights is not None
        self._weights_request = None
        total = float(self._weights[0])
        if self._average:
            self._scale = 1.0 / total if total > 0.0 else 0.0
