"""What a wrapper needs to know of a module and its arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hpcpar.nn.gradient_reduction import tensors_in

__all__ = ["batch_size", "hides_parameters"]


def hides_parameters(module: nn.Module) -> bool:
    """Whether scripted or compiled code reads parameters, which does not notice stale ones. Local."""
    return any(
        isinstance(m, torch.jit.ScriptModule)
        or m._compiled_call_impl is not None
        or "_orig_mod" in m._modules
        for m in module.modules()
    )


def batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Length of the first axis of the first tensor."""
    for tensor in tensors_in([*args, *kwargs.values()]):
        return tensor.shape[0] if tensor.dim() else 1
    return 0
