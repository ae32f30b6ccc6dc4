"""Pending parameters: any use settles them, once, and then they are ordinary parameters again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hpcpar.optim.pending import make_pending, restore


def pending(kind: type[nn.Parameter] = nn.Parameter) -> tuple[nn.Parameter, list[int]]:
    """A parameter of ones that will be twos, and a list of its settlings."""
    parameter, settled = kind(torch.ones(2, 3)), []

    def settle() -> None:
        restore(parameter)
        settled.append(1)
        with torch.no_grad():
            parameter.fill_(2.0)

    make_pending(parameter, settle)
    return parameter, settled


USES: list[Callable[[Any], object]] = [
    torch.sum,
    lambda p: p.mean(),
    lambda p: (p * p)[0, 0],
    lambda p: torch.cat([p, p]).sum(),
    lambda p: nn.functional.linear(torch.ones(3), p).sum(),
    lambda p: torch.zeros(2, 3).add(p),
    lambda p: torch.zeros(2, 3).copy_(p.detach()),
    lambda p: torch.einsum("ij,ij->", [p, p]),
    lambda p: torch.add(torch.zeros(2, 3), other=p),
    lambda p: nn.utils.parameters_to_vector([p]),
    lambda p: setattr(p, "grad", None),
    lambda p: setattr(p, "data", torch.full((2, 3), 2.0)),
    lambda p: p.requires_grad_(False),
    lambda p: p.storage_offset(),
    lambda p: torch.equal(torch.ones(2, 3), p),
    lambda p: list(p),
]


@pytest.mark.parametrize("use", USES)
def test_use_settles_once(use: Callable[[Any], object]) -> None:
    parameter, settled = pending()
    use(parameter)
    use(parameter)
    assert settled == [1]
    assert type(parameter) is nn.Parameter
    assert bool((parameter == 2.0).all())
    assert not hasattr(parameter, "_hpcpar_settle")


def test_gradients_flow_through_a_use_that_settles() -> None:
    parameter, settled = pending()
    (parameter * 3.0).sum().backward()
    assert settled == [1]
    assert torch.equal(parameter.grad, torch.full((2, 3), 3.0))


def test_making_pending_twice_keeps_the_last() -> None:
    parameter, settled = pending()
    other: list[int] = []

    def settle() -> None:
        restore(parameter)
        other.append(1)

    make_pending(parameter, settle)
    parameter.sum()
    assert (settled, other) == ([], [1])
    restore(parameter)  # nothing to do


def test_subclass_of_parameter_is_itself_again() -> None:
    class Special(nn.Parameter):
        def doubled(self) -> torch.Tensor:
            return self * 2

    parameter, settled = pending(Special)
    assert isinstance(parameter, Special)
    assert bool((parameter.doubled() == 4.0).all())
    assert settled == [1]
    assert type(parameter) is Special


def test_pending_parameter_in_a_module_is_found_by_name() -> None:
    parameter, settled = pending()
    layer = nn.Linear(3, 2)
    layer.weight = parameter
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert sum(p.numel() for p in layer.parameters()) == 8
    layer.zero_grad()
    assert bool((layer.weight == 2.0).all())
    assert settled == [1]
