"""What a step would take without any overhead: the schedule, simulated with the compute times of this run.

A machine computes as fast as it happens to, and more slowly when all its cores are busy or its caches hold
something else. So the times are measured in the same repetition as the steps they are compared with, on all
ranks at once; and each rank goes through its own row of the schedule, only without messages::

    schedule, rank 0   F0 F1 B0 F2 B1 ...      barrier, then action after action; no rank waits for another;
    schedule, rank 1   F0 B0 F1 B1 F2 ...      the cost of a kind and stage is the median over microbatches

    ideal = simulate(schedule, forward=[F...], backward_input=[I...], backward_weight=[W...]).makespan

Inputs are the real ones, gradients random ones of the real shapes, made before. Forward on the last stage
includes the loss. A backward that the schedule does not cut is timed whole.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from hpcpar.comm import Communicator
from hpcpar.nn.pipeline import Action, Kind, Schedule, simulate
from hpcpar.nn.pipeline.backward import DeferredWeights, backward_inputs, backward_whole
from pipeline_workloads import PipelineWorkload

__all__ = ["Costs", "StageCompute", "ideal_s"]

Costs = dict[str, list[float]]
"""Seconds of ``forward``, ``backward_input`` and ``backward_weight`` of one microbatch, per stage."""

Medians = dict[tuple[Kind, int], float]
"""Seconds of each kind of action on each stage of this rank."""


class StageCompute:
    """This rank's row of a schedule, without messages; :meth:`run` is a variant for ``common.measure``."""

    def __init__(self, comm: Communicator, work: PipelineWorkload, schedule: Schedule) -> None:
        self._row = schedule.actions[comm.rank]
        self._last = schedule.stages - 1
        self._loss, self._count = work.loss, work.microbatches
        model = work.build()
        value, targets = work.batch()
        self._targets = targets.chunk(self._count)
        self._stages: dict[int, nn.Module] = {}
        self._inputs: dict[int, tuple[torch.Tensor, ...]] = {}
        self._gradients: dict[int, torch.Tensor] = {}
        for index, rank in enumerate(schedule.placement):
            stage = work.stage(model, index, schedule.stages)
            with torch.no_grad():
                output = stage(value)
            if rank == comm.rank:
                self._stages[index] = stage
                self._inputs[index] = value.chunk(self._count)
                is_last = index == self._last
                self._gradients[index] = (
                    torch.ones(()) if is_last else torch.randn_like(output.chunk(self._count)[0])
                )
            value = output
        self._execute: dict[Kind, Callable[[int, int], None]] = {
            Kind.FORWARD: self._forward,
            Kind.BACKWARD: self._backward,
            Kind.BACKWARD_INPUT: self._backward_inputs,
            Kind.BACKWARD_WEIGHT: self._backward_weights,
        }
        self._leaves: dict[tuple[int, int], torch.Tensor] = {}
        self._roots: dict[tuple[int, int], GradientEdge] = {}
        self._deferred: dict[tuple[int, int], DeferredWeights] = {}
        self._medians: list[Medians] = []

    def run(self) -> None:
        """Go through the row and note the medians. **Local**; to be called on all ranks at once."""
        for stage in self._stages.values():
            stage.zero_grad(set_to_none=True)
        seconds: dict[tuple[Kind, int], list[float]] = {}
        for action in self._row:
            seconds.setdefault((action.kind, action.stage), []).append(self._time(action))
        self._medians.append({key: statistics.median(some) for key, some in seconds.items()})

    def forget(self) -> None:
        """Drop what the runs so far have found. **Local.**"""
        self._medians.clear()

    def gather(self, comm: Communicator) -> list[Costs]:
        """The costs of each run, of all ranks' stages. **Collective.**"""
        runs = []
        for parts in zip(*comm.allgather(self._medians), strict=True):
            found: Medians = {key: median for part in parts for key, median in part.items()}
            halves = [found.get((Kind.BACKWARD, stage), 0.0) / 2 for stage in range(self._last + 1)]
            runs.append(
                {
                    "forward": [found[Kind.FORWARD, stage] for stage in range(self._last + 1)],
                    "backward_input": [
                        found.get((Kind.BACKWARD_INPUT, stage), half) for stage, half in enumerate(halves)
                    ],
                    "backward_weight": [
                        found.get((Kind.BACKWARD_WEIGHT, stage), half) for stage, half in enumerate(halves)
                    ],
                }
            )
        return runs

    def _time(self, action: Action) -> float:
        start = time.perf_counter()
        self._execute[action.kind](action.stage, action.microbatch)
        return time.perf_counter() - start

    def _forward(self, stage: int, microbatch: int) -> None:
        x = self._inputs[stage][microbatch].detach()
        if stage > 0:
            self._leaves[stage, microbatch] = x.requires_grad_()
        y = self._stages[stage](x)
        if stage == self._last:
            y = self._loss(y, self._targets[microbatch]) / self._count
        self._roots[stage, microbatch] = get_gradient_edge(y)

    def _backward(self, stage: int, microbatch: int) -> None:
        backward_whole([self._roots.pop((stage, microbatch))], [self._gradients[stage]])
        self._leaves.pop((stage, microbatch), None)

    def _backward_inputs(self, stage: int, microbatch: int) -> None:
        leaves = [self._leaves.pop((stage, microbatch))] if stage > 0 else []
        root = self._roots.pop((stage, microbatch))
        self._deferred[stage, microbatch] = backward_inputs([root], [self._gradients[stage]], leaves)[1]

    def _backward_weights(self, stage: int, microbatch: int) -> None:
        self._deferred.pop((stage, microbatch)).run()


def ideal_s(schedule: Schedule, costs: Sequence[Costs]) -> list[float]:
    """The makespan with the costs of each run and messages that take no time. **Local.**"""
    return [simulate(schedule, message=0.0, **run).makespan for run in costs]
