from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpcpar.comm import Communicator
from hpcpar.data import Mean, mean
from hpcpar.errors import MismatchError
from tests.data.files import PROPERTY

local = pytest.mark.local

floats = st.floats(allow_nan=False, allow_infinity=False)


def exactly(values: list[Any], weights: list[Any]) -> float:
    pairs = zip(values, weights, strict=True)
    return float(sum(Fraction(v) * Fraction(w) for v, w in pairs) / sum(map(Fraction, weights)))


@local
@PROPERTY
@given(st.lists(st.tuples(floats, st.floats(0, 1e300)), min_size=1, max_size=20))
def test_mean_is_the_exact_one_rounded_once(pairs: list[tuple[float, float]]) -> None:
    values, weights = [v for v, _ in pairs], [w for _, w in pairs]
    assert mean(values) == exactly(values, [1] * len(values))
    if any(weights):
        assert mean(values, weights) == exactly(values, weights)


@local
def test_every_type_of_number_is_exact_up_to_its_limits() -> None:
    for dtype in (np.int8, np.uint16, np.int32, np.int64, np.uint64, np.float16, np.float32):
        limits: Any = np.iinfo(dtype) if np.dtype(dtype).kind in "iu" else np.finfo(dtype)
        values = np.array([limits.min, limits.max, limits.max, 3, 0], dtype)
        weights = np.array([1, 2, 3, 4, 0], np.uint8)
        expected = exactly([v.item() for v in values], weights.tolist())
        assert mean(values, weights) == mean(np.tile(values, 9), np.tile(weights, 9)) == expected


@local
def test_tensors_of_every_kind_are_taken() -> None:
    assert mean(torch.tensor([True, False, True, True])) == 0.75
    assert mean(torch.tensor([1.5, 2.5], dtype=torch.bfloat16, requires_grad=True)) == 2.0
    assert mean(torch.tensor(3.0)) == 3.0
    assert mean(torch.arange(6).reshape(2, 3), torch.ones(2, 3)) == 2.5
    assert mean(torch.arange(6).reshape(2, 3).t(), 2) == 2.5


@local
def test_many_values_in_any_order_give_the_same_bits() -> None:
    generator = np.random.default_rng(0)
    values = np.exp(generator.normal(0.0, 20.0, 100_000)) * generator.choice([-1.0, 1.0], 100_000)
    expected = math.fsum(values) / len(values)  # rounded twice, so that it may be off by one unit
    result = mean(values)
    assert result == pytest.approx(expected, rel=1e-15)
    assert result == mean(values[::-1]) == mean(np.sort(values))


@local
def test_what_is_not_finite_comes_through() -> None:
    assert mean([1.0, math.inf]) == math.inf
    assert mean([1.0, -math.inf], [1, 2]) == -math.inf
    assert math.isnan(mean([math.inf, -math.inf, 1.0]))
    assert math.isnan(mean([1.0, math.nan]))
    assert math.isnan(mean([1.0, math.inf], [1.0, 0.0]))
    assert mean([1e308, 1e308], [1e308, 1e308]) == 1e308  # no overflow on the way
    assert mean([1e308, 1e308], [2, -1]) == 1e308


@local
def test_a_mean_of_nothing_is_an_error() -> None:
    for arguments in [([],), ([1.0, 2.0], [0, 0]), (torch.empty(0),)]:
        with pytest.raises(ValueError, match="weights that do not sum to zero"):
            mean(*arguments)
    with pytest.raises(ValueError, match="weights must be one number or of the shape"):
        mean([1.0, 2.0, 3.0], [1.0, 2.0])
    with pytest.raises(TypeError, match="values must be integers"):
        mean([1j])
    with pytest.raises(TypeError, match="values must be integers"):
        mean(["a"])


@local
def test_an_accumulator_goes_on_from_its_state() -> None:
    values = np.random.default_rng(1).normal(size=40)
    whole = Mean()
    whole.update(values[:15])
    state = json.loads(json.dumps(whole.state_dict()))
    whole.update(values[15:], np.full(25, 2.0))
    other = Mean()
    other.load_state_dict(state)
    other.update(values[15:], 2.0)
    assert other.compute() == whole.compute() == other.compute()
    other.reset()
    other.update([4.0])
    assert other.compute() == 4.0


def test_the_same_bits_for_every_partition(comm: Communicator) -> None:
    generator = np.random.default_rng(5)
    values, weights = generator.normal(size=(2, 101)) * 10.0 ** generator.integers(-30, 30, (2, 101))
    weights = np.abs(weights)
    expected = mean(values, weights)
    assert expected == exactly(values.tolist(), weights.tolist())
    share = slice(comm.rank, None, comm.size)
    assert mean(values[share], weights[share], comm) == expected
    all_on_one = slice(None) if comm.rank == comm.size - 1 else slice(0)  # ranks with nothing
    assert mean(values[all_on_one], weights[all_on_one], comm) == expected


def test_a_mistake_on_one_rank_is_an_error_on_all(comm: Communicator) -> None:
    with pytest.raises((TypeError, MismatchError), match="must be integers, booleans or floats"):
        mean("a" if comm.rank == comm.size - 1 else 1.0, None, comm)
    with pytest.raises(ValueError, match="got no samples"):
        mean([], None, comm)
    assert math.isnan(mean(math.nan if comm.rank == 0 else 1.0, None, comm))
