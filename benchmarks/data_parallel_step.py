"""How much does data parallelism add to a training step: hpcpar, and DistributedDataParallel over gloo?

::

    mpirun -n 2 python benchmarks/data_parallel_step.py [--model mlp|gpt|both] [--with-mpi-transport]

Every variant has its own copy of the model, from the same seed, its own fused Adam, and sees the same
batches. A repetition runs each variant in turn for some steps (:mod:`common` says how); *no communication*
is the model by itself, so that the difference to it, taken within a repetition, is what a variant adds. The
goal is half of what DistributedDataParallel adds, or less.

With *forward overlap* the update of a step happens in the next forward. A run of some steps therefore ends
with waiting for the last update: nothing leaks into another variant's time, at the price that one step of
each run overlaps no forward.

Afterwards the parameters of each variant must be bitwise equal on all ranks, and are compared with those of
DistributedDataParallel: a fast wrong step is no step.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import hpcpar
from common import (
    Environment,
    Timings,
    add_common_options,
    describe,
    gloo,
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
from models import WORKLOADS, Batch, Workload, workload

ALONE, DDP = "no communication", "DDP over gloo"
BLOCKING, DEFAULT, OVERLAP = "hpcpar blocking", "hpcpar", "hpcpar forward overlap"
MPI_TRANSPORT = "hpcpar transport=mpi"
GOAL_ADDED = 0.5
BATCHES = 8


@dataclass
class Trainer:
    """A model in training: ``module`` is the model itself, ``wrapped`` what the forward is called on."""

    module: nn.Module
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    batches: list[Batch]
    steps_done: int = 0

    def train(self, steps: int) -> None:
        """Go on training; afterwards nothing is under way. **Collective**, if the variant communicates."""
        for _ in range(steps):
            inputs, targets = self.batches[self.steps_done % len(self.batches)]
            self.optimizer.zero_grad(set_to_none=True)
            self.loss(self.wrapped(inputs), targets).backward()
            self.optimizer.step()
            self.steps_done += 1
        if isinstance(self.optimizer, hpcpar.optim.DataParallelOptimizer):
            self.optimizer.finish()

    def reduction_s(self) -> tuple[float, float]:
        """Seconds of communication, and of waiting in it, so far. **Local.**"""
        if not isinstance(self.wrapped, hpcpar.nn.DataParallel):
            return 0.0, 0.0
        stats = self.wrapped.stats()
        return stats.communication_s, stats.exposed_s

    def free(self) -> None:
        """Give windows and communicators back. **Collective.**"""
        if isinstance(self.wrapped, hpcpar.nn.DataParallel):
            self.wrapped.free()


def main() -> None:
    """Run the benchmark. **Collective.**"""
    comm = hpcpar.comm.world()
    options = parse_arguments(make_parser(), comm)
    if options.quick:
        options.repetitions, options.steps, options.warmup = min(options.repetitions, 2), 2, 2
    environment = describe(comm)
    if options.warmup is None:
        options.warmup = 5 if environment.threads == 1 else 20
    if comm.rank == 0:
        print(f"one training step, data parallel\n{environment.text}", flush=True)
    names = list(WORKLOADS) if options.model == "both" else [options.model]
    results = {}
    with gloo(comm):
        for name in names:
            results[name] = run(comm, workload(name, options.quick), options)
            if comm.rank == 0:
                show(results[name], environment)
    if comm.rank == 0:
        content = {"steps_per_run": options.steps, "warmup_steps": options.warmup, "results": results}
        save(options.output, "data_parallel_step", environment, content, draw(results, environment))


def make_parser() -> argparse.ArgumentParser:
    """The command line. **Local.**"""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_common_options(parser, repetitions=15)
    parser.add_argument("--model", choices=[*WORKLOADS, "both"], default="both", help="default both")
    parser.add_argument("--steps", type=positive_int, default=4, metavar="N", help="of each run (default 4)")
    parser.add_argument(
        "--warmup",
        type=positive_int,
        metavar="N",
        help="steps of each variant before (default 5; 20 with several threads, for the progress trial)",
    )
    parser.add_argument("--with-mpi-transport", action="store_true", help="hpcpar by MPI messages, too")
    return parser


# ---- measuring ---------------------------------------------------------------------------------------------


def run(comm: Communicator, work: Workload, options: argparse.Namespace) -> dict[str, Any]:
    """Train one model in all ways, in turn. **Collective.**"""
    trainers: dict[str, Trainer] = {}
    memory = {}
    make_trainer(comm, work, ALONE).train(1)  # what is loaded on first use is nobody's memory
    for name in variant_names(options):
        before = resident_bytes(comm)
        trainers[name] = make_trainer(comm, work, name)
        trainers[name].train(options.warmup)
        memory[name] = resident_bytes(comm) - before
    runs = {name: runner(trainer, options.steps) for name, trainer in trainers.items()}
    measure(comm, runs, 1)
    before_s = {name: trainer.reduction_s() for name, trainer in trainers.items()}
    timings = measure(comm, runs, options.repetitions)
    steps = options.steps * options.repetitions
    reduction_s = {
        name: largest_over_ranks(
            comm, [(now - was) / steps for now, was in zip(t.reduction_s(), before_s[name], strict=True)]
        )
        for name, t in trainers.items()
    }
    variants = summarise(timings, options.steps, reduction_s, memory, compare(comm, trainers))
    parameters = sum(parameter.numel() for parameter in trainers[ALONE].module.parameters())
    for trainer in trainers.values():
        trainer.free()
    return {"model": work.name, "parameters": parameters, "variants": variants}


def variant_names(options: argparse.Namespace) -> list[str]:
    """What is run, in the order of the table. **Local.**"""
    extra = [MPI_TRANSPORT] if options.with_mpi_transport else []
    return [ALONE, DDP, BLOCKING, DEFAULT, OVERLAP, *extra]


def make_trainer(comm: Communicator, work: Workload, name: str) -> Trainer:
    """One variant, not yet trained. **Collective.**"""
    torch.manual_seed(0)
    module = work.build()
    adam = torch.optim.Adam(module.parameters(), lr=1e-4, fused=True)
    overlapping = hpcpar.optim.DataParallelOptimizer(adam) if name == OVERLAP else None
    wrappers: dict[str, Callable[[], nn.Module]] = {
        ALONE: lambda: module,
        DDP: lambda: DistributedDataParallel(module, gradient_as_bucket_view=True),
        BLOCKING: lambda: hpcpar.nn.DataParallel(module, comm, blocking_parameter_updates=True),
        DEFAULT: lambda: hpcpar.nn.DataParallel(module, comm),
        OVERLAP: lambda: hpcpar.nn.DataParallel(module, comm, overlapping),
        MPI_TRANSPORT: lambda: hpcpar.nn.DataParallel(module, comm, transport="mpi"),
    }
    generator = torch.Generator().manual_seed(1 + comm.rank)
    batches = [work.batch(generator) for _ in range(BATCHES)]
    return Trainer(module, wrappers[name](), overlapping or adam, work.loss, batches)


def runner(trainer: Trainer, steps: int) -> Callable[[], None]:
    """What is timed. **Local.**"""
    return lambda: trainer.train(steps)


def resident_bytes(comm: Communicator) -> int:
    """Memory of all ranks' processes, shared pages counted once; 0 where Linux does not tell. **Collective.**

    The proportional set size of a process divides each page by the number of processes that share it. What
    is free but kept for later is given back first, for it would hide the next one's needs.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    comm.Barrier()
    try:
        text = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
        mine = next(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("Pss:"))
    except (OSError, StopIteration):
        mine = 0
    comm.Barrier()  # nobody may go on and allocate while another still looks at pages they share
    return sum(int(other) for other in comm.allgather(mine))


