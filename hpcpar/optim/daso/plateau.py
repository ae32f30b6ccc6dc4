"""Has the loss stopped falling? The question on which DASO's skips depend.

A loss counts as better when it is below the best so far by more than a fraction of it, so noise does not.
After more than ``patience`` epochs in a row without a better one, the loss is on a plateau; then counting
begins anew. This is the criterion of ``torch.optim.lr_scheduler.ReduceLROnPlateau`` in its relative mode,
also for losses below zero.
"""

from __future__ import annotations

__all__ = ["PlateauDetector"]


class PlateauDetector:
    """Watches the loss of one epoch after the other. Local.

    Parameters
    ----------
    threshold
        Fraction of the best loss by which a better one must be smaller.
    patience
        Epochs without a better loss that are not yet a plateau.

    Attributes
    ----------
    best : float
        The loss that the next one is compared with; infinite before the first.
    bad_epochs : int
        Epochs since then.
    """

    def __init__(self, threshold: float, patience: int) -> None:
        self._threshold = threshold
        self._patience = patience
        self.best = float("inf")
        self.bad_epochs = 0

    def observe(self, loss: float) -> bool:
        """Take the loss of an epoch; whether this is a plateau. ``nan`` is never better. Local."""
        goal = self.best if self.best == float("inf") else self.best - self._threshold * abs(self.best)
        if loss < goal:
            self.best, self.bad_epochs = loss, 0
            return False
        self.bad_epochs += 1
        if self.bad_epochs <= self._patience:
            return False
        self.bad_epochs = 0
        return True
