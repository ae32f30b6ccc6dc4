"""Updates of an expert: gradients of how many examples make one step, and what a step is.

Every backward request adds its gradients, summed over its examples. Without ``samples_per_update`` each makes
a step; with it, a step is made after exactly that many examples. A batch that crosses the boundary is cut
there, so that the result does not depend on how requests happened to be batched::

    examples      1 2 3 4 5 | 6 7 8 9 10 | 11 12       samples_per_update=5
    one batching  [1 2 3]  [4 5 | 6 7 8 9]  [10 | 11 12]
    another       [1 2 3 4 5 | 6 7 8 9 10 | 11 12]     the same steps

Accumulated gradients are kept apart from ``.grad``, which is set for the time of a step only, so a backward
pass that fails has nothing to take back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from hpcpar.errors import HpcparError, MismatchError

__all__ = ["ExpertUpdates", "OptimizerLike", "SchedulerLike", "collected_gradients"]

OptimizerLike = torch.optim.Optimizer | Callable[..., torch.optim.Optimizer] | None
SchedulerLike = LRScheduler | Callable[..., LRScheduler] | None


@dataclass
class _Progress:
    """Where an expert is between two updates."""

    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    samples: int = 0
    updates: int = 0
    examples: int = 0  # in updates already made


class ExpertUpdates:
    """Accumulates gradients of an expert and steps its optimizer. Local, not thread-safe.

    Parameters
    ----------
    expert
        Whose parameters are trained.
    optimizer
        Over them, or a function that makes one from them. ``None``: the expert is not trained.
    scheduler
        Of the learning rate, stepped with each update: one over this optimizer, or a function that makes it:
        ``scheduler(optimizer, num_warmup_steps, num_total_steps)``, without the numbers that are not given.
        ``None``: linear warm-up, then linear decay to zero at ``num_total_steps``, as far as these are given.
    num_warmup_steps, num_total_steps
        Numbers of updates.
    clip_grad_norm
        Largest norm of the gradient of an update.
    samples_per_update
        Examples that make an update; ``None`` for any number.

    Raises
    ------
    HpcparError
        When these do not fit together.
    """

    def __init__(
        self,
        expert: nn.Module,
        optimizer: OptimizerLike,
        scheduler: SchedulerLike = None,
        *,
        num_warmup_steps: int | None = None,
        num_total_steps: int | None = None,
        clip_grad_norm: float | None = None,
        samples_per_update: int | None = None,
    ) -> None:
        if samples_per_update is not None and samples_per_update < 1:
            raise HpcparError(f"samples_per_update must be positive or None, got {samples_per_update}")
        if clip_grad_norm is not None and not clip_grad_norm > 0:
            raise HpcparError(f"clip_grad_norm must be positive or None, got {clip_grad_norm}")
        self._expert = expert
        self.optimizer = _make_optimizer(optimizer, expert)
        self.scheduler = _make_scheduler(scheduler, self.optimizer, num_warmup_steps, num_total_steps)
        self._clip_grad_norm = clip_grad_norm
        self._samples_per_update = samples_per_update
        self._progress = _Progress()

    # Facts -----------------------------------------------------------------------------------------------

    @property
    def accumulated_samples(self) -> int:
        """Examples whose gradients wait for an update. Local."""
        return self._progress.samples

    def stats(self) -> dict[str, int]:
        """``updates`` made, and ``examples_processed``, those that wait for an update included. Local."""
        progress = self._progress
        return {"updates": progress.updates, "examples_processed": progress.examples + progress.samples}

    def segments(self, rows: int) -> list[tuple[int, int]]:
        """Where to cut the next ``rows`` examples: (start, stop) between updates. Local."""
        if self._samples_per_update is None or self.optimizer is None:
            return [(0, rows)]
        first = max(1, self._samples_per_update - self.accumulated_samples)
        return list(pairwise([0, *range(first, rows, self._samples_per_update), rows]))

    # Steps -----------------------------------------------------------------------------------------------

    def add(self, gradients: Mapping[str, torch.Tensor], samples: int) -> None:
        """Accumulate gradients, by name of the parameter, of so many examples. Local."""
        progress = self._progress
        if self.optimizer is None:
            progress.examples += samples
            return
        total = dict(progress.gradients)
        for name, gradient in gradients.items():
            # Not in place: the sum so far must survive a failure.
            total[name] = total[name] + gradient if name in total else gradient
        progress.gradients = total
        progress.samples += samples

    @property
    def is_due(self) -> bool:
        """Whether enough examples wait for an update. Local."""
        return self.accumulated_samples >= (self._samples_per_update or 1)

    def apply(self) -> None:
        """Update the expert with what is accumulated; nothing without examples. Local."""
        if self.accumulated_samples:
            self._step(self._progress.gradients, self.accumulated_samples)
            self._progress.gradients, self._progress.samples = {}, 0

    def take(self) -> tuple[list[torch.Tensor], int]:
        """Gradients of all trainable parameters, zeros where there is none, and their samples. Local.

        The accumulation is empty afterwards.
        """
        progress = self._progress
        gradients = [
            progress.gradients.get(name, torch.zeros_like(parameter, requires_grad=False))
            for name, parameter in self._trainable()
        ]
        samples = progress.samples
        progress.gradients, progress.samples = {}, 0
        return [g.to_dense() if g.is_sparse else g.contiguous() for g in gradients], samples

    def apply_summed(self, gradients: Sequence[torch.Tensor], samples: int) -> None:
        """Update the expert with gradients as :meth:`take` gives them; nothing without examples. Local."""
        trainable = self._trainable()
        if [gradient.numel() for gradient in gradients] != [p.numel() for _, p in trainable]:
            raise MismatchError(
                f"gradients must be one for each of the {len(trainable)} trainable parameters, of its size, "
                f"got {[tuple(gradient.shape) for gradient in gradients]}"
            )
        if samples:
            pairs = zip(trainable, gradients, strict=True)
            self._step({name: gradient.view(p.shape) for (name, p), gradient in pairs}, samples)

    def _step(self, gradients: Mapping[str, torch.Tensor], samples: int) -> None:
        if self.optimizer is None:
            raise HpcparError("an expert that is updated must have an optimizer, got None")
        try:
            for name, parameter in self._expert.named_parameters():
                parameter.grad = gradients.get(name)
            if self._clip_grad_norm is not None:
                nn.utils.clip_grad_norm_(self._expert.parameters(), self._clip_grad_norm)
            self.optimizer.step()
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            _drop_gradients(self._expert)
        if self.scheduler is not None:
            self.scheduler.step()
        self._progress.updates += 1
        self._progress.examples += samples

    def _trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self._expert.named_parameters() if p.requires_grad]

    # State -----------------------------------------------------------------------------------------------

    @contextmanager
    def undone_on_failure(self) -> Iterator[None]:
        """Forget what the block accumulated when it fails; updates are not undone. Local."""
        before = copy.copy(self._progress)
        try:
            yield
        except BaseException:
            self._progress = before
            raise

    def state(self) -> dict[str, Any]:
        """A copy of everything: ``stats``, ``optimizer``, ``scheduler`` and ``pending``. Local."""
        state = {
            "stats": self.stats(),
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "pending": {"gradients": self._progress.gradients, "samples": self._progress.samples},
        }
        return copy.deepcopy(state)

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave. Local."""
        state = copy.deepcopy({key: state[key] for key in ("stats", "optimizer", "scheduler", "pending")})
        for name, part in (("optimizer", self.optimizer), ("scheduler", self.scheduler)):
            if (part is None) != (state[name] is None):
                has = "no" if part is None else "a"
                raise MismatchError(
                    f"the state of an expert with {has} {name} must fit, got one with {state[name]}"
                )
            if part is not None:
                part.load_state_dict(state[name])
        pending, stats = state["pending"], state["stats"]
        parameters = dict(self._expert.named_parameters())
        self._progress = _Progress(
            gradients={name: g.to(parameters[name].device) for name, g in pending["gradients"].items()},
            samples=pending["samples"],
            updates=stats["updates"],
            examples=stats["examples_processed"] - pending["samples"],
        )


