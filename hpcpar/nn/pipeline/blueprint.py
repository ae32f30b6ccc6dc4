"""Blueprints: what a pipeline will be, drawn by each rank and compared before anything is built.

Every rank was given the same arguments, or should have been. Each checks its own and draws the blueprint; the
ranks exchange how that went, so that a mistake on one of them is an error on all and nobody is left waiting
in the next collective. What only one rank can know (measured times, the seed) is rank 0's word.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hpcpar.errors import MismatchError, ScheduleError
from hpcpar.nn.pipeline.builders import build_schedule
from hpcpar.nn.pipeline.layers import Layers
from hpcpar.nn.pipeline.partition import balance_layers, check_balance
from hpcpar.nn.pipeline.plan import PipelinePlan, make_plan
from hpcpar.nn.pipeline.profile import profile_layers
from hpcpar.nn.pipeline.schedule import Schedule, messages
from hpcpar.nn.pipeline.simulate import simulate
from hpcpar.nn.pipeline.skip import check_skips, pop_names, stash_names
from hpcpar.nn.pipeline.step import CHECKPOINT_MODES, LOSS_REDUCTIONS
from hpcpar.nn.progress_trial import PROGRESS_CHOICES

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["Blueprint", "check_options"]

REUSE_MODES = ("route", "replicate")


@dataclass(frozen=True)
class Blueprint:
    """See the module's description.

    Attributes
    ----------
    schedule : Schedule
        As asked for; checked.
    balance : tuple of int
        Layers of each of its stages.
    seed : int
        Of the layers' random numbers.
    descriptions : tuple of str
        A line per layer and option, the same on every rank.
    """

    schedule: Schedule
    balance: tuple[int, ...]
    seed: int
    descriptions: tuple[str, ...]

    @classmethod
    def draw(
        cls,
        layers: Layers,
        comm: Communicator,
        *,
        options: dict[str, Any],
        sample_input: Any,
    ) -> Blueprint:
        """Draw it on this rank. Local.

        Parameters
        ----------
        layers
            The model.
        comm
            The ranks of the pipeline.
        options
            The arguments of :class:`~hpcpar.nn.Pipeline` that must be the same on all ranks.
        sample_input
            With which rank 0 measures, for ``balance="time"``.

        Raises
        ------
        MismatchError, ScheduleError
            For options that do not fit together.
        """
        check_options(options)
        schedule = _choose_schedule(comm.size, options)
        balance = options["balance"]
        counts = _choose_balance(layers, schedule.stages, balance, sample_input, measures=comm.rank == 0)
        lines = [
            f"{name}={value!r}" for name, value in options.items() if name not in ("schedule", "balance")
        ]
        lines += [f"layer {name}: {layers.describe(index)}" for index, name in enumerate(layers.names)]
        lines += [
            f"schedule of rank {r}: {' '.join(map(str, row))}" for r, row in enumerate(schedule.actions)
        ]
        lines.append(f"balance={'time' if isinstance(balance, str) else counts}")
        return cls(schedule, tuple(counts), torch.initial_seed() & (2**63 - 1), tuple(lines))

    def adopted_by_all(self, comm: Communicator) -> Blueprint:
        """Compare with the other ranks', and take rank 0's word for what may differ. Collective.

        Raises
        ------
        MismatchError
            On every rank, with the first difference.
        """
        digest = hashlib.sha256("\n".join(self.descriptions).encode()).hexdigest()
        digests = comm.allgather(digest)
        other = next((rank for rank, seen in enumerate(digests) if seen != digests[0]), None)
        if other is None:
            balance, seed = comm.bcast((self.balance, self.seed), 0)
            return dataclasses.replace(self, balance=balance, seed=seed)
        first, second = comm.bcast(self.descriptions, 0), comm.bcast(self.descriptions, other)
        pairs = zip([*first, "nothing more"], [*second, "nothing more"], strict=False)
        one, two = next(pair for pair in pairs if pair[0] != pair[1])
        raise MismatchError(
            f"a pipeline must be made alike on all ranks, got {one!r} on rank 0 and {two!r} on rank {other}"
        )

    def plan(self, layers: Layers, reuse: str) -> PipelinePlan:
        """Where each layer goes and what travels. Local."""
        names = []
        for index in range(len(layers)):
            sketch = layers.sketch(index)  # one at a time: a spec may have to be built for it
            names.append((stash_names(sketch), pop_names(sketch)))
        skips = check_skips(names)
        tied = layers.tied_groups() if reuse == "route" else []
        return make_plan(self.schedule, self.balance, tied, skips)


def check_options(options: dict[str, Any]) -> None:
    """Raise for an option that is none of the choices. Local."""
    microbatches = options["microbatches"]
    if isinstance(microbatches, bool) or not isinstance(microbatches, int) or microbatches < 1:
        raise MismatchError(f"microbatches must be a positive integer, got {microbatches!r}")
    choices: dict[str, Sequence[str]] = {
        "checkpoint": list(CHECKPOINT_MODES),
        "reuse": REUSE_MODES,
        "loss_reduction": LOSS_REDUCTIONS,
        "progress": PROGRESS_CHOICES,
    }
    for name, allowed in choices.items():
        if options[name] not in allowed:
            raise MismatchError(
                f"{name} must be one of {', '.join(map(repr, allowed))}, got {options[name]!r}"
            )


def _choose_schedule(ranks: int, options: dict[str, Any]) -> Schedule:
    schedule, microbatches, chunks = options["schedule"], options["microbatches"], options["chunks"]
    if isinstance(schedule, str):
        return build_schedule(schedule, ranks, microbatches, chunks)
    if not isinstance(schedule, Schedule):
        raise ScheduleError(f"schedule must be a name or a Schedule, got {type(schedule).__name__}")
    schedule.check(ranks=ranks, microbatches=microbatches)
    messages(schedule)  # each receive has its send
    simulate(schedule)  # and nobody waits for ever
    if chunks != 1 and chunks * ranks != schedule.stages:
        raise ScheduleError(
            f"chunks must be what the schedule has, got {chunks} for {schedule.stages} stages on {ranks} "
            "ranks. Leave it out"
        )
    return schedule


def _choose_balance(
    layers: Layers, stages: int, balance: str | Sequence[int] | None, sample_input: Any, *, measures: bool
) -> list[int]:
    if balance is None:
        # A layer without parameters still costs something.
        return balance_layers([layers.parameter_count(index) + 1.0 for index in range(len(layers))], stages)
    if not isinstance(balance, str):
        return check_balance(balance, len(layers), stages)
    if balance != "time":
        raise MismatchError(f"balance must be None, 'time' or a list of layer counts, got {balance!r}")
    if not measures:
        return balance_layers([1.0] * len(layers), stages)  # checks the numbers; rank 0's word counts
    if sample_input is None:
        raise MismatchError("sample_input must be given for balance='time', got None")
    profiles = profile_layers(layers, sample_input)
    return balance_layers([profile.forward_s + profile.backward_s for profile in profiles], stages)
