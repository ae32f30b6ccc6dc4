"""``hpcpar bench``: what this machine and its network give, in two small tables.

Between every two figures that are compared lies no more than a second, and copying memory is measured beside
them: machines differ more than libraries do.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from hpcpar.cli import measure
from hpcpar.cli.output import (
    format_bytes,
    format_rate,
    format_seconds,
    format_table,
    is_first_process,
    parse_size,
    print_json,
)
from hpcpar.cli.session import start, watched
from hpcpar.comm import Communicator

__all__ = ["bench"]

_SIZES = "8,1KiB,32KiB,1MiB,16MiB,64MiB"
_LARGEST = 1 << 30
_ALLREDUCE_FROM = 1024
_MEMCPY_BYTES = 64 << 20
_ALONE = "One process: only copying memory is measured. Start it as a job: mpirun -n 2 hpcpar bench"


def _sizes(context: click.Context, option: click.Parameter, value: str) -> list[int]:
    try:
        sizes = [parse_size(text) for text in value.split(",")]
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    if max(sizes) > _LARGEST:
        raise click.BadParameter(f"must be at most {format_bytes(_LARGEST)}, got {value!r}")
    return sorted(set(sizes))


@click.command(epilog="Example: mpirun -n 4 hpcpar bench --sizes 8,64KiB,16MiB --seconds 10")
@click.option(
    "--sizes",
    callback=_sizes,
    default=_SIZES,
    show_default=True,
    metavar="BYTES,...",
    help="Sizes of messages and buffers; K, M and G (or KiB, MiB, GiB) are powers of 1024.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0.1, max=3600),
    default=5.0,
    show_default=True,
    help="Time for all measurements together, roughly.",
)
@click.option("--pairs", type=click.IntRange(1, 64), default=2, show_default=True, help="Pairs of each kind.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    default=None,
    metavar="SECONDS",
    help="End with an error when it takes longer; 0 means never.  [default: 120 and 10 times --seconds]",
)
def bench(sizes: list[int], seconds: float, pairs: int, as_json: bool, timeout: float | None) -> None:
    """Measure latency and bandwidth inside a node and between nodes, and allreduce.

    Start it with the launcher of your job, on the ranks and nodes that the job will have. Alone it measures
    copying memory only.
    """
    with watched(10 * seconds + 120 if timeout is None else timeout, "bench") as watcher:
        facts, comm = start(watcher)
        if comm is None and not is_first_process():
            return
        if comm is None and facts.launcher.rank is not None:
            raise click.ClickException(f"{(facts.mpi_problem or '').rstrip('.')}. `hpcpar doctor` says more")
        watcher.enter("the measurements")
        figures = _measure(comm, sizes, seconds, pairs)
    if facts.mpi is not None:
        figures["mpi"] = f"{facts.mpi.name} {facts.mpi.version}"
    if not is_first_process():
        return
    if as_json:
        print_json(figures)
    else:
        click.echo(_report(figures))


def _measure(comm: Communicator | None, sizes: list[int], seconds: float, limit: int) -> dict[str, Any]:
    """All figures, on every rank. Collective."""
    alone = comm is None or comm.size == 1
    copied = measure.measure_memcpy(comm, _MEMCPY_BYTES, seconds if alone else seconds / 10)
    figures: dict[str, Any] = {
        "mpi": None,
        "ranks": 1 if comm is None else comm.size,
        "nodes": 1 if comm is None else comm.num_nodes,
        "memcpy_bytes_per_s": copied,
        "point_to_point": [],
        "allreduce": [],
    }
    if comm is None or comm.size == 1:
        return figures
    pairs = measure.choose_pairs(comm.node_map, limit)
    buffers = [nbytes for nbytes in sizes if nbytes >= _ALLREDUCE_FROM]
    share_s = 0.9 * seconds / (len(pairs) * len(sizes) + 2 * len(buffers))
    for pair in pairs:
        for nbytes in sizes:
            result = measure.measure_pair(comm, pair, nbytes, share_s)
            row = {**asdict(result), "pair": [pair.first, pair.second]}
            figures["point_to_point"].append({"where": _where(pair), **row})
    for nbytes in buffers:
        figures["allreduce"].append(asdict(measure.measure_allreduce(comm, nbytes, 2 * share_s)))
    return figures


def _where(pair: measure.Pair) -> str:
    return "inside a node" if pair.one_node else "between nodes"


def _report(figures: dict[str, Any]) -> str:
    lines = [
        f"{figures['ranks']} rank(s) on {figures['nodes']} node(s), {figures['mpi'] or 'without MPI'}",
        f"memcpy, all ranks at once: {format_rate(figures['memcpy_bytes_per_s'])} per rank",
    ]
    if figures["ranks"] == 1:
        return "\n".join([*lines, _ALONE])
    rows = [
        [
            row["where"],
            "{}-{}".format(*row["pair"]),
            format_bytes(row["nbytes"]),
            format_seconds(row["latency_s"]),
            format_rate(row["bytes_per_s"]),
        ]
        for row in figures["point_to_point"]
    ]
    lines += ["", format_table(["messages", "ranks", "size", "one way", "bandwidth"], rows)]
    sums = [
        [
            "allreduce",
            format_bytes(row["nbytes"]),
            format_seconds(row["mpi_s"]),
            format_rate(row["nbytes"] / row["mpi_s"]),
            format_seconds(row["reducer_s"]),
            format_rate(row["nbytes"] / row["reducer_s"]),
            row["transport"],
        ]
        for row in figures["allreduce"]
    ]
    if sums:
        head = ["float32", "size", "MPI", "buffer/time", "hpcpar", "buffer/time", "hpcpar goes by"]
        lines += ["", format_table(head, sums)]
    return "\n".join(lines)