def compare(comm: Communicator, trainers: Mapping[str, Trainer]) -> dict[str, float | None]:
    """Largest difference of a parameter to DDP's; None for the model that is alone. **Collective.**

    Raises RuntimeError on all ranks when a variant's replicas differ.
    """
    reference = flatten(trainers[DDP].module)
    differences: dict[str, float | None] = {ALONE: None}
    for name, trainer in trainers.items():
        if name == ALONE:
            continue
        mine = flatten(trainer.module)
        roots = mine.clone()
        comm.Bcast(roots, root=0)
        to_root, to_ddp = largest_over_ranks(
            comm, [float((mine - roots).abs().max()), float((mine - reference).abs().max())]
        )
        if to_root != 0.0:
            raise RuntimeError(f"{name}: replicas must be equal on all ranks, got {to_root:g} between them")
        differences[name] = to_ddp
    return differences


def flatten(module: nn.Module) -> torch.Tensor:
    """All parameters in one vector. **Local.**"""
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


# ---- reporting ---------------------------------------------------------------------------------------------


def summarise(
    timings: Timings,
    steps: int,
    reduction_s: Mapping[str, Sequence[float]],
    memory: Mapping[str, int],
    agreement: Mapping[str, float | None],
) -> dict[str, Any]:
    """Per step: medians, paired differences, and their share of DDP's. **Local.**"""
    ddp_added = timings.added(DDP, ALONE)
    variants = {}
    for name, seconds in timings.seconds.items():
        added = timings.added(name, ALONE)
        variants[name] = {
            "step_s": timings.median(name) / steps,
            "added_s": added / steps,
            "added_of_ddp": added / ddp_added if ddp_added > 0.0 else None,  # all noise, then
            "times_ddp": timings.speedup(name, DDP),
            "communication_s": reduction_s[name][0],
            "exposed_s": reduction_s[name][1],
            "memory_bytes": memory[name],
            "difference_to_ddp": agreement[name],
            "seconds_of_runs": seconds,
        }
    return variants


