"""Sums over some of the ranks of a communicator, chosen anew each time, without making another communicator.

MPI's collectives need all ranks of a communicator, and to make one for the ranks that happen to be there
would itself be collective. An :class:`~hpcpar.comm.ordered_reduction.OrderedReduction` consists of messages
between two ranks each, so it can be had among any ranks that agree on who they are::

    members 0, 2 of ranks 0 ... 3        0: [a0|a1]  <-- a1, c0 -->  2: [c0|c1]
                                         0: a0+c0    <-- sums   -->  2: a1+c1

Invariant: sums follow each other in one order on every rank that takes part in them. Messages of one sender,
receiver and tag keep their order, so the messages of two sums cannot be mixed up, whoever else took part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from hpcpar.comm.mpi import MPI
from hpcpar.comm.ordered_reduction import OrderedReduction, combine_in_order, slice_bounds
from hpcpar.comm.progress import ENGINE, Patience
from hpcpar.comm.request import Request, wait_all

if TYPE_CHECKING:
    from mpi4py import MPI as MPITypes

    from hpcpar.comm.communicator import Communicator

__all__ = ["MemberReduction"]


class MemberReduction:
    """Sums flat tensors over some ranks of a communicator. Collective to make and to free.

    Parameters
    ----------
    comm
        The ranks from which members are chosen.
    name
        For error messages.
    """

    def __init__(self, comm: Communicator, name: str) -> None:
        self._comm, self._name = comm, name
        self._mpi: MPITypes.Intracomm = comm.mpi.Dup()
        self._requests: list[Request] = []

    def start(self, flats: Sequence[torch.Tensor], members: Sequence[int]) -> None:
        """Replace each flat tensor by its sum over the members. Collective among these; does not wait.

        Parameters
        ----------
        flats
            Of any dtype, flat, contiguous, on the host or not; alike on all members.
        members
            Ranks in ascending order, the same on each of them, this one included.
        """
        self._requests = [self._start_one(flat, members, tag) for tag, flat in enumerate(flats)]

    def is_done(self) -> bool:
        """Whether all sums are there. Local."""
        self._requests = [request for request in self._requests if not request.advance()]
        return not self._requests

    def wait(self) -> None:
        """Wait for all sums. Collective among the members.

        Raises
        ------
        StalledError
            At the deadline, naming the members.
        """
        wait_all(self._requests)

    def give_up(self) -> None:
        """Leave sums unfinished, since a member has failed. Local."""
        for request in self._requests:
            if isinstance(request, OrderedReduction):
                ENGINE.discard(request)
        self._requests = []

    def free(self) -> None:
        """Give the communicator back, when nothing is under way. Collective."""
        self._mpi.Free()

    def _start_one(self, flat: torch.Tensor, members: Sequence[int], tag: int) -> Request:
        host = flat if flat.device.type == "cpu" else flat.cpu()
        bounds = slice_bounds(host.numel(), len(members))
        others = [rank for rank in members if rank != self._comm.rank]

        def patience(operation: str, timeout_s: float | None) -> Patience:
            where = self._comm._where
            return Patience(operation, missing=lambda: others, where=where, timeout_s=timeout_s)

        def combine(rows: torch.Tensor) -> list[torch.Tensor | None]:
            return [combine_in_order(rows, MPI.SUM)] * len(members)

        def deliver() -> None:
            if host is not flat:
                flat.copy_(host)

        return OrderedReduction(
            f"{self._name} among ranks {list(members)}",
            patience,
            self._mpi,
            tag,
            send=host,
            bounds=bounds,
            combine=combine,
            receive=[host[start:end] for start, end in bounds],
            deliver=deliver,
            limit=self._comm._count_limit,
            members=members,
        )
