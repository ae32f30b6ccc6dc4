"""Code that exchanges messages with other ranks, and so must not be compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

__all__ = ["never_compiled"]

P = ParamSpec("P")
T = TypeVar("T")


def never_compiled(function: Callable[P, T]) -> Callable[P, T]:
    """As ``torch.compiler.disable``, which would import the whole compiler when it decorates. Local.

    That takes longer than all other imports of this package, so it is left to the first call.
    """
    disabled: list[Callable[P, T]] = []

    @functools.wraps(function)
    def eager(*args: P.args, **kwargs: P.kwargs) -> T:
        if not disabled:
            disabled.append(torch.compiler.disable(function))  # type: ignore[no-untyped-call]
        return disabled[0](*args, **kwargs)

    return eager
