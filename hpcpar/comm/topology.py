"""Who shares my node, and how ranks form a grid.

Six ranks on three nodes; ``node`` joins the ranks that share memory, ``rail`` the ranks with one node-local
index, so that each column below is a rail::

              index 0   index 1
    node 0    rank 0    rank 1
    node 1    rank 2    rank 3
    node 2    rank 4    rank 5

An operation over all ranks becomes one at memory speed inside each node and one per rail across the
network, all rails at once. Nodes may have different numbers of ranks; then later rails have fewer.

``HPCPAR_RANKS_PER_NODE=k`` cuts every real node into pretended ones of *k* ranks, so that everything that
is meant for several nodes runs, and is tested, on one machine.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from hpcpar.comm.mpi import MPI
from hpcpar.errors import TopologyError

if TYPE_CHECKING:
    from mpi4py import MPI as MPITypes

    from hpcpar.comm.communicator import Communicator

__all__ = ["NodeMap", "ProcessGrid", "cores_per_rank"]


@dataclass(frozen=True)
class NodeMap:
    """Which node each rank of a communicator is on.

    ``nodes[r]`` is the node of rank *r*; nodes are numbered by their lowest rank.
    """

    nodes: tuple[int, ...]

    @classmethod
    def discover(cls, mpi: MPITypes.Intracomm) -> NodeMap:
        """Ask MPI which ranks share memory, and the environment for pretended nodes. Collective."""
        shared = mpi.Split_type(MPI.COMM_TYPE_SHARED, key=mpi.rank)
        leader = shared.bcast(mpi.rank, 0)
        local = shared.rank
        shared.Free()
        # The environment is checked only after everybody's answer is known, so that all ranks raise.
        answers = mpi.allgather((leader, local, os.environ.get("HPCPAR_RANKS_PER_NODE")))
        for rank, (_, _, text) in enumerate(answers):
            if text and not (text.isdecimal() and int(text) > 0):
                raise TopologyError(
                    f"HPCPAR_RANKS_PER_NODE must be a positive number of ranks, got {text!r} on rank {rank}"
                )
        keys = [(leader, local // int(text) if text else 0) for leader, local, text in answers]
        return cls(_number(keys))

    def restrict(self, ranks: Sequence[int]) -> NodeMap:
        """The map of a communicator of some of the ranks. Local."""
        return NodeMap(_number([self.nodes[rank] for rank in ranks]))

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return max(self.nodes) + 1

    def local_index(self, rank: int) -> int:
        """Number of ranks before ``rank`` on its node. Local."""
        return self.nodes[:rank].count(self.nodes[rank])

    def ranks_of(self, node: int) -> list[int]:
        """The ranks on ``node``, in order. Local."""
        return [rank for rank, other in enumerate(self.nodes) if other == node]

    @property
    def smallest_node(self) -> int:
        """Ranks on the node that has fewest."""
        return min(self.nodes.count(node) for node in range(self.num_nodes))

    @property
    def largest_node(self) -> int:
        """Ranks on the node that has most."""
        return max(self.nodes.count(node) for node in range(self.num_nodes))


def _number(keys: Sequence[object]) -> tuple[int, ...]:
    """Number equal keys equally, in order of first appearance."""
    numbers: dict[object, int] = {}
    return tuple(numbers.setdefault(key, len(numbers)) for key in keys)


class ProcessGrid:
    """Ranks as a grid with named axes, one communicator per axis.

    Parameters
    ----------
    comm
        The ranks to arrange. The grid does not own it.
    **axes
        Size of each axis; they must multiply to ``comm.size``, and one may be -1 for what is left. The last
        axis varies fastest, as in MPI's Cartesian grids: its ranks are neighbours, and so on one node where
        possible. Name last the axis with the most traffic. ``data``, ``pipeline`` and ``expert`` are always
        there; one that is not named is a communicator of this rank alone.

    Raises
    ------
    TopologyError
        When the sizes do not fit, on every rank.

    Examples
    --------
    >>> grid = ProcessGrid(hpcpar.comm.world(), data=2, pipeline=-1)
    >>> grid.pipeline.rank, grid.data.size, grid.shape

    Notes
    -----
    Collective, and so is ``free``.
    """

    def __init__(self, comm: Communicator, **axes: int) -> None:
        self.shape = _fill_in(axes, comm.size)
        self.coordinates: dict[str, int] = {}
        self._communicators: dict[str, Communicator] = {}
        stride = comm.size
        for name, length in self.shape.items():
            stride //= length
            self.coordinates[name] = comm.rank // stride % length
            # Ranks that differ in this coordinate only: subtract it to name the group.
            axis = comm.Split(comm.rank - self.coordinates[name] * stride, comm.rank)
            assert axis is not None  # our colors are never MPI.UNDEFINED
            self._communicators[name] = axis
        for name in {"data", "pipeline", "expert"} - set(self.shape):
            alone = comm.Split(comm.rank, 0)
            assert alone is not None
            self._communicators[name] = alone

    def __getattr__(self, name: str) -> Communicator:
        try:
            return self.__dict__["_communicators"][name]  # type: ignore[no-any-return]
        except KeyError:
            raise AttributeError(
                f"a process grid has the axes {', '.join(self.__dict__.get('shape', ()))}, not {name!r}"
            ) from None

    def free(self) -> None:
        """Free the communicators of the axes. Collective."""
        for communicator in self._communicators.values():
            communicator.Free()

    def __enter__(self) -> ProcessGrid:
        return self

    def __exit__(self, *exception: object) -> None:
        self.free()


def _fill_in(axes: dict[str, int], size: int) -> dict[str, int]:
    if not axes:
        raise TopologyError("a process grid must have at least one axis, got none")
    taken = [name for name in axes if name.startswith("_") or name in ("shape", "coordinates", "free")]
    if taken:
        raise TopologyError(
            f"the axes of a process grid must not be named as its attributes, got {taken[0]!r}"
        )
    unknown = [name for name, length in axes.items() if length == -1]
    known = prod(length for length in axes.values() if length != -1)
    wrong = [name for name, length in axes.items() if length != -1 and length < 1]
    if wrong or len(unknown) > 1:
        raise TopologyError(f"the axes of a process grid must be positive, one may be -1, got {axes}")
    shape = {name: size // known if length == -1 else length for name, length in axes.items()}
    if prod(shape.values()) != size:
        raise TopologyError(f"the axes of a process grid must multiply to {size} ranks, got {axes}")
    return shape


def cores_per_rank(mpi: MPITypes.Intracomm) -> int:
    """Cores this rank may use, divided by the ranks of its machine that share them; at least 1.

    Collective.
    """
    shared = mpi.Split_type(MPI.COMM_TYPE_SHARED, key=mpi.rank)
    mine = os.sched_getaffinity(0)
    everyone = shared.allgather(mine)
    shared.Free()
    sharers = sum(1 for other in everyone if other & mine)
    return max(1, len(mine) // sharers)
