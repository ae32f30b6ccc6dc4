"""Messages between ranks stay outside of compiled code, and the compiler outside of the import."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hpcpar.nn.experts.eager import never_compiled

pytestmark = pytest.mark.local


class Exchanging(nn.Module):
    """Its forward must run as it is written."""

    @never_compiled
    def forward(self, x: torch.Tensor, *, factor: float) -> torch.Tensor:
        """Says what it does."""
        assert not torch.compiler.is_compiling()
        return x * factor if float(x.detach().sum()) > 0 else -x


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.exchanging = nn.Linear(3, 3), Exchanging()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.exchanging(self.first(x), factor=3.0) + 1


def test_compiled_model_runs_it_between_two_graphs() -> None:
    model = Model()
    compiled = torch.compile(model, backend="eager")
    for x in (torch.ones(2, 3), -torch.ones(2, 3)):
        torch.testing.assert_close(compiled(x), model(x))
        compiled(x).sum().backward()
    assert model.first.weight.grad is not None
    assert Exchanging.forward.__doc__ == "Says what it does."
