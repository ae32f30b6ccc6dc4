"""Does the event loop keep to its schedule? Stages that sleep, on more ranks than there may be cores.

::

    mpirun -n 8 python benchmarks/pipeline_sleep.py [--forward-ms 20] [--input-ms 20] [--weight-ms 20]

A rank that sleeps needs no core, so many ranks can show on a small machine what schedules do on a large one.
A stage is one layer, the identity, with two parts that autograd runs apart::

    x ──── sleeps F ───────── + ──── y       backward of the upper part: sleeps I, then x has its gradient
    w ──── (nothing) ── x 0 ──┘              backward of the lower part: sleeps W, then w has its gradient

so that a whole backward sleeps I + W, and one that is cut in two sleeps each when it is its turn. On the
first stage, which has no input that wants a gradient, I belongs to its W, as in any model. With two stages
per rank each sleeps half as long.

``time.sleep`` takes longer than it is told, and it is up to the machine by how much. So measured steps are
compared with the schedule simulated with the mean durations of the sleeps themselves; what is missing is
hpcpar's and MPI's. The ratio to the simulation with the nominal durations stands beside it. Where that
is much lower, the machine wakes processes late, for instance because ranks that wait keep its cores busy.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import hpcpar
from common import (
    Environment,
    add_common_options,
    describe,
    largest_over_ranks,
    measure,
    new_figure,
    parse_arguments,
    positive_int,
    print_table,
    save,
    verdict,
)
from hpcpar.comm import Communicator
from hpcpar.nn import Pipeline
from hpcpar.nn.pipeline import simulate

SCHEDULES = {"gpipe": 1, "1f1b": 1, "zero_bubble": 1, "interleaved": 2}
"""With the stages per rank."""

SHAPE = (8, 64)
GOAL = 0.97


# ---- stages that sleep -------------------------------------------------------------------------------------


@dataclass
class Naps:
    """How long the parts of a stage are to sleep, and how long they did, by kind: F, I, W."""

    nominal_s: dict[str, float]
    slept_s: dict[str, list[float]] = field(default_factory=lambda: {"F": [], "I": [], "W": []})

    def take(self, kind: str) -> None:
        """Sleep. **Local.**"""
        start = time.perf_counter()
        time.sleep(self.nominal_s[kind])
        self.slept_s[kind].append(time.perf_counter() - start)

    def forget(self) -> None:
        """Drop the durations so far. **Local.**"""
        for durations in self.slept_s.values():
            durations.clear()


class SleepyLayer(nn.Module):
    """The identity, slowly. The first layer has a parameter where others have an input."""

    def __init__(self, naps: Naps, is_first: bool) -> None:
        super().__init__()
        self.naps = naps
        self.weight = nn.Parameter(torch.ones(SHAPE[1]))
        self.embedding = nn.Parameter(torch.zeros(SHAPE[1])) if is_first else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.embedding is not None:
            x = x + self.embedding
        slept: torch.Tensor = _SleepyIdentity.apply(x, self.naps, "F", "I")
        weight: torch.Tensor = _SleepyIdentity.apply(self.weight, self.naps, None, "W")
        return slept + 0.0 * weight


class _SleepyIdentity(torch.autograd.Function):
    """Sleeps before it returns what it was given, in forward, in backward, or in both."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, naps: Naps, forward: str | None, backward: str) -> torch.Tensor:
        ctx.naps, ctx.kind = naps, backward
        if forward is not None:
            naps.take(forward)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        ctx.naps.take(ctx.kind)
        return gradient, None, None, None


# ---- measuring ---------------------------------------------------------------------------------------------


@dataclass
class Trainer:
    """A pipeline of stages that sleep."""

    pipe: Pipeline
    naps: list[Naps]
    inputs: torch.Tensor
    targets: torch.Tensor
    step_s: float = 0.0

    def step(self) -> None:
        """Train one step. **Collective.**"""
        start = time.perf_counter()
        self.pipe.zero_grad(set_to_none=True)
        loss = self.pipe.train_step(self.inputs, self.targets)
        self.step_s += time.perf_counter() - start
        wanted = float(F.mse_loss(self.inputs, self.targets))
        if abs(float(loss) - wanted) > 1e-5 * wanted:
            raise RuntimeError(f"the loss of stages that only sleep must be {wanted}, got {float(loss)}")


