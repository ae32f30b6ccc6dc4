"""Replicas of an expert: several ranks serve it, and train it as one.

Callers spread over the replicas, so their requests come at different times and some replicas may get none at
all. Nobody may wait for somebody else's request. So the replicas keep asking each other, by a small
``Iallreduce`` that each service looks after between batches, how many samples they have together::

    replica 0   [12 samples] ──┐             take gradients ──┐            same step
    replica 1   [ 0 samples] ──┼─ sum 40 ──> zeros          ──┼─ sum ────> same step
    replica 2   [28 samples] ──┘             take gradients ──┘            same step

When that is enough for an update, all take what they have accumulated by then, zeros included, and add it up
by another ``Iallreduce``. All replicas start with the same state and take the same steps, so they stay equal.

Invariant: all replicas run the same sequence of collectives, because each of them is decided by the result
of the one before. The last is the one in which every replica says that it is leaving.

Buffers that are floating, such as running statistics, become their mean with every update. When a replica
dies, the others go on answering, but are trained no more.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import torch

from hpcpar.comm import MPI
from hpcpar.errors import MismatchError
from hpcpar.nn.experts.replica_states import state_with_pending

if TYPE_CHECKING:
    from hpcpar.comm import Communicator, Request
    from hpcpar.nn.experts.backend import ExpertBackend

__all__ = ["ReplicaRounds"]

logger = logging.getLogger(__name__)

_PAUSE_S = 0.001


class ReplicaRounds:
    """The part of one replica. Collective to make and to free, over the replicas.

    Parameters
    ----------
    uid
        Of the expert, for errors.
    backend
        The replica of this rank. It takes over the state of the first one, but keeps the samples that wait
        for an update.
    replicas
        The ranks that serve it.

    Attributes
    ----------
    problem : str or None
        Why this replica cannot take part, for all ranks to raise.
    """

    def __init__(self, uid: str, backend: ExpertBackend, replicas: Communicator) -> None:
        self.uid = uid
        self._backend = backend
        self.comm = replicas.Dup()
        self.problem: str | None = None
        self._needed = max(1, backend.samples_per_update or 1)
        own = backend.get_full_state()
        first = self.comm.bcast(own if self.comm.rank == 0 else None, 0)
        try:
            backend.load_full_state(state_with_pending(first, own["pending"]))
        except MismatchError as error:
            self.problem = f"replicas of expert {uid!r} must be alike, got one that differs: {error}"
        self._word = torch.zeros(2, dtype=torch.int64)  # samples here, whether this replica is leaving
        self._asking: Request | None = None
        self._adding: list[Request] = []
        self._sums: dict[torch.dtype, torch.Tensor] = {}
        self._ask_at_s = 0.0
        self._leaving = False
        self._all_leave = False

    def turn(self) -> bool:
        """Go on as far as is possible without waiting. Local.

        Returns
        -------
        bool
            Whether an update was begun or ended.
        """
        if self._all_leave and not self._adding:
            return False
        try:
            return self._go_on()
        except MPI.Exception as error:
            logger.warning("replicas of expert %r are trained no more, for one is gone: %s", self.uid, error)
            self._all_leave, self._adding, self._asking = True, [], None
            return False

    def leave(self) -> None:
        """Take part until all replicas are leaving, and no longer. Local."""
        self._leaving = True

    @property
    def is_done(self) -> bool:
        """Whether the last round has ended. Local."""
        return self._all_leave and not self._adding

    def free(self) -> None:
        """Give the communicator back, when done. Collective."""
        self.comm.Free()

    def _go_on(self) -> bool:
        if self._adding:
            return self._apply_when_added()
        if self._asking is not None:
            return self._asking.advance() and self._decide()
        if time.monotonic() >= self._ask_at_s:
            self._word[0] = self._backend.accumulated_samples
            self._word[1] = int(self._leaving)
            self._asking = self.comm.Iallreduce(MPI.IN_PLACE, self._word)
        return False

    def _decide(self) -> bool:
        self._asking = None
        samples, leaving = self._word.tolist()
        self._ask_at_s = time.monotonic() + _PAUSE_S
        enough = bool(samples >= self._needed)
        if enough:
            self._begin_update()
        # Only now, and in `_apply_when_added` at the end: another thread reads `is_done`.
        self._all_leave = leaving == self.comm.size
        return enough

    def _begin_update(self) -> None:
        with self._backend.lock:
            gradients, taken = self._backend.take_gradients()
            buffers = [buffer.detach().clone() for buffer in self._floating_buffers()]
        counted = [torch.tensor([float(taken)], dtype=torch.float64)]
        self._sums = _pack([*counted, *gradients, *buffers])
        self._adding = [self.comm.Iallreduce(MPI.IN_PLACE, flat) for flat in self._sums.values()]

    def _apply_when_added(self) -> bool:
        if not all(request.advance() for request in self._adding):
            return False
        parameters = [p for p in self._backend.expert.parameters() if p.requires_grad]
        buffers = self._floating_buffers()
        like = [torch.empty(1, dtype=torch.float64), *parameters, *buffers]
        counted, *sums = _unpack(self._sums, like)
        with self._backend.lock, torch.no_grad():
            self._backend.apply_summed(sums[: len(parameters)], int(counted))
            for buffer, total in zip(buffers, sums[len(parameters) :], strict=True):
                buffer.copy_(total / self.comm.size)
        self._adding = []
        return True

    def _floating_buffers(self) -> list[torch.Tensor]:
        return [buffer for buffer in self._backend.expert.buffers() if buffer.is_floating_point()]


def _summed_as(dtype: torch.dtype) -> torch.dtype:
    """MPI cannot add 16-bit floats."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _pack(tensors: list[torch.Tensor]) -> dict[torch.dtype, torch.Tensor]:
    """One flat host tensor for each dtype that is summed."""
    groups: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        dtype = _summed_as(tensor.dtype)
        groups.setdefault(dtype, []).append(tensor.reshape(-1).to("cpu", dtype))
    return {dtype: torch.cat(parts) for dtype, parts in groups.items()}


def _unpack(flats: dict[torch.dtype, torch.Tensor], like: list[torch.Tensor]) -> list[torch.Tensor]:
    """The inverse, in the shapes and dtypes and on the devices of ``like``."""
    places = dict.fromkeys(flats, 0)
    tensors = []
    for tensor in like:
        dtype = _summed_as(tensor.dtype)
        start = places[dtype]
        places[dtype] = start + tensor.numel()
        part = flats[dtype][start : start + tensor.numel()]
        tensors.append(part.view(tensor.shape).to(tensor.device, tensor.dtype))
    return tensors
