"""The verdict: a parameter by whose gradient a ``GradScaler`` learns that another rank has overflowed.

A scaler looks for infinities in the gradients of its optimizer. Here each rank has only its part of them, and
all must skip the same steps and lower their scales together. So the first parameter of the first group is one
of no use, whose gradient is zero while the gradients of *all* ranks are finite, and infinite otherwise. The
ranks agree on that when a scaler looks at its gradient; for anybody else it is zero, and nothing is asked.
During a step it is set aside.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["Verdict"]


class Verdict(nn.Parameter):
    """A parameter of one element, whose gradient is the verdict of all ranks on theirs.

    Parameters
    ----------
    judge
        Whether the gradients of all ranks are finite. Collective.
    """

    _judge: Callable[[], bool]

    def __new__(cls, judge: Callable[[], bool]) -> Verdict:
        """A leaf of one zero."""
        verdict: Any = super().__new__(cls, torch.zeros(1), requires_grad=True)
        verdict._judge = judge
        return verdict  # type: ignore[no-any-return]

    def __init__(self, judge: Callable[[], bool]) -> None:
        """All is done in ``__new__``."""

    @property
    def grad(self) -> torch.Tensor:
        """Zero; to a ``GradScaler`` infinite when the gradient of any rank is not finite, and Collective."""
        asked_by = sys._getframe(1).f_globals.get("__name__", "")
        fine = "grad_scaler" not in asked_by or self._judge()
        return torch.zeros(1) if fine else torch.full((1,), float("inf"))

    @grad.setter
    def grad(self, value: object) -> None:
        """There is nothing to keep."""

    @contextmanager
    def aside(self, members: list[Any]) -> Iterator[None]:
        """Take it out of ``members``, of which it is the first, for the time of the block. Local."""
        members.pop(0)
        try:
            yield
        finally:
            members.insert(0, self)
