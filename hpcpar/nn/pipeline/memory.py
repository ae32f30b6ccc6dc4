"""Memory: what each stage of a pipeline will need, before anybody books a node.

Parameters, gradients and the optimizer's states are those of the stage's layers; activations are what its
layers save for backward, times the number of microbatches that the schedule lets it hold: on stage s of p at
most ``min(m, p - s)`` under 1F1B, all m under GPipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hpcpar.nn.pipeline.partition import check_balance
from hpcpar.nn.pipeline.profile import LayerProfile
from hpcpar.nn.pipeline.schedule import Kind, Schedule

__all__ = ["StageMemory", "estimate_memory", "peaks_of_stages"]


@dataclass(frozen=True)
class StageMemory:
    """Estimated bytes of one stage; the total is the sum of the others."""

    stage: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    total_bytes: int


def estimate_memory(
    profiles: Sequence[LayerProfile],
    balance: Sequence[int],
    held: Schedule | Sequence[int],
    *,
    optimizer_states: int = 2,
) -> list[StageMemory]:
    """Estimate the memory of each stage. Local.

    It is an upper bound for activations, since a storage that two layers save is counted twice, and knows
    nothing of temporary memory within a layer or of buffers for messages.

    Parameters
    ----------
    profiles
        Of all layers.
    balance
        Number of layers of each stage.
    held
        The schedule, or for each stage of how many microbatches it keeps the activations at most.
    optimizer_states
        Tensors like the parameters that the optimizer keeps: 2 for Adam, 0 for plain SGD.

    Raises
    ------
    MismatchError
        When the numbers of layers or stages do not fit together.
    """
    if isinstance(held, Schedule):
        held = peaks_of_stages(held)
    counts = check_balance(balance, len(profiles), len(held))
    stages, start = [], 0
    for stage, (count, peak) in enumerate(zip(counts, held, strict=True)):
        block = profiles[start : start + count]
        start += count
        parameters = sum(profile.parameter_bytes for profile in block)
        optimizer = optimizer_states * parameters
        activations = (sum(profile.saved_bytes for profile in block) + block[-1].output_bytes) * peak
        total = 2 * parameters + optimizer + activations
        stages.append(StageMemory(stage, parameters, parameters, optimizer, activations, total))
    return stages


def peaks_of_stages(schedule: Schedule) -> list[int]:
    """For each stage, of how many microbatches it holds the activations at most. Local."""
    change = {Kind.FORWARD: 1, Kind.BACKWARD: -1, Kind.BACKWARD_WEIGHT: -1}
    held, peaks = [0] * schedule.stages, [0] * schedule.stages
    for row in schedule.actions:
        for action in row:
            held[action.stage] += change.get(action.kind, 0)
            peaks[action.stage] = max(peaks[action.stage], held[action.stage])
    return peaks
