"""What a data-parallel model wants of an optimizer that overlaps the next forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from hpcpar.nn.gradient_reduction import GradientReduction

__all__ = ["OverlappingOptimizer", "check_overlapping"]


class OverlappingOptimizer(Protocol):
    """An optimizer that updates parameters when they are next read, as their gradients arrive."""

    def attach(self, gradients: GradientReduction) -> None:
        """Take over the waiting for the gradients of a model. Local."""

    def finish(self) -> None:
        """Wait for everything that is under way and apply it. Collective in effect."""


def check_overlapping(optimizer: object) -> None:
    """Refuse what is no such optimizer, nor ``None``. Local."""
    if optimizer is not None and not (hasattr(optimizer, "attach") and hasattr(optimizer, "finish")):
        raise TypeError(
            "optimizer of DataParallel must be an hpcpar.optim.DataParallelOptimizer, got "
            f"{type(optimizer).__name__}. Other optimizers are not passed; step() them as usual"
        )
