"""The communicator: torch tensors over MPI, with mpi4py's own methods.

Upper-case methods take tensors (every dtype, stride and device) and numpy arrays, lower-case ones Python
objects. All waits have a deadline. The methods live in :mod:`~hpcpar.comm.point_to_point`,
:mod:`~hpcpar.comm.transfers`, :mod:`~hpcpar.comm.reductions` and :mod:`~hpcpar.comm.objects`; this file is
about what a communicator *is*: who made it, who is in it, which nodes it spans, and who frees it.

Invariant: a communicator frees exactly the MPI communicators that it made. It never sends on
``MPI.COMM_WORLD`` itself; :func:`world` works on a duplicate.
"""

from __future__ import annotations

import functools
import os
from types import TracebackType
from typing import TYPE_CHECKING, cast

import torch

from hpcpar.comm.buffers import COUNT_LIMIT
from hpcpar.comm.mpi import MPI
from hpcpar.comm.objects import ObjectMessages
from hpcpar.comm.request import wait_all
from hpcpar.comm.topology import NodeMap, cores_per_rank
from hpcpar.comm.watchdog import install_exception_hook, install_exit_hook, wait_for_readers
from hpcpar.logs import configure_by_default

if TYPE_CHECKING:
    from mpi4py import MPI as MPITypes

__all__ = ["Communicator", "world"]


class Communicator(ObjectMessages):
    """Ranks that exchange tensors. Collective to make, like everything that makes communicators.

    Parameters
    ----------
    mpi_comm
        An mpi4py intracommunicator. It stays the caller's: ``Free`` does not free it, and messages of the
        caller on it must not match those sent through this object.
    count_limit
        Largest count passed to MPI, in elements; larger blocks are chunked. Smaller values are for tests.

    Attributes
    ----------
    rank, size : int
        Number of this rank, number of ranks.
    node, rail : Communicator
        The ranks that share memory with this one; the ranks with its node-local index, one per node.
    num_nodes, node_rank : int
        Number of nodes, and which of them this rank is on (its index *inside* the node is ``node.rank``).
    mpi : mpi4py.MPI.Intracomm
        The wrapped communicator.
    """

    def __init__(self, mpi_comm: MPITypes.Intracomm, *, count_limit: int = COUNT_LIMIT) -> None:
        _check_intracommunicator(mpi_comm)
        self._assemble(mpi_comm, None, owned=False, count_limit=count_limit)

    def _assemble(
        self, mpi: MPITypes.Intracomm, node_map: NodeMap | None, *, owned: bool, count_limit: int
    ) -> None:
        self._map = NodeMap.discover(mpi) if node_map is None else node_map
        control = mpi.Dup() if mpi.Get_size() > 1 else None
        super().__init__(mpi, control, count_limit)
        self._owned = owned
        self.num_nodes: int = self._map.num_nodes
        self.node_rank: int = self._map.nodes[self.rank]
        local = self._map.local_index(self.rank)
        self._node: Communicator | None = None
        self._rail: Communicator | None = None
        # Ranks of one node are their own node, ranks on different nodes their own rail: no recursion.
        if self.num_nodes > 1:
            self._node = self._part(self.node_rank, self._map.ranks_of(self.node_rank))
        if self.num_nodes != self.size:
            members = [r for r in range(self.size) if self._map.local_index(r) == local]
            members.sort(key=self._map.nodes.__getitem__)
            self._rail = self._part(local, members)

    def _part(self, color: int, members: list[int]) -> Communicator:
        """The communicator of ``members`` in their order, with this rank among them. Collective."""
        part = _intra(self.mpi.Split(color, members.index(self.rank)))
        return self._derive(part, self._map.restrict(members))

    def _derive(self, mpi: MPITypes.Intracomm, node_map: NodeMap) -> Communicator:
        derived = Communicator.__new__(Communicator)
        derived._assemble(mpi, node_map, owned=True, count_limit=self._count_limit)
        return derived

    @property
    def node(self) -> Communicator:
        """The ranks that share memory with this one, itself included. Local."""
        self.mpi  # noqa: B018  raises when freed
        return self if self._node is None else self._node

    @property
    def rail(self) -> Communicator:
        """The ranks with this rank's node-local index, in the order of their nodes. Local."""
        self.mpi  # noqa: B018
        return self if self._rail is None else self._rail

    def skip_checks(self) -> None:
        """Leave out the comparisons of ``HPCPAR_DEBUG`` here, in node and rail. Local.

        For code whose collectives keep their order by construction and must never wait when they start.
        """
        for communicator in {self, self.node, self.rail}:
            communicator._checked = False

    @property
    def node_map(self) -> NodeMap:
        """Which node each rank is on. Local."""
        return self._map

    def Split(self, color: int = 0, key: int = 0) -> Communicator | None:
        """One communicator per color, ranks ordered by key; ``None`` for ``MPI.UNDEFINED``. Collective."""
        self._enter("Split")
        self._meet("Split")
        part = self.mpi.Split(color, key)
        if part == MPI.COMM_NULL:
            return None
        mine, ours = part.Get_group(), self.mpi.Get_group()
        members = list(MPI.Group.Translate_ranks(mine, list(range(part.size)), ours))
        for group in (mine, ours):
            group.Free()
        return self._derive(_intra(part), self._map.restrict(members))

    def Dup(self) -> Communicator:
        """The same ranks with message spaces of their own. Collective."""
        self._enter("Dup")
        self._meet("Dup")
        return self._derive(_intra(self.mpi.Dup()), self._map)

    def Free(self) -> None:
        """Free what this object made; afterwards it raises on every use. A second call is fine. Collective.

        Operations that are still under way are left to MPI; only ordered reductions, which have stages to go
        that need the communicator, are waited for.
        """
        if self._handle is None:
            return
        wait_all(self._staged)
        if self._roll_call is not None:
            self._enter("Free")
            self._meet("Free")
            self._roll_call.close()
        for part in (self._node, self._rail):
            if part is not None:
                part.Free()
        if self._control_handle is not None:
            self._control_handle.Free()
        if self._owned:
            self._handle.Free()
        self._handle = self._control_handle = self._roll_call = None

    free = Free

    @property
    def is_freed(self) -> bool:
        """Whether ``Free`` was called. Local."""
        return self._handle is None

    def abort(self, code: int = 1) -> None:
        """End every process of the job, when the launcher has taken what was reported. Local."""
        wait_for_readers()
        self.mpi.Abort(code)

    def __enter__(self) -> Communicator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error other ranks may never come to free theirs; leave it to the end of the process.
        if error is None:
            self.Free()

    def __repr__(self) -> str:
        if self._handle is None:
            return f"<Communicator freed, was rank {self._rank} of {self._size}>"
        return f"<Communicator rank {self._rank} of {self._size}, node {self.node_rank} of {self.num_nodes}>"

    def __deepcopy__(self, memo: object) -> Communicator:
        return self  # a copy of a model trains over the same ranks

    def __reduce__(self) -> str:
        raise TypeError("a communicator must not be pickled: it belongs to this process and job")


