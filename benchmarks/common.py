"""What the benchmarks share: variants timed in turn, paired statistics, gloo beside MPI, tables and files.

A machine is never twice the same: frequency, neighbours and caches drift by more than the variants differ.
So all variants run in one process, each repetition runs every variant once, and variants are compared
within a repetition::

    repetition 0   [a] [b] [c]        ratio b to a: median over repetitions of  a's time / b's time
    repetition 1   [c] [b] [a]
    repetition 2   [b] [c] [a]        [ ] = prepare (not timed), barrier, run (timed)

The order is rotated, so that no variant is always first, and every other repetition is reversed, so that
none always follows the same other. All ranks leave a barrier together, and the time of a repetition is that
of the slowest rank.

Rank 0 parses the command line and shows and writes everything; the others learn the outcome.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed

from hpcpar.comm import MPI, Communicator

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Environment",
    "Timings",
    "add_common_options",
    "describe",
    "gloo",
    "largest_over_ranks",
    "measure",
    "new_figure",
    "order",
    "parse_arguments",
    "positive_int",
    "print_table",
    "save",
    "verdict",
]

RESULTS = Path(__file__).resolve().parent / "results"


# ---- timing ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timings:
    """``seconds[name][i]``: what a variant took in repetition *i*, on the slowest rank."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Median seconds of a variant."""
        return statistics.median(self.seconds[name])

    def speedup(self, name: str, reference: str) -> float:
        """How many times faster than ``reference``: the median of the ratios within a repetition."""
        pairs = zip(self.seconds[reference], self.seconds[name], strict=True)
        return statistics.median(other / own for other, own in pairs)

    def added(self, name: str, reference: str) -> float:
        """Seconds more than ``reference``: the median of the differences within a repetition."""
        pairs = zip(self.seconds[reference], self.seconds[name], strict=True)
        return statistics.median(own - other for other, own in pairs)


def order(names: Sequence[str], repetition: int) -> list[str]:
    """The names as they are run in a repetition: rotated, and reversed in every other one. **Local.**"""
    first = repetition % len(names)
    turned = [*names[first:], *names[:first]]
    return turned[::-1] if repetition % 2 else turned


def measure(
    comm: Communicator,
    variants: Mapping[str, Callable[[], None]],
    repetitions: int,
    prepare: Callable[[str], None] = lambda name: None,
) -> Timings:
    """Time the variants in turn. **Collective.**

    Parameters
    ----------
    comm
        The ranks; each passes the same names in the same order.
    variants
        What to time, by name.
    repetitions
        How often each runs.
    prepare
        Called with the name before each run, outside of the time.
    """
    names = list(variants)
    seconds = np.zeros((repetitions, len(names)))
    with comm.Dup() as own:
        barrier = own.mpi.Barrier  # MPI's own: it lets all ranks go at once, and never sleeps
        for repetition in range(repetitions):
            for name in order(names, repetition):
                prepare(name)
                barrier()
                start = time.perf_counter()
                variants[name]()
                seconds[repetition, names.index(name)] = time.perf_counter() - start
        own.Allreduce(MPI.IN_PLACE, seconds, MPI.MAX)
    return Timings({name: seconds[:, column].tolist() for column, name in enumerate(names)})


def largest_over_ranks(comm: Communicator, values: Sequence[float]) -> list[float]:
    """The largest of each value over all ranks. **Collective.**"""
    largest = torch.tensor(values, dtype=torch.float64)
    comm.Allreduce(MPI.IN_PLACE, largest, MPI.MAX)
    return [float(value) for value in largest]


# ---- the machine and the peers -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Environment:
    """What a figure depends on besides the code."""

    mpi: str
    ranks: int
    nodes: int
    threads: int
    cores: int
    torch: str

    @property
    def text(self) -> str:
        """One line for people."""
        return (
            f"{self.mpi}, {self.ranks} rank(s) on {self.nodes} node(s), {self.threads} thread(s) per rank, "
            f"{self.cores} core(s) for rank 0, PyTorch {self.torch}"
        )

    @property
    def slug(self) -> str:
        """The MPI, the ranks and the nodes as part of a file name: ``mpich-2``, ``openmpi-8-4nodes``."""
        family = re.sub(r"[^a-z]", "", self.mpi.lower().partition(",")[0])
        nodes = f"-{self.nodes}nodes" if self.nodes > 1 else ""
        return f"{family or 'mpi'}-{self.ranks}{nodes}"


def describe(comm: Communicator) -> Environment:
    """The environment of this run, as rank 0 sees it. **Collective.**"""
    seen = Environment(
        mpi=_library_name(MPI.Get_library_version()),
        ranks=comm.size,
        nodes=comm.num_nodes,
        threads=torch.get_num_threads(),
        cores=len(os.sched_getaffinity(0)),
        torch=torch.__version__,
    )
    agreed: Environment = comm.bcast(seen, root=0)
    return agreed


