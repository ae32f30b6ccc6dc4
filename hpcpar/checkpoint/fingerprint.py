"""Fingerprints: how ranks find out, without exchanging tensors, which of these they have in common.

A leaf is cut into slices of 4 MiB, each with a *digest*: to tell slices apart and, written down with them,
to tell later whether they are still what was written. The digest of less than 1 MiB is its SHA-256. More
would take too long: it is taken for a row of matrices of 64-bit words, each word is folded and multiplied by
the random odd number that belongs to its place, and the SHA-256 is that of the sums of rows and columns,
modulo 2^64::

    block   [ k(w ^ w>>29)  k(w ^ w>>29) ... ]   row sum
            [ k(w ^ w>>29)  k(w ^ w>>29) ... ]   row sum
             ...                 32 rows of 1024 words
              column sums

Folding brings the highest bits, the signs of floats, to where a product does not lose them. A word that is
the only changed one of its row or column always shows. So a change that does not show is one of four words or
more, in two rows and two columns, whose products cancel in each of these: for a change of values, signs or
places as they occur the odds are 2^-30 for a sum and thus 2^-90 for the three that are independent, or less.
The numbers are the same in every process, hence known, and this is no protection against data that were made
to collide.

Numpy computes in the calling thread, without the interpreter's lock. Torch would wake its threads for each
block.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from hpcpar.checkpoint.leaves import memory_of

__all__ = ["SLICE_BYTES", "digest", "fingerprint", "slice_bounds"]

SLICE_BYTES = 4 << 20
_LARGE_BYTES = 1 << 20
_ROWS, _COLUMNS, _WORD = 32, 1024, 8
_BLOCK_BYTES = _ROWS * _COLUMNS * _WORD  # with the numbers and the products it stays in the cache
_FOLD = 29  # no multiple of a float's bits: two signs must not fold onto each other
_DIGITS = 24


def slice_bounds(nbytes: int) -> Iterator[tuple[int, int]]:
    """Start and end of each slice in which a leaf is written; an empty leaf has none. Local."""
    for start in range(0, nbytes, SLICE_BYTES):
        yield start, min(start + SLICE_BYTES, nbytes)


def fingerprint(data: torch.Tensor) -> list[str]:
    """The digests of all slices of a leaf. Local.

    Parameters
    ----------
    data
        uint8, one dimension, on the host.
    """
    return [digest(data[start:end]) for start, end in slice_bounds(data.numel())]


def digest(data: torch.Tensor) -> str:
    """A short text that is the same for the same bytes. Local.

    Parameters
    ----------
    data
        As in :func:`fingerprint`.
    """
    found = hashlib.sha256(data.numel().to_bytes(8, "little"))
    array = data.numpy()
    end = array.size // _BLOCK_BYTES * _BLOCK_BYTES if array.size >= _LARGE_BYTES else 0
    if end:
        _add_sums(found, array[:end])
    found.update(memory_of(array[end:]))
    return found.hexdigest()[:_DIGITS]


def _add_sums(found: hashlib._Hash, array: np.ndarray[Any, Any]) -> None:
    products = np.empty((_ROWS, _COLUMNS), np.uint64)
    for start in range(0, array.size, _BLOCK_BYTES):
        block = array[start : start + _BLOCK_BYTES]
        if block.ctypes.data % _WORD:  # memory that starts between two words, as that of bytes may
            block = block.copy()
        words = block.view(np.uint64).reshape(_ROWS, _COLUMNS)
        np.right_shift(words, _FOLD, out=products)
        np.bitwise_xor(products, words, out=products)
        np.multiply(products, _numbers(), out=products)
        found.update(memory_of(products.sum(0)))
        found.update(memory_of(products.sum(1)))


@functools.cache
def _numbers() -> np.ndarray[Any, Any]:
    """A random odd number for each place of a block, for ever the same."""
    drawn = hashlib.shake_256(b"hpcpar checkpoint digest").digest(_BLOCK_BYTES)
    return np.frombuffer(drawn, np.dtype("<u8")).reshape(_ROWS, _COLUMNS).astype(np.uint64) | np.uint64(1)
