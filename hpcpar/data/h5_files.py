"""HDF5 files that count as one: what is in them, how they are cut into blocks, and reading stretches of them.

A :class:`Layout` is plain data: it is made once, compared between ranks, and travels to worker processes. An
:class:`OpenFiles` belongs to one process and to who opened it; nothing is open before somebody reads.

Files are opened without locks. Parallel file systems often have none (the error is then "unable to lock
file"), and who only reads needs none.
"""

from __future__ import annotations

import glob
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import torch

__all__ = ["Field", "FilePart", "Layout", "OpenFiles", "Paths", "describe", "listed_names", "listed_paths"]

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
Array = npt.NDArray[Any]

_MOST_BLOCK_BYTES, _LEAST_BLOCK_BYTES = 1 << 20, 1 << 16
_BLOCKS = 256  # that small data is cut into, so that ranks need not read far beyond their shares
_OPEN_AT_ONCE = 32
_CACHE_BYTES = 64 << 20


@dataclass(frozen=True)
class Field:
    """One of the datasets that are read together: its name, and the shape and type of a sample."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Bytes of a sample."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def empty(self, samples: int) -> Array:
        """Room for samples."""
        return np.empty((samples, *self.shape), self.dtype)


@dataclass(frozen=True)
class FilePart:
    """One file.

    Attributes
    ----------
    samples
        How many there are.
    chunk_rows
        Samples in a chunk of the field with the largest samples; None: not chunked. Blocks are cut there.
    shared_chunk_bytes
        Size of the largest chunk of which several blocks may have a part; 0: there are none.
    """

    path: str
    samples: int
    chunk_rows: int | None
    shared_chunk_bytes: int


@dataclass(frozen=True)
class Layout:
    """What the files contain."""

    fields: tuple[Field, ...]
    files: tuple[FilePart, ...]

    @property
    def samples(self) -> int:
        """Samples in all files."""
        return sum(file.samples for file in self.files)

    @property
    def sample_bytes(self) -> int:
        """Bytes of a sample, over all fields."""
        return sum(field.nbytes for field in self.fields)

    def bounds(self, block_size: int | None = None) -> npt.NDArray[np.int64]:
        """Where blocks begin, and the end: blocks are whole chunks and never cross files.

        Parameters
        ----------
        block_size
            Samples in a block, to be rounded up to whole chunks; None for about a 256th of the data, at least
            64 KiB and at most 1 MiB.
        """
        block_bytes = self.samples * self.sample_bytes // _BLOCKS
        block_bytes = min(max(block_bytes, _LEAST_BLOCK_BYTES), _MOST_BLOCK_BYTES)
        starts = [np.zeros(0, np.int64)]
        first = 0
        for file in self.files:
            chunk = file.chunk_rows or 1
            wanted = block_size or max(block_bytes // max(self.sample_bytes, 1), 1)
            chunks = -(-wanted // chunk) if block_size else max(wanted // chunk, 1)
            starts.append(np.arange(first, first + file.samples, chunks * chunk))
            first += file.samples
        return np.concatenate([*starts, [first]]).astype(np.int64)

    def lines(self) -> list[str]:
        """A description to be compared between ranks. Folders may differ: nodes have disks of their own."""
        fields = [f"dataset {f.name!r} of {f.dtype} {f.shape}" for f in self.fields]
        files = [
            f"{os.path.basename(f.path)}: {f.samples} samples, chunks {f.chunk_rows}" for f in self.files
        ]
        return fields + files


def listed_paths(paths: Paths) -> tuple[str, ...]:
    """Paths and patterns as they were given, one or several. Local.

    Raises
    ------
    TypeError
        When they are something else.
    """
    try:
        return (os.fsdecode(paths),)  # type: ignore[arg-type]
    except TypeError:
        pass
    try:
        return tuple(os.fsdecode(path) for path in paths)  # type: ignore[union-attr]
    except TypeError:
        raise TypeError(f"path must be a file, a pattern or a list of these, got {paths!r}") from None


def listed_names(names: str | Sequence[str]) -> tuple[str, ...]:
    """Names of datasets, one or several. Local.

    Raises
    ------
    TypeError, ValueError
        When they are something else, none, or not different.
    """
    try:
        listed = (names,) if isinstance(names, str) else tuple(names)
        wrong = not all(isinstance(name, str) for name in listed)
    except TypeError:
        wrong = True
    if wrong:
        raise TypeError(f"names must be the name of a dataset or a list of names, got {names!r}")
    if not listed:
        raise ValueError("names must be those of at least one dataset, got none")
    if len(set(listed)) != len(listed):
        raise ValueError(f"names must be different, got {list(listed)}")
    return listed


def describe(paths: Sequence[str], names: Sequence[str]) -> Layout:
    """What is in the files. Local.

    Parameters
    ----------
    paths
        Files and patterns.
    names
        Of the datasets in each.

    Raises
    ------
    FileNotFoundError, OSError
        When there is no such file, or it is not HDF5.
    KeyError, ValueError, TypeError
        When a file lacks a dataset, their lengths or, between files, types and shapes differ, or torch has no
        such type.
    """
    fields: tuple[Field, ...] | None = None
    parts = []
    for path in _expand(paths):
        with _open(path) as file:
            found, part = _describe_file(file, path, names)
        for here, expected in zip(found, fields or found, strict=True):
            if here != expected:
                raise ValueError(
                    f"dataset {here.name!r} in {path} must be of {expected.dtype} {expected.shape} as in the "
                    f"files before, got {here.dtype} {here.shape}"
                )
        fields = found
        parts.append(part)
    return Layout(fields or (), tuple(parts))


def _expand(paths: Sequence[str]) -> list[str]:
    """Absolute paths: a worker process may live in another folder."""
    found: list[str] = []
    for path in paths:
        if glob.has_magic(path) and not os.path.exists(path):
            matches = sorted(set(glob.glob(path, recursive=True)))
            if not matches:
                raise FileNotFoundError(f"{path} must match at least one file, got none")
            found += matches
        else:
            found.append(path)
    if not found:
        raise ValueError("path must name at least one file, got an empty list")
    return [os.path.abspath(path) for path in found]


def _open(path: str, **options: Any) -> h5py.File:
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{path} must be an HDF5 file, got {'a folder' if os.path.isdir(path) else 'none'}"
        )
    # Where this process has the file open already, with locks, HDF5 wants it the same way again.
    for locking in (False, None, True, "best-effort"):
        try:
            return h5py.File(path, "r", locking=locking, **options)
        except OSError as error:
            problem = error
            if "locking" not in str(error):
                break
    raise OSError(f"{path} must be an HDF5 file that can be read, got {problem}") from problem


def _describe_file(file: h5py.File, path: str, names: Sequence[str]) -> tuple[tuple[Field, ...], FilePart]:
    fields, lengths, chunks = [], [], []
    for name in names:
        dataset = file.get(name)
        if not isinstance(dataset, h5py.Dataset):
            raise KeyError(f"{path} must have a dataset {name!r}, got {sorted(file)}")
        if dataset.ndim == 0:
            raise ValueError(
                f"dataset {name!r} in {path} must have samples along its first dimension, got a scalar"
            )
        fields.append(Field(name, dataset.shape[1:], _torch_type(dataset.dtype, f"{name!r} in {path}")))
        lengths.append(dataset.shape[0])
        chunks.append(dataset.chunks)
    if len(set(lengths)) > 1:
        pairs = ", ".join(f"{name!r} {length}" for name, length in zip(names, lengths, strict=True))
        raise ValueError(f"the datasets in {path} must have equally many samples, got {pairs}")
    largest = max(range(len(fields)), key=lambda at: fields[at].nbytes)
    rows = chunks[largest][0] if chunks[largest] else None
    shared = [
        int(np.prod(chunk, dtype=np.int64)) * field.dtype.itemsize
        for chunk, field in zip(chunks, fields, strict=True)
        if chunk and (rows or 1) % chunk[0]
    ]
    return tuple(fields), FilePart(path, lengths[0], rows, max(shared, default=0))


def _torch_type(dtype: np.dtype[Any], where: str) -> np.dtype[Any]:
    """The type in this machine's byte order, if torch has it."""
    native = dtype.newbyteorder("=")
    try:
        torch.from_numpy(np.empty(0, native))
    except TypeError:
        raise TypeError(
            f"dataset {where} must be of a type that torch has, got {dtype}. Store codes of strings"
        ) from None
    return np.dtype(native.str)  # without what h5py notes in it, such as the names of an enumeration


