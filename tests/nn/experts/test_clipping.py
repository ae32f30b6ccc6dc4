"""Clipping a model with experts is clipping the model of one process."""

from __future__ import annotations

import pytest
import torch

from hpcpar.comm import Communicator
from hpcpar.errors import MismatchError
from hpcpar.nn import DataParallel
from hpcpar.nn.experts.clipping import clip_grad_norm_
from tests.nn.experts.mixtures import assert_expert_gradients, assert_same, pair, rows_of


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
@pytest.mark.parametrize("num_experts", [1, 3, 5])
def test_clipping_equals_one_process(comm: Communicator, num_experts: int, norm_type: float) -> None:
    mixture, dense = pair(comm, num_experts)
    parallel = DataParallel(mixture, comm)
    x, mine = rows_of(comm, [4, 2, 5])
    for max_norm in (0.1, 1e6):
        for parameter in (*mixture.parameters(), *dense.parameters()):
            parameter.grad = None
        parallel(x[mine]).sin().sum().backward()
        (dense(x).sin().sum() / comm.size).backward()
        expected = torch.nn.utils.clip_grad_norm_(dense.parameters(), max_norm, norm_type)
        norm = clip_grad_norm_(parallel, max_norm, norm_type)
        assert_same(norm, expected)
        assert comm.allgather(float(norm)) == [float(norm)] * comm.size
        assert_expert_gradients(mixture, dense)
        assert_same(next(mixture.gate.parameters()).grad, dense.gate.weight.grad)
    with pytest.raises(MismatchError, match="norm_type"):
        clip_grad_norm_(parallel, 1.0, 0.0)
    parallel.free()
    mixture.free()
