"""DASO: gradients averaged inside a node at every step, parameters between nodes every few steps."""

from hpcpar.optim.daso.optimizer import DASO
from hpcpar.optim.daso.schedule import Phase

__all__ = ["DASO", "Phase"]
