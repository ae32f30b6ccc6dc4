"""How fast do ranks read a shuffled epoch: H5Dataset, single samples by h5py, memmap, and the disk itself?

::

    mpirun -n 2 python benchmarks/io_reading.py [--samples 60000] [--folder /scratch/me] [--cold]
    python benchmarks/io_reading.py --amplification

The data is like Fashion-MNIST, images of 28 x 28 bytes and a label, in one HDF5 file with gzip, one without,
and a .npy file. Each variant reads a share for each rank, in turn (:mod:`common` says how); slow ones read a
part of it, and all are compared by samples per second over all ranks::

    read through        h5py reads everything from front to back in large pieces: what HDF5 can do
    H5Dataset           shuffled: its batches, the same in a DataLoader, and samples in a DataLoader
    h5py per sample     what tutorials do: a dataset whose __getitem__ reads one row, in a DataLoader
    memmap              numpy.load(mmap_mode="r") with the same loader, and with whole batches at once
    plain read          the compressed file as bytes: what the disk, or the page cache, can do

Files that were just written lie in the page cache. ``--cold`` has the system drop them before each run.

``--amplification`` reads nothing: it prints how much ranks would read in a shuffled epoch, as a multiple of
the data, with the default blocks and windows, for data of several sizes and up to 512 ranks.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import hpcpar
from common import (
    Environment,
    Timings,
    add_common_options,
    describe,
    measure,
    new_figure,
    parse_arguments,
    positive_int,
    print_table,
    save,
    verdict,
)
from hpcpar.comm import MPI, Communicator
from hpcpar.data import DistributedSampler, H5Dataset
from hpcpar.data.amplification import read_amplification
from hpcpar.data.h5_files import Field, FilePart, Layout
from hpcpar.data.read_options import ReadOptions

NAMES = ["images", "labels"]
BATCH, THROUGH_ROWS, SIDE = 64, 8192, 28
GOAL_OVER_SINGLE, GOAL_OF_THROUGH = 10.0, 0.7

THROUGH, OURS = "read through by h5py", "H5Dataset batches"
LOADER, SAMPLES, CACHED = "H5Dataset in DataLoader", "H5Dataset per sample", "H5Dataset from node cache"
WORKERS = "H5Dataset, 2 workers"
SINGLE, SINGLE_WORKERS = "h5py per sample", "h5py per sample, 2 workers"
MEMMAP, MEMMAP_BATCHES, PLAIN = "memmap per sample", "memmap batches", "plain read of the file"
GZIP, RAW = "gzip", "uncompressed"

RANKS = (2, 4, 8, 16, 64, 512)
DATA = (  # what --amplification is about: samples, bytes of each, samples in a chunk
    ("60,000 x 784 B, chunks of 256", 60000, 784, 256),
    ("1,400,000 x 784 B, chunks of 256", 1400000, 784, 256),
    ("100,000 x 147 KiB, chunks of 4", 100000, 150528, 4),
    ("1,280,000 x 18 KiB, chunks of 32", 1280000, 18816, 32),
)


@dataclass
class Variant:
    """One way to read: ``run`` returns how many samples this rank got, and the sum of their labels.

    ``samples`` of all ranks together are read; ``whole`` says that they are an epoch.
    """

    run: Callable[[], tuple[int, int]]
    samples: int
    whole: bool = True
    got: list[tuple[int, int]] = field(default_factory=list)


class SingleSamples(Dataset[Any]):
    """What tutorials do: a row for each sample; files are opened by the process that reads."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, None

    def __len__(self) -> int:
        with h5py.File(self._path) as file:
            return len(file["labels"])

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if self._file is None:
            self._file = h5py.File(self._path, locking=False)
        return torch.from_numpy(self._file["images"][index]), int(self._file["labels"][index])


class MemmapSamples(Dataset[Any]):
    """Rows of arrays that are mapped from files."""

    def __init__(self, folder: Path) -> None:
        self.images = np.load(folder / "images.npy", mmap_mode="r")
        self.labels = np.load(folder / "labels.npy")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(self.images[index].copy()), int(self.labels[index])


