"""Deferred batch normalisation: running statistics of the whole batch, though it is computed in microbatches.

In training each microbatch is normalised by its own mean and variance; those of other microbatches are
not there yet. What ``BatchNorm`` would get wrong in a pipeline are the running statistics: it would update
them once per microbatch, with the variances of small samples, and once more in a recomputation. The deferred
layer notes count, mean and variance of each microbatch, pools them (Chan, Golub and LeVeque 1983), over the
replicas of the stage too, and updates the running statistics once per step, as if the batch had come whole.
The idea is torchgpipe's (Kim et al., arXiv:2004.09910).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hpcpar.nn.batch_norm import SyncBatchNorm, adopt, pool_moments, replace_batch_norm

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["DeferredBatchNorm", "convert_deferred_batch_norm"]


class DeferredBatchNorm(_BatchNorm):
    """A batch normalisation whose running statistics are updated by :meth:`commit`. See above."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._moments: list[torch.Tensor] = []
        self.is_recomputing = False

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"the input of batch normalisation must have two axes, got {input.dim()}")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise by the statistics of this microbatch, and note them. Local."""
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        if self.track_running_stats and not self.is_recomputing:
            with torch.no_grad():
                self._note(input.detach())
        return F.batch_norm(input, None, None, self.weight, self.bias, True, 0.0, self.eps)

    def _note(self, input: torch.Tensor) -> None:
        dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
        axes = [axis for axis in range(input.dim()) if axis != 1]
        variance, mean = torch.var_mean(input.to(dtype), axes, correction=0)
        count = torch.full_like(mean, input.numel() / input.shape[1])
        self._moments.append(torch.stack([count, mean, variance]))

    @torch.no_grad()
    def commit(self, comm: Communicator | None) -> None:
        """Update the running statistics from all microbatches since the last time.

        Collective over ``comm``, the replicas of the stage, if one is given.
        """
        if not self.track_running_stats:
            return
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        nothing = self.running_mean.new_zeros(3, self.num_features)  # a rank may have had no samples
        pooled = pool_moments(torch.stack([nothing, *self._moments]))
        self._moments = []
        if comm is not None and comm.size > 1:
            table = pooled.new_empty(comm.size, *pooled.shape)
            comm.Allgather(pooled.contiguous(), table)
            pooled = pool_moments(table)
        count, mean, variance = pooled
        if float(count[0]) < 2:
            return
        self.num_batches_tracked.add_(1)
        rate = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), rate)
        self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), rate)


def convert_deferred_batch_norm(module: nn.Module) -> nn.Module:
    """Replace every batch normalisation inside ``module`` by a deferred one. Local.

    Parameters
    ----------
    module
        Changed in place; parameters and buffers stay the same objects. Those of hpcpar that synchronise
        their statistics in each forward are left alone.

    Returns
    -------
    torch.nn.Module
        ``module``, or its replacement when it is a batch normalisation itself.
    """

    def convert(old: _BatchNorm) -> _BatchNorm:
        is_plain = not isinstance(old, (SyncBatchNorm, DeferredBatchNorm, nn.SyncBatchNorm))
        return adopt(old, DeferredBatchNorm) if is_plain else old

    return replace_batch_norm(module, convert)
