"""Optimizer steps over ranks."""

from hpcpar.optim.data_parallel import DataParallelOptimizer

__all__ = ["DataParallelOptimizer"]
