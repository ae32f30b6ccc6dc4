"""What an eight-bit wire has kept back of the gradients, as a state to save beside the model's.

The reducer keeps residuals by bucket (:mod:`hpcpar.comm.wire`). Buckets depend on options and on what is
frozen, parameters do not; so the state goes by the names of the parameters, in their shapes. It is the total
over all ranks, in units of the mean gradient, and therefore fits any number of ranks, nodes and buckets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from hpcpar.comm import view_slot
from hpcpar.errors import MismatchError
from hpcpar.nn.gradient_reduction import GradientReduction

__all__ = ["load_residual_state", "residual_state"]


def residual_state(module: nn.Module, gradients: GradientReduction | None) -> dict[str, torch.Tensor]:
    """The residuals of all parameters whose gradients are reduced in eight bits, on the host. Collective.

    Parameters
    ----------
    module
        Has the names.
    gradients
        Idle; ``None`` where there is nobody to reduce with.
    """
    if gradients is None or gradients.wire_dtype is not torch.int8:
        return {}
    residuals = gradients.reducer.residuals()
    return {name: view.clone() for name, view in _views(module, gradients, residuals)}


def load_residual_state(
    module: nn.Module, gradients: GradientReduction | None, state: Mapping[str, torch.Tensor]
) -> None:
    """Go on from ``state``, with zero for parameters that it lacks. All ranks must, with the same. Local.

    Raises
    ------
    MismatchError
        When a name or shape is none of the module's.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    for name, residual in state.items():
        if shapes.get(name) != tuple(residual.shape):
            raise MismatchError(
                f"residual {name!r} must have the shape of the model's parameter of that name, which is "
                f"{shapes.get(name, 'missing')}, got {tuple(residual.shape)}"
            )
    if gradients is None:
        return
    residuals = [torch.zeros(layout.numel, dtype=layout.dtype) for layout in gradients.layouts]
    for name, view in _views(module, gradients, residuals):
        if name in state:
            view.copy_(state[name])
    gradients.reducer.load_residuals(residuals)


def _views(
    module: nn.Module, gradients: GradientReduction, flats: Sequence[torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name of each parameter, and its part of what is laid out like the buckets."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for layout, flat in zip(gradients.layouts, flats, strict=False):  # behind them come flags
        for slot in layout.slots:
            parameter = gradients.parameters[slot.index]
            yield names[id(parameter)], view_slot(flat, slot, parameter)
