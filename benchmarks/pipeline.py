"""How close does a pipeline come to its schedule: hpcpar, torch.distributed.pipelining, and a bare loop?

::

    mpirun -n 2 python benchmarks/pipeline.py [--model mlp|gpt|both]
    mpirun -n 2 python benchmarks/pipeline.py --memory

Every variant computes the gradients of one batch (:mod:`pipeline_peers`), with a stage per rank, or two with
*interleaved*; there is no optimizer. All run in turn within a repetition (:mod:`common` says how), and so do
the stages by themselves, without messages, on all ranks at once. From these times follows what the schedule
would take without any overhead (:mod:`pipeline_ideal`)::

    efficiency  = ideal / measured                       of the same repetition; the median of these
    us / action = (measured - ideal) / actions on a rank

so that neither a slow machine nor the bubble, which is the schedule's own, counts as overhead. Before
anything is timed, loss and gradients of every variant must equal those of the unsplit model.

*unsplit* is the whole batch on rank 0 while the others sleep; *unsplit in microbatches* is the same in as
many parts as the pipeline has. Small parts compute less efficiently, which the pipeline cannot help.

``--memory`` measures no time, but what 1F1B and GPipe keep for backward (:mod:`pipeline_memory`).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import hpcpar
import pipeline_memory
from common import (
    Environment,
    Timings,
    add_common_options,
    describe,
    gloo,
    measure,
    new_figure,
    parse_arguments,
    positive_int,
    print_table,
    save,
    verdict,
)
from hpcpar.comm import Communicator
from hpcpar.nn.pipeline import Schedule, build_schedule
from pipeline_ideal import Costs, StageCompute, ideal_s
from pipeline_peers import (
    FLOOR,
    ONE_F_ONE_B,
    SCHEDULES,
    TORCH,
    UNSPLIT,
    UNSPLIT_PARTS,
    ZERO_BUBBLE,
    check,
    make_variants,
)
from pipeline_workloads import WORKLOAD_NAMES, PipelineWorkload, workloads

GOALS = {(8, 32): 0.95, (32, 8): 0.93}
"""Efficiency of 1f1b, by microbatches and their rows."""


def main() -> None:
    """Run the benchmark. **Collective.**"""
    comm = hpcpar.comm.world()
    options = parse_arguments(make_parser(), comm)
    environment = describe(comm)
    if options.memory:
        pipeline_memory.run(comm, options, environment)
        return
    if options.quick:
        options.repetitions, options.warmup = min(options.repetitions, 2), 2
    if options.warmup is None:
        options.warmup = 2 if environment.threads == 1 else 20
    if comm.rank == 0:
        print(f"one training step, pipelined\n{environment.text}", flush=True)
    results = []
    with gloo(comm):
        for work in workloads(options.model, comm.size, options.quick):
            results.append(run(comm, work, options))
            if comm.rank == 0:
                show(results[-1], environment)
    if comm.rank == 0:
        show_goals(environment)
        save(options.output, "pipeline", environment, {"results": results}, draw(results, environment))


def make_parser() -> argparse.ArgumentParser:
    """The command line. **Local.**"""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_common_options(parser, repetitions=7)
    parser.add_argument("--model", choices=[*WORKLOAD_NAMES, "both"], default="both", help="default both")
    parser.add_argument(
        "--warmup",
        type=positive_int,
        metavar="N",
        help="steps of each variant before (default 2; 20 with several threads, for the progress trial)",
    )
    parser.add_argument("--memory", action="store_true", help="what is kept for backward, instead of times")
    return parser


# ---- measuring ---------------------------------------------------------------------------------------------


def run(comm: Communicator, work: PipelineWorkload, options: argparse.Namespace) -> dict[str, Any]:
    """Train one model in all ways, in turn. **Collective.**"""
    variants = make_variants(comm, work)
    differences = check(comm, work, variants)
    schedules = {
        name: build_schedule(how[0], comm.size, work.microbatches, how[1]) for name, how in SCHEDULES.items()
    }
    computes = {name: StageCompute(comm, work, schedule) for name, schedule in schedules.items()}
    runs = {name: variant.step for name, variant in variants.items()}
    runs.update({f"compute of {name}": compute.run for name, compute in computes.items()})
    measure(comm, runs, options.warmup)
    for compute in computes.values():
        compute.forget()
    timings = measure(comm, runs, options.repetitions)
    costs = {name: compute.gather(comm) for name, compute in computes.items()}
    for variant in variants.values():
        variant.free()
    schedules.update({TORCH: schedules[ONE_F_ONE_B], FLOOR: schedules[ONE_F_ONE_B]})
    ideals = {
        name: ideal_s(schedule, costs.get(name, costs[ONE_F_ONE_B])) for name, schedule in schedules.items()
    }
    return {
        "workload": work.label,
        "microbatches": work.microbatches,
        "samples": work.samples,
        "variants": {
            name: summarise(timings, name, schedules.get(name), ideals.get(name)) | {"difference": difference}
            for name, difference in differences.items()
        },
        "stage_s": {name: medians(some) for name, some in costs.items()},
    }


def summarise(
    timings: Timings, name: str, schedule: Schedule | None, ideals: Sequence[float] | None
) -> dict[str, Any]:
    """Medians of one variant, and of its ratios to others within a repetition. **Local.**"""
    seconds = timings.seconds[name]
    figures: dict[str, Any] = {
        "step_s": timings.median(name),
        "times_unsplit": timings.speedup(name, UNSPLIT),
        "times_unsplit_in_microbatches": timings.speedup(name, UNSPLIT_PARTS),
        "times_torch": timings.speedup(name, TORCH),
        "times_1f1b": timings.speedup(name, ONE_F_ONE_B),
        "seconds": seconds,
    }
    if schedule is not None and ideals is not None:
        actions = max(map(len, schedule.actions))
        pairs = list(zip(ideals, seconds, strict=True))
        figures |= {
            "ideal_s": statistics.median(ideals),
            "efficiency": statistics.median(ideal / own for ideal, own in pairs),
            "overhead_per_action_s": statistics.median((own - ideal) / actions for ideal, own in pairs),
            "actions": actions,
            "seconds_of_ideal": list(ideals),
        }
    return figures


def medians(runs: Sequence[Costs]) -> Costs:
    """The median over repetitions of each cost. **Local.**"""
    return {
        kind: [statistics.median(some) for some in zip(*(run[kind] for run in runs), strict=True)]
        for kind in runs[0]
    }


# ---- reporting ---------------------------------------------------------------------------------------------


def show(result: Mapping[str, Any], environment: Environment) -> None:
    """The table of one workload, and what its stages compute. **Local.**"""
    variants = result["variants"]
    title = f"{result['workload']}, median of {len(variants[UNSPLIT]['seconds'])} repetitions"
    header = (
        "variant",
        "step ms",
        "ideal ms",
        "efficiency",
        "us / action",
        "x unsplit",
        "x in parts",
        "x torch",
    )
    goal = GOALS.get((result["microbatches"], result["samples"])) if has_goals(environment) else None
    rows = [line(name, figures, goal, has_goals(environment)) for name, figures in variants.items()]
    print_table(title, header, rows)
    for name, costs in result["stage_s"].items():
        kinds = {"F": "forward", "I": "backward_input", "W": "backward_weight"}
        if name != ZERO_BUBBLE:
            costs = {**costs, "backward": [2 * half for half in costs["backward_input"]]}
            kinds = {"F": "forward", "B": "backward"}
        parts = (f"{kind} {' '.join(f'{s * 1e3:.3f}' for s in costs[key])}" for kind, key in kinds.items())
        print(f"{name}, one microbatch, ms per stage: {', '.join(parts)}", flush=True)
    if has_goals(environment):
        print(zero_bubble_line(variants), flush=True)


def line(name: str, figures: Mapping[str, Any], goal: float | None, has_goal: bool) -> tuple[str, ...]:
    """A row of the table; a dash where there is nothing to say. **Local.**"""
    ideal, efficiency, overhead = "-", "-", "-"
    if "ideal_s" in figures:
        ideal = f"{figures['ideal_s'] * 1e3:.2f}"
        efficiency = f"{figures['efficiency']:.3f}"
        overhead = f"{figures['overhead_per_action_s'] * 1e6:.0f}"
        if goal is not None and name == ONE_F_ONE_B:
            efficiency = verdict(figures["efficiency"], goal, at_least=True)
    torch = f"{figures['times_torch']:.2f}"
    if has_goal and name == ONE_F_ONE_B:
        torch = verdict(figures["times_torch"], 1.0, at_least=True)
    unsplit, parts = figures["times_unsplit"], figures["times_unsplit_in_microbatches"]
    return (
        name,
        f"{figures['step_s'] * 1e3:.2f}",
        ideal,
        efficiency,
        overhead,
        f"{unsplit:.2f}",
        f"{parts:.2f}",
        torch,
    )


def zero_bubble_line(variants: Mapping[str, Any]) -> str:
    """Whether zero_bubble is faster than 1f1b where the simulator says so. **Local.**"""
    pairs = zip(
        variants[ONE_F_ONE_B]["seconds_of_ideal"], variants[ZERO_BUBBLE]["seconds_of_ideal"], strict=True
    )
    predicted = statistics.median(whole / split for whole, split in pairs)
    found = variants[ZERO_BUBBLE]["times_1f1b"]
    judged = verdict(found, 1.0, at_least=True) if predicted > 1.0 else f"{found:.2f}, no goal"
    return f"zero_bubble, times as fast as 1f1b: {predicted:.2f} simulated, {judged}"


def has_goals(environment: Environment) -> bool:
    """Whether there is anything to reach. **Local.**"""
    return environment.ranks > 1


def show_goals(environment: Environment) -> None:
    """What the verdicts mean. **Local.**"""
    if not has_goals(environment):
        print("\nno goal: one rank has nobody to send to", flush=True)
        return
    efficiencies = ", ".join(f"{goal} at {count} x {rows} rows" for (count, rows), goal in GOALS.items())
    print(
        f"\ngoals: efficiency of {ONE_F_ONE_B!r} of at least {efficiencies}; faster than {TORCH!r} in every "
        "table; zero_bubble faster than 1f1b where the simulator says so, given the times of the stages",
        flush=True,
    )


def draw(results: Sequence[Mapping[str, Any]], environment: Environment) -> Any:
    """A group of bars per workload: the efficiency of each variant. **Local.**"""
    canvas = new_figure(1)
    if canvas is None:
        return None
    figure, (axes,) = canvas
    figure.set_size_inches(10.0, 4.6)
    names = [*SCHEDULES, TORCH, FLOOR]
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        values = [result["variants"][name]["efficiency"] for result in results]
        where = [group + (place - (len(names) - 1) / 2) * width for group in range(len(results))]
        bars = axes.bar(where, values, width * 0.92, label=name)
        axes.bar_label(bars, [f"{value:.2f}" for value in values], fontsize=7)
    axes.set_xticks(range(len(results)), [result["workload"] for result in results])
    axes.axhline(1.0, color="0.6", linewidth=0.8)
    axes.set(ylabel="ideal / measured", ylim=(0.0, None))
    axes.margins(y=0.1)
    figure.legend(loc="outside lower center", ncols=len(names), frameon=False)
    figure.suptitle(f"{environment.mpi}, {environment.ranks} rank(s) on {environment.nodes} node(s)")
    return figure


if __name__ == "__main__":
    main()
