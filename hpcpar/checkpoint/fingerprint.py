"""Fingerprints: how ranks find out, without exchanging tensors, which of these they have in common.

A leaf is cut into slices of 4 MiB, each with a *digest*: to tell slices apart and, written down with them,
to tell later whether they are still what was written. A digest costs little more than to read the memory, a
fraction of what a CRC costs. It takes the slice for a row of matrices of 64-bit words, and is the SHA-256 of
the sums of their columns and of their rows, modulo 2^64::

    block   [ w w w w ... ]   row sum
            [ w w w w ... ]   row sum
             ...     31 rows of 4095 words
            column sums

Two slices that differ have the same digest only if their differences cancel in every column and, at the same
time, in every row of every block. A single changed word, values or rows or blocks in another order, a page of
zeros: all show. Sums lose what is carried beyond the highest bit, the sign of a float, so rows and columns
have odd lengths: a tensor and its negative, or a part of it, differ. Tensors that differ because training has
led them apart have, for every block with a difference, dozens of sums that would have to agree by chance; the
odds are far below those of a memory error. It is no protection against data that were made to collide.

Numpy sums in the calling thread, without the interpreter's lock. Torch would wake its threads for each block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from hpcpar.checkpoint.leaves import memory_of

__all__ = ["SLICE_BYTES", "digest", "fingerprint", "slice_bounds"]

SLICE_BYTES = 4 << 20
_ROWS, _COLUMNS, _WORD = 31, 4095, 8
_BLOCK_BYTES = _ROWS * _COLUMNS * _WORD
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
    whole = array.size // _BLOCK_BYTES * _BLOCK_BYTES
    for start in range(0, whole, _BLOCK_BYTES):
        _add_sums(found, array[start : start + _BLOCK_BYTES])
    rest = array[whole:]
    columns = rest.size // (_ROWS * _WORD)
    columns -= columns % 2 == 0 and columns > 0
    end = columns * _ROWS * _WORD
    if end:
        _add_sums(found, rest[:end])
    found.update(rest[end:].tobytes())
    return found.hexdigest()[:_DIGITS]


def _add_sums(found: hashlib._Hash, block: np.ndarray[Any, Any]) -> None:
    if block.ctypes.data % _WORD:  # memory that starts between two words, as that of bytes may
        block = block.copy()
    words = block.view(np.uint64).reshape(_ROWS, -1)
    found.update(memory_of(words.sum(0)))
    found.update(memory_of(words.sum(1)))
