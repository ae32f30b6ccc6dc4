"""Saving and loading a checkpoint: hpcpar against torch.save on rank 0 and torch.distributed.checkpoint.

::

    mpirun -n 2 python benchmarks/io_checkpoints.py --folder /scratch/me

The state is that of a model with Adam, 1 GB of float32, the same on every rank. All variants save it to
the same disk, in turn, each into an empty folder::

    hpcpar                  save(): slices by all ranks, digests, fsync of files and folders
    DCP                     torch.distributed.checkpoint over gloo: tensors by all ranks, fsync of files
    torch.save              rank 0 writes, the others wait; data may still be in memory when it returns
    torch.save + fsync      the same, until they are on the disk

    hpcpar background       save(asynchronous=True), until it returns: so long training stands still
    memory copy             what that cannot do without: one copy of the state, into memory that is there

    hpcpar load             load() into tensors that are there; with and without comparing digests
    DCP load                torch.distributed.checkpoint.load(), in place, too
    torch.load              every rank reads the file of rank 0, and copies into tensors that are there

Files are read from the system's cache, where they are after having been written. Goals: to save faster than
DCP on two ranks; training stands still for at most 5 % of the time of a save plus one memory copy.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

import hpcpar
from common import (
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
from hpcpar.checkpoint import Saving
from hpcpar.comm import Communicator

HPCPAR, DCP, TORCH, TORCH_FSYNC = "hpcpar", "DCP", "torch.save", "torch.save + fsync"
BACKGROUND, COPY = "hpcpar background", "memory copy"
LOAD, LOAD_UNCHECKED, DCP_LOAD, TORCH_LOAD = "hpcpar load", "hpcpar load unchecked", "DCP load", "torch.load"
SAVES = (HPCPAR, DCP, TORCH, TORCH_FSYNC)
LOADS = (LOAD, LOAD_UNCHECKED, DCP_LOAD, TORCH_LOAD)
GOAL_SAVE, GOAL_SHARE = 1.0, 0.05


# ---- what is measured --------------------------------------------------------------------------------------


def make_state(nbytes: int) -> dict[str, Any]:
    """Parameters, and the two momenta of each: 16 layers of a matrix and a vector."""
    generator = torch.Generator().manual_seed(0)
    per_layer = nbytes // (16 * 3 * 4)
    shapes = {"weight": (1024, per_layer // 1024), "bias": (per_layer % 1024 + 1,)}
    model, optimizer = {}, {}
    for layer in range(16):
        for name, shape in shapes.items():
            key = f"layers.{layer}.{name}"
            model[key] = torch.randn(shape, generator=generator)
            moments = {m: torch.randn(shape, generator=generator) for m in ("exp_avg", "exp_avg_sq")}
            optimizer[key] = {"step": torch.tensor(1.0), **moments}
    return {"model": model, "optimizer": optimizer}


def tensors_of(state: Any) -> list[torch.Tensor]:
    """All tensors of a nested state, in order."""
    if isinstance(state, dict):
        return [tensor for value in state.values() for tensor in tensors_of(value)]
    return [state]


@dataclass
class Bench:
    """The variants, over one folder and one state."""

    comm: Communicator
    folder: Path
    state: dict[str, Any]
    pending: list[Saving] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.copies = [tensor.clone() for tensor in tensors_of(self.state)]

    def variants(self) -> dict[str, Callable[[], Any]]:
        """All of them by name."""
        saved = self.folder / "saved"
        return {
            HPCPAR: lambda: hpcpar.checkpoint.save(self.folder / "new" / "hpcpar", self.state, self.comm),
            DCP: lambda: dcp.save(self.state, checkpoint_id=self.folder / "new" / "dcp"),
            TORCH: lambda: self.torch_save(self.folder / "new" / "torch.pt"),
            TORCH_FSYNC: lambda: self.torch_save(self.folder / "new" / "torch.pt", sync=True),
            BACKGROUND: self.save_in_background,
            COPY: self.copy,
            LOAD: lambda: hpcpar.checkpoint.load(saved / "hpcpar", self.state, self.comm),
            LOAD_UNCHECKED: lambda: hpcpar.checkpoint.load(
                saved / "hpcpar", self.state, self.comm, verify=False
            ),
            DCP_LOAD: lambda: dcp.load(self.state, checkpoint_id=saved / "dcp"),
            TORCH_LOAD: lambda: self.torch_load(saved / "torch.pt"),
        }

    def prepare(self, name: str = "") -> None:
        """An empty folder, an idle disk."""
        while self.pending:
            self.pending.pop().wait()
        self.comm.Barrier()
        if self.comm.rank == 0:
            shutil.rmtree(self.folder / "new", ignore_errors=True)
            (self.folder / "new").mkdir()
            os.sync()
        self.comm.Barrier()

    def save_for_loading(self) -> None:
        """What the loads read."""
        saved = self.folder / "saved"
        if self.comm.rank == 0:
            saved.mkdir()
        self.comm.Barrier()
        hpcpar.checkpoint.save(saved / "hpcpar", self.state, self.comm)
        dcp.save(self.state, checkpoint_id=saved / "dcp")
        self.torch_save(saved / "torch.pt")

    def save_in_background(self) -> None:
        self.pending.append(
            hpcpar.checkpoint.save(self.folder / "new" / "later", self.state, self.comm, asynchronous=True)
        )

    def copy(self) -> None:
        for copy, tensor in zip(self.copies, tensors_of(self.state), strict=True):
            copy.copy_(tensor)

    def torch_save(self, path: Path, *, sync: bool = False) -> None:
        if self.comm.rank == 0:
            torch.save(self.state, path)
            if sync:
                handle = os.open(path, os.O_RDONLY)
                os.fsync(handle)
                os.close(handle)
        self.comm.Barrier()

    def torch_load(self, path: Path) -> None:
        loaded = torch.load(path, mmap=True, weights_only=True)
        for own, tensor in zip(tensors_of(self.state), tensors_of(loaded), strict=True):
            own.copy_(tensor)

    def check(self) -> None:
        """Every load must give back the state, bit for bit."""
        variants = self.variants()
        for name in LOADS:
            for tensor in tensors_of(self.state):
                tensor.zero_()
            variants[name]()
            if not all(map(torch.equal, tensors_of(self.state), self.copies)):
                raise SystemExit(f"{name} must give back what was saved, got something else")


# ---- output ------------------------------------------------------------------------------------------------


def standstill(timings: Timings) -> float:
    """Time of the call over what it may take: 5 % of a save and one copy."""
    allowed = GOAL_SHARE * timings.median(HPCPAR) + timings.median(COPY)
    return timings.median(BACKGROUND) / allowed


def show(timings: Timings, nbytes: int, ranks: int) -> None:
    """The tables."""
    rows = []
    for name in SAVES:
        goal = GOAL_SAVE if (name, ranks) == (DCP, 2) else None
        rows.append(row(timings, name, HPCPAR, nbytes, goal))
    header = ["save", "ms", "GB/s", "hpcpar is x times faster"]
    print_table(f"Saving {nbytes / 1e9:.2f} GB that all of {ranks} rank(s) have", header, rows)
    rows = [
        [HPCPAR, f"{1e3 * timings.median(HPCPAR):.0f}", ""],
        [COPY, f"{1e3 * timings.median(COPY):.0f}", ""],
        [
            BACKGROUND,
            f"{1e3 * timings.median(BACKGROUND):.0f}",
            verdict(standstill(timings), 1.0, at_least=False),
        ],
    ]
    print_table("Training stands still", ["", "ms", "x (5 % of a save + a copy), goal 1"], rows)
    rows = [row(timings, name, LOAD, nbytes, None) for name in LOADS]
    print_table("Loading it on every rank", ["load", "ms", "GB/s per rank", "hpcpar is x times faster"], rows)


def row(timings: Timings, name: str, ours: str, nbytes: int, goal: float | None) -> list[str]:
    """A line: time, rate, and how much faster ours is."""
    factor = timings.speedup(ours, name)
    text = "" if name == ours else f"{factor:.2f}"
    if goal is not None:
        text = f"{verdict(factor, goal, at_least=True)}, goal {goal:g}"
    seconds = timings.median(name)
    return [name, f"{1e3 * seconds:.0f}", f"{nbytes / seconds / 1e9:.2f}", text]


def draw(timings: Timings) -> Any:
    """Bars of the medians."""
    made = new_figure(2)
    if made is None:
        return None
    figure, axes = made
    for axis, names in zip(axes, ((*SAVES, BACKGROUND, COPY), LOADS), strict=True):
        axis.barh(names[::-1], [timings.median(name) for name in names[::-1]])
        axis.set_xlabel("seconds")
    return figure


def main() -> None:
    comm = hpcpar.comm.world()
    parser = argparse.ArgumentParser(description="Saving and loading a checkpoint.")
    add_common_options(parser, repetitions=7)
    parser.add_argument("--megabytes", type=positive_int, default=1000, help="of the state (default 1000)")
    parser.add_argument(
        "--folder", type=Path, help="on the disk to measure (default: the system's for temporary files)"
    )
    options = parse_arguments(parser, comm)
    warnings.filterwarnings("ignore")
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    environment = describe(comm)
    repetitions = 2 if options.quick else options.repetitions
    state = make_state((20 if options.quick else options.megabytes) * 10**6)
    nbytes = sum(tensor.nbytes for tensor in tensors_of(state))
    folder = Path(comm.bcast(tempfile.mkdtemp(dir=options.folder) if comm.rank == 0 else None))
    try:
        with gloo(comm):
            bench = Bench(comm, folder, state)
            bench.save_for_loading()
            bench.check()
            measure(comm, bench.variants(), 1, bench.prepare)  # memory that is new is slower
            timings = measure(comm, bench.variants(), repetitions, bench.prepare)
            bench.prepare()
    finally:
        if comm.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
    if comm.rank == 0:
        print(environment.text)
        show(timings, nbytes, comm.size)
        content = {"nbytes": nbytes, "seconds": timings.seconds, "standstill": standstill(timings)}
        save(options.output, "io_checkpoints", environment, content, draw(timings))


if __name__ == "__main__":
    main()