def main() -> None:
    """Run the benchmark. **Collective.**"""
    comm = hpcpar.comm.world()
    options = parse_arguments(make_parser(), comm)
    if options.amplification:
        if comm.rank == 0:
            show_amplification()
        return
    if options.quick:
        options.samples, options.single_samples = min(options.samples, 3000), 64
        options.repetitions = min(options.repetitions, 2)
    environment = describe(comm)
    where = "after dropping the page cache" if options.cold else "from the page cache"
    if comm.rank == 0:
        print(
            f"reading a shuffled epoch of {options.samples} samples {where}\n{environment.text}", flush=True
        )
    folder = make_folder(comm, options)
    try:
        rows = measure_all(comm, folder, options)
        size_bytes = (folder / f"{GZIP}.h5").stat().st_size
    finally:
        comm.Barrier()
        if comm.rank == 0:
            shutil.rmtree(folder)
    if comm.rank == 0:
        show(rows, size_bytes, options)
        content = {
            "samples": options.samples,
            "cold": options.cold,
            "gzip_bytes": size_bytes,
            "results": rows,
        }
        save(options.output, "io_reading", environment, content, draw(rows, environment))


def make_parser() -> argparse.ArgumentParser:
    """The command line. **Local.**"""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_common_options(parser, repetitions=5)
    parser.add_argument("--samples", type=positive_int, default=60000, metavar="N", help="default 60000")
    parser.add_argument(
        "--single-samples",
        type=positive_int,
        default=600,
        metavar="N",
        help="of these, how many each rank reads one by one with h5py (default 600)",
    )
    parser.add_argument("--chunk", type=positive_int, default=256, metavar="N", help="images in a chunk")
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="where to write the data, on a disk of all ranks"
    )
    parser.add_argument(
        "--cold", action="store_true", help="drop the files from the page cache before each run"
    )
    parser.add_argument(
        "--amplification", action="store_true", help="only print how much ranks would read of larger data"
    )
    return parser


# ---- the data ----------------------------------------------------------------------------------------------


def make_folder(comm: Communicator, options: argparse.Namespace) -> Path:
    """Write the files on rank 0. **Collective.**"""
    made = None
    if comm.rank == 0:
        made = Path(tempfile.mkdtemp(prefix="io_reading-", dir=options.folder))
        images, labels = make_samples(options.samples)
        np.save(made / "images.npy", images)
        np.save(made / "labels.npy", labels)
        for name, compression in ((GZIP, "gzip"), (RAW, None)):
            with h5py.File(made / f"{name}.h5", "w") as file:
                rows = min(options.chunk, options.samples)
                kinds: dict[str, Any] = {"compression": compression}
                file.create_dataset("images", data=images, chunks=(rows, SIDE, SIDE), **kinds)
                file.create_dataset("labels", data=labels, chunks=(rows,), **kinds)
        for path in made.iterdir():
            with open(path, "rb") as written:
                os.fsync(written.fileno())
    folder: Path = comm.bcast(made, root=0)
    return folder


