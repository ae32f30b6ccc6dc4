"""How fast is an allreduce of one buffer: hpcpar, the MPI library below it, and gloo beside it?

::

    mpirun -n 2 python benchmarks/allreduce.py [--compare RESULTS_WITH_THE_OTHER_MPI.json]

One float32 buffer per size, reduced by every variant in turn (:mod:`common` says how). Before each run every
rank writes the buffer, as a backward pass would have, so that no variant finds it in a better place than
another. Each variant's result is checked once per size: a fast wrong sum is no sum.

The reducer averages where its buckets are, in the window that the ranks share; the others get ordinary
memory, all of them the same. Both MPI variants work in place. *memcpy* is one ``copy_`` of the buffer on
every rank at once: what the memory can do.

The goal for the reducer in shared memory is relative to MPI's own ``Allreduce`` and to gloo. MPI libraries
differ, and the goal means the better one: ``--compare`` takes the file that a run under another MPI wrote.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed

import hpcpar
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
from hpcpar.comm import MPI, BucketLayout, Communicator, Reducer

SIZES = ("4K", "64K", "1M", "8M", "25M", "100M")
QUICK_SIZES = ("4K", "8M")
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

OURS, PLAIN_MPI, GLOO = "hpcpar shared memory", "MPI.Allreduce", "gloo"
GOAL_FROM_BYTES = 8 << 20
GOAL_OVER_MPI, GOAL_OVER_GLOO = 2.0, 8.0


@dataclass(frozen=True)
class Variant:
    """One way to reduce a buffer.

    ``run`` leaves ``expected`` in every element of ``buffer``, if rank *r* has filled it with *r* + 1.
    """

    run: Callable[[], Any]
    buffer: torch.Tensor
    expected: float
    free: Callable[[], None] = lambda: None


def main() -> None:
    """Run the benchmark. **Collective.**"""
    comm = hpcpar.comm.world()
    options = parse_arguments(make_parser(), comm)
    environment = describe(comm)
    if comm.rank == 0:
        print(f"allreduce of one float32 buffer\n{environment.text}", flush=True)
    rows: list[dict[str, Any]] = []
    with gloo(comm), comm.Dup() as raw:
        for nbytes in options.sizes:
            timings = measure_size(comm, raw, nbytes, options)
            rows.append(summarise(nbytes, timings))
            if comm.rank == 0:
                show_size(rows[-1])
    if comm.rank == 0:
        goals = judge(rows, environment, options.compare)
        show_goals(goals, environment, options)
        content = {"warmup": options.warmup, "results": rows, "goals": goals}
        save(options.output, "allreduce", environment, content, draw(rows, environment))


def make_parser() -> argparse.ArgumentParser:
    """The command line. **Local.**"""
    parser = _Parser(description=__doc__.partition("\n")[0])
    add_common_options(parser, repetitions=30)
    parser.add_argument("--warmup", type=positive_int, default=3, metavar="N", help="runs before (default 3)")
    parser.add_argument(
        "--sizes",
        type=size_bytes,
        nargs="+",
        metavar="SIZE",
        help=f"buffer sizes; K, M, G are powers of 1024 (default {' '.join(SIZES)})",
    )
    parser.add_argument(
        "--compare",
        type=earlier_run,
        metavar="JSON",
        help="results of an earlier run under another MPI: the goal then means the better of both",
    )
    return parser


class _Parser(argparse.ArgumentParser):
    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        options = super().parse_args(*args, **kwargs)
        if options.sizes is None:
            options.sizes = [size_bytes(text) for text in (QUICK_SIZES if options.quick else SIZES)]
        if options.quick:
            options.repetitions, options.warmup = min(options.repetitions, 3), 1
        return options


def size_bytes(text: str) -> int:
    """An argparse type: ``64K`` or ``1.5M`` in bytes, at least one float32 and a whole number of them."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    nbytes = float(found[1]) * UNITS[found[2].upper()] if found else 0.0
    if nbytes < 4 or nbytes % 4:
        raise argparse.ArgumentTypeError(f"must be a multiple of 4 bytes such as 64K or 8M, got {text!r}")
    return int(nbytes)


def earlier_run(text: str) -> dict[str, Any]:
    """An argparse type: the content of a file that this benchmark has written."""
    try:
        record: dict[str, Any] = json.loads(Path(text).read_text(encoding="utf-8"))
        if record["benchmark"] != "allreduce":
            raise KeyError("allreduce")
        Environment(**record["environment"])
        for row in record["results"]:
            float(row["variants"][PLAIN_MPI]["gb_per_s"])
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot read {text}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"{text} is not a result of this benchmark ({error!r})") from error
    return record


