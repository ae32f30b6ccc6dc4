"""The experts of one rank, as a module: calling them, and keeping replicas of them equal.

For a wrapper such as :class:`~hpcpar.nn.DataParallel` this is the module whose gradients are its own business
(:mod:`hpcpar.nn.own_gradients`): other ranks have other experts.

Invariant: every backward of the layer gives each parameter a gradient, if only of zeros. So hooks run and
replicas are reduced on every rank, whatever the routing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from hpcpar.comm import MPI
from hpcpar.errors import MismatchError
from hpcpar.nn.experts.dispatch import without_rows
from hpcpar.nn.experts.exchange import Exchange
from hpcpar.nn.experts.placement import Placement
from hpcpar.nn.experts.replica_gradients import ReplicaGradients
from hpcpar.nn.reduction_options import ReductionOptions

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["LocalExperts"]


@dataclass(frozen=True)
class _Sharing:
    """Over which ranks replicas of experts are kept equal."""

    comm: Communicator
    average: bool
    options: ReductionOptions


class LocalExperts(nn.ModuleDict):
    """Experts under their global numbers. Collective to make and to ``free``.

    Parameters
    ----------
    experts
        Modules by number.
    placement
        Where all experts live.
    exchange
        Of the layer.
    """

    def __init__(self, experts: Mapping[str, nn.Module], placement: Placement, exchange: Exchange) -> None:
        super().__init__(experts)
        self._placement = placement
        self._exchange = exchange
        self._synchronize = True
        self._sharing: _Sharing | None = None
        self._replicas: ReplicaGradients | None = None
        self.keep_gradients()

    @property
    def scales(self) -> torch.Tensor | None:
        """Factors for gradients that enter the experts of each rank; ``None``: all one. Local."""
        return None if self._replicas is None else self._replicas.scales

    def answer(self, rows: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """Call each expert once, on its rows, shape (rows, features); none on no rows. Local.

        Raises
        ------
        MismatchError
            When what an expert returns is not a matrix of floating numbers with as many rows.
        """
        return [
            _called(expert, part) if len(part) else None
            for expert, part in zip(self.values(), rows, strict=True)
        ]

    def complete(self, answers: Sequence[torch.Tensor | None], empty: torch.Tensor) -> list[torch.Tensor]:
        """Put ``empty``, shape (0, features), where there is no answer. Local."""
        return [
            without_rows(empty, list(expert.parameters())) if answer is None else answer
            for expert, answer in zip(self.values(), answers, strict=True)
        ]

    def own_parameters(self) -> list[nn.Parameter]:
        """Those of this rank's experts, which other ranks have not. Local."""
        return list(self.parameters())

    def own_buffers(self) -> list[torch.Tensor]:
        """Those of this rank's experts. Local."""
        return list(self.buffers())

    def share_gradients(self, comm: Communicator, *, average: bool, options: ReductionOptions) -> None:
        """Keep experts equal on all ranks of ``comm`` that have the same ones. Collective over ``comm``.

        Parameters
        ----------
        comm
            All ranks of this layer, and perhaps of others like it, which hold replicas of its experts. The
            values of the first rank of each group are broadcast in it.
        average
            Whether the gradients of experts are those of the mean over the ranks of ``comm`` of their losses;
            else those of the sum.
        options
            How gradients are reduced.

        Raises
        ------
        MismatchError
            On every rank, when ``comm`` lacks ranks of the layer, or has layers that are not alike.
        """
        self._sharing = _Sharing(comm, average, options)
        self.prepare(renew=True)

    def keep_gradients(self) -> None:
        """Give experts the gradient of the sum over the layer's own ranks, as at the start. Collective.

        After a failure, or when the layer is freed, nothing is reduced any more: Local.
        """
        if self._exchange.has_failed or self._exchange.comm.is_freed:
            self.give_up()
            self._replicas = self._sharing = None
            return
        options = ReductionOptions(
            bucket_mb=None, blocking=False, wire_dtype=None, transport="auto", progress="hooks"
        )
        self._sharing = (
            _Sharing(self._exchange.comm, False, options) if self._placement.has_replicas else None
        )
        self.prepare(renew=True)

    @property
    def synchronize(self) -> bool:
        """Whether the next backward reduces the gradients of replicas, or accumulates them here. Local."""
        return self._synchronize

    @synchronize.setter
    def synchronize(self, value: bool) -> None:
        self._synchronize = value
        if self._replicas is not None:
            self._replicas.set_synchronize(value)

    def reduce_now(self) -> None:
        """Reduce the gradients that have accumulated without synchronisation. Collective."""
        if self._replicas is not None:
            self._replicas.reduce_now()

    def give_up(self) -> None:
        """Leave a reduction unfinished, since another rank has failed. Local."""
        if self._replicas is not None:
            self._replicas.give_up()

    def watch(self, outputs: object) -> None:
        """Notice when backward reaches ``outputs``, of the layer or of a whole model. Local."""
        if self._replicas is not None:
            self._replicas.watch(outputs)

    def gradient_norm(self, norm_type: float) -> float:
        """Norm of the gradients of all experts of the layer, each expert counted once. Collective.

        Parameters
        ----------
        norm_type
            Order of the norm; may be infinite.
        """
        ranks = self._exchange.comm
        counted = [
            parameter.grad
            for number, expert in self.items()
            if self._placement.ranks_of(int(number))[0] == ranks.rank
            for parameter in expert.parameters()
            if parameter.grad is not None
        ]
        norm = torch.zeros(1, dtype=torch.float64)
        if counted:
            norm[0] = torch.nn.utils.get_total_norm(counted, norm_type).double()
        norms = torch.zeros(ranks.size, dtype=torch.float64)
        with self._exchange.armed():
            ranks.Allgather(norm, norms)
        return float(torch.linalg.vector_norm(norms, norm_type))

    def free(self) -> None:
        """Give communicators and memory of the replicas back; Local after a failure, else Collective."""
        if self._replicas is not None and self._exchange.has_failed:
            self._replicas.give_up()
        elif self._replicas is not None:
            self._replicas.free()
        self._replicas = self._sharing = None

    def summed_over_layers(self, counts: torch.Tensor) -> torch.Tensor:
        """Counts of this layer, the same on all of its ranks, and of others that share its experts, added up.

        As often as a layer has ranks. Collective over the ranks that share gradients.
        """
        sharing = self._sharing
        if sharing is None or sharing.comm.size == self._exchange.comm.size:
            return counts
        total = counts.clone()
        sharing.comm.Allreduce(MPI.IN_PLACE, total)
        return total

    def prepare(self, *, renew: bool = False) -> None:
        """Make the reduction of replicas where it is missing, or does not fit any more. Collective then.

        It is missing in a copy, whose first forward in training makes it on all ranks together.
        """
        if renew and self._replicas is not None:
            self._replicas.free()
            self._replicas = None
        if self._sharing is None:
            return
        if self._replicas is not None:
            self._replicas.refresh()
            return
        self._replicas = ReplicaGradients(
            self,
            self._placement,
            self._exchange.comm,
            self._sharing.comm,
            average=self._sharing.average,
            options=self._sharing.options,
        )
        self._replicas.set_synchronize(self._synchronize)


def _called(expert: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    output = expert(rows)
    if not isinstance(output, torch.Tensor) or output.dim() != 2 or len(output) != len(rows):
        got = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise MismatchError(
            f"an expert must return a tensor with a row for each of its {len(rows)} rows, got {got}"
        )
    if not output.is_floating_point():
        raise MismatchError(f"an expert must return floating numbers, got {output.dtype}")
    return output