def make_samples(samples: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Bright, noisy rectangles on black, which gzip makes about as small as pictures of clothes."""
    generator = np.random.default_rng(0)
    down, right = np.mgrid[0:SIDE, 0:SIDE]
    images = np.zeros((samples, SIDE, SIDE), np.uint8)
    for start in range(0, samples, 5000):
        some = images[start : start + 5000]
        centre = generator.uniform(10, 18, (2, len(some), 1, 1))
        reach = generator.uniform(6, 13, (2, len(some), 1, 1))
        inside = (abs(down - centre[0]) < reach[0]) & (abs(right - centre[1]) < reach[1])
        light = generator.integers(60, 220, (len(some), 1, 1)) + generator.integers(-20, 20, some.shape)
        some[...] = np.where(inside, light, 0)
    return images, generator.integers(0, 10, samples)


# ---- measuring ---------------------------------------------------------------------------------------------


def measure_all(comm: Communicator, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time all variants; a row for each. **Collective.**"""
    expected = int(np.load(folder / "labels.npy").sum())
    with H5Dataset(folder / f"{GZIP}.h5", NAMES, comm, shuffle=True, cache="node") as cached:
        variants = make_variants(comm, folder, options, cached)

        def prepare(name: str) -> None:
            if options.cold:
                drop_cache(folder)

        def runner(variant: Variant) -> Callable[[], None]:
            return lambda: variant.got.append(variant.run())

        runs = {name: runner(variant) for name, variant in variants.items()}
        timings = measure(comm, runs, options.repetitions, prepare)
    for name, variant in variants.items():
        totals = np.array(variant.got, dtype=np.int64)
        comm.Allreduce(MPI.IN_PLACE, totals)
        if variant.whole and (totals != [variant.samples, expected]).any():
            raise SystemExit(f"{name} must read every sample once, got {totals.tolist()}")
    return summarise(variants, timings)


def make_variants(
    comm: Communicator, folder: Path, options: argparse.Namespace, cached: H5Dataset
) -> dict[str, Variant]:
    """All ways to read, by name and kind of file. **Collective.**"""
    variants = {}
    for kind in (GZIP, RAW):
        path = folder / f"{kind}.h5"
        for name, (run, samples) in make_h5_variants(comm, path, options).items():
            whole = samples == options.samples
            variants[f"{name}, {kind}"] = Variant(run, samples, whole)
    variants[f"{CACHED}, {GZIP}"] = Variant(lambda: total(cached.batches(BATCH)), options.samples)
    memmap = MemmapSamples(folder)
    sampler = DistributedSampler(memmap, comm)

    def memmap_batches() -> tuple[int, int]:
        order = np.array(list(sampler))
        parts = (order[at : at + BATCH] for at in range(0, len(order), BATCH))
        return total((torch.from_numpy(memmap.images[p]), torch.from_numpy(memmap.labels[p])) for p in parts)

    def plain() -> tuple[int, int]:
        read_plain(comm, folder / f"{GZIP}.h5")
        return 0, 0

    loader = DataLoader(memmap, BATCH, sampler=sampler)
    variants[MEMMAP] = Variant(lambda: total(loader), options.samples)
    variants[MEMMAP_BATCHES] = Variant(memmap_batches, options.samples)
    variants[PLAIN] = Variant(plain, options.samples, whole=False)
    return variants


def make_h5_variants(
    comm: Communicator, path: Path, options: argparse.Namespace
) -> dict[str, tuple[Callable[[], tuple[int, int]], int]]:
    """Ways to read one HDF5 file, and how many samples each reads. **Collective.**"""
    data = H5Dataset(path, NAMES, comm, shuffle=True, batch_size=BATCH)
    batches: Any = data.batches(BATCH)
    single = SingleSamples(path)
    some = list(DistributedSampler(single, comm))[: options.single_samples]

    def loaded(source: Any, size: int | None, **more: Any) -> Callable[[], tuple[int, int]]:
        return lambda: total(DataLoader(source, size, **more))

    everything, part = options.samples, comm.allreduce(len(some))
    runs: dict[str, tuple[Callable[[], tuple[int, int]], int]] = {
        THROUGH: (lambda: read_through(comm, path), everything),
        OURS: (lambda: total(batches), everything),
        LOADER: (loaded(batches, None), everything),
        SAMPLES: (loaded(data, BATCH), everything),
        WORKERS: (loaded(batches, None, num_workers=2), everything),
        SINGLE: (loaded(single, BATCH, sampler=some), part),
    }
    if path.stem == GZIP:
        runs[SINGLE_WORKERS] = (loaded(single, BATCH, sampler=some, num_workers=2), part)
    return runs


def total(batches: Iterable[Any]) -> tuple[int, int]:
    """Samples in all batches, and the sum of their labels."""
    count, labels = 0, 0
    for _, some in batches:
        count, labels = count + len(some), labels + int(some.sum())
    return count, labels


def read_through(comm: Communicator, path: Path) -> tuple[int, int]:
    """This rank's part of the file, from front to back."""
    count, labels = 0, 0
    with h5py.File(path, locking=False) as file:
        samples = len(file["labels"])
        stop = samples * (comm.rank + 1) // comm.size
        for start in range(samples * comm.rank // comm.size, stop, THROUGH_ROWS):
            rows = slice(start, min(start + THROUGH_ROWS, stop))
            count += len(file["images"][rows])
            labels += int(file["labels"][rows].sum())
    return count, labels


def read_plain(comm: Communicator, path: Path) -> None:
    """This rank's part of the file, as bytes."""
    size = path.stat().st_size
    with open(path, "rb", buffering=0) as file:
        file.seek(size * comm.rank // comm.size)
        left = size * (comm.rank + 1) // comm.size - file.tell()
        while left > 0:
            left -= len(file.read(min(left, 4 << 20)))


def drop_cache(folder: Path) -> None:
    """Ask the system to forget what it holds of the files."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# ---- what came out -----------------------------------------------------------------------------------------


def summarise(variants: dict[str, Variant], timings: Timings) -> list[dict[str, Any]]:
    """A row for each variant, with ratios of samples per second."""
    per_sample = Timings(
        {name: [s / variants[name].samples for s in seconds] for name, seconds in timings.seconds.items()}
    )
    rows = []
    for name, variant in variants.items():
        kind = RAW if RAW in name else GZIP
        rows.append(
            {
                "variant": name,
                "samples": variant.samples,
                "seconds": timings.seconds[name],
                "samples_per_s": 1.0 / per_sample.median(name),
                "of_read_through": per_sample.speedup(name, f"{THROUGH}, {kind}"),
                "times_single": per_sample.speedup(name, f"{SINGLE}, {kind}"),
            }
        )
        if kind == GZIP:  # the goal is against the better of both loaders
            over_workers = per_sample.speedup(name, f"{SINGLE_WORKERS}, {GZIP}")
            rows[-1]["times_best_single"] = min(rows[-1]["times_single"], over_workers)
    return rows


def show(rows: list[dict[str, Any]], size_bytes: int, options: argparse.Namespace) -> None:
    """Print the tables. **Local**, rank 0."""
    cells = [
        [
            row["variant"],
            f"{row['samples_per_s']:,.0f}",
            f"{row['of_read_through']:.2f}",
            f"{row['times_single']:.1f}",
        ]
        for row in rows
    ]
    print_table(
        "samples per second, all ranks", ["variant", "samples/s", "of read through", "x single"], cells
    )
    by_name = {row["variant"]: row for row in rows}
    rate = by_name[PLAIN]["samples_per_s"] * size_bytes / options.samples / 1e6
    print(f"\nplain read: {rate:,.0f} MB/s {'from the disk' if options.cold else 'from the page cache'}")
    ours = by_name[f"{OURS}, {GZIP}"]
    over, of = ours["times_best_single"], ours["of_read_through"]
    print(
        f"goals for {OURS}, {GZIP}:\n"
        f"  times single samples by h5py, best of 0 and 2 workers (goal {GOAL_OVER_SINGLE:g}): "
        f"{verdict(over, GOAL_OVER_SINGLE, at_least=True)}\n"
        f"  of reading the file straight through (goal {GOAL_OF_THROUGH:g}): "
        f"{verdict(of, GOAL_OF_THROUGH, at_least=True)}",
        flush=True,
    )


def show_amplification() -> None:
    """Print what ranks read of several data sets, by what there is. **Local**, rank 0."""
    cells = []
    for name, samples, nbytes, chunk in DATA:
        layout = Layout((Field("x", (nbytes,), np.dtype("u1")),), (FilePart(name, samples, chunk, 0),))
        blocks = len(layout.bounds()) - 1
        window = ReadOptions(True, 0, None, None, None, 2, None, None).window(layout, blocks)
        times = [read_amplification(samples, blocks, window, ranks, shuffle=True) for ranks in RANKS]
        size = f"{samples * nbytes / 2**20:,.0f} MiB"
        cells.append([name, size, str(blocks), str(window), *(f"{value:.2f}" for value in times)])
    columns = ["data", "size", "blocks", "window", *(f"{ranks} ranks" for ranks in RANKS)]
    print_table("read in a shuffled epoch, as a multiple of the data", columns, cells)


def draw(rows: list[dict[str, Any]], environment: Environment) -> Any:
    """Bars of samples per second; None without matplotlib. **Local.**"""
    made = new_figure(1)
    if made is None:
        return None
    figure, (axes,) = made
    shown = [row for row in rows if row["variant"] != PLAIN][::-1]
    axes.barh([row["variant"] for row in shown], [row["samples_per_s"] for row in shown], height=0.7)
    axes.set_xscale("log")
    axes.set_xlabel("samples per second, all ranks")
    axes.set_title(environment.text, fontsize=7)
    return figure


if __name__ == "__main__":
    main()
