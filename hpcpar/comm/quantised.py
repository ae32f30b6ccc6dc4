"""Eight bits per number: a code for gradients on the wire, and a memory for what its rounding keeps back.

*The code.* A flat tensor is cut into blocks of 256 numbers. A block becomes one float32 scale, its largest
magnitude over 127, and 256 integers in [-127, 127], each a number over the scale, rounded to nearest::

    block      x0   x1   ...  x255 | x256 ...                 1024 bytes in float32
    packed     q0 q1 ... q255 scale | q256 ...                 260 bytes, 0.254 of that

A block is thus as coarse as its largest number, and a large one elsewhere does it no harm. The last block is
filled up with zeros. A block with an infinity or a NaN decodes to NaN, so that an overflow is seen by whoever
looks for one, as a ``GradScaler`` does; but zeros in it stay zero. Gaps between tensors are zeros that nobody
writes again: a NaN there would come back in every message.

*The memory.* Rounding alone would lose numbers below half a scale, step after step, in favour of a large
neighbour. So what a message keeps back is added to the next one: error feedback (Seide et al., "1-Bit
Stochastic Gradient Descent", Interspeech 2014; Karimireddy et al., "Error Feedback Fixes SignSGD", ICML
2019).

Invariant: what was decoded, over all messages, plus the residual is what was put in, up to the rounding of
the tensor's own type; save for blocks that were not finite, which leave no residual.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hpcpar.comm.ordered_reduction import slice_bounds

__all__ = [
    "BLOCK",
    "BLOCK_BYTES",
    "ErrorFeedback",
    "add_decoded",
    "decode",
    "encode",
    "is_quantisable",
    "packed_bounds",
]

BLOCK = 256
"""Numbers that share a scale."""

BLOCK_BYTES = BLOCK + torch.float32.itemsize
"""Of a packed block."""

_LEVELS = 127
_CHUNK = 512  # blocks that are coded together, so that they stay in a second-level cache
_SMALLEST = 1024  # below this many numbers a message costs its latency, whatever its length

Bounds = Sequence[tuple[int, int]]


def is_quantisable(flat: torch.Tensor) -> bool:
    """Whether eight bits make a message of ``flat`` shorter, in a way worth having. Local.

    It depends on the length and the dtype only, which are the same on every rank.
    """
    return flat.dtype in (torch.float32, torch.float64) and flat.numel() >= _SMALLEST


def packed_bounds(bounds: Bounds) -> list[tuple[int, int]]:
    """Where parts of a tensor lie once each is packed, one behind the other. Local.

    Parameters
    ----------
    bounds
        Of each part, in elements.

    Returns
    -------
    list of tuple
        Of each part, in bytes.
    """
    packed, end = [], 0
    for first, last in bounds:
        start, end = end, end + -(-(last - first) // BLOCK) * BLOCK_BYTES
        packed.append((start, end))
    return packed


def encode(flat: torch.Tensor) -> torch.Tensor:
    """Pack a tensor. Local.

    Parameters
    ----------
    flat
        Shape (n,), float32 or float64, contiguous, on the host.

    Returns
    -------
    torch.Tensor
        uint8, 260 bytes for each block begun.
    """
    packed = flat.new_empty((-(-flat.numel() // BLOCK), BLOCK_BYTES), dtype=torch.uint8)
    whole = flat.numel() // BLOCK
    blocks = flat[: whole * BLOCK].view(whole, BLOCK)
    for rows, into in zip(torch.split(blocks, _CHUNK), torch.split(packed[:whole], _CHUNK), strict=True):
        _encode_blocks(rows, into)
    if whole < packed.shape[0]:
        last = flat.new_zeros((1, BLOCK))
        last[0, : flat.numel() - whole * BLOCK] = flat[whole * BLOCK :]
        _encode_blocks(last, packed[whole:])
    return packed.view(-1)


def decode(packed: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Unpack what :func:`encode` made. Local.

    Parameters
    ----------
    packed
        uint8. It starts at a multiple of four bytes.
    out
        Shape (n,), float32 or float64, contiguous: the length that was packed. It is written to.

    Returns
    -------
    torch.Tensor
        ``out``.
    """
    blocks = packed.view(-1, BLOCK_BYTES)
    whole = out.numel() // BLOCK
    rows = out[: whole * BLOCK].view(whole, BLOCK)
    for source, into in zip(torch.split(blocks[:whole], _CHUNK), torch.split(rows, _CHUNK), strict=True):
        _decode_blocks(source, into)
    if whole < blocks.shape[0]:
        last = _decode_blocks(blocks[whole:], out.new_empty((1, BLOCK)))
        out[whole * BLOCK :] = last[0, : out.numel() - whole * BLOCK]
    return out


