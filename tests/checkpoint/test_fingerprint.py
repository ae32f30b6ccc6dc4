"""Digests tell apart what is made of the same words, the same rows, the same blocks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hpcpar.checkpoint.fingerprint import digest
from hpcpar.checkpoint.leaves import as_bytes

pytestmark = pytest.mark.local

WORDS = 1 << 18  # 2 MiB, of which sums are taken; a block is 32 x 1024 words
SMALL = 31 * 31


def of(tensor: torch.Tensor) -> str:
    return digest(as_bytes(tensor))


def rearranged(words: torch.Tensor) -> Iterator[torch.Tensor]:
    """The same numbers in other places."""
    count = len(words)
    for stride in (1, 31, 32, count // 8, min(1024, count - 1)):
        swapped = words.clone()
        swapped[[0, stride]] = words[[stride, 0]]
        yield swapped
        yield words.roll(stride)
    for side in (2, 31, 32, 64):
        rows = words[: count // side * side].view(side, -1)
        for order in (rows.flip(0), rows.flip(1), rows.roll(1, 0)):
            yield torch.cat([order.reshape(-1), words[rows.numel() :]])


@pytest.mark.parametrize("count", [SMALL, WORDS, WORDS + 77])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_the_same_words_in_another_order_are_other_data(count: int, dtype: torch.dtype) -> None:
    words = torch.randperm(count).to(dtype)
    others = [words, *rearranged(words)]
    assert len({of(other) for other in others}) == len({other.numpy().tobytes() for other in others})


@pytest.mark.parametrize(("a", "b"), [(1.0, 2.0), (1.0, -1.0), (0.0, -0.0), (0.0, 2.0**1023)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_two_by_two_exchanges_show(a: float, b: float, dtype: torch.dtype) -> None:
    values = torch.zeros(512, 1024, dtype=torch.float64)
    for rows, columns in (((0, 1), (0, 1)), ((0, 31), (5, 1000)), ((0, 32), (0, 512)), ((3, 7), (0, 256))):
        matrix = values.clone()
        matrix[rows[0], columns[0]] = matrix[rows[1], columns[1]] = a
        matrix[rows[0], columns[1]] = matrix[rows[1], columns[0]] = b
        other = matrix.clone()
        other[list(rows)] = matrix[list(rows[::-1])]
        assert of(matrix.to(dtype)) != of(other.to(dtype))


@pytest.mark.parametrize("side", [31, 512])
def test_permutation_matrices_differ(side: int) -> None:
    matrices = [torch.eye(side, dtype=torch.float64)[torch.randperm(side)] for _ in range(8)]
    assert len({of(matrix) for matrix in matrices}) == 8


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64])
def test_signs_show_in_any_number(dtype: torch.dtype) -> None:
    values = torch.randn(4 * WORDS).abs().to(dtype)
    seen = {of(values)}
    for count in (1, 2, 4, 32, 64, 1024, 2048, 32768, len(values)):
        for places in (slice(count), slice(0, None, max(1, len(values) // count))):
            changed = values.clone()
            changed[places] = -changed[places]
            seen.add(of(changed))
    assert len(seen) == 1 + 2 * 9 - 2  # the first of each pair is the same for one and for all


def test_single_bits_show() -> None:
    data = torch.zeros(8 * WORDS + 5, dtype=torch.uint8)
    seen = {digest(data)}
    places = torch.randint(0, len(data), (40,)).unique().tolist()
    for place in places:
        for bit in (1, 128):
            data[place] ^= bit
            seen.add(digest(data))
            data[place] ^= bit
    assert len(seen) == 1 + 2 * len(places)
