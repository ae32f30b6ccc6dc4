"""Which experts of a grid suit a sample: product keys and beam search.

An expert of a grid of ``n0 x n1 x ...`` has a score that is a sum of one number for each of its coordinates,
so ``n0 + n1 + ...`` numbers decide between ``n0 * n1 * ...`` experts (Lample et al. 2019; Riabinin and Gusev
2020). The best ones are found coordinate by coordinate, keeping the best ``k`` beginnings (beams)::

    scores   axis 0: [1, 4, 2]   axis 1: [0, 3, 5]
    beams    1, 2                1.2 (9)  2.2 (7)          k = 2

On a full grid that finds exactly the best ``k``: a beginning that is not among these has ``k`` better
ones, each of which goes on at least as well. Where some experts are missing, only beginnings of experts that
exist are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from hpcpar.errors import MismatchError

__all__ = ["ExpertGrid", "ProductKeyGate"]

_MOST_EXPERTS = 1 << 26


class ProductKeyGate(nn.Module):
    """Scores for each coordinate of a grid. Local.

    Parameters
    ----------
    in_features
        Length of the last axis of the input.
    grid
        Lengths of the grid's axes.
    """

    def __init__(self, in_features: int, grid: Sequence[int]) -> None:
        super().__init__()
        self.grid = tuple(grid)
        self.projection = nn.Linear(in_features, sum(self.grid))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """A tensor of (batch, length) for each axis; axes of ``x`` between first and last are averaged."""
        if x.ndim > 2:
            x = x.flatten(1, -2).mean(dim=1)
        with torch.autocast(x.device.type, enabled=False):
            scores = self.projection(x.to(self.projection.weight.dtype))
        return list(scores.split(self.grid, dim=-1))


class ExpertGrid:
    """The experts of a grid that exist. Local.

    Parameters
    ----------
    prefix
        Of their uids: that of the expert at (3, 5) is ``prefix.3.5``.
    grid
        Lengths of the axes.
    uids
        Of all experts that are served, of other grids too.

    Attributes
    ----------
    uids : tuple of str
        Of those that exist.

    Raises
    ------
    MismatchError
        When no expert of the grid is among them, or the grid is no grid.
    """

    def __init__(self, prefix: str, grid: Sequence[int], uids: Iterable[str]) -> None:
        self.prefix, self.grid = prefix, tuple(int(length) for length in grid)
        if not self.grid or min(self.grid) < 1 or math.prod(self.grid) > _MOST_EXPERTS:
            raise MismatchError(
                f"a grid must have axes of at least one expert and {_MOST_EXPERTS} in all, got {tuple(grid)}"
            )
        exists = torch.zeros(self.grid, dtype=torch.bool)
        places = [place for uid in uids if (place := self._place_of(uid)) is not None]
        if not places:
            shape = " x ".join(map(str, self.grid))
            raise MismatchError(
                f"a grid of {shape} experts must have one that is served as "
                f"'{prefix}{'.0' * len(self.grid)}' or the like, got none"
            )
        exists[tuple(torch.tensor(places).T)] = True
        self.uids = tuple(sorted({".".join((prefix, *map(str, place))) for place in places}))
        # Of each length of a beginning, flattened: does an expert begin like this?
        self._begun = [exists.flatten(axis + 1).any(-1).flatten() for axis in range(len(self.grid) - 1)]
        self._begun.append(exists.flatten())

    def uid(self, index: int) -> str:
        """The uid of the expert with a flat index. Local."""
        places = []
        for length in reversed(self.grid):
            index, place = divmod(index, length)
            places.append(str(place))
        return ".".join((self.prefix, *reversed(places)))

    def coordinates(self, indices: torch.Tensor) -> list[torch.Tensor]:
        """Coordinates of flat indices, a tensor of their shape for each axis. Local."""
        places = []
        for length in reversed(self.grid):
            places.append(indices % length)
            indices = indices // length
        return places[::-1]

    @property
    def count(self) -> int:
        """Number of experts that exist. Local."""
        return len(self.uids)

    @torch.no_grad()
    def best(self, scores: Sequence[torch.Tensor], k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts with the best sums of scores. Local.

        Parameters
        ----------
        scores
            For each axis, of shape (batch, length).
        k
            How many for each sample.

        Returns
        -------
        indices : torch.Tensor
            Flat, best first, int64 of shape (batch, at most k).
        exists : torch.Tensor
            Whether there are as many, bool of the same shape.
        """
        rows = scores[0].shape[0]
        beams = torch.zeros(rows, 1, dtype=torch.int64, device=scores[0].device)
        totals = torch.zeros(rows, 1, dtype=scores[0].dtype, device=scores[0].device)
        for begun, of_axis in zip(self._begun, scores, strict=True):
            length = of_axis.shape[1]
            steps = torch.arange(length, device=beams.device)
            candidates = (beams.unsqueeze(-1) * length + steps).flatten(1)
            sums = (totals.unsqueeze(-1) + of_axis.unsqueeze(1)).flatten(1)
            missing = ~begun.to(beams.device)[candidates]
            sums = torch.nan_to_num(sums, nan=torch.finfo(sums.dtype).min).masked_fill(missing, -torch.inf)
            totals, chosen = sums.topk(min(k, sums.shape[1]), dim=1)
            beams = candidates.gather(1, chosen)
        return beams, totals > -torch.inf

    def _place_of(self, uid: str) -> tuple[int, ...] | None:
        head, *words = uid.removeprefix(self.prefix).split(".")
        if not uid.startswith(self.prefix) or head or len(words) != len(self.grid):
            return None
        if not all(word.isdecimal() and str(int(word)) == word for word in words):
            return None
        place = tuple(map(int, words))
        return place if all(p < n for p, n in zip(place, self.grid, strict=True)) else None