def main() -> None:
    """Run the benchmark. **Collective.**"""
    comm = hpcpar.comm.world()
    options = parse_arguments(make_parser(), comm)
    if options.quick:
        options.repetitions, options.microbatches = min(options.repetitions, 2), 8
        options.forward_ms = options.input_ms = options.weight_ms = 2
    environment = describe(comm)
    nominal_s = {"F": options.forward_ms / 1e3, "I": options.input_ms / 1e3, "W": options.weight_ms / 1e3}
    if comm.rank == 0:
        print(f"stages that sleep, {_in_ms(nominal_s)}\n{environment.text}", flush=True)
    trainers = {name: make_trainer(comm, name, nominal_s, options.microbatches) for name in SCHEDULES}
    runs = {name: trainer.step for name, trainer in trainers.items()}
    measure(comm, runs, 1)
    before = {name: trainer.pipe.stats() for name, trainer in trainers.items()}
    for trainer in trainers.values():
        trainer.step_s = 0.0
        for naps in trainer.naps:
            naps.forget()
    timings = measure(comm, runs, options.repetitions)
    results = []
    for name, trainer in trainers.items():
        figures = analyse(comm, trainer, before[name], options.repetitions)
        figures |= {"schedule": name, "step_s": timings.median(name), "seconds": timings.seconds[name]}
        results.append(figures)
        trainer.pipe.free()
    if comm.rank == 0:
        show(results, options, environment)
        content = {"microbatches": options.microbatches, "nominal_s": nominal_s, "results": results}
        save(options.output, "pipeline_sleep", environment, content, draw(results, environment))


def make_parser() -> argparse.ArgumentParser:
    """The command line. **Local.**"""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_common_options(parser, repetitions=3)
    parser.add_argument("--microbatches", type=positive_int, default=32, metavar="N", help="default 32")
    for kind, what in (("forward", "F"), ("input", "I"), ("weight", "W")):
        parser.add_argument(
            f"--{kind}-ms", type=positive_int, default=20, metavar="MS", help=f"{what}, per rank (default 20)"
        )
    return parser


def make_trainer(comm: Communicator, name: str, rank_s: Mapping[str, float], microbatches: int) -> Trainer:
    """A pipeline under one schedule, where the stages of a rank sleep ``rank_s`` together. **Collective.**"""
    chunks = SCHEDULES[name]
    nominal_s = {kind: seconds / chunks for kind, seconds in rank_s.items()}
    naps = [Naps(nominal_s) for _ in range(comm.size * chunks)]
    layers = [SleepyLayer(some, is_first=stage == 0) for stage, some in enumerate(naps)]
    pipe = Pipeline(
        layers,
        comm,
        microbatches=microbatches,
        schedule=name,
        chunks=chunks,
        loss_fn=F.mse_loss,
        balance=[1] * len(layers),
    )
    generator = torch.Generator().manual_seed(1)
    inputs, targets = torch.randn(2, microbatches * SHAPE[0], SHAPE[1], generator=generator)
    return Trainer(pipe, naps, inputs, targets)


def analyse(comm: Communicator, trainer: Trainer, before: Any, steps: int) -> dict[str, Any]:
    """Simulate with the sleeps as they were, and see where the rest of a step has gone. **Collective.**

    Raises RuntimeError on all ranks when a stage has not slept as often as its schedule says.
    """
    pipe = trainer.pipe
    schedule = pipe.schedule
    own = {
        stage: trainer.naps[stage].slept_s
        for stage, rank in enumerate(schedule.placement)
        if rank == comm.rank
    }
    slept = {stage: naps for part in comm.allgather(own) for stage, naps in part.items()}
    for stage, naps in slept.items():
        counts = {kind: len(durations) for kind, durations in naps.items()}
        if set(counts.values()) != {steps * schedule.microbatches}:
            raise RuntimeError(f"stage {stage} must sleep once per microbatch, got {counts} in {steps} steps")
    mean_s = {stage: {k: statistics.mean(some) for k, some in naps.items()} for stage, naps in slept.items()}
    nominal_s = {stage: trainer.naps[stage].nominal_s for stage in slept}
    stats, actions = pipe.stats(), steps * len(schedule.actions[comm.rank])
    computed_s, waited_s = stats.computed_s - before.computed_s, stats.waited_s - before.waited_s
    asleep_s = sum(sum(durations) for naps in own.values() for durations in naps.values())
    in_loop_s, in_actions_s = largest_over_ranks(
        comm, [(trainer.step_s - computed_s - waited_s) / actions, (computed_s - asleep_s) / actions]
    )
    return {
        "simulated_s": makespan_s(schedule, mean_s),
        "nominally_simulated_s": makespan_s(schedule, nominal_s),
        "loop_per_action_s": in_loop_s,
        "compute_per_action_s": in_actions_s,
        "actions": len(schedule.actions[comm.rank]),
        "mean_nap_s": {kind: statistics.mean(naps[kind] for naps in mean_s.values()) for kind in "FIW"},
    }