# ---- measuring ---------------------------------------------------------------------------------------------


def measure_size(comm: Communicator, raw: Communicator, nbytes: int, options: argparse.Namespace) -> Timings:
    """Time all variants on a buffer of one size. **Collective.**"""
    variants = make_variants(comm, raw, nbytes)

    def fill(name: str) -> None:
        variants[name].buffer.fill_(comm.rank + 1.0)

    runs = {name: variant.run for name, variant in variants.items()}
    for name, variant in variants.items():
        fill(name)
        comm.Barrier()  # gloo and MPI know nothing of each other: start each when all are here
        variant.run()
        check(comm, name, variant)
    measure(comm, runs, options.warmup, fill)
    # Small buffers are quickly done, and their times vary more.
    timings = measure(comm, runs, options.repetitions * (4 if nbytes < 1 << 20 else 1), fill)
    for variant in variants.values():
        variant.free()
    return timings


def make_variants(comm: Communicator, raw: Communicator, nbytes: int) -> dict[str, Variant]:
    """All ways to reduce a buffer of one size; ``raw`` is for what goes past hpcpar. **Collective.**"""
    count = nbytes // 4
    buffer, target = torch.zeros(count), torch.zeros(count)
    array = buffer.numpy()
    total = comm.size * (comm.size + 1) / 2.0

    def nonblocking() -> None:
        raw.mpi.Iallreduce(MPI.IN_PLACE, array).Wait()

    return {
        OURS: reducer_variant(comm, count, "shared_memory"),
        "hpcpar mpi": reducer_variant(comm, count, "mpi"),
        "Communicator.Allreduce": Variant(lambda: comm.Allreduce(MPI.IN_PLACE, buffer), buffer, total),
        PLAIN_MPI: Variant(lambda: raw.mpi.Allreduce(MPI.IN_PLACE, array), buffer, total),
        "MPI.Iallreduce + Wait": Variant(nonblocking, buffer, total),
        GLOO: Variant(lambda: torch.distributed.all_reduce(buffer), buffer, total),
        "memcpy": Variant(lambda: target.copy_(buffer), buffer, comm.rank + 1.0),
    }


def reducer_variant(comm: Communicator, count: int, transport: str) -> Variant:
    """A reducer with one bucket. **Collective.**"""
    reducer = Reducer(comm, [BucketLayout(torch.float32, count)], transport=transport)

    def run() -> None:
        reducer.begin(average=False)  # a sum, as the others make
        reducer.publish(0)
        reducer.wait(0)

    return Variant(run, reducer.flats[0], comm.size * (comm.size + 1) / 2.0, reducer.free)


def check(comm: Communicator, name: str, variant: Variant) -> None:
    """Compare every element with what it should be; wrong on one rank is wrong on all. **Collective.**"""
    wrong = not torch.allclose(variant.buffer, torch.tensor(variant.expected), rtol=1e-5)
    ranks = [rank for rank, other in enumerate(comm.allgather(wrong)) if other]
    if ranks:
        raise RuntimeError(f"{name} must give {variant.expected} everywhere, got others on ranks {ranks}")


# ---- reporting ---------------------------------------------------------------------------------------------


def summarise(nbytes: int, timings: Timings) -> dict[str, Any]:
    """Medians and paired ratios of one size, and the seconds they come from. **Local.**"""
    variants = {}
    for name, seconds in timings.seconds.items():
        variants[name] = {
            "median_s": timings.median(name),
            "gb_per_s": nbytes / timings.median(name) / 1e9,
            "times_gloo": timings.speedup(name, GLOO),
            "times_mpi": timings.speedup(name, PLAIN_MPI),
            "seconds": seconds,
        }
    return {"bytes": nbytes, "repetitions": len(timings.seconds[GLOO]), "variants": variants}


def show_size(row: Mapping[str, Any]) -> None:
    """The table of one size. **Local.**"""
    lines = [
        (
            name,
            f"{figures['median_s'] * 1e3:.3f}",
            f"{figures['gb_per_s']:.3g}",
            f"{figures['times_gloo']:.2f}",
            f"{figures['times_mpi']:.2f}",
        )
        for name, figures in row["variants"].items()
    ]
    title = f"{size_text(row['bytes'])}, median of {row['repetitions']} repetitions"
    print_table(title, ("variant", "ms", "GB/s", "x gloo", f"x {PLAIN_MPI}"), lines)


