"""Experts: calls over MPI against local calls, and the synchronous layer against dense and torch.

    mpirun -n 2 python benchmarks/experts.py
    mpirun -n 4 python benchmarks/experts.py --part layer

See `experts_remote.py` and `experts_layer.py` for what is timed.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

import torch

import experts_layer
import experts_remote
import hpcpar
from common import (
    Timings,
    add_common_options,
    describe,
    gloo,
    new_figure,
    parse_arguments,
    print_table,
    save,
    verdict,
)
from experts_layer import DENSE, EXPERTS_ONLY, HPCPAR, TORCH, LayerWork
from hpcpar.comm import Communicator

GOAL_EXTRA_US = 150.0
GOAL_SLOWEST = 5.0
GOAL_OUTSIDE = 0.25
ROWS = (1, 64, 512)
GOAL_ROWS = 64


def main() -> None:
    """Measure, print, save."""
    comm = hpcpar.comm.world()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_common_options(parser, repetitions=21)
    parser.add_argument("--part", choices=["all", "remote", "layer"], default="all", help="what to measure")
    options = parse_arguments(parser, comm)
    environment = describe(comm)
    if comm.rank == 0:
        print(environment.text, flush=True)
    content: dict[str, Any] = {}
    if options.part != "layer" and comm.size > 1:
        content |= remote(comm, options)
    if options.part != "remote":
        content |= layer(comm, options)
    if comm.rank == 0:
        figure = _draw(content) if content.get("layer") else None
        save(options.output, "experts", environment, content, figure)


def remote(comm: Communicator, options: argparse.Namespace) -> dict[str, Any]:
    """Latency of one caller, and several callers at once. **Collective.**"""
    pair = comm.Split(0 if comm.rank < 2 else 1, comm.rank)
    assert pair is not None
    rows = ROWS[:2] if options.quick else ROWS
    repetitions = min(3, options.repetitions) if options.quick else options.repetitions
    latencies = []
    if comm.rank < 2:
        for count in rows:
            latencies += experts_remote.measure_latency(pair, count, repetitions)
    latencies = comm.bcast(latencies, 1)
    seconds = 0.2 if options.quick else 3.0
    loads = [
        experts_remote.measure_load(comm, experts, threads, seconds)
        for experts, threads in ([(2, 2)] if options.quick else [(1, 1), (1, 8), (4, 8), (16, 8)])
    ]
    pair.Free()
    if comm.rank == 0:
        print_table(
            f"one caller, Linear({experts_remote.FEATURES}), microseconds; goal: extra at most "
            f"{GOAL_EXTRA_US:.0f} for ({GOAL_ROWS}, {experts_remote.FEATURES}) forward",
            ["rows", "direction", "local", "ping-pong", "remote", "extra", "goal"],
            [_latency_row(latency) for latency in latencies],
        )
        print_table(
            f"calls of (64, {experts_remote.FEATURES}) by {comm.size - 1} rank(s) at once; goal: slowest at "
            f"most {GOAL_SLOWEST:.0f} times the median",
            ["experts", "threads", "requests/s", "median ms", "slowest ms", "slowest/median", "mean batch"],
            [_load_row(load) for load in loads],
        )
    return {"latency": [asdict(each) for each in latencies], "load": [asdict(each) for each in loads]}


def _latency_row(latency: experts_remote.Latency) -> list[str]:
    extra = 1e6 * latency.extra
    has_goal = latency.rows == GOAL_ROWS and latency.direction == "forward"
    return [
        str(latency.rows),
        latency.direction,
        *(f"{1e6 * value:.0f}" for value in (latency.local, latency.ping_pong, latency.remote)),
        f"{extra:.0f}",
        verdict(extra, GOAL_EXTRA_US, at_least=False).partition(" ")[2] if has_goal else "",
    ]


def _load_row(load: experts_remote.Load) -> list[str]:
    return [
        str(load.experts),
        str(load.threads),
        f"{load.requests_per_s:.0f}",
        f"{1e3 * load.median_s:.2f}",
        f"{1e3 * load.slowest_s:.2f}",
        verdict(load.slowest_s / load.median_s, GOAL_SLOWEST, at_least=False),
        f"{load.mean_batch:.2f}",
    ]


def layer(comm: Communicator, options: argparse.Namespace) -> dict[str, Any]:
    """The layer over all ranks and over parts of them. **Collective.**"""
    found = []
    repetitions = min(2, options.repetitions) if options.quick else options.repetitions
    for size, work in _works(comm.size, options.quick):
        part = comm.Split(0 if comm.rank < size else 1, comm.rank)
        assert part is not None
        if comm.rank < size:
            divides = work.experts % size == 0
            with gloo(part):
                timings = experts_layer.measure_layer(part, work, repetitions, with_torch=divides)
            found.append({"ranks": size, **asdict(work), "text": work.text, "seconds": timings.seconds})
            if comm.rank == 0:
                _print_layer(size, work, timings)
        comm.Barrier()
        part.Free()
    return {"layer": found}


def _works(ranks: int, quick: bool) -> list[tuple[int, LayerWork]]:
    """Ranks and work: the goal's first, then more experts, then fewer ranks."""
    if quick:
        return [(ranks, LayerWork(32, 64, 4, 2, 64))]
    sizes = [size for size in (1, 2, 4, 8) if size < ranks]
    return [
        (ranks, LayerWork(512, 2048, 8, 2, 4096 // ranks)),
        (ranks, LayerWork(512, 2048, 8, 2, 4096)),
        (ranks, LayerWork(512, 512, 8, 2, 4096)),
        (ranks, LayerWork(512, 2048, 32, 2, 4096 // ranks)),
        *((size, LayerWork(512, 2048, 8, 2, 4096 // ranks)) for size in sizes),
    ]


def _print_layer(size: int, work: LayerWork, timings: Timings) -> None:
    rows = []
    for name in timings.seconds:
        outside = ""
        if name == HPCPAR:
            share = 1.0 - 1.0 / timings.speedup(EXPERTS_ONLY, HPCPAR)
            outside = verdict(share, GOAL_OUTSIDE, at_least=False)
        rows.append(
            [
                name,
                f"{1e3 * timings.median(name):.1f}",
                f"{size * work.tokens / timings.median(name):.0f}",
                f"{timings.speedup(HPCPAR, name):.2f}",
                outside,
            ]
        )
    print_table(
        f"{size} rank(s), {work.text}; goal: outside of experts at most {GOAL_OUTSIDE:.2f}",
        ["variant", "ms", "tokens/s", "hpcpar is x times as fast", "outside"],
        rows,
    )


def _draw(content: dict[str, Any]) -> Any:
    """Tokens per second of every work and variant."""
    drawn = new_figure(1)
    if drawn is None:
        return None
    figure, (axes,) = drawn
    labels = [
        f"{found['ranks']} rank(s)\n{found['text'].replace(', ', chr(10))}" for found in content["layer"]
    ]
    names = [HPCPAR, TORCH, DENSE, EXPERTS_ONLY]
    for place, name in enumerate(names):
        heights = [
            found["ranks"] * found["tokens"] / float(torch.tensor(found["seconds"][name]).median())
            if name in found["seconds"]
            else 0.0
            for found in content["layer"]
        ]
        axes.bar([i + 0.2 * (place - 1.5) for i in range(len(labels))], heights, 0.2, label=name)
    axes.set_xticks(range(len(labels)), labels, fontsize=7)
    axes.set(ylabel="tokens per second", title="expert layer, forward and backward")
    axes.legend()
    return figure


if __name__ == "__main__":
    main()