class OpenFiles:
    """The files of a layout, opened when they are first read from. A context manager. Local.

    Parameters
    ----------
    layout
        What :func:`describe` found.
    options
        For ``h5py.File``, such as ``driver``.
    """

    def __init__(self, layout: Layout, **options: Any) -> None:
        self._layout, self._options = layout, options
        self._starts = [0]
        for file in layout.files:
            self._starts.append(self._starts[-1] + file.samples)
        self._open: dict[int, tuple[h5py.File, list[Any]]] = {}  # the least recently used one first

    def open_all(self) -> None:
        """Open every file now. Collective over the communicator of a parallel driver."""
        for at in range(len(self._layout.files)):
            self._datasets(at, keep=len(self._layout.files))

    def read(self, start: int, stop: int, arrays: Sequence[Array], row: int) -> None:
        """Read the samples ``start`` to ``stop - 1`` into the rows from ``row`` of each field's array. Local.

        Raises
        ------
        OSError
            Naming file and samples, when a part cannot be read: truncated, damaged, a filter that is missing.
        """
        while start < stop:
            at = bisect_right(self._starts, start) - 1
            first, end = self._starts[at], min(stop, self._starts[at + 1])
            try:
                for dataset, array in zip(self._datasets(at), arrays, strict=True):
                    target = array[row : row + end - start]
                    if target.size:
                        _read_rows(dataset, start - first, target)
            except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
                raise OSError(
                    f"{self._layout.files[at].path} must be whole and as it was at first, got {error} "
                    f"in samples {start - first} to {end - first}"
                ) from error
            row, start = row + end - start, end

    def close(self) -> None:
        """Close all files; reading opens them again. Local."""
        while self._open:
            self._open.popitem()[1][0].close()

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _datasets(self, at: int, keep: int = _OPEN_AT_ONCE) -> list[Any]:
        entry = self._open.pop(at, None)
        if entry is None:
            while len(self._open) >= max(keep, _OPEN_AT_ONCE):
                self._open.pop(next(iter(self._open)))[0].close()
            part = self._layout.files[at]
            # Chunks that are read whole would only be copied once more on their way through HDF5's cache. One
            # that several blocks share, such as a long one of labels, is decompressed once if it fits.
            cache = min(2 * part.shared_chunk_bytes, _CACHE_BYTES)
            file = _open(part.path, rdcc_nbytes=cache, **self._options)
            try:
                entry = file, [_as_described(file[field.name], field, part) for field in self._layout.fields]
            except (KeyError, ValueError):
                file.close()
                raise
        self._open[at] = entry
        return entry[1]


def _as_described(dataset: Any, field: Field, part: FilePart) -> Any:
    """The dataset's identifier, if its shape is what was found at first."""
    if dataset.shape != (part.samples, *field.shape):
        raise ValueError(f"{field.name!r} of {dataset.shape} where it was {(part.samples, *field.shape)}")
    return dataset.id


def _read_rows(dataset: Any, start: int, target: Array) -> None:
    """Samples from ``start`` into an array. What h5py's ``read_direct`` does takes three times as long."""
    offset = (start, *(0 for _ in target.shape[1:]))
    space = dataset.get_space()
    space.select_hyperslab(offset, target.shape)
    dataset.read(h5py.h5s.create_simple(target.shape), space, target)