def judge(
    rows: Sequence[Mapping[str, Any]], environment: Environment, other: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """The reducer against its goals, at every size that has some, if all ranks share a node. **Local.**

    Against the MPI of this run by paired ratio, against the other one, if it is better, by GB/s.
    """
    elsewhere = {} if other is None else {row["bytes"]: row["variants"] for row in other["results"]}
    goals = []
    for row in rows:
        if environment.ranks == 1 or environment.nodes > 1 or row["bytes"] < GOAL_FROM_BYTES:
            continue
        ours, mpi = row["variants"][OURS], row["variants"][PLAIN_MPI]
        best, best_gb_per_s, ratio = environment.mpi, mpi["gb_per_s"], ours["times_mpi"]
        theirs = elsewhere.get(row["bytes"], {}).get(PLAIN_MPI, {"gb_per_s": -math.inf})
        if other is not None and theirs["gb_per_s"] > best_gb_per_s:
            best, best_gb_per_s = other["environment"]["mpi"], theirs["gb_per_s"]
            ratio = ours["gb_per_s"] / best_gb_per_s
        goals.append(
            {
                "bytes": row["bytes"],
                "gb_per_s": ours["gb_per_s"],
                "best_mpi": best,
                "best_mpi_gb_per_s": best_gb_per_s,
                "times_mpi": ratio,
                "times_gloo": ours["times_gloo"],
            }
        )
    return goals


def show_goals(
    goals: Sequence[Mapping[str, Any]], environment: Environment, options: argparse.Namespace
) -> None:
    """The goals next to what was reached. **Local.**"""
    if not goals:
        reason = f"they begin at {size_text(GOAL_FROM_BYTES)}"
        if environment.nodes > 1:
            reason = "they are for the ranks of one node"
        if environment.ranks == 1:
            reason = "one rank has nobody to reduce with"
        print(f"\nno goals: {reason}", flush=True)
        return
    lines = [
        (
            size_text(goal["bytes"]),
            f"{goal['gb_per_s']:.3g}",
            f"{goal['best_mpi']} {goal['best_mpi_gb_per_s']:.3g}",
            verdict(goal["times_mpi"], GOAL_OVER_MPI, at_least=True),
            verdict(goal["times_gloo"], GOAL_OVER_GLOO, at_least=True),
        )
        for goal in goals
    ]
    over_mpi, over_gloo = f"x it (goal {GOAL_OVER_MPI:g})", f"x gloo (goal {GOAL_OVER_GLOO:g})"
    header = ("size", "GB/s", f"best {PLAIN_MPI}, GB/s", over_mpi, over_gloo)
    print_table(f"goals of {OURS}, from {size_text(GOAL_FROM_BYTES)} on", header, lines)
    if options.compare is None:
        print(f"only {environment.mpi} was looked at; --compare takes the results of another MPI", flush=True)
        return
    other = Environment(**options.compare["environment"])
    print(f"compared with: {other.text}", flush=True)
    if (other.ranks, other.nodes, other.threads) != (
        environment.ranks,
        environment.nodes,
        environment.threads,
    ):
        print("note: ranks, nodes or threads differ from this run's, so the goal means little", flush=True)


def draw(rows: Sequence[Mapping[str, Any]], environment: Environment) -> Any:
    """GB/s by size, both logarithmic. **Local.**"""
    canvas = new_figure(1)
    if canvas is None:
        return None
    figure, (axes,) = canvas
    sizes = [row["bytes"] for row in rows]
    for name in rows[0]["variants"]:
        style = {"linewidth": 2.5} if name == OURS else {"linestyle": ":" if name == "memcpy" else "-"}
        speeds = [row["variants"][name]["gb_per_s"] for row in rows]
        axes.plot(sizes, speeds, marker="o", markersize=4, label=name, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [size_text(size) for size in sizes])
    axes.minorticks_off()
    axes.set(
        xlabel="buffer",
        ylabel="GB of buffer per second",
        title=f"allreduce, {environment.mpi}, {environment.ranks} rank(s) on {environment.nodes} node(s)",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def size_text(nbytes: int) -> str:
    """``8 MiB``."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:g} {name}"
    return f"{nbytes} B"


if __name__ == "__main__":
    main()
