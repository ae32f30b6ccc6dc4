"""Gradients on the host add up as with ``backward()``, whatever was done to ``.grad`` in between."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hpcpar.xla.gradients import HostGradients

pytestmark = pytest.mark.local


def make(*dtypes: torch.dtype) -> tuple[list[nn.Parameter], HostGradients]:
    """Two parameters, of 2 and 2 x 2 elements."""
    first, second = dtypes or (torch.float32, torch.float32)
    parameters = [nn.Parameter(torch.zeros(2, dtype=first)), nn.Parameter(torch.zeros(2, 2, dtype=second))]
    return parameters, HostGradients(parameters, torch.float32)


def add(gradients: HostGradients, total: float, used: tuple[int, ...] = (0, 1)) -> None:
    """The sum of two samples, in pieces that respect no parameter."""
    flat = torch.full((6,), total)
    gradients.add([(0, flat[:3]), (3, flat[3:])], 2, used)


def values(parameters: list[nn.Parameter]) -> list[float | None]:
    """Of which all elements of a gradient are equal."""
    found: list[float | None] = []
    for parameter in parameters:
        distinct = None if parameter.grad is None else parameter.grad.unique()
        assert distinct is None or distinct.numel() == 1
        found.append(None if distinct is None else distinct.item())
    return found


def test_gradient_is_the_sum_divided_by_the_samples_and_a_second_adds_to_it() -> None:
    parameters, gradients = make()
    add(gradients, 6.0)
    assert values(parameters) == [3.0, 3.0]
    add(gradients, 2.0)
    assert values(parameters) == [4.0, 4.0]


def test_zeroing_begins_anew() -> None:
    parameters, gradients = make()
    gradients.zero()
    assert values(parameters) == [None, None]
    add(gradients, 6.0)
    gradients.zero()
    assert values(parameters) == [0.0, 0.0]
    add(gradients, 2.0)
    assert values(parameters) == [1.0, 1.0]


@pytest.mark.parametrize("to_none", [True, False])
def test_the_optimizer_may_zero_them(to_none: bool) -> None:
    parameters, gradients = make()
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    for total in (6.0, 2.0):
        optimizer.zero_grad(set_to_none=to_none)
        add(gradients, total)
    assert values(parameters) == [1.0, 1.0]


def test_parameter_whose_gradient_was_dropped_begins_at_zero_beside_one_that_goes_on() -> None:
    parameters, gradients = make()
    add(gradients, 6.0)
    parameters[0].grad = None
    add(gradients, 2.0)
    assert values(parameters) == [1.0, 4.0]


def test_unused_parameters_keep_what_they_have() -> None:
    parameters, gradients = make()
    add(gradients, 6.0, used=(1,))
    assert values(parameters) == [None, 3.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_of_another_tensor_is_added_to(dtype: torch.dtype) -> None:
    parameters, gradients = make(dtype, dtype)
    parameters[1].grad = torch.full((2, 2), 10.0, dtype=dtype).t()
    add(gradients, 2.0)
    assert values(parameters) == [1.0, 11.0]


def test_a_foreign_backward_may_come_between() -> None:
    parameters, gradients = make()
    add(gradients, 2.0)
    (5.0 * parameters[1]).sum().backward()
    add(gradients, 2.0)
    assert values(parameters) == [2.0, 7.0]


def test_parameters_of_16_bits_have_gradients_of_their_own_type() -> None:
    parameters, gradients = make(torch.bfloat16, torch.float32)
    add(gradients, 6.0)
    add(gradients, 2.0)
    kinds = [grad.dtype for p in parameters if isinstance(grad := p.grad, Tensor)]
    assert kinds == [torch.bfloat16, torch.float32]
    assert values(parameters) == [4.0, 4.0]
    gradients.zero()
    add(gradients, 2.0)
    assert values(parameters) == [1.0, 1.0]
