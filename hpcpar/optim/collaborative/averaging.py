"""Averaging: one round's sums, over all ranks or over those that came.

All ranks together use the :class:`~hpcpar.comm.Reducer` (shared memory inside a node). When some are missing,
the members sum the same buckets by messages among themselves; the reducer is left alone then, so that its
steps stay in number the same on every rank. The tail travels with the buckets in both cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from hpcpar.comm import MemberReduction, Reducer, threads_allowed

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["Averaging"]

_NAME = "averaging round"


class Averaging:
    """Sums the buckets of a reducer over the members of a round. Collective to make and to free.

    Parameters
    ----------
    comm
        All ranks.
    reducer
        Over the same ranks.
    behind
        Whether rounds run behind the program's own work, which a thread helps where MPI allows it.
    """

    def __init__(self, comm: Communicator, reducer: Reducer, *, behind: bool) -> None:
        self._size = comm.size
        self._reducer = reducer
        self._among = MemberReduction(comm, _NAME)
        self._is_full = True
        reducer.use_progress_thread(behind and threads_allowed())

    def start(self, members: Sequence[int]) -> None:
        """Begin to sum the buckets, which are filled. Collective among the members; does not wait."""
        self._is_full = len(members) == self._size
        if not self._is_full:
            self._among.start(self._reducer.flats, members)
            return
        self._reducer.begin(average=False)
        for bucket in range(len(self._reducer.flats)):
            self._reducer.publish(bucket)

    def is_done(self) -> bool:
        """Whether the sums are there; :meth:`wait` does not wait then. Local."""
        if not self._is_full:
            return self._among.is_done()
        self._reducer.progress()
        return self._reducer.is_idle

    def wait(self) -> None:
        """Wait for the sums. Collective among the members.

        Raises
        ------
        StalledError
            At the deadline, naming ranks that are late.
        RankFailedError
            When one has died.
        """
        if self._is_full:
            self._reducer.wait_all()
        else:
            self._among.wait()

    @property
    def buckets(self) -> list[torch.Tensor]:
        """The flat tensors that are summed. Local."""
        return self._reducer.flats

    def residuals(self) -> list[torch.Tensor]:
        """What an eight-bit wire has kept back of each bucket, over all ranks. Collective, between rounds."""
        return self._reducer.residuals()

    def load_residuals(self, flats: Sequence[torch.Tensor]) -> None:
        """Go on from that. All ranks must, between rounds. Local."""
        self._reducer.load_residuals(flats)

    def give_up(self) -> None:
        """Leave what is under way, since another rank has failed. Local."""
        self._reducer.use_progress_thread(False)
        self._reducer.give_up()
        self._among.give_up()

    def free(self) -> None:
        """Give the communicators back. Collective."""
        self._reducer.free()
        self._among.free()
