"""Ranks of unequal speed: a collaborative optimizer against lock-step data parallelism; see `optimizers.py`.

The last rank is four times slower than the others::

    lock-step      rank 0   m . . . m . . . | update         m: a microbatch,  .: waits for the slowest
                   rank 3   m m m m m m m m | update
    collaborative  rank 0   m m m m m | round                as many microbatches as each gets done
                   rank 3   m m m m m | round

A microbatch sleeps for most of its time, and computes a tiny model besides: sleeping needs no core, so four
ranks fit on a machine with two. Both ways make an update of every ``TARGET_MICROBATCHES`` microbatches of all
ranks together; in lock-step each rank computes its equal part of them, the gradients accumulate, and only
the last is reduced.

A run of the collaborative optimizer lasts for a number of updates. Each rank counts the samples it computes,
and all of them count, since what is left over at the end of a run goes into the next update.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import hpcpar
from common import Environment, Timings, measure, new_figure, print_table, verdict
from hpcpar.comm import Communicator
from replicas import require_equal_replicas

__all__ = ["draw", "run", "show"]

LOCK_STEP, COLLABORATIVE, DELAYED = "lock-step", "collaborative", "collaborative, delayed averaging"
GOAL, GOAL_RANKS = 1.8, 4
SLOWER = 4
SAMPLES, FEATURES, CLASSES = 32, 32, 10
TARGET_MICROBATCHES = 32


@dataclass
class Worker:
    """One rank's part of a variant; ``samples`` is what it has computed so far.

    ``update`` goes on training for a number of updates.
    """

    module: nn.Module
    update: Callable[[int], None]
    samples: int = 0


@dataclass(frozen=True)
class Microbatch:
    """Forward and backward of one microbatch on this rank, which takes ``nap_s`` longer than it computes."""

    inputs: torch.Tensor
    targets: torch.Tensor
    nap_s: float

    def compute(self, model: nn.Module) -> None:
        """Leave its mean gradient in ``.grad``."""
        time.sleep(self.nap_s)
        F.cross_entropy(model(self.inputs), self.targets).backward()


# ---- measuring ---------------------------------------------------------------------------------------------


def run(comm: Communicator, options: argparse.Namespace) -> dict[str, Any]:
    """Time the three variants in turn. **Collective.**"""
    nap_s = options.sleep_ms / 1e3
    slowness = SLOWER if comm.size > 1 and comm.rank == comm.size - 1 else 1
    generator = torch.Generator().manual_seed(comm.rank)
    inputs = torch.randn(SAMPLES, FEATURES, generator=generator)
    targets = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    microbatch = Microbatch(inputs, targets, slowness * nap_s)
    with ExitStack() as stack:
        workers = {
            LOCK_STEP: stack.enter_context(lock_step(comm, microbatch)),
            COLLABORATIVE: stack.enter_context(collaborative(comm, microbatch, delayed=False)),
            DELAYED: stack.enter_context(collaborative(comm, microbatch, delayed=True)),
        }
        timings, samples = time_workers(comm, workers, options)
    for name, worker in workers.items():  # only now: at its end a collaboration makes all ranks one replica
        require_equal_replicas(comm, name, worker.module)
    return {
        "sleep_s": nap_s,
        "slower": SLOWER,
        "updates_per_run": options.updates,
        "target_batch_size": TARGET_MICROBATCHES * SAMPLES,
        "variants": summarise(timings, samples),
    }


def time_workers(
    comm: Communicator, workers: Mapping[str, Worker], options: argparse.Namespace
) -> tuple[Timings, dict[str, list[list[int]]]]:
    """Seconds of each run, and the samples that each rank has computed in it. **Collective.**"""
    samples: dict[str, list[int]] = {name: [] for name in workers}

    def runner(name: str, worker: Worker) -> Callable[[], None]:
        def train() -> None:
            before = worker.samples
            worker.update(options.updates)
            samples[name].append(worker.samples - before)

        return train

    runs = {name: runner(name, worker) for name, worker in workers.items()}
    measure(comm, runs, 1)
    for counts in samples.values():
        counts.clear()
    timings = measure(comm, runs, options.repetitions)
    everyone = comm.allgather(samples)
    return timings, {name: [each[name] for each in everyone] for name in samples}


def make_net() -> nn.Module:
    """The tiny model, with the same parameters every time. **Local.**"""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, CLASSES))


@contextmanager
def lock_step(comm: Communicator, microbatch: Microbatch) -> Iterator[Worker]:
    """Data parallelism with accumulation. **Collective.**"""
    net = make_net()
    adam = torch.optim.Adam(net.parameters(), lr=1e-3)
    model = hpcpar.nn.DataParallel(net, comm)
    own = max(1, TARGET_MICROBATCHES // comm.size)

    def update(updates: int) -> None:
        for _ in range(updates):
            adam.zero_grad()
            for number in range(own):
                last = number == own - 1
                with contextlib.nullcontext() if last else model.no_sync():
                    microbatch.compute(model)
                worker.samples += SAMPLES
            adam.step()

    worker = Worker(net, update)
    yield worker
    model.free()


@contextmanager
def collaborative(comm: Communicator, microbatch: Microbatch, *, delayed: bool) -> Iterator[Worker]:
    """The collaborative optimizer. **Collective.**"""
    net = make_net()
    adam = torch.optim.Adam(net.parameters(), lr=1e-3)
    target = TARGET_MICROBATCHES * SAMPLES
    with hpcpar.optim.CollaborativeOptimizer(
        adam, comm, target_batch_size=target, batch_size_per_step=SAMPLES, delayed_averaging=delayed
    ) as optimizer:

        def update(updates: int) -> None:
            end = optimizer.local_step + updates
            while optimizer.local_step < end:
                optimizer.zero_grad()
                microbatch.compute(net)
                worker.samples += SAMPLES
                optimizer.step()

        worker = Worker(net, update)
        yield worker


def summarise(timings: Timings, samples: Mapping[str, list[list[int]]]) -> dict[str, Any]:
    """Samples per second, and how many times lock-step's, by variant. **Local.**"""
    rates = {
        name: [sum(ranks) / s for ranks, s in zip(zip(*samples[name], strict=True), seconds, strict=True)]
        for name, seconds in timings.seconds.items()
    }
    return {
        name: {
            "samples_per_s": statistics.median(own),
            "times_lock_step": statistics.median([a / b for a, b in zip(own, rates[LOCK_STEP], strict=True)]),
            "samples_of_ranks": [sum(counts) for counts in samples[name]],
            "seconds_of_runs": timings.seconds[name],
            "samples_of_runs": [sum(ranks) for ranks in zip(*samples[name], strict=True)],
        }
        for name, own in rates.items()
    }


