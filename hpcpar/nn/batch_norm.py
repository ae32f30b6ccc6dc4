"""Batch normalisation over the batches of all ranks, on the host and on GPUs.

In training, mean and variance are those of the global batch. Each rank sends its count, mean and variance
per channel; they are combined by the formula for pooled variances (Chan, Golub and LeVeque 1983), which does
not lose digits as a sum of squares would. Backward needs two global sums per channel::

    dx = w * invstd * (dy - mean(dy) - xhat * mean(dy * xhat))        means over the global batch

The gradients of weight and bias are left local: data parallelism averages them as any other. A rank with an
empty batch takes part with a count of zero. In evaluation nothing is communicated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hpcpar.comm import world
from hpcpar.nn.own_gradients import OwnGradients

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["SyncBatchNorm", "convert_sync_batchnorm"]


class _Normalize(torch.autograd.Function):
    """Normalise by global statistics; the backward of the module's description."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        mean: torch.Tensor,
        invstd: torch.Tensor,
        count: float,
        comm: Communicator,
    ) -> torch.Tensor:
        shape = _per_channel(x)
        normalized = (x.to(mean.dtype) - mean.view(shape)) * invstd.view(shape)
        ctx.save_for_backward(normalized, weight, invstd)
        ctx.count, ctx.comm, ctx.has_bias = count, comm, bias is not None
        ctx.dtype = x.dtype
        y = normalized if weight is None else normalized * weight.view(shape)
        return (y if bias is None else y + bias.view(shape)).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        normalized, weight, invstd = ctx.saved_tensors
        dy = gradients[0].to(normalized.dtype)
        axes = _other_axes(dy)
        sums = torch.stack([dy.sum(axes), (dy * normalized).sum(axes)])
        dbias = sums[0].clone() if ctx.has_bias else None
        dweight = sums[1].clone() if weight is not None else None
        total = torch.empty_like(sums)
        ctx.comm.Allreduce(sums, total)
        shape = _per_channel(dy)
        mean_dy, mean_dy_xhat = (total / max(ctx.count, 1.0)).unbind()
        scale = invstd if weight is None else invstd * weight
        dx = (dy - mean_dy.view(shape) - normalized * mean_dy_xhat.view(shape)) * scale.view(shape)
        if weight is not None and dweight is not None:
            dweight = dweight.to(weight.dtype)
        return dx.to(ctx.dtype), dweight, dbias, None, None, None, None


class SyncBatchNorm(_BatchNorm):
    """``torch.nn.BatchNorm1d/2d/3d`` with statistics of the global batch.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, device, dtype
        As in ``torch.nn.BatchNorm2d``. Input has shape (batch, features) or (batch, features, ...).
    comm
        The ranks, ``hpcpar.comm.world()`` by default. All of them must call forward and backward equally
        often while training: Collective. The layer uses ``comm`` itself, from within forward and backward.

    Raises
    ------
    ValueError
        When the global batch has only one value per channel.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        comm: Communicator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self._comm = comm

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise ValueError(
                f"the input of SyncBatchNorm must have shape (batch, {self.num_features}, ...), got "
                f"{tuple(input.shape)}"
            )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise ``input``. Collective while training, Local in evaluation."""
        self._check_input_dim(input)
        if not self.training:
            return super().forward(input)
        comm = world() if self._comm is None else self._comm
        if comm.size == 1:
            return super().forward(input)
        with torch.no_grad():
            count, mean, variance = global_statistics(input, comm)
            if count < 2:
                raise ValueError(
                    f"the global batch must have more than one value per channel to train, got {count:g}"
                )
            if self.track_running_stats:
                self._update_running(count, mean, variance)
        invstd = torch.rsqrt(variance + self.eps)
        result: torch.Tensor = _Normalize.apply(  # type: ignore[no-untyped-call]
            input, self.weight, self.bias, mean, invstd, count, comm
        )
        return result

    def _update_running(self, count: float, mean: torch.Tensor, variance: torch.Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        rate = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), rate)
        self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), rate)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_comm"] = None  # a communicator cannot leave the process; the copy uses world()
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncBatchNorm:
        import copy

        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))  # type: ignore[no-untyped-call]
        twin._comm = self._comm
        return twin


def global_statistics(x: torch.Tensor, comm: Communicator) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Count, mean and biased variance per channel over all ranks. Collective.

    Parameters
    ----------
    x
        Shape (batch, channels, ...); an empty batch is allowed.

    Returns
    -------
    tuple
        Values per channel; means and variances of shape (channels,), in float32 at least.
    """
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    channels, count = x.shape[1], x.numel() // max(x.shape[1], 1)
    mine = torch.zeros(3, channels, dtype=dtype, device=x.device)
    mine[0] = count
    if count:
        mine[2], mine[1] = torch.var_mean(x.to(dtype), _other_axes(x), correction=0)
    table = mine.new_empty(comm.size, 3, channels)
    comm.Allgather(mine, table)
    total, mean, variance = pool_moments(table)
    return float(total[0]), mean, variance


def pool_moments(moments: torch.Tensor) -> torch.Tensor:
    """Counts, means and biased variances of all samples together (Chan, Golub and LeVeque 1983). Local.

    Parameters
    ----------
    moments
        Those of each sample, shape (samples, 3, channels).

    Returns
    -------
    torch.Tensor
        Shape (3, channels).
    """
    counts, means, variances = moments.unbind(1)
    total = counts.sum(0)
    mean = (counts * means).sum(0) / total.clamp(min=1)
    variance = (counts * (variances + (means - mean) ** 2)).sum(0) / total.clamp(min=1)
    return torch.stack([total, mean, variance])


def convert_sync_batchnorm(module: nn.Module, comm: Communicator | None = None) -> nn.Module:
    """Replace every batch normalisation inside ``module`` by :class:`SyncBatchNorm`. Local.

    Parameters
    ----------
    module
        Changed in place; parameters and buffers stay the same objects.
    comm
        The ranks, ``hpcpar.comm.world()`` by default.

    Returns
    -------
    torch.nn.Module
        ``module``, or its replacement when it is a batch normalisation itself.
    """

    def convert(old: _BatchNorm) -> _BatchNorm:
        return old if isinstance(old, SyncBatchNorm) else adopt(old, SyncBatchNorm, comm=comm)

    return replace_batch_norm(module, convert)


def replace_batch_norm(module: nn.Module, convert: Callable[[_BatchNorm], _BatchNorm]) -> nn.Module:
    """Put ``convert(layer)`` in the place of every batch normalisation inside ``module``. Local.

    Not in experts, of which other ranks have others.
    """
    if isinstance(module, _BatchNorm):
        return convert(module)
    if isinstance(module, OwnGradients):
        return module
    for name, child in list(module._modules.items()):  # named_children() skips second names of a module
        if child is not None:
            setattr(module, name, replace_batch_norm(child, convert))
    return module


def adopt(old: _BatchNorm, kind: type[_BatchNorm], **options: Any) -> _BatchNorm:
    """A layer of another kind with the parameters, buffers and mode of ``old``. Local."""
    layer = kind(old.num_features, old.eps, old.momentum, old.affine, old.track_running_stats, **options)
    layer.weight, layer.bias = old.weight, old.bias
    layer.running_mean, layer.running_var = old.running_mean, old.running_var
    layer.num_batches_tracked = old.num_batches_tracked
    layer.training = old.training
    return layer


def _per_channel(x: torch.Tensor) -> list[int]:
    return [1, -1] + [1] * (x.dim() - 2)


def _other_axes(x: torch.Tensor) -> list[int]:
    return [axis for axis in range(x.dim()) if axis != 1]
