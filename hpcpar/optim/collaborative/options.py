"""Options of a collaborative optimizer, checked when they are made."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, fields

import torch

from hpcpar.errors import MismatchError

__all__ = ["CollaborativeOptions", "check_batch_size", "check_kinds"]


@dataclass(frozen=True)
class CollaborativeOptions:
    """As described at :class:`~hpcpar.optim.CollaborativeOptimizer`; the same on every rank but for four.

    ``batch_size_per_step``, ``accumulate_grads_on``, ``performance_ema_alpha`` and ``verbose`` may differ.

    Raises
    ------
    MismatchError
        For a value out of range, or two that exclude each other.
    """

    target_batch_size: int
    batch_size_per_step: int | None = None
    step_tolerance: int = 1
    reuse_grad_buffers: bool = False
    accumulate_grads_on: torch.device | None = None
    averaging_timeout: float | None = None
    performance_ema_alpha: float = 0.1
    verbose: bool = False
    delayed_averaging: bool = False
    clip_grad_norm: float | None = None
    wire_dtype: torch.dtype | None = None
    transport: str = "auto"

    def __post_init__(self) -> None:
        check_batch_size("target_batch_size", self.target_batch_size)
        if self.batch_size_per_step is not None:
            check_batch_size("batch_size_per_step", self.batch_size_per_step)
        if self.step_tolerance < 0:
            raise MismatchError(f"step_tolerance must not be negative, got {self.step_tolerance}")
        for name in ("averaging_timeout", "clip_grad_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0.0:
                raise MismatchError(f"{name} must be positive or None, got {value!r}")
        if not 0.0 < self.performance_ema_alpha <= 1.0:
            raise MismatchError(
                f"performance_ema_alpha must be above 0 and at most 1, got {self.performance_ema_alpha!r}"
            )
        self._check_reuse()
        if self.delayed_averaging and self.step_tolerance < 1:
            raise MismatchError(
                "step_tolerance must be at least 1 with delayed_averaging, whose gradients are of parameters "
                f"one step old, got {self.step_tolerance}"
            )

    @property
    def unit_of_sums(self) -> float:
        """In which sums of gradients travel: their range is that of means times samples. Local."""
        if self.wire_dtype is not torch.float16:
            return 1.0
        return 2.0 ** math.ceil(math.log2(self.target_batch_size))

    def _check_reuse(self) -> None:
        if not self.reuse_grad_buffers:
            return
        if self.batch_size_per_step is None:
            raise MismatchError(
                "batch_size_per_step must be given with reuse_grad_buffers, got None: gradients that are "
                "accumulated by backward can only be weighted all alike"
            )
        if self.accumulate_grads_on is not None or self.delayed_averaging:
            raise MismatchError(
                "reuse_grad_buffers must not be combined with accumulate_grads_on or delayed_averaging, got "
                "both: .grad is the accumulator then"
            )

    def in_common(self) -> dict[str, object]:
        """Those that must be the same on every rank. Local."""
        own = {"batch_size_per_step", "accumulate_grads_on", "performance_ema_alpha", "verbose"}
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in own}


def check_batch_size(name: str, value: object) -> int:
    """The value as an integer. Local.

    Raises
    ------
    MismatchError
        When it is no positive integer.
    """
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = 0
    if isinstance(value, bool) or number < 1:
        raise MismatchError(f"{name} must be a positive integer, got {value!r}")
    return number


def check_kinds(opt: object, scheduler: object, *, reuse_grad_buffers: bool) -> None:
    """Whether a collaborative optimizer can work with these. Local.

    Raises
    ------
    MismatchError
        For what is no optimizer, and for one or a scheduler that needs more than a step.
    """
    if not isinstance(opt, torch.optim.Optimizer):
        raise MismatchError(f"opt must be a torch optimizer, got {type(opt).__name__}")
    if isinstance(opt, torch.optim.LBFGS):
        raise MismatchError("opt must step without a closure, got LBFGS")
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise MismatchError(
            "scheduler must step without a loss, got ReduceLROnPlateau. Step it in the program, on all ranks "
            "alike"
        )
    narrow = any(p.dtype.itemsize < 4 for group in opt.param_groups for p in group["params"])
    if reuse_grad_buffers and narrow:
        raise MismatchError(
            "reuse_grad_buffers must be used with parameters of 32 bits or more, got narrower ones, whose "
            "gradients cannot hold sums over many batches"
        )
