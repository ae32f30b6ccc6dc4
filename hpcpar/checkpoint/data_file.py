"""The data of one rank: an HDF5 file with one dataset of bytes, in which all that it writes lies end to end.

::

    [ HDF5's own bytes | slice | slice | slice ... ]        attributes: format, generation, rank
                       ^ offset, in the manifest

The dataset is contiguous and allocated when the file is made. So slices are written and read by the system's
own calls, at the speed of any plain file, straight from and to the memory of tensors; and other HDF5 programs
still find an ordinary file. What belongs to HDF5 has a checksum in the manifest, like every slice.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import torch

from hpcpar.checkpoint.fingerprint import digest
from hpcpar.checkpoint.leaves import LeafValue, as_bytes, memory_of
from hpcpar.checkpoint.plan import Piece, Write
from hpcpar.errors import CheckpointError

__all__ = ["DataFile", "DataReader", "write_data_file"]

_FORMAT = "hpcpar checkpoint data 1"
_PAGE = 4096
_SYNC_BYTES = 64 << 20
_SMALL_BYTES = 64 << 10
_BATCH_BYTES = 1 << 20


@dataclass(frozen=True)
class DataFile:
    """What the manifest knows of a file.

    Attributes
    ----------
    name
        In the folder of the checkpoint.
    nbytes
        Of the file.
    offset
        Where its data begin.
    data_bytes
        How many these are.
    crc
        Checksum of all other bytes.
    """

    name: str
    nbytes: int
    offset: int
    data_bytes: int
    crc: int


def write_data_file(
    path: Path,
    generation: str,
    rank: int,
    leaves: Sequence[LeafValue],
    work: Sequence[Write],
    data_bytes: int,
) -> DataFile:
    """Write what a plan wants of a rank, and see that it is on the disk. Local.

    Raises
    ------
    OSError
        When that fails, for instance because the disk is full. The file is left for the caller to remove.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        offset = _lay_out(handle, generation, rank, data_bytes)
        _write_leaves(handle, leaves, work, offset)
        nbytes = os.fstat(handle).st_size
        return DataFile(
            path.name, nbytes, offset, data_bytes, _crc_around(handle, nbytes, offset, data_bytes)
        )
    finally:
        os.close(handle)


def _write_leaves(handle: int, leaves: Sequence[LeafValue], work: Sequence[Write], offset: int) -> None:
    """Write and sync; a thread has the system begin with the disk while more is written to its memory."""
    number, data, ahead = -1, torch.empty(0, dtype=torch.uint8), 0
    batch = _Batch(handle)
    with ThreadPoolExecutor(1) as thread:
        synced: Future[None] | None = None
        for write in work:
            if write.leaf != number:  # slices of a leaf follow each other: it is copied to the host once
                number, data = write.leaf, as_bytes(leaves[write.leaf])
            part = data[write.start : write.end]
            batch.write(memory_of(part.numpy()), offset + write.offset)
            ahead += part.numel()
            if ahead >= _SYNC_BYTES and (synced is None or synced.done()):
                _raise_error(synced)
                synced, ahead = _begin_to_sync(thread, handle), 0
        batch.flush()
        _raise_error(synced)
    os.fsync(handle)


class _Batch:
    """Writes small pieces that follow each other by one call for many; what is between them becomes zero."""

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._start = 0
        self._bytes = bytearray()

    def write(self, data: memoryview, offset: int) -> None:
        """Write now, or later together with others."""
        gap = offset - self._start - len(self._bytes)
        if not 0 <= gap < _SMALL_BYTES or len(self._bytes) >= _BATCH_BYTES or data.nbytes > _SMALL_BYTES:
            self.flush()
        if data.nbytes > _SMALL_BYTES:
            _write_all(self._handle, data, offset)
            return
        if not self._bytes:
            self._start, gap = offset, 0
        self._bytes += bytes(gap)
        self._bytes += data

    def flush(self) -> None:
        """Write what is left."""
        if self._bytes:
            _write_all(self._handle, memoryview(self._bytes), self._start)
            self._bytes = bytearray()


def _begin_to_sync(thread: ThreadPoolExecutor, handle: int) -> Future[None] | None:
    try:
        return thread.submit(os.fdatasync, handle)
    except RuntimeError:  # the process exits, and has no new threads: it syncs in the end
        return None


def _raise_error(synced: Future[None] | None) -> None:
    """The system reports a failure to write to the disk to one call only."""
    if synced is not None:
        synced.result()