def _library_name(version: str) -> str:
    """Family and number out of what ``MPI_Get_library_version`` says, which has no common form."""
    found = re.search(r"(Open MPI|MPICH|Intel\(R\) MPI|MVAPICH2?)\D{0,20}?v?(\d+(?:\.\w+)+)", version)
    return f"{found[1]} {found[2]}" if found else version.partition("\n")[0].strip()[:40]


@contextmanager
def gloo(comm: Communicator) -> Iterator[None]:
    """Let ``torch.distributed`` work over gloo among the ranks of ``comm``. **Collective.**"""
    hosts = set(comm.allgather(MPI.Get_processor_name()))
    host = comm.bcast("127.0.0.1" if len(hosts) == 1 else socket.gethostname(), root=0)
    if len(hosts) == 1 and any(name == "lo" for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo may not find the host's own name
    store = torch.distributed.TCPStore(host, 0, is_master=True) if comm.rank == 0 else None
    port = comm.bcast(store.port if store is not None else 0, root=0)
    if store is None:
        store = torch.distributed.TCPStore(host, port, is_master=False)
    torch.distributed.init_process_group("gloo", store=store, rank=comm.rank, world_size=comm.size)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


# ---- command line ------------------------------------------------------------------------------------------


def add_common_options(parser: argparse.ArgumentParser, repetitions: int) -> None:
    """The options that all benchmarks have. **Local.**"""
    parser.add_argument(
        "--repetitions",
        type=positive_int,
        default=repetitions,
        metavar="N",
        help=f"how often each variant is timed (default {repetitions})",
    )
    parser.add_argument("--quick", action="store_true", help="small and few: whether it works, not how fast")
    parser.add_argument(
        "--output",
        type=Path,
        default=RESULTS,
        metavar="DIR",
        help="folder for the JSON and the picture (default benchmarks/results)",
    )


def parse_arguments(parser: argparse.ArgumentParser, comm: Communicator) -> argparse.Namespace:
    """Parse the command line on rank 0 and hand the result, or the exit, to all. **Collective.**"""
    outcome: argparse.Namespace | str | int | None = None
    if comm.rank == 0:
        try:
            outcome = parser.parse_args()
            outcome.output.mkdir(parents=True, exist_ok=True)  # a bad path shows before the work
        except OSError as error:
            print(f"{parser.prog}: error: cannot write to --output: {error}", file=sys.stderr, flush=True)
            outcome = 2
        except SystemExit as ended:  # --help, or a usage error that argparse has printed
            outcome = ended.code
    outcome = comm.bcast(outcome, root=0)
    if not isinstance(outcome, argparse.Namespace):
        raise SystemExit(outcome)
    return outcome


def positive_int(text: str) -> int:
    """An argparse type: 1, 2, 3 and so on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of at least 1, got {text!r}")
    return int(text)


# ---- output ------------------------------------------------------------------------------------------------


def verdict(value: float, goal: float, *, at_least: bool) -> str:
    """A ratio with what became of its goal: ``2.31 reached``."""
    reached = value >= goal if at_least else value <= goal
    return f"{value:.2f} {'reached' if reached else 'missed'}"


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Show a table on standard output: in colour on a terminal, plain otherwise. **Local**, rank 0 only.

    The first column is aligned to the left, the others, which are numbers, to the right.
    """
    if _on_terminal() and _print_rich(title, header, rows):
        return
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [f"\n{title}", "  ".join(_pad(header, widths)), "  ".join("-" * width for width in widths)]
    lines += ["  ".join(_pad(row, widths)) for row in rows]
    print("\n".join(lines), flush=True)


def _pad(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    numbers = zip(row[1:], widths[1:], strict=True)
    return [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in numbers)]


def _on_terminal() -> bool:
    """Whether somebody watches; some launchers give their ranks a terminal of no width."""
    try:
        return sys.stdout.isatty() and os.get_terminal_size(sys.stdout.fileno()).columns > 0
    except (OSError, ValueError):
        return False


def _print_rich(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return False
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    return True


def new_figure(panels: int) -> tuple[Figure, list[Any]] | None:
    """A figure with a row of axes that needs no display; None where matplotlib is missing. **Local.**"""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("matplotlib is not installed: no picture is drawn", file=sys.stderr)
        return None
    figure = Figure(figsize=(7.0 * panels, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def save(
    output: Path, benchmark: str, environment: Environment, content: Mapping[str, Any], figure: Figure | None
) -> None:
    """Write ``<benchmark>-<slug>.json``, the picture beside it, and say where. **Local**, rank 0."""
    stem = output / f"{benchmark}-{environment.slug}"
    record = {"benchmark": benchmark, "environment": asdict(environment), **content}
    path = stem.with_suffix(".json")
    path.write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
    print(f"\nresults: {path}", flush=True)
    if figure is not None:
        path = stem.with_suffix(".png")
        figure.savefig(path, dpi=120)
        print(f"picture: {path}", flush=True)
