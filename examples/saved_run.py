"""A training run on disk, to go on with another number of ranks.

    <folder>/step-200/trunk.h5                      what all ranks have alike, and the number of steps
                      blocks.1.mlp.expert.0.h5      an expert, with its part of the optimizer's state
                      blocks.1.mlp.expert.1.h5 ...

`hpcpar.checkpoint.save_experts` writes what has a state under a name, each in a file of its own; what several
ranks have is written by the first of them and read by all. So the common part of the model is saved as if it
were one more expert, which lives everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import common
import hpcpar
from hpcpar.checkpoint import load_experts, save_experts
from hpcpar.comm import Communicator
from hpcpar.errors import CheckpointError

__all__ = ["reported", "resume_run", "save_run"]

TRUNK = "trunk"


class Trunk:
    """What all ranks have alike, and the number of steps."""

    def __init__(self, net: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        self.step = step
        self._shared = hpcpar.nn.shared_state(net, optimizer)

    def get_full_state(self) -> dict[str, Any]:
        """A copy of the state."""
        return {"step": self.step, **self._shared.get_full_state()}

    def load_full_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self._shared.load_full_state(state)
        self.step = state["step"]


def save_run(
    folder: Path, net: nn.Module, optimizer: torch.optim.Optimizer, step: int, comm: Communicator
) -> Path:
    """Write everything that the next step depends on. **Collective.** Returns the folder of this step."""
    target = folder / f"step-{step}"
    experts = hpcpar.nn.layer_experts(net, optimizer)
    with reported():
        save_experts(target, {TRUNK: Trunk(net, optimizer, step), **experts}, comm)
    return target


def resume_run(folder: Path, net: nn.Module, optimizer: torch.optim.Optimizer, comm: Communicator) -> int:
    """Read what `save_run` wrote, on any number of ranks. **Collective.** Returns the steps done so far."""
    trunk = Trunk(net, optimizer, 0)
    with reported():
        load_experts(folder, {TRUNK: trunk, **hpcpar.nn.layer_experts(net, optimizer)}, comm)
    return trunk.step


@contextmanager
def reported() -> Iterator[None]:
    """A file that cannot be written or read, or does not fit, is the user's to correct."""
    try:
        yield
    except CheckpointError as error:  # raised on all ranks
        raise common.UserError(str(error)) from error