def show(result: Mapping[str, Any], environment: Environment) -> None:
    """The table of one model. **Local.**"""
    variants = result["variants"]
    seconds = variants[ALONE]["seconds_of_runs"]
    title = (
        f"{result['model']}, {result['parameters'] / 1e6:.1f} million parameters, "
        f"median of {len(seconds)} repetitions"
    )
    header = ("variant", "step ms", "added ms", "added / DDP's", "exposed ms", "memory MiB", "off DDP by")
    print_table(title, header, [line(name, figures, environment) for name, figures in variants.items()])
    if len(seconds) > 1:
        low, middle, high = statistics.quantiles(seconds, n=4)
        print(
            f"noise: the middle half of the times of {ALONE!r} spans {100 * (high - low) / middle:.0f} % of "
            "their median",
            flush=True,
        )
    if environment.ranks == 1:
        print("no goal: one rank has nobody to reduce with", flush=True)
    else:
        print(f"goal: added / DDP's of at most {GOAL_ADDED} for {DEFAULT!r} and {OVERLAP!r}", flush=True)


def line(name: str, figures: Mapping[str, Any], environment: Environment) -> tuple[str, ...]:
    """A row of the table; a dash where there is nothing to say. **Local.**"""
    ratio = figures["added_of_ddp"]
    share = "-"
    if ratio is not None and name != ALONE and environment.ranks > 1:
        has_goal = name in (DEFAULT, OVERLAP)
        share = verdict(ratio, GOAL_ADDED, at_least=False) if has_goal else f"{ratio:.2f}"
    ours = name not in (ALONE, DDP)
    difference = figures["difference_to_ddp"]
    return (
        name,
        f"{figures['step_s'] * 1e3:.1f}",
        "-" if name == ALONE else f"{figures['added_s'] * 1e3:.1f}",
        share,
        f"{figures['exposed_s'] * 1e3:.1f}" if ours else "-",
        f"{figures['memory_bytes'] / environment.ranks / 2**20:.0f}",
        "-" if difference is None else f"{difference:.1g}",
    )


def draw(results: Mapping[str, Any], environment: Environment) -> Any:
    """One bar per variant: the step by itself, and what the variant adds. **Local.**"""
    canvas = new_figure(len(results))
    if canvas is None:
        return None
    figure, panels = canvas
    for axes, (name, result) in zip(panels, results.items(), strict=True):
        variants = result["variants"]
        labels = list(variants)
        alone_ms = variants[ALONE]["step_s"] * 1e3
        added_ms = [max(0.0, figures["added_s"]) * 1e3 for figures in variants.values()]
        axes.barh(labels, alone_ms, color="0.75", label=ALONE)
        bars = axes.barh(labels, added_ms, left=alone_ms, color="tab:blue", label="added")
        bars[labels.index(DDP)].set_color("tab:orange")
        axes.bar_label(bars, [f" +{value:.1f}" if value else "" for value in added_ms])
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set(title=f"{name}, {result['parameters'] / 1e6:.1f} million parameters", xlabel="ms per step")
    figure.suptitle(f"{environment.mpi}, {environment.ranks} rank(s) on {environment.nodes} node(s)")
    return figure


if __name__ == "__main__":
    main()
