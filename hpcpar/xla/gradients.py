"""The gradients on the host: ``.grad`` of the model's parameters, views of one flat tensor.

A step adds its mean to them, as a second ``backward()`` would. So they are set back before the next one, by
the manager's ``zero_grad()`` or by that of an optimizer; a parameter whose ``.grad`` was dropped begins at
zero, and one that was given another tensor goes on from that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

__all__ = ["HostGradients"]


class HostGradients:
    """Keeps ``.grad`` of parameters. Local.

    Parameters
    ----------
    parameters
        Those that require a gradient.
    dtype
        Of the flat tensor. Parameters of other types have a ``.grad`` of their own, rounded from it.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], dtype: torch.dtype) -> None:
        self._parameters = list(parameters)
        self._flat = torch.zeros(sum(p.numel() for p in parameters), dtype=dtype)
        parts = torch.split(self._flat, [p.numel() for p in parameters])
        self._views = [part.view(p.shape) for part, p in zip(parts, parameters, strict=True)]
        self._own: list[torch.Tensor | None] = [None] * len(self._views)

    def add(self, pieces: Sequence[tuple[int, torch.Tensor]], samples: int, used: Sequence[int]) -> None:
        """Add sums, divided by the samples, to the gradients.

        Parameters
        ----------
        pieces
            Of the flat sum, and where they begin.
        samples
            The divisor.
        used
            Parameters that have a gradient; others whose ``.grad`` is None keep it.
        """
        fresh = all(parameter.grad is None for parameter in self._parameters)
        if not fresh:
            self._take_in()
        for first, piece in pieces:
            part = self._flat[first : first + piece.numel()]
            if fresh:
                torch.div(piece, samples, out=part)
            else:
                part.add_(piece / samples)
        wanted = set(used)
        for index, parameter in enumerate(self._parameters):
            if index in wanted or parameter.grad is not None:
                self._give_out(index, parameter)

    def zero(self) -> None:
        """Set them to zero."""
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()

    def _take_in(self) -> None:
        """Bring into the flat tensor what ``.grad`` is now."""
        for view, parameter in zip(self._views, self._parameters, strict=True):
            if parameter.grad is None:
                view.zero_()
            elif parameter.grad.data_ptr() != view.data_ptr() or parameter.grad.dtype != view.dtype:
                view.copy_(parameter.grad)

    def _give_out(self, index: int, parameter: nn.Parameter) -> None:
        view = self._views[index]
        if parameter.dtype == view.dtype:
            parameter.grad = view
            return
        own = self._own[index]
        if own is None:
            own = self._own[index] = torch.empty(parameter.shape, dtype=parameter.dtype)
        own.copy_(view)
        parameter.grad = own
