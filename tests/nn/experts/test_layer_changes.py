"""Layers that are frozen, converted, copied, misused or freed on the way keep their ranks together."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from hpcpar.comm import Communicator
from hpcpar.errors import MismatchError, RankFailedError
from hpcpar.nn import DataParallel, MixtureOfExperts, SyncBatchNorm, TopKGate, convert_sync_batchnorm
from hpcpar.nn.experts.layer_experts import layer_experts
from tests.nn.experts.mixtures import FEATURES, expert, gate, rows_of


def make(comm: Communicator, num_experts: int = 4, **options: Any) -> MixtureOfExperts:
    return MixtureOfExperts(gate(num_experts, **options), [expert(e) for e in range(num_experts)], comm)


def assert_replicas_equal(comm: Communicator, values: dict[str, torch.Tensor]) -> None:
    for part in comm.allgather(values):
        for name, value in part.items():
            if name in values:
                assert torch.equal(values[name], value), name


def gradients(layer: MixtureOfExperts) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in layer.experts.named_parameters() if p.grad is not None}


def test_freezing_an_expert_of_one_rank(comm: Communicator) -> None:
    layer = make(comm)
    model = DataParallel(nn.Sequential(layer), comm)
    x, mine = rows_of(comm, [4, 2])
    model(x[mine]).sum().backward()
    if "3" in layer.experts:
        layer.experts["3"].requires_grad_(False)
    model.zero_grad()
    model(x[mine]).sum().backward()
    assert all(p.grad is None for n, p in layer.experts.named_parameters() if n.startswith("3."))
    model.free()


@pytest.mark.parametrize("convert", [nn.Module.double, nn.Module.float, nn.Module.bfloat16])
def test_converted_layer_reduces_its_replicas(comm: Communicator, convert: Any) -> None:
    layer = make(comm, 2)
    convert(layer)
    dtype = next(layer.experts.parameters()).dtype
    x, mine = rows_of(comm, [4, 2])
    layer(x[mine].to(dtype)).float().sum().backward()
    assert_replicas_equal(comm, gradients(layer))
    layer.free()


def test_copy_that_trains_in_eval_mode_reduces_its_replicas(comm: Communicator) -> None:
    layer = make(comm, 2)
    x, mine = rows_of(comm, [4, 2])
    twin = copy.deepcopy(layer).eval()
    layer.eval()
    for one in (layer, twin):
        one(x[mine]).square().sum().backward()
    for name, value in gradients(layer).items():
        torch.testing.assert_close(gradients(twin)[name], value, rtol=1e-12, atol=0.0)
    twin.free()
    layer(x[mine])
    layer.free()


def test_bias_stays_in_float32(comm: Communicator) -> None:
    layer = make(comm, bias_update_rate=1e-4).bfloat16()
    assert isinstance(layer.gate, TopKGate)
    assert layer.gate.expert_bias.dtype is torch.float32 or layer.gate.expert_bias.dtype is torch.float64
    assert layer.gate.weight.dtype is torch.bfloat16
    layer.gate.expert_bias.fill_(0.5)
    x, mine = rows_of(comm, [7, 2])
    layer(x[mine].bfloat16())
    moved = (layer.gate.expert_bias - 0.5).abs()
    assert bool((moved < 1.5e-4).all()) and bool((moved > 0.5e-4).any())
    layer.free()


def test_bias_follows_the_load_of_all_that_share_the_experts(comm: Communicator) -> None:
    """Data parallelism over several layers of one rank each."""
    alone = comm.Split(comm.rank)
    assert alone is not None
    layer = make(alone, bias_update_rate=0.1)
    model = DataParallel(nn.Sequential(layer), comm)
    x, mine = rows_of(comm, [5, 2, 7])
    model(x[mine]).sum().backward()
    loads = sum(comm.allgather(layer.load))
    expected = torch.sign(loads.sum() - 4 * loads).double() * 0.1
    assert isinstance(layer.gate, TopKGate)
    torch.testing.assert_close(layer.gate.expert_bias.double(), expected)
    model.free()


def test_wrong_input_on_one_rank_is_an_error_on_all_and_leaves_the_layer_usable(comm: Communicator) -> None:
    layer = make(comm)
    x, mine = rows_of(comm, [4, 2])
    wrong = torch.zeros(3, FEATURES, dtype=torch.int64)
    with pytest.raises(MismatchError, match="input of a mixture"):
        layer(wrong if comm.rank == comm.size - 1 else x[mine])
    with pytest.raises((MismatchError, RuntimeError)):
        layer(torch.zeros(3, FEATURES + 1, dtype=torch.float64) if comm.rank == 0 else x[mine])
    layer(x[mine]).sum().backward()
    layer.free()


def test_expert_that_raises_once_on_a_single_rank_leaves_the_layer_usable(comm: Communicator) -> None:
    alone = comm.Split(comm.rank)
    assert alone is not None
    layer = make(alone)
    x = torch.randn(5, FEATURES, dtype=torch.float64)
    with pytest.raises(ValueError, match="once"):
        handle = layer.experts["0"].register_forward_pre_hook(_raise)
        layer.experts["1"].register_forward_pre_hook(_raise)
        layer.experts["2"].register_forward_pre_hook(_raise)
        layer(x)
    handle.remove()
    for part in layer.experts.values():
        part._forward_pre_hooks.clear()
    layer(x).sum().backward()
    layer.free()


def _raise(*_: Any) -> None:
    raise ValueError("once")


def test_freeing_after_a_failure_does_not_wait(comm: Communicator) -> None:
    layer = make(comm, 2)
    model = DataParallel(nn.Sequential(layer), comm)
    x, mine = rows_of(comm, [4, 2])
    for part in layer.experts.values():
        if comm.rank == 0:
            part.register_forward_pre_hook(_raise)
    with pytest.raises((ValueError, RankFailedError)):
        model(x[mine])
    model.free()
    layer.free()


def test_freed_before_the_wrapper(comm: Communicator) -> None:
    layer = make(comm, 2)
    model = DataParallel(nn.Sequential(layer), comm)
    layer.free()
    model.free()


def test_synchronised_batch_norm_has_no_place_in_experts(comm: Communicator) -> None:
    normed = [nn.Sequential(nn.BatchNorm1d(FEATURES), expert(e)).double() for e in range(2)]
    layer = MixtureOfExperts(gate(2), normed, comm)
    model = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(FEATURES), layer), comm)
    assert isinstance(model[0], SyncBatchNorm)
    assert not any(isinstance(part, SyncBatchNorm) for part in layer.modules())
    with pytest.raises(MismatchError, match="SyncBatchNorm"):
        MixtureOfExperts(gate(2), [SyncBatchNorm(FEATURES, comm=comm), expert(0)], comm)
    layer.free()


def test_experts_that_share_parameters_are_refused(comm: Communicator) -> None:
    one, two = expert(0), expert(1)
    two[0].weight = one[0].weight
    with pytest.raises(MismatchError, match="share parameters"):
        MixtureOfExperts(gate(2), [one, two], comm)


def test_state_without_moments_takes_them_away(comm: Communicator) -> None:
    layer = make(comm)
    optimizer = torch.optim.Adam(layer.parameters())
    before = {uid: each.get_full_state() for uid, each in layer_experts(layer, optimizer).items()}
    x, mine = rows_of(comm, [4, 2])
    layer(x[mine]).sum().backward()
    optimizer.step()
    for uid, each in layer_experts(layer, optimizer).items():
        each.load_full_state(before[uid])
    assert not any(parameter in optimizer.state for parameter in layer.experts.parameters())
    layer.free()
