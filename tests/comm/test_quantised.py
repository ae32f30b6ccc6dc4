"""Eight bits per number: how coarse, how short, what overflows become, and what the memory keeps."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from hpcpar.comm.quantised import (
    BLOCK,
    BLOCK_BYTES,
    ErrorFeedback,
    add_decoded,
    decode,
    encode,
    is_quantisable,
    packed_bounds,
)

pytestmark = pytest.mark.local

WIDE = (torch.float32, torch.float64)
SIZES = (0, 1, 255, 256, 257, 5000, 600 * BLOCK + 3)


def round_trip(flat: torch.Tensor) -> torch.Tensor:
    return decode(encode(flat), torch.full_like(flat, 99.0))


def values(numel: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    """Numbers of very different size, from block to block and within blocks."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** torch.randint(-6, 7, (numel // 100 + 1,), generator=generator).double()
    spread = sizes.repeat_interleave(100)[:numel]
    return (torch.randn(numel, generator=generator, dtype=torch.float64) * spread).to(dtype)


@pytest.mark.parametrize("dtype", WIDE)
def test_error_is_half_a_scale_of_the_block_at_most(dtype: torch.dtype) -> None:
    for numel in SIZES:
        flat = values(numel, dtype)
        errors = (round_trip(flat) - flat).abs()
        for block, error in zip(flat.split(BLOCK), errors.split(BLOCK), strict=True):
            if block.numel():
                assert error.max() <= block.abs().max() / 254 * (1 + 1e-5)


@pytest.mark.parametrize("dtype", WIDE)
def test_integers_up_to_the_scale_are_exact(dtype: torch.dtype) -> None:
    flat = torch.randint(-127, 128, (3 * BLOCK,)).to(dtype)
    flat[::BLOCK] = -127.0
    assert torch.equal(round_trip(flat * 0.25), flat * 0.25)
    assert torch.equal(round_trip(torch.zeros(700, dtype=dtype)), torch.zeros(700, dtype=dtype))


def test_packed_is_a_quarter_of_float32() -> None:
    for numel in SIZES:
        assert encode(torch.zeros(numel)).numel() == -(-numel // BLOCK) * BLOCK_BYTES
    assert packed_bounds([(0, 256), (256, 257), (257, 257), (257, 1000)]) == [
        (0, 260),
        (260, 520),
        (520, 520),
        (520, 1300),
    ]


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_block_that_is_not_finite_becomes_nan_and_others_do_not(bad: float) -> None:
    flat = values(4 * BLOCK + 7, torch.float32)
    flat[BLOCK + 5] = flat[-1] = bad
    flat[BLOCK + 9] = 0.0
    decoded = round_trip(flat)
    is_bad = torch.zeros(flat.numel(), dtype=torch.bool)
    is_bad[BLOCK : 2 * BLOCK] = is_bad[4 * BLOCK :] = True
    is_bad[BLOCK + 9] = False  # a gap between tensors must stay one
    assert torch.equal(decoded.isnan(), is_bad)
    assert decoded[BLOCK + 9] == 0.0


def test_numbers_at_the_ends_of_the_range() -> None:
    huge = torch.full((BLOCK,), 1e300, dtype=torch.float64)  # its scale is no float32
    assert bool(round_trip(huge).isnan().all())
    tiny = torch.full((BLOCK,), 1e-300, dtype=torch.float64)
    assert torch.equal(round_trip(tiny), torch.zeros_like(tiny))
    subnormal = torch.linspace(-1.0, 1.0, BLOCK) * 3e-44  # the scale itself has a bit or none
    assert bool((round_trip(subnormal).abs() <= 2 * 3e-44).all())


def test_only_long_wide_floats_are_worth_it() -> None:
    assert is_quantisable(torch.empty(1024)) and is_quantisable(torch.empty(5000, dtype=torch.float64))
    assert not is_quantisable(torch.empty(1023))
    for dtype in (torch.bfloat16, torch.float16, torch.int32, torch.int64):
        assert not is_quantisable(torch.empty(5000, dtype=dtype))


def test_delivered_and_kept_back_is_what_was_put_in() -> None:
    numel, bounds = 1500, [(0, 100), (100, 100), (100, 1500)]
    feedback = ErrorFeedback(numel, torch.float64, 0, 1)
    put_in, delivered = torch.zeros(numel).double(), torch.zeros(numel).double()
    for step in range(5):
        flat = values(numel, seed=step)
        packed = feedback.encode(flat, bounds)
        put_in += flat
        for (first, last), (start, end) in zip(bounds, packed_bounds(bounds), strict=True):
            delivered[first:last] += decode(packed[start:end], flat[first:last])
        assert bool((feedback.outstanding() != 0).any())
        torch.testing.assert_close(delivered + feedback.outstanding(), put_in, rtol=1e-12, atol=1e-9)


def test_sum_is_that_of_all_rows_and_keeps_its_own_residual() -> None:
    feedback = ErrorFeedback(600, torch.float64, 0, 1)
    parts = [values(600, seed=seed) for seed in range(3)]
    rows = torch.stack([encode(part) for part in parts])
    total = add_decoded(rows, torch.empty(600, dtype=torch.float64))
    assert torch.equal(total, round_trip(parts[0]) + round_trip(parts[1]) + round_trip(parts[2]))
    delivered = decode(feedback.encode_sum(total), torch.empty_like(total))
    torch.testing.assert_close(delivered + feedback.outstanding(), total, rtol=1e-12, atol=1e-9)
    assert bool((feedback.sum != 0).any()) and not bool(feedback.own.any())


def test_overflow_leaves_no_residual_in_its_block() -> None:
    feedback = ErrorFeedback(2 * BLOCK, torch.float32, 0, 1)
    flat = values(2 * BLOCK, torch.float32)
    flat[3] = float("inf")
    feedback.encode(flat, [(0, 2 * BLOCK)])
    assert not bool(feedback.own[:BLOCK].any()) and bool(feedback.own[BLOCK:].any())
    assert bool(feedback.own.isfinite().all())


def test_slices_of_ranks_are_whole_blocks() -> None:
    for numel in (1, 256, 1024, 5001):
        for size in (1, 2, 3, 4, 7):
            feedbacks = [ErrorFeedback(numel, torch.float32, rank, size) for rank in range(size)]
            bounds = feedbacks[0].bounds
            assert bounds[0][0] == 0 and bounds[-1][1] == numel
            assert all(a[1] == b[0] for a, b in pairwise(bounds))
            assert all(first % BLOCK == 0 or first == numel for first, _ in bounds)
            assert [f.sum.numel() for f in feedbacks] == [last - first for first, last in bounds]