def _check_intracommunicator(mpi: object) -> None:
    if not isinstance(mpi, MPI.Intracomm) or mpi == MPI.COMM_NULL:
        raise TypeError(f"mpi_comm must be an mpi4py intracommunicator, got {mpi!r}")


def _intra(mpi: MPITypes.Comm) -> MPITypes.Intracomm:
    return cast("MPITypes.Intracomm", mpi)


def world() -> Communicator:
    """All ranks of the job, on a duplicate of ``MPI.COMM_WORLD``. Collective on first use, then Local.

    The first call starts MPI if need be, checks that launcher and library belong together, sets torch's
    number of threads to this rank's share of the cores it may use (unless ``OMP_NUM_THREADS`` is set), makes
    an uncaught exception on any rank end the job (:mod:`hpcpar.comm.watchdog`), and lets log records show
    their rank (:mod:`hpcpar.logs`).

    Raises
    ------
    LauncherError
        When the job was started by the launcher of another MPI.
    """
    communicator = _world()
    if communicator.is_freed:
        _world.cache_clear()
        communicator = _world()
    return communicator


@functools.cache
def _world() -> Communicator:
    mpi = MPI.COMM_WORLD.Dup()
    communicator = Communicator.__new__(Communicator)
    communicator._assemble(mpi, None, owned=True, count_limit=COUNT_LIMIT)
    threads = cores_per_rank(mpi)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    install_exception_hook(communicator.rank, communicator.size)
    install_exit_hook(mpi)
    configure_by_default(communicator.rank, communicator.size)
    return communicator
