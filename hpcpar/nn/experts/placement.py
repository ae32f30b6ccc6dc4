"""Which ranks hold which experts, and how a sender divides its rows among them.

With at least as many experts as ranks, each rank holds a contiguous block. With more ranks than experts, each
rank holds one expert, of which there are replicas then::

    8 experts, 3 ranks             3 experts, 8 ranks
    rank 0   0 1                   rank   0 1 2   3 4 5   6 7
    rank 1   2 3 4                 expert   0       1      2
    rank 2   5 6 7

A *place* is a pair of an expert and a rank that holds it. Invariant: places in the order of their ranks are
in the order of their experts too. So rows that are sorted by expert and cut among the places of each expert
are sorted by rank, and can be sent as they lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

__all__ = ["Placement"]


@dataclass(frozen=True)
class Placement:
    """Where ``num_experts`` live on ``num_ranks``. Everything here is Local."""

    num_experts: int
    num_ranks: int

    def experts_of(self, rank: int) -> range:
        """The experts that ``rank`` holds."""
        first = rank * self.num_experts // self.num_ranks
        if self.num_experts < self.num_ranks:
            return range(first, first + 1)
        return range(first, (rank + 1) * self.num_experts // self.num_ranks)

    def ranks_of(self, expert: int) -> list[int]:
        """The ranks that hold ``expert``; more than one where it has replicas."""
        return [rank for rank in range(self.num_ranks) if expert in self.experts_of(rank)]

    @property
    def has_replicas(self) -> bool:
        """Whether some expert lives on several ranks."""
        return self.num_ranks > self.num_experts

    @cached_property
    def places(self) -> tuple[tuple[int, int], ...]:
        """Pairs of expert and rank, in the order of both."""
        return tuple((e, rank) for rank in range(self.num_ranks) for e in self.experts_of(rank))

    @cached_property
    def most_experts(self) -> int:
        """The largest number of experts on a rank."""
        return max(len(self.experts_of(rank)) for rank in range(self.num_ranks))

    def divide(self, rows_per_expert: torch.Tensor, sender: int) -> torch.Tensor:
        """How many rows a sender has for each expert of each rank.

        An expert's rows are cut evenly among its places. The places that get one row more depend on the
        sender, so that the remainders of all senders spread.

        Parameters
        ----------
        rows_per_expert
            Shape (num_experts,), int64, on the host.
        sender
            The rank that has these rows.

        Returns
        -------
        torch.Tensor
            Shape (num_ranks, most_experts), int64; column *l* is for the *l*-th expert of the rank, and zero
            where it has no such expert.
        """
        experts, indices, counts, ranks, columns = self._columns
        rows = rows_per_expert[experts]
        surplus = (indices - sender) % counts < rows % counts
        table = rows.new_zeros(self.num_ranks, self.most_experts)
        table[ranks, columns] = rows // counts + surplus
        return table

    @cached_property
    def _columns(self) -> tuple[torch.Tensor, ...]:
        """For each place: its expert, its number among the expert's, how many these are, rank, column."""
        experts, ranks = torch.tensor(self.places).unbind(1)
        counts = torch.bincount(experts, minlength=self.num_experts)
        firsts = counts.cumsum(0) - counts
        indices = torch.arange(len(experts)) - firsts[experts]
        columns = experts - torch.tensor([self.experts_of(int(rank)).start for rank in ranks])
        return experts, indices, counts[experts], ranks, columns
