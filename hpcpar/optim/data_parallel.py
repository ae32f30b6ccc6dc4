"""The optimizer of the mode that overlaps the next forward.

``backward()`` returns while gradients are still being reduced, ``step()`` only notes that a step is wanted
and with which learning rates, and each bucket of parameters is updated when the next forward first reads one
of them. Waiting for the last buckets, which the first layers need, is spread over the forward, and the
update runs on parameters that are in the cache because the layer is about to use them::

    rank 0   backward | step() zero_grad() | forward: [wait+update b2] layer 0, 1 [wait+update b1] layer 2 ...

Who looks at a parameter or a gradient earlier, in whatever way, settles it first
(:mod:`hpcpar.optim.pending`): clipping, AMP, ``state_dict``, evaluation, averaging all work, they only cost
part of the overlap.

A partial step hands the wrapped optimizer the parameters of one bucket. torch's own optimizers treat each
parameter by itself (all but LBFGS), so the parts make up the whole, bit for bit. Others are stepped at once,
when the first parameter is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import nn

from hpcpar.errors import HpcparError
from hpcpar.optim.pending import make_pending, restore
from hpcpar.optim.wrapped import WrappedOptimizer

__all__ = ["DataParallelOptimizer", "GradientSource"]


class GradientSource(Protocol):
    """Where gradients come from: the reduction of a data-parallel model."""

    overlapped: Callable[[], None] | None
    before_begin: Callable[[], None]

    @property
    def buckets(self) -> list[list[nn.Parameter]]:
        """The parameters of each bucket."""

    def wait(self, bucket: int) -> None:
        """Wait until ``.grad`` of the parameters of a bucket is the mean over ranks."""


class DataParallelOptimizer(WrappedOptimizer):
    """Wraps a torch optimizer; pass it to :class:`hpcpar.nn.DataParallel` to overlap the next forward.

    Parameters
    ----------
    torch_optimizer
        Any torch optimizer over the model's parameters.
    blocking
        ``True`` waits for all gradients in backward and steps at once, as without this class.

    Notes
    -----
    Local, but an access that settles a parameter waits for other ranks to have finished their backward.
    Learning-rate schedulers take this object or the wrapped one; the rate at ``step()`` is what counts.
    An optimizer with hooks on its step, or not of torch's own, does whole steps, without the overlap.

    Examples
    --------
    >>> optimizer = hpcpar.optim.DataParallelOptimizer(torch.optim.AdamW(net.parameters()))
    >>> model = hpcpar.nn.DataParallel(net, optimizer=optimizer)
    """

    # A GradScaler hands fused optimizers its scale by attributes of this object: let it unscale itself.
    _step_supports_amp_scaling = False

    def __init__(self, torch_optimizer: torch.optim.Optimizer, blocking: bool = False) -> None:
        super().__init__(torch_optimizer)
        self.blocking = blocking
        self._overlaps: list[_Overlap] = []
        torch_optimizer.register_state_dict_pre_hook(lambda _: self.finish())

    def attach(self, gradients: GradientSource) -> None:
        """Take over the waiting for the gradients of a model; called by ``DataParallel``. Local."""
        if self.blocking:
            return
        buckets = gradients.buckets
        mine = {id(parameter) for group in self.param_groups for parameter in group["params"]}
        replaced = {id(parameter) for bucket in buckets for parameter in bucket}
        self._overlaps = [overlap for overlap in self._overlaps if not overlap.covers(replaced)]
        self._overlaps.append(_Overlap(gradients, buckets, self.optimizer, mine))

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Do a step: at once for gradients that are there, at first use for those under way. Local."""
        if any(overlap.step_is_due for overlap in self._overlaps):
            self.finish()
        if not any(overlap.pending for overlap in self._overlaps):
            return self.optimizer.step() if closure is None else self.optimizer.step(closure)
        if closure is not None:
            raise HpcparError(
                "step() must not get a closure while gradients are under way. Use DataParallelOptimizer(..., "
                "blocking=True)"
            )
        settings = [_settings(group) for group in self.param_groups]
        later: set[int] = set()
        if is_separable(self.optimizer):
            for overlap in self._overlaps:
                later |= overlap.request_step(settings)
        else:
            self.finish()
            return self.optimizer.step()
        partial_step(self.optimizer, settings, lambda parameter: id(parameter) not in later)
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # schedulers want a step before theirs
        return None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients; those that an outstanding step still needs, right after it. Local."""
        later: set[int] = set()
        for overlap in self._overlaps:
            later |= overlap.request_zero(set_to_none)
        for group in self.param_groups:
            drop_gradients((p for p in group["params"] if id(p) not in later), set_to_none)

    def finish(self) -> None:
        """Wait for everything that is under way and apply it. Collective in effect."""
        for overlap in self._overlaps:
            overlap.settle_all()

    def state_dict(self) -> dict[str, Any]:
        """As in torch, after everything under way is applied. Collective in effect."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch. Collective in effect."""
        self.finish()
        self.optimizer.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch, before the model is wrapped. Local."""
        self.finish()
        self.optimizer.add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        self.finish()
        return {"optimizer": self.optimizer, "blocking": self.blocking}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["optimizer"], state["blocking"])  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"DataParallelOptimizer({self.optimizer!r}, blocking={self.blocking})"


class _Overlap:
    """One model's buckets between the end of backward and their update.

    ``pending`` holds the buckets that nobody has used yet; ``_settings`` the groups' options of the step
    that they still wait for, if ``step()`` was called.
    """

    def __init__(
        self,
        gradients: GradientSource,
        buckets: list[list[nn.Parameter]],
        optimizer: torch.optim.Optimizer,
        mine: set[int],
    ) -> None:
        self._gradients = gradients
        self._buckets = buckets
        self._optimizer = optimizer
        self._mine = mine
        self.pending: set[int] = set()
        self._settings: list[dict[str, Any]] | None = None
        self._zero: bool | None = None
        gradients.overlapped = self._start
        gradients.before_begin = self.settle_all

    @property
    def step_is_due(self) -> bool:
        return self._settings is not None

    def covers(self, parameters: set[int]) -> bool:
        return any(id(parameter) in parameters for bucket in self._buckets for parameter in bucket)

    def request_step(self, settings: list[dict[str, Any]]) -> set[int]:
        """Update the pending buckets when they are used; the identities of their parameters."""
        self._settings = settings if self.pending else None
        return self._pending_ids()

    def request_zero(self, set_to_none: bool) -> set[int]:
        """Drop the gradients of pending buckets after their update; before it when no step is due."""
        if self._settings is None:
            self.settle_all()
        else:
            self._zero = set_to_none
        return self._pending_ids()

    def settle_all(self) -> None:
        for bucket in sorted(self.pending):
            self._settle(bucket)

    def _start(self) -> None:
        """Backward has ended; every bucket is on its way."""
        self.pending = set(range(len(self._buckets)))
        for index in self.pending:
            self._guard(index)

    def _guard(self, index: int) -> None:
        """Let the first use of a parameter of the bucket settle it."""
        for parameter in self._buckets[index]:
            make_pending(parameter, lambda: self._settle(index))

    def _settle(self, index: int) -> None:
        bucket = self._buckets[index]
        for parameter in bucket:
            restore(parameter)  # first: what follows uses them
        if index not in self.pending:
            return
        try:
            self._gradients.wait(index)
        except BaseException:
            self._guard(index)  # a wait that failed leaves them as stale as they were
            raise
        self.pending.discard(index)
        if self._settings is None:
            return
        members = {id(parameter) for parameter in bucket} & self._mine
        with torch.no_grad():
            partial_step(self._optimizer, self._settings, lambda parameter: id(parameter) in members)
        if self._zero is not None:
            drop_gradients((p for p in bucket if id(p) in members), self._zero)
        if not self.pending:
            self._settings = self._zero = None

    def _pending_ids(self) -> set[int]:
        return {id(p) for index in self.pending for p in self._buckets[index]} & self._mine


def is_separable(optimizer: torch.optim.Optimizer) -> bool:
    """Whether stepping parameters part by part gives the same as all at once. Local."""
    hooks = [*optimizer._optimizer_step_pre_hooks, *optimizer._optimizer_step_post_hooks]
    known = type(optimizer).__module__.startswith("torch.optim")
    return known and not hooks and not isinstance(optimizer, torch.optim.LBFGS)


def partial_step(
    optimizer: torch.optim.Optimizer,
    settings: list[dict[str, Any]],
    chosen: Callable[[torch.Tensor], bool],
) -> None:
    """Step only the chosen parameters, with the given options of their groups. Local."""
    groups = optimizer.param_groups
    optimizer.param_groups = [
        {**options, "params": [parameter for parameter in group["params"] if chosen(parameter)]}
        for options, group in zip(settings, groups, strict=True)
    ]
    try:
        if any(group["params"] for group in optimizer.param_groups):
            optimizer.step()
    finally:
        optimizer.param_groups = groups


def drop_gradients(parameters: Iterable[torch.Tensor], set_to_none: bool) -> None:
    """What ``zero_grad`` does. Local."""
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if set_to_none:
            parameter.grad = None
        else:
            parameter.grad.requires_grad_(False)  # not detach_(), which views do not allow
            parameter.grad.zero_()


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """The options of a group as they are now; schedulers change them in place."""
    return {
        name: value.clone() if isinstance(value, torch.Tensor) else value
        for name, value in group.items()
        if name != "params"
    }