def _lay_out(handle: int, generation: str, rank: int, data_bytes: int) -> int:
    """Give an empty file the form of HDF5, with its dataset; where the data begin."""
    image = _Image()
    # HDF5 does not write to the disk itself: when that is full, it can neither close the file nor forget it.
    with h5py.File(image, "w", libver="latest", alignment_threshold=_PAGE, alignment_interval=_PAGE) as file:
        file.attrs.update(format=_FORMAT, generation=generation, rank=rank)
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_layout(h5py.h5d.CONTIGUOUS)
        properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        space = h5py.h5s.create_simple((data_bytes,))
        dataset = h5py.h5d.create(file.id, b"data", h5py.h5t.STD_U8LE, space, properties)
        offset = int(dataset.get_offset())
    os.ftruncate(handle, image.size)
    for start, page in image.pages():
        _write_all(handle, memoryview(page)[: image.size - start], start)
    return offset


class _Image(io.RawIOBase):
    """A file in memory that has only the pages that were written to: those of HDF5 itself, not the data."""

    def __init__(self) -> None:
        self._pages: dict[int, bytearray] = {}
        self._position = 0
        self.size = 0

    def pages(self) -> Iterator[tuple[int, bytearray]]:
        """Place and contents of each."""
        return ((number * _PAGE, page) for number, page in sorted(self._pages.items()))

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = start + offset
        return self._position

    def truncate(self, size: int | None = None) -> int:
        self.size = self._position if size is None else size
        return self.size

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), max(0, self.size - self._position))
        for place in range(count):
            number, start = divmod(self._position + place, _PAGE)
            buffer[place] = self._pages[number][start] if number in self._pages else 0
        self._position += count
        return count

    def write(self, data: Any) -> int:
        for place, byte in enumerate(bytes(data)):
            number, start = divmod(self._position + place, _PAGE)
            self._pages.setdefault(number, bytearray(_PAGE))[start] = byte
        self._position += len(data)
        self.size = max(self.size, self._position)
        return len(data)


def _write_all(handle: int, left: memoryview, offset: int) -> None:
    while left:
        written = os.pwrite(handle, left, offset)
        left, offset = left[written:], offset + written


def _crc_around(handle: int, nbytes: int, offset: int, data_bytes: int) -> int:
    end = offset + data_bytes
    crc = zlib.crc32(os.pread(handle, offset, 0))
    return zlib.crc32(os.pread(handle, max(0, nbytes - end), end), crc)


class DataReader:
    """Reads slices of one file. Local; a context manager.

    Parameters
    ----------
    folder
        Of the checkpoint.
    file
        What the manifest says of it.
    verify
        Whether to compare checksums.

    Raises
    ------
    CheckpointError
        When the file is missing, of another size, or damaged.
    """

    def __init__(self, folder: Path, file: DataFile, *, verify: bool = True) -> None:
        self.path = folder / file.name
        self._file, self._verify = file, verify
        try:
            self._handle = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{self.path} must be readable, got {error.strerror}") from error
        try:
            self._check()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> DataReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Local."""
        os.close(self._handle)

    def read(self, piece: Piece, into: torch.Tensor) -> None:
        """Read a slice into memory of its size. Local.

        Raises
        ------
        CheckpointError
            When it is damaged.
        """
        left, offset = memory_of(into.numpy()), self._file.offset + piece.offset
        while left:
            try:
                count = os.preadv(self._handle, [left], offset)
            except OSError as error:
                raise CheckpointError(f"{self.path} must be readable, got {error.strerror}") from error
            if not count:
                raise CheckpointError(f"{self.path} must be whole, got its end at byte {offset}")
            left, offset = left[count:], offset + count
        if self._verify and digest(into) != piece.digest:
            raise CheckpointError(
                f"{self.path} must be undamaged, got a wrong checksum of {piece.nbytes} bytes at "
                f"{self._file.offset + piece.offset}"
            )

    def _check(self) -> None:
        nbytes = os.fstat(self._handle).st_size
        if nbytes != self._file.nbytes:
            raise CheckpointError(
                f"{self.path} must have {self._file.nbytes} bytes as its manifest says, got {nbytes}"
            )
        file = self._file
        if _crc_around(self._handle, nbytes, file.offset, file.data_bytes) != file.crc:
            raise CheckpointError(f"{self.path} must be undamaged, got a wrong checksum of its head")
