"""How often nodes exchange parameters, epoch by epoch: DASO's phases and its cycling through skips.

With 4 epochs of warm-up and of cool-down, ``max_global_skips=8``, ``skip_reduction_factor=2``:

=====================  =========  ===========  ===============
epoch                  phase      global_skip  batches_to_wait
=====================  =========  ===========  ===============
0, 1, 2, 3             warm-up    0            0
4                      cycling    4            1
after a plateau        cycling    2            1
after the next         cycling    1            1
after the next         cycling    8            2
after the next         cycling    4            1
... and so on round
the last 4, and later  cool-down  0            0
=====================  =========  ===========  ===============

In warm-up and cool-down every step averages the gradients of all ranks. In cycling an average of the
parameters begins after every ``global_skip`` steps, and is merged ``batches_to_wait`` steps later. A plateau
asks for more exact steps, so both are divided; from a plateau at the bottom it goes back to the top, since
there is nothing to gain from averaging more often and time to gain from averaging less.

Everything here is arithmetic on a loss that is the same on all ranks, so all decide alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from hpcpar.errors import MismatchError
from hpcpar.optim.daso.plateau import PlateauDetector

__all__ = ["Phase", "ScheduleOptions", "SkipSchedule"]

_FIRST_SKIP = 4
_SKIPS_PER_WAIT = 4


class Phase(Enum):
    """What a step synchronises; in warm-up and cool-down everything."""

    WARM_UP = "warm-up"
    CYCLING = "cycling"
    COOL_DOWN = "cool-down"


@dataclass(frozen=True)
class ScheduleOptions:
    """The keyword options of :class:`~hpcpar.optim.DASO` that decide about its phases and skips.

    Raises
    ------
    MismatchError
        For a number that is out of range.
    """

    total_epochs: int
    warmup_epochs: int
    cooldown_epochs: int
    max_global_skips: int
    skip_reduction_factor: int
    stability_level: float
    patience: int

    def __post_init__(self) -> None:
        lowest = {
            "total_epochs": 1,
            "warmup_epochs": 0,
            "cooldown_epochs": 0,
            "max_global_skips": 1,
            "skip_reduction_factor": 2,
            "patience": 0,
        }
        for name, least in lowest.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise MismatchError(f"{name} of DASO must be an integer of at least {least}, got {value!r}")
        if not 0.0 <= self.stability_level < 1.0:
            raise MismatchError(
                "stability_level of DASO must be a fraction of the loss, at least 0 and less than 1, got "
                f"{self.stability_level!r}"
            )
        if self.warmup_epochs + self.cooldown_epochs > self.total_epochs:
            raise MismatchError(
                "warmup_epochs and cooldown_epochs of DASO must fit into "
                f"total_epochs={self.total_epochs}, got {self.warmup_epochs} and {self.cooldown_epochs}"
            )


class SkipSchedule:
    """The phase and the skips of each epoch. Local.

    Attributes
    ----------
    epoch : int
        The epoch that is being trained, from 0.
    global_skip, batches_to_wait : int
        Of this epoch; both 0 in warm-up and cool-down.
    """

    def __init__(self, options: ScheduleOptions) -> None:
        self._options = options
        self._plateau = PlateauDetector(options.stability_level, options.patience)
        self.epoch = 0
        self.global_skip = self.batches_to_wait = 0
        self._settle()

    @property
    def phase(self) -> Phase:
        """Of this epoch."""
        options = self._options
        if self.epoch >= options.total_epochs - options.cooldown_epochs:
            return Phase.COOL_DOWN
        return Phase.WARM_UP if self.epoch < options.warmup_epochs else Phase.CYCLING

    def end_epoch(self, loss: float) -> None:
        """Go on to the next epoch, after one with this mean loss."""
        if self.phase is Phase.CYCLING and self._plateau.observe(loss):
            self._adapt()
        self.epoch += 1
        self._settle()

    def _adapt(self) -> None:
        if self.global_skip > 1:
            factor = self._options.skip_reduction_factor
            self._set(self.global_skip // factor, self.batches_to_wait // factor)
        else:
            self._set(self._options.max_global_skips, self._options.max_global_skips // _SKIPS_PER_WAIT)

    def _set(self, global_skip: int, batches_to_wait: int) -> None:
        self.global_skip = max(1, min(global_skip, self._options.max_global_skips))
        self.batches_to_wait = max(1, batches_to_wait)

    def _settle(self) -> None:
        """Let the numbers fit the phase: on entering one, and for a state saved under other options."""
        if self.phase is not Phase.CYCLING:
            self.global_skip = self.batches_to_wait = 0
        elif self.global_skip == 0:
            self._set(_FIRST_SKIP, _FIRST_SKIP // _SKIPS_PER_WAIT)
        else:
            self._set(self.global_skip, self.batches_to_wait)

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands, in plain numbers."""
        return {
            "epoch": self.epoch,
            "global_skip": self.global_skip,
            "batches_to_wait": self.batches_to_wait,
            "best_loss": self._plateau.best,
            "bad_epochs": self._plateau.bad_epochs,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Options are those of this object: training may be made longer."""
        self.epoch = state["epoch"]
        self.global_skip, self.batches_to_wait = state["global_skip"], state["batches_to_wait"]
        self._plateau.best, self._plateau.bad_epochs = state["best_loss"], state["bad_epochs"]
        self._settle()
