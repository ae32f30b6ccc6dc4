"""How many rows each expert got in each step: counted while training, written as numbers and as a heat map.

    expert 0   ▓▓▒▒▒▒▒▒▒
    expert 1   ░░░▒▒▒▒▒▒     a row per expert, a column per step; the colour is the load, where 1 is an
    expert 2   ░▒▒▒▒▒▒▒▒     even share of the layer's rows
               step ->

An expert that stays dark is not trained, and one that stays bright makes its rank the slowest. Balancing
losses are there to even that out, and here one sees whether they do.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import reporting
from hpcpar.comm import MPI, Communicator

__all__ = ["ExpertLoad", "write_expert_load"]


class ExpertLoad:
    """Rows of each expert in each layer and step.

    Parameters
    ----------
    layers : names of the layers.
    experts : how many experts each of them has.
    """

    def __init__(self, layers: list[str], experts: int) -> None:
        self.layers = layers
        self._current = torch.zeros(len(layers), experts, dtype=torch.int64)
        self._steps: list[torch.Tensor] = []

    def add(self, layer: int, rows: torch.Tensor) -> None:
        """Some more rows of the current step: int64 of shape (experts,). A step may have several forwards."""
        self._current[layer] += rows

    def end_step(self) -> None:
        """The step is over."""
        self._steps.append(self._current.clone())
        self._current.zero_()

    def table(self, comm: Communicator, op: MPI.Op) -> torch.Tensor:
        """All steps, int64 of shape (layers, experts, steps), combined over ranks by `op`. **Collective.**

        All ranks must have counted equally many steps.
        """
        mine = torch.stack([*self._steps, self._current])[:-1]  # the last so that there is one to stack
        total = torch.empty_like(mine)
        comm.Allreduce(mine, total, op)
        return total.permute(1, 2, 0)


def write_expert_load(
    folder: Path, layers: list[str], table: torch.Tensor, first_step: int, draw: bool
) -> list[Path]:
    """Write ``expert_load.npz`` and, if wanted, ``expert_load.png``. For rank 0. Returns what was written.

    The arrays in the file are ``rows`` (layers, experts, steps), ``layers`` (names) and ``first_step``.
    """
    rows = table.numpy()
    numbers = folder / "expert_load.npz"
    np.savez(numbers, rows=rows, layers=np.array(layers), first_step=first_step)
    if not draw:
        return [numbers]
    even_share = np.maximum(rows.sum(axis=1, keepdims=True), 1) / rows.shape[1]
    groups = dict(zip(layers, rows / even_share, strict=True))
    labels = ("step", "expert", "load, 1: an even share")
    picture = reporting.draw_heat_map(folder / "expert_load.png", groups, first_step + 1, labels)
    return [numbers] if picture is None else [numbers, picture]
