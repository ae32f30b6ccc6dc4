"""An optimizer whose state, and inside a node also the parameters, exist once instead of on every rank."""

from hpcpar.optim.sharded.optimizer import ShardedOptimizer

__all__ = ["ShardedOptimizer"]