# ---- reporting ---------------------------------------------------------------------------------------------


def show(result: Mapping[str, Any], environment: Environment) -> None:
    """The table. **Local.**"""
    variants = result["variants"]
    title = (
        f"microbatches of {SAMPLES} samples and {result['sleep_s'] * 1e3:.0f} ms of sleep, the last rank "
        f"{result['slower']} times as long; updates of {result['target_batch_size']} samples"
    )
    header = ("variant", "samples/s", "x lock-step", "share of the slow rank")
    print_table(title, header, [_line(name, figures, environment) for name, figures in variants.items()])
    if environment.ranks == GOAL_RANKS:
        print(f"goal: both collaborative ones at least {GOAL} x lock-step", flush=True)
    else:
        reason = (
            "one rank has nobody to wait for" if environment.ranks == 1 else f"it is for {GOAL_RANKS} ranks"
        )
        print(f"no goal: {reason}", flush=True)


def _line(name: str, figures: Mapping[str, Any], environment: Environment) -> tuple[str, ...]:
    times = f"{figures['times_lock_step']:.2f}"
    if environment.ranks == GOAL_RANKS and name != LOCK_STEP:
        times = verdict(figures["times_lock_step"], GOAL, at_least=True)
    counts = figures["samples_of_ranks"]
    return name, f"{figures['samples_per_s']:.0f}", times, f"{counts[-1] / sum(counts):.2f}"


def draw(result: Mapping[str, Any], environment: Environment) -> Any:
    """Samples per second, by the rank that has computed them. **Local.**"""
    canvas = new_figure(1)
    if canvas is None:
        return None
    figure, (axes,) = canvas
    variants = result["variants"]
    lefts = [0.0] * len(variants)
    for rank in range(environment.ranks):
        widths = [
            v["samples_per_s"] * v["samples_of_ranks"][rank] / sum(v["samples_of_ranks"])
            for v in variants.values()
        ]
        axes.barh(list(variants), widths, left=lefts, label=f"rank {rank}")
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="samples per second", title=f"last rank {result['slower']} times slower")
    axes.legend()
    figure.suptitle(f"{environment.mpi}, {environment.ranks} rank(s) on {environment.nodes} node(s)")
    return figure
