"""Optimizer steps over ranks."""

from hpcpar.optim.collaborative import (
    CollaborationState,
    CollaborativeOptimizer,
    PerformanceEMA,
    TrainingState,
)
from hpcpar.optim.daso import DASO
from hpcpar.optim.data_parallel import DataParallelOptimizer
from hpcpar.optim.sharded import ShardedOptimizer

__all__ = [
    "CollaborationState",
    "CollaborativeOptimizer",
    "DASO",
    "DataParallelOptimizer",
    "PerformanceEMA",
    "ShardedOptimizer",
    "TrainingState",
]
