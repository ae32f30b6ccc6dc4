"""What a step with sharded optimizer state costs, and what it saves; see `optimizers.py`.

Every variant has its own copy of the model, from the same seed, its own fused Adam, and the same batches::

    no communication        the model by itself, each rank for its own
    DDP over gloo           DistributedDataParallel
    DDP + ZeroRedundancy    with ZeroRedundancyOptimizer: state split by parameters, updates broadcast
    hpcpar                  DataParallel
    hpcpar sharded          DataParallel with ShardedOptimizer

Memory is taken twice. *Exact* are the bytes of parameters and optimizer state, of which a rank's share is
counted: what lies in memory that the ranks of its node share, divided by their number. *Resident* is what
the processes have grown by, as the system sees it (:func:`data_parallel_step.resident_bytes`), gradients and
buckets included.

Afterwards the replicas of each variant must be bitwise equal, and are compared with DDP's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import hpcpar
from common import Environment, Timings, gloo, largest_over_ranks, measure, new_figure, print_table, verdict
from data_parallel_step import ALONE, BATCHES, DDP, Trainer, compare, resident_bytes, runner
from hpcpar.comm import Communicator
from models import WORKLOADS, Workload, workload

__all__ = ["draw", "run", "show"]

ZERO, PLAIN, SHARDED = "DDP + ZeroRedundancy", "hpcpar", "hpcpar sharded"
NAMES = (ALONE, DDP, ZERO, PLAIN, SHARDED)
ADAM: dict[str, Any] = {"lr": 1e-4, "fused": True}
GOAL_STEP, GOAL_MEMORY = 1.25, 0.55


@dataclass
class ShardingTrainer(Trainer):
    """A trainer that gives back what its optimizer shares, too."""

    def free(self) -> None:
        """Give windows and communicators back. **Collective.**"""
        if isinstance(self.optimizer, hpcpar.optim.ShardedOptimizer):
            self.optimizer.free()
        super().free()


# ---- measuring ---------------------------------------------------------------------------------------------


def run(comm: Communicator, options: argparse.Namespace) -> dict[str, Any]:
    """Each model in all ways, in turn: results by the name of the model. **Collective.**"""
    with gloo(comm):
        return {name: run_model(comm, workload(name, options.quick), options) for name in WORKLOADS}


def run_model(comm: Communicator, work: Workload, options: argparse.Namespace) -> dict[str, Any]:
    """Train one model in all ways. **Collective.**"""
    trainers: dict[str, ShardingTrainer] = {}
    resident, exact = {}, {}
    for name in (ALONE, ZERO):  # what is loaded on first use is nobody's memory
        make_trainer(comm, work, name).train(1)
    for name in NAMES:
        before = resident_bytes(comm)
        trainers[name] = make_trainer(comm, work, name)
        trainers[name].train(options.warmup)
        resident[name] = (resident_bytes(comm) - before) / comm.size
        (exact[name],) = largest_over_ranks(comm, [share_of_bytes(comm, trainers[name])])
    runs = {name: runner(trainer, options.steps) for name, trainer in trainers.items()}
    measure(comm, runs, 1)
    timings = measure(comm, runs, options.repetitions)
    difference = compare(comm, trainers)
    parameters = sum(parameter.numel() for parameter in trainers[ALONE].module.parameters())
    for trainer in trainers.values():
        trainer.free()
    variants = summarise(timings, options.steps, exact, resident, difference)
    return {"model": work.name, "parameters": parameters, "variants": variants}


def make_trainer(comm: Communicator, work: Workload, name: str) -> ShardingTrainer:
    """One variant, not yet trained. **Collective.**"""
    torch.manual_seed(0)
    module = work.build()
    wrappers: dict[str, Callable[[], nn.Module]] = {
        ALONE: lambda: module,
        DDP: lambda: DistributedDataParallel(module, gradient_as_bucket_view=True),
        ZERO: lambda: DistributedDataParallel(module, gradient_as_bucket_view=True),
        PLAIN: lambda: hpcpar.nn.DataParallel(module, comm),
        SHARDED: lambda: hpcpar.nn.DataParallel(module, comm),
    }
    wrapped = wrappers[name]()
    generator = torch.Generator().manual_seed(1 + comm.rank)
    batches = [work.batch(generator) for _ in range(BATCHES)]
    return ShardingTrainer(module, wrapped, make_optimizer(comm, wrapped, name), work.loss, batches)


def make_optimizer(comm: Communicator, model: nn.Module, name: str) -> torch.optim.Optimizer:
    """Adam, as the variant has it. **Collective**, if it communicates."""
    if name == ZERO:
        # Parameters as views of the tensors that are broadcast: its fastest way.
        return ZeroRedundancyOptimizer(
            model.parameters(), torch.optim.Adam, parameters_as_bucket_view=True, **ADAM
        )
    if name == SHARDED:
        return hpcpar.optim.ShardedOptimizer(model, torch.optim.Adam, comm, **ADAM)
    return torch.optim.Adam(model.parameters(), **ADAM)


def share_of_bytes(comm: Communicator, trainer: Trainer) -> float:
    """Bytes of parameters and optimizer state, this rank's share of those that its node shares. **Local.**"""
    optimizer = trainer.optimizer
    is_shared = isinstance(optimizer, hpcpar.optim.ShardedOptimizer) and optimizer.is_shared
    parameters = sum(p.numel() * p.element_size() for p in trainer.module.parameters())
    # Of torch's, only the inner optimizer has the state of this rank's part, and nothing else.
    inner = optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer
    state = sum(
        value.numel() * value.element_size()
        for entries in inner.state.values()
        for value in entries.values()
        if isinstance(value, torch.Tensor)
    )
    return parameters / (comm.node.size if is_shared else 1) + state


