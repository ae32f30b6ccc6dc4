"""Joining: ranks that run out of batches take part in reductions until the last rank has.

A rank at the end of its batches contributes nothing to the steps that others still make, with a weight of
zero, and may do what follows each of them (a step of the optimizer), so that its state stays equal::

    rank 0   batch  batch  batch  batch  end     the reduction is over when no rank is active
    rank 1   batch  batch  end    zeros  zeros
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hpcpar.comm import MPI
from hpcpar.nn.gradient_reduction import GradientReduction

__all__ = ["joined"]


@contextmanager
def joined(
    gradients: GradientReduction,
    weight: Callable[[], float],
    finish: Callable[[], None],
    step: Callable[[], object] | None,
    *,
    is_whole: bool,
) -> Iterator[Callable[[], int]]:
    """Weighted reductions inside of the block, and after it until no rank is active. Collective.

    Parameters
    ----------
    gradients
        What is reduced.
    weight
        Of this rank in the next reduction.
    finish
        Applies what is under way, when this rank's batches are over.
    step
        Done after each reduction that this rank sits out.
    is_whole
        Whether ``step`` is all that follows a backward, clipping included.

    Yields
    ------
    callable
        After the block: the rank that has trained longest.
    """
    comm = gradients.reducer.comm
    longest: list[int] = []
    before = gradients.reducer.step
    gradients.weight, gradients.sits_out_with_steps_only = weight, not is_whole
    try:
        yield lambda: longest[0]
        steps = gradients.reducer.step - before
        finish()
        while gradients.shadow_step():
            if step is not None:
                step()
        _, rank = comm.allreduce((steps, -comm.rank), MPI.MAX)
        longest.append(-rank)
    finally:
        gradients.weight, gradients.sits_out_with_steps_only = None, False