class ErrorFeedback:
    """What rounding has kept back of a tensor that is summed over ranks again and again, on this rank.

    Parameters
    ----------
    numel, dtype
        Of the tensor.
    rank, size
        Of this rank, and of the ranks that sum.

    Attributes
    ----------
    bounds : list of tuple
        The slice of each rank in a sum that all want, in elements: whole blocks.
    own : torch.Tensor
        Residual of this rank's contributions, as long as the tensor.
    sum : torch.Tensor
        Residual of the sums that this rank sends round, as long as its slice.
    """

    def __init__(self, numel: int, dtype: torch.dtype, rank: int, size: int) -> None:
        blocks = slice_bounds(-(-numel // BLOCK), size)
        self.bounds = [(min(first * BLOCK, numel), min(last * BLOCK, numel)) for first, last in blocks]
        self._part = slice(*self.bounds[rank])
        self.own = torch.zeros(numel, dtype=dtype)
        self.sum = torch.zeros_like(self.own[self._part])

    def encode(self, flat: torch.Tensor, bounds: Bounds) -> torch.Tensor:
        """Pack a contribution, each part by itself, and keep back what the code cannot say. Local.

        Parameters
        ----------
        flat
            The contribution.
        bounds
            Of the parts, in elements.

        Returns
        -------
        torch.Tensor
            uint8; :func:`packed_bounds` tells where each part is.
        """
        self.own.add_(flat)
        return torch.cat([_take(self.own[first:last]) for first, last in bounds])

    def encode_sum(self, total: torch.Tensor) -> torch.Tensor:
        """Pack the sum of this rank's slice, likewise. Local."""
        self.sum.add_(total)
        return _take(self.sum)

    def outstanding(self) -> torch.Tensor:
        """Both residuals together, a copy as long as the tensor. Local."""
        both = self.own.clone()
        both[self._part] += self.sum
        return both

    def load(self, share: torch.Tensor) -> None:
        """Have ``share``, as long as the tensor, outstanding and nothing else. Local."""
        self.own.copy_(share)
        self.sum.zero_()


def add_decoded(rows: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Write the sum of packed tensors to ``total``, row 0 first. Local.

    Parameters
    ----------
    rows
        uint8, shape (ranks, bytes).
    total
        As ``out`` of :func:`decode`.
    """
    decode(rows[0], total)
    part = torch.empty_like(total)
    for row in rows[1:]:
        total.add_(decode(row, part))
    return total


def _take(residual: torch.Tensor) -> torch.Tensor:
    """Pack as much of ``residual`` as the code can say, which leaves the rest in it."""
    packed = encode(residual)
    residual.sub_(decode(packed, torch.empty_like(residual)))
    residual.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)  # an overflow must not come back step after step
    return packed


def _encode_blocks(rows: torch.Tensor, packed: torch.Tensor) -> None:
    largest = rows.abs().amax(dim=1, keepdim=True)  # torch.aminmax takes ten times as long
    scale = (largest / _LEVELS).to(torch.float32)
    packed[:, BLOCK:].view(torch.float32).copy_(scale)
    # A scale of zero is that of a block of zeros, or of numbers that are below what float32 can say.
    divisor = torch.where(scale > 0.0, scale, 1.0).to(rows.dtype)
    # Clamped, because the scale is rounded too, and coarsely so when it is tiny.
    values = (rows / divisor).round_().clamp_(-_LEVELS, _LEVELS)
    finite = scale.isfinite()
    if not bool(finite.all()):
        values = torch.where(finite, values, rows.ne(0.0))
    packed[:, :BLOCK].view(torch.int8).copy_(values)


def _decode_blocks(packed: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    values, scale = packed[:, :BLOCK].view(torch.int8), packed[:, BLOCK:].view(torch.float32)
    rows.copy_(values).mul_(scale.to(rows.dtype))
    finite = scale.isfinite()
    if not bool(finite.all()):
        rows.masked_fill_(~finite, float("nan")).masked_fill_(values.eq(0), 0.0)
    return rows
