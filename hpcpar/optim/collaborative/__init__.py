"""Ranks of unequal speed make the same optimizer steps: :mod:`~hpcpar.optim.collaborative.optimizer`."""

from hpcpar.optim.collaborative.optimizer import CollaborativeOptimizer
from hpcpar.optim.collaborative.performance import PerformanceEMA
from hpcpar.optim.collaborative.progress import CollaborationState, TrainingState

__all__ = ["CollaborationState", "CollaborativeOptimizer", "PerformanceEMA", "TrainingState"]
