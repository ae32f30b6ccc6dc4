"""Gradients of experts that live on several ranks, and the scale that makes them what the caller wants.

::

    DataParallel over 4 ranks, each pair a layer of its own        3 experts on 4 ranks

    rank 0  e0 e1 --+                                              rank 0  e0 --+ sum
    rank 1  e2 e3 --|--+                                           rank 1  e0 --+
    rank 2  e0 e1 --+  | sum                                       rank 2  e1
    rank 3  e2 e3 -----+                                           rank 3  e2

The chain rule gives each replica the gradient of the sum of the losses whose tokens it had. The sum over the
replicas is that of all losses, in which every rank takes part in every backward, with zeros if it must. It is
taken as a mean of what the layer has multiplied by the number of replicas where gradients enter its experts:
a mean leaves alone what is the same on all replicas already, which gradients of earlier backwards are. For
the mean of the losses of *n* ranks the layer divides by *n* there.

Invariant: experts of all ranks of a group start with the same values, and stay equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from hpcpar.comm import MPI, broadcast_packed
from hpcpar.comm.agreement import agree
from hpcpar.errors import MismatchError
from hpcpar.nn.experts.placement import Placement
from hpcpar.nn.gradient_reduction import GradientReduction
from hpcpar.nn.reduction_options import ReductionOptions
from hpcpar.nn.sparse_gradients import sparse_parameters

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["ReplicaGradients"]


class ReplicaGradients:
    """Reduces the gradients of this rank's experts over the ranks that have the same ones.

    Parameters
    ----------
    experts
        Those of this rank.
    placement, ranks
        Of the layer.
    comm
        All ranks that have experts of such layers, those of the layer among them.
    average
        Whether gradients are to be those of the mean over the ranks of ``comm``.
    options
        How they are reduced.

    Attributes
    ----------
    scales : torch.Tensor or None
        By which the layer multiplies the gradients that enter the experts of each of its ranks, shape
        (ranks,), float64; ``None`` if by one.

    Raises
    ------
    MismatchError
        On every rank of ``comm``, when the layers on it are not placed alike.

    Notes
    -----
    Collective over ``comm`` to make, over the replicas to free.
    """

    def __init__(
        self,
        experts: nn.Module,
        placement: Placement,
        ranks: Communicator,
        comm: Communicator,
        *,
        average: bool,
        options: ReductionOptions,
    ) -> None:
        self._experts = experts
        self._options = options
        self._reduction: GradientReduction | None = None
        agree([comm], "sharing of gradients of experts", lambda: _check_inside(ranks, comm))
        placements = comm.allgather((placement.num_experts, placement.num_ranks))
        if len(set(placements)) > 1:
            raise MismatchError(
                "layers of experts whose gradients are shared must be alike, got numbers of experts and "
                f"ranks {sorted(set(placements))}"
            )
        block = placement.experts_of(ranks.rank).start
        group = comm.Split(block, comm.rank)
        assert group is not None
        self._group = group
        scales = ranks.allgather(group.size / (comm.size if average else 1))
        self.scales = None if set(scales) == {1.0} else torch.tensor(scales, dtype=torch.float64)
        broadcast_packed([*experts.parameters(), *experts.buffers()], group, 0)
        self._open()

    def refresh(self) -> None:
        """Notice parameters that were frozen, unfrozen or converted since. Local, Collective if some were."""
        if self._fitting != self._facts():
            self._close()
            self._open()

    def set_synchronize(self, synchronize: bool) -> None:
        """Whether the next backward reduces. Local."""
        if self._reduction is not None:
            self._reduction.synchronize = synchronize

    def reduce_now(self) -> None:
        """Reduce the gradients that have accumulated without synchronisation. Collective."""
        if self._reduction is not None:
            self._reduction.ends_with_backward = False  # there is none
            self._reduction.finish()
            self._reduction.ends_with_backward = True

    def give_up(self) -> None:
        """Leave a reduction unfinished, since another rank has failed. Local."""
        if self._reduction is not None:
            self._reduction.give_up()

    def watch(self, outputs: object) -> None:
        """Notice when backward reaches ``outputs``. Local."""
        if self._reduction is not None:
            self._reduction.watch(outputs)

    def free(self) -> None:
        """Give memory and communicators back. Collective."""
        self._close()
        self._group.Free()

    def __deepcopy__(self, memo: object) -> None:
        return None  # a copy of the experts makes its own, on all ranks together

    def _open(self) -> None:
        self._fitting = self._facts()
        if self._group.size == 1 or not any(p.requires_grad for p in self._experts.parameters()):
            return
        self._reduction = GradientReduction(
            [(name, p) for name, p in self._experts.named_parameters() if p.requires_grad],
            sparse_parameters(self._experts),
            lambda: dict(self._experts.named_buffers()),
            self._group,
            self._options,
        )
        self._reduction.after_end = self._synchronize_buffers

    def _facts(self) -> list[object]:
        return [(p.requires_grad, p.dtype, p.device) for p in self._experts.parameters()]

    def _close(self) -> None:
        if self._reduction is not None:
            self._reduction.free()
        self._reduction = None

    def _synchronize_buffers(self, changed: Sequence[str]) -> None:
        """Copy the buffers that changed from the first replica."""
        assert self._reduction is not None
        if changed:
            buffers = dict(self._experts.named_buffers())
            broadcast_packed([buffers[name] for name in changed], self._reduction.reducer.comm, 0)


def _check_inside(ranks: Communicator, comm: Communicator) -> None:
    mine, all_ranks = ranks.mpi.Get_group(), comm.mpi.Get_group()
    found = MPI.Group.Translate_ranks(mine, list(range(mine.size)), all_ranks)
    mine.Free()
    all_ranks.Free()
    missing = [rank for rank, place in enumerate(found) if place == MPI.UNDEFINED]
    if missing:
        raise MismatchError(
            "the ranks that share gradients must include all ranks of a layer of experts, got a "
            f"communicator without ranks {missing} of the layer. Make the layer over a part of the "
            "data-parallel ranks"
        )
