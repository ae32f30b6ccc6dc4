"""What an eight-bit wire has kept back of the gradients, as a part of the optimizer's state.

It is the total over all ranks, by parameter, and so fits any number of ranks (:mod:`hpcpar.comm.wire`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hpcpar.comm import view_slot
from hpcpar.optim.sharded.gradient_parts import GradientParts

__all__ = ["load_residuals", "residuals"]


def residuals(gradients: GradientParts) -> dict[int, torch.Tensor]:
    """Of each parameter, by its index; nothing unless gradients travel in eight bits. Collective."""
    if gradients.wire_dtype is not torch.int8:
        return {}
    flats = gradients.reducer.residuals()
    return {
        slot.index: view_slot(flats[bucket], slot, gradients.parameters[slot.index]).clone()
        for bucket, layout in enumerate(gradients.layouts)
        for slot in layout.slots
    }


def load_residuals(gradients: GradientParts, state: Mapping[int, torch.Tensor]) -> None:
    """Go on from what :func:`residuals` returned, with zero for parameters that it lacks. Local."""
    flats = [torch.zeros(layout.numel, dtype=layout.dtype) for layout in gradients.layouts]
    for bucket, layout in enumerate(gradients.layouts):
        for slot in layout.slots:
            if slot.index in state:
                view_slot(flats[bucket], slot, gradients.parameters[slot.index]).copy_(state[slot.index])
    gradients.reducer.load_residuals(flats)