@contextmanager
def collected_gradients(expert: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Collect what backward passes inside the block add to ``.grad``, by name; empty before and after. Local.

    The dict is filled when the block ends; it stays empty when the block fails.
    """
    _drop_gradients(expert)
    gradients: dict[str, torch.Tensor] = {}
    try:
        yield gradients
        gradients.update((name, p.grad) for name, p in expert.named_parameters() if p.grad is not None)
    finally:
        _drop_gradients(expert)


def _drop_gradients(expert: nn.Module) -> None:
    for parameter in expert.parameters():
        parameter.grad = None


# ---- optimizer and scheduler -------------------------------------------------------------------------------


def _make_optimizer(optimizer: OptimizerLike, expert: nn.Module) -> torch.optim.Optimizer | None:
    if optimizer is None or isinstance(optimizer, torch.optim.Optimizer):
        return optimizer
    if not callable(optimizer):
        raise HpcparError(
            "optimizer of an expert must be a torch optimizer, a function that makes one from parameters, or "
            f"None, got a {type(optimizer).__name__}"
        )
    return optimizer(expert.parameters())


def _make_scheduler(
    scheduler: SchedulerLike,
    optimizer: torch.optim.Optimizer | None,
    warmup: int | None,
    total: int | None,
) -> LRScheduler | None:
    if scheduler is None and warmup is None and total is None:
        return None
    if optimizer is None:
        raise HpcparError("an expert with a scheduler must have an optimizer, got None")
    if scheduler is None:
        return LambdaLR(optimizer, _linear_schedule(warmup or 0, total))
    if isinstance(scheduler, LRScheduler):
        made = scheduler
    elif total is not None:
        made = scheduler(optimizer, warmup or 0, total)
    else:
        made = scheduler(optimizer) if warmup is None else scheduler(optimizer, warmup)
    if isinstance(made, ReduceLROnPlateau) or made.optimizer is not optimizer:
        raise HpcparError(
            "scheduler of an expert must be over the expert's own optimizer and need no metric, got a "
            f"{type(made).__name__} over another, or one that needs a metric"
        )
    return made


def _linear_schedule(warmup: int, total: int | None) -> Callable[[int], float]:
    """From zero up to one at ``warmup``, then down to zero at ``total``, or constant without one."""

    def factor(update: int) -> float:
        if update < warmup:
            return update / warmup
        if total is None:
            return 1.0
        return max(0.0, (total - update) / max(1, total - warmup))

    return factor