def summarise(
    timings: Timings,
    steps: int,
    exact: Mapping[str, float],
    resident: Mapping[str, float],
    difference: Mapping[str, float | None],
) -> dict[str, Any]:
    """Medians per step, paired ratios, bytes per rank, by variant. **Local.**"""
    return {
        name: {
            "step_s": timings.median(name) / steps,
            "times_alone": timings.speedup(ALONE, name),
            "exact_bytes": exact[name],
            "exact_of_plain": exact[name] / exact[PLAIN],
            "resident_bytes": resident[name],
            "difference_to_ddp": difference[name],
            "seconds_of_runs": seconds,
        }
        for name, seconds in timings.seconds.items()
    }


# ---- reporting ---------------------------------------------------------------------------------------------


def show(results: Mapping[str, Any], environment: Environment) -> None:
    """A table for each model. **Local.**"""
    header = ("variant", "step ms", "x alone", "exact MiB", "of plain", "resident MiB", "off DDP by")
    for result in results.values():
        variants = result["variants"]
        repetitions = len(variants[ALONE]["seconds_of_runs"])
        title = (
            f"{result['model']}, {result['parameters'] / 1e6:.1f} million parameters, memory per rank, "
            f"median of {repetitions} repetitions"
        )
        print_table(title, header, [line(name, result, environment) for name in variants])
    if has_goals(environment):
        print(
            f"goals: {SHARDED!r} at most {GOAL_STEP} x alone for mlp, and {GOAL_MEMORY} of plain", flush=True
        )
    else:
        only = environment.ranks == 1
        print(f"no goal: {'one rank has nobody to share with' if only else 'it is for 2 ranks on a node'}")


def has_goals(environment: Environment) -> bool:
    """Whether these are the ranks that the goals are for. **Local.**"""
    return environment.ranks == 2 and environment.nodes == 1


def line(name: str, result: Mapping[str, Any], environment: Environment) -> tuple[str, ...]:
    """A row of the table. **Local.**"""
    figures = result["variants"][name]
    times, share = f"{figures['times_alone']:.2f}", f"{figures['exact_of_plain']:.2f}"
    if name == SHARDED and has_goals(environment):
        share = verdict(figures["exact_of_plain"], GOAL_MEMORY, at_least=False)
        if result["model"] == "mlp":
            times = verdict(figures["times_alone"], GOAL_STEP, at_least=False)
    difference = figures["difference_to_ddp"]
    return (
        name,
        f"{figures['step_s'] * 1e3:.1f}",
        times,
        f"{figures['exact_bytes'] / 2**20:.1f}",
        share,
        f"{figures['resident_bytes'] / 2**20:.0f}",
        "-" if difference is None else f"{difference:.1g}",
    )


def draw(results: Mapping[str, Any], environment: Environment) -> Any:
    """Step time and memory of each variant and model. **Local.**"""
    canvas = new_figure(2 * len(results))
    if canvas is None:
        return None
    figure, panels = canvas
    for result, (left, right) in zip(
        results.values(), zip(panels[::2], panels[1::2], strict=True), strict=True
    ):
        variants = result["variants"]
        _bars(left, variants, [v["step_s"] * 1e3 for v in variants.values()], "ms per step")
        _bars(right, variants, [v["exact_bytes"] / 2**20 for v in variants.values()], "MiB per rank")
        left.set_title(f"{result['model']}: time")
        right.set_title(f"{result['model']}: parameters and optimizer state")
    figure.suptitle(f"{environment.mpi}, {environment.ranks} rank(s) on {environment.nodes} node(s)")
    return figure


def _bars(axes: Any, names: Mapping[str, Any], values: Sequence[float], label: str) -> None:
    colours = ["0.75", "tab:orange", "tab:orange", "tab:blue", "tab:blue"]
    bars = axes.barh(list(names), values, color=colours)
    axes.bar_label(bars, [f" {value:.0f}" for value in values])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(label)