def makespan_s(schedule: Any, stage_s: Mapping[int, Mapping[str, float]]) -> float:
    """The simulated step; the first stage does everything in W. **Local.**"""
    stages = [stage_s[stage] for stage in sorted(stage_s)]
    inputs, weights = [some["I"] for some in stages], [some["W"] for some in stages]
    inputs[0], weights[0] = 0.0, inputs[0] + weights[0]
    forward = [some["F"] for some in stages]
    return simulate(schedule, forward=forward, backward_input=inputs, backward_weight=weights).makespan


# ---- reporting ---------------------------------------------------------------------------------------------


def show(results: Sequence[Mapping[str, Any]], options: argparse.Namespace, environment: Environment) -> None:
    """The table. **Local.**"""
    header = (
        "schedule",
        "step ms",
        "simulated ms",
        "ratio",
        "nominal ms",
        "ratio",
        "loop us",
        "around sleeps us",
    )
    rows = []
    for figures in results:
        ratio = figures["simulated_s"] / figures["step_s"]
        rows.append(
            (
                figures["schedule"],
                f"{figures['step_s'] * 1e3:.1f}",
                f"{figures['simulated_s'] * 1e3:.1f}",
                verdict(ratio, GOAL, at_least=True) if environment.ranks > 1 else f"{ratio:.2f}",
                f"{figures['nominally_simulated_s'] * 1e3:.1f}",
                f"{figures['nominally_simulated_s'] / figures['step_s']:.3f}",
                f"{figures['loop_per_action_s'] * 1e6:.0f}",
                f"{figures['compute_per_action_s'] * 1e6:.0f}",
            )
        )
    print_table(
        f"{options.microbatches} microbatches, median of {options.repetitions} repetitions", header, rows
    )
    naps = ", ".join(f"{figures['schedule']} {_in_ms(figures['mean_nap_s'], 3)}" for figures in results)
    print(f"mean sleeps: {naps}", flush=True)
    print(
        "loop: of an action, what is neither the action nor waiting; around sleeps: what an action takes "
        "more than its sleep; both on the rank where they are largest",
        flush=True,
    )
    if environment.ranks > 1:
        print(f"goal: simulated with the sleeps as they were / measured of at least {GOAL}", flush=True)
    else:
        print("no goal: one rank has nobody to wait for", flush=True)


def _in_ms(seconds: Mapping[str, float], digits: int = 0) -> str:
    return " ".join(f"{kind} {value * 1e3:.{digits}f} ms" for kind, value in seconds.items())


def draw(results: Sequence[Mapping[str, Any]], environment: Environment) -> Any:
    """Three bars per schedule: nominal, simulated, measured. **Local.**"""
    canvas = new_figure(1)
    if canvas is None:
        return None
    figure, (axes,) = canvas
    bars = {"nominal": "nominally_simulated_s", "simulated": "simulated_s", "measured": "step_s"}
    for place, (label, key) in enumerate(bars.items()):
        where = [group + 0.27 * (place - 1) for group in range(len(results))]
        drawn = axes.bar(where, [figures[key] * 1e3 for figures in results], 0.25, label=label)
        axes.bar_label(drawn, fmt="%.0f", fontsize=7)
    axes.set_xticks(range(len(results)), [figures["schedule"] for figures in results])
    axes.set(ylabel="ms per step")
    axes.margins(y=0.1)
    figure.legend(loc="outside lower center", ncols=len(bars), frameon=False)
    figure.suptitle(f"{environment.mpi}, {environment.ranks} rank(s) on {environment.nodes} node(s)")
    return figure


if __name__ == "__main__":
    main()
