"""What is left in ``.grad`` when each rank has the mean of its own part of a gradient only.

The rest of the memory behind it holds this rank's own gradient, or nothing of meaning. Whoever looked at it,
to clip it or to log its norm, would get a wrong number without noticing. So it is there, with its shape, to
say that there is a gradient; any other use raises an error that tells what to do instead.
"""

from __future__ import annotations

from typing import Any

import torch

from hpcpar.errors import HpcparError

__all__ = ["ScatteredGradient"]

_HARMLESS = frozenset(
    [
        *(
            getattr(torch.Tensor, name).__get__
            for name in (
                "shape",
                "dtype",
                "device",
                "layout",
                "ndim",
                "requires_grad",
                "is_leaf",
                "is_cuda",
                "_version",
            )
        ),
        *(getattr(torch.Tensor, name) for name in ("dim", "numel", "size", "stride", "element_size")),
        torch.Tensor.is_complex,
        torch.Tensor.is_floating_point,
    ]
)


class ScatteredGradient(torch.Tensor):
    """A gradient of which every rank knows only a part. Made by ``tensor.as_subclass(ScatteredGradient)``."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _HARMLESS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", str(func))
        raise HpcparError(
            f"a gradient that is spread over the ranks must be left to its optimizer, got {name}(). Use "
            "clip_grad_norm_() of the ShardedOptimizer for norms, zero_grad() with set_to_none=True before "
            "the next backward, and no_sync() to accumulate"
        )

    def __repr__(self) -> str:  # type: ignore[override]
        return f"ScatteredGradient(shape={tuple(self.shape)}, dtype={self.dtype})"
