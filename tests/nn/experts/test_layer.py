"""The synchronous layer against a dense mixture in one process."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from hpcpar.comm import Communicator
from hpcpar.errors import CommunicatorFreedError, HpcparError, MismatchError, RankFailedError
from hpcpar.nn.experts.gate import TopKGate
from hpcpar.nn.experts.layer import MixtureOfExperts
from tests.nn.experts.mixtures import (
    FEATURES,
    Dense,
    assert_expert_gradients,
    assert_same,
    expert,
    gate,
    pair,
    rows_of,
    summed,
)

BATCHES = {"even": [5], "uneven": [7, 2, 4], "a rank without tokens": [0, 6], "no tokens at all": [0]}


def compare_steps(
    comm: Communicator,
    layer: MixtureOfExperts,
    dense: Dense,
    counts: list[int],
    steps: int = 1,
    what: object = "",
) -> None:
    """Outputs, losses, load and every gradient, of the sum of all ranks' losses."""
    for step in range(steps):
        x, mine = rows_of(comm, counts, seed=step)
        whole, part = x.clone().requires_grad_(), x[mine].clone().requires_grad_()
        for parameter in (*layer.parameters(), *dense.parameters()):
            parameter.grad = None
        expected, got = dense(whole), layer(part)
        assert_same(got, expected[mine], f"output {what}")
        assert layer.load.tolist() == dense.load.tolist()
        router = layer.gate
        assert isinstance(router, TopKGate)
        assert_same(router.balancing_loss, dense.balancing_loss, f"balancing loss {what}")
        assert_same(router.z_loss, dense.z_loss, f"z-loss {what}")
        assert_same(router.expert_bias, dense.gate.expert_bias, f"bias {what}")
        (expected.sin().sum() + comm.size * (dense.balancing_loss + dense.z_loss)).backward()
        (got.sin().sum() + router.balancing_loss + router.z_loss).backward()
        assert_same(part.grad, None if whole.grad is None else whole.grad[mine], f"input {what}")
        assert_expert_gradients(layer, dense, what)
        assert_same(summed(comm, router.weight.grad), dense.gate.weight.grad, f"gate {what}")
        if layer.shared_expert is not None and dense.shared is not None:
            for one, other in zip(layer.shared_expert.parameters(), dense.shared.parameters(), strict=True):
                assert_same(summed(comm, one.grad), other.grad, f"shared {what}")


@pytest.mark.parametrize("num_experts", [1, 2, 3, 4, 8])
def test_layer_equals_dense_mixture(comm: Communicator, num_experts: int) -> None:
    for top_k in (1, 2):
        for capacity in (None, 1.0, 0.5):
            layer, dense = pair(comm, num_experts, top_k=top_k, capacity_factor=capacity, out=4)
            for name, counts in BATCHES.items():
                if name != "no tokens at all":
                    compare_steps(comm, layer, dense, counts, what=(name, top_k, capacity))
            layer.free()


def test_no_tokens_anywhere(comm: Communicator) -> None:
    layer, _ = pair(comm, 3, shared=True)
    x = torch.zeros(2, 0, FEATURES, dtype=torch.float64, requires_grad=True)
    output = layer(x)
    assert output.shape == x.shape
    output.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in layer.experts.parameters())
    layer.free()


@pytest.mark.parametrize(
    "options",
    [
        {"shared": True},
        {"bias_update_rate": 0.05},
        {"balancing_coefficient": 0.3, "z_coefficient": 0.2},
        {"normalize": False},
        {"top_k": 1, "normalize": True},
        {"top_k": 3},
    ],
    ids=str,
)
def test_options_equal_dense_mixture(comm: Communicator, options: dict[str, Any]) -> None:
    layer, dense = pair(comm, 4, **options)
    compare_steps(comm, layer, dense, [5, 3, 6], steps=4)
    layer.free()


def test_all_tokens_to_one_expert(comm: Communicator) -> None:
    for capacity in (None, 1.0):
        layer, dense = pair(comm, 4, top_k=1, capacity_factor=capacity)
        for router in (layer.gate, dense.gate):
            assert isinstance(router, TopKGate)
            router.expert_bias.copy_(torch.tensor([0.0, 0.0, 9.0, 0.0]))
        compare_steps(comm, layer, dense, [5, 3])
        layer.free()


def test_leading_axes_are_tokens(comm: Communicator) -> None:
    layer, _ = pair(comm, 3, out=5, shared=True)
    x = torch.randn(2, 3, FEATURES, dtype=torch.float64)
    assert_same(layer(x), layer(x.flatten(0, 1)).view(2, 3, 5))
    layer.free()


def test_any_module_may_be_the_gate(comm: Communicator) -> None:
    linear = nn.Linear(FEATURES, 4, bias=False).double()
    layer = MixtureOfExperts(linear, [expert(e) for e in range(4)], comm)
    reference = gate(4)
    reference.weight.data.copy_(linear.weight.data)
    x, mine = rows_of(comm, [4, 6])
    assert_same(layer(x[mine]), Dense(reference, [expert(e) for e in range(4)])(x)[mine])
    assert layer.top_k == 2
    layer.free()


def test_top_k_of_the_layer_wins(comm: Communicator) -> None:
    layer = MixtureOfExperts(gate(4, top_k=1), [expert(e) for e in range(4)], comm, top_k=3)
    x, mine = rows_of(comm, [4, 6])
    assert_same(layer(x[mine]), Dense(gate(4, top_k=3), [expert(e) for e in range(4)])(x)[mine])
    layer.free()


def test_evaluation_moves_no_bias(comm: Communicator) -> None:
    layer, _ = pair(comm, 4, bias_update_rate=0.1, jitter=0.2)
    x, mine = rows_of(comm, [4, 6])
    layer.eval()
    with torch.no_grad():
        first, second = layer(x[mine]), layer(x[mine])
    assert torch.equal(first, second)
    assert isinstance(layer.gate, TopKGate) and not layer.gate.expert_bias.any()
    layer(x[mine]).sum().backward()
    layer.free()


def test_inputs_without_gradient_on_some_ranks(comm: Communicator) -> None:
    layer, dense = pair(comm, 3)
    x, mine = rows_of(comm, [4, 2])
    part = x[mine].clone().requires_grad_(comm.rank % 2 == 1)
    dense(x).sin().sum().backward()
    layer(part).sin().sum().backward()
    assert_expert_gradients(layer, dense)
    assert (part.grad is not None) == part.requires_grad
    layer.free()


def test_frozen_experts_and_gate(comm: Communicator) -> None:
    layer, dense = pair(comm, 3)
    layer.requires_grad_(False)
    x, mine = rows_of(comm, [4, 2])
    assert not layer(x[mine]).requires_grad
    whole, part = x.clone().requires_grad_(), x[mine].clone().requires_grad_()
    dense(whole).sin().sum().backward()
    layer(part).sin().sum().backward()
    assert whole.grad is not None
    assert_same(part.grad, whole.grad[mine])
    assert all(parameter.grad is None for parameter in layer.parameters())
    layer.free()


class Bare(nn.Module):
    """Cannot cope with no rows, and works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(FEATURES, dtype=torch.float64))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        assert len(rows) > 0
        return rows.mul_(2.0) * self.weight


def test_expert_without_rows_is_not_called_but_gets_zeros(comm: Communicator) -> None:
    layer = MixtureOfExperts(gate(5, top_k=1), [Bare] * 5, comm)
    assert isinstance(layer.gate, TopKGate)
    layer.gate.expert_bias[3] = 9.0
    x, mine = rows_of(comm, [4, 0, 2])
    layer(x[mine].clone().requires_grad_()).sum().backward()
    for number, module in layer.experts.items():
        grad = module.weight.grad
        assert grad is not None and bool(grad.any()) == (number == "3")
    layer.free()


def test_layers_in_a_row_and_side_by_side(comm: Communicator) -> None:
    first, dense_first = pair(comm, 3)
    second, dense_second = pair(comm, 4, capacity_factor=1.0)
    third, dense_third = pair(comm, 2, top_k=1)
    x, mine = rows_of(comm, [5, 3, 0])
    whole, part = x.clone().requires_grad_(), x[mine].clone().requires_grad_()
    middle, dense_middle = first(part), dense_first(whole)
    (second(middle) * third(middle)).sin().sum().backward()
    (dense_second(dense_middle) * dense_third(dense_middle)).sin().sum().backward()
    assert whole.grad is not None
    assert_same(part.grad, whole.grad[mine])
    for layer, dense in ((first, dense_first), (second, dense_second), (third, dense_third)):
        assert_expert_gradients(layer, dense)
    for layer in (first, second, third):
        layer.free()


def test_layer_called_twice_accumulates(comm: Communicator) -> None:
    layer, dense = pair(comm, 3)
    x, mine = rows_of(comm, [5, 3, 0])
    for _ in range(2):
        dense(dense(x)).sin().sum().backward()
        layer(layer(x[mine])).sin().sum().backward()
    assert_expert_gradients(layer, dense)
    layer.free()


@pytest.mark.parametrize("capacity", [None, 0.7])
def test_result_does_not_depend_on_number_of_ranks(comm: Communicator, capacity: float | None) -> None:
    def make(ranks: Communicator) -> MixtureOfExperts:
        torch.manual_seed(5)
        factory = lambda: nn.Linear(FEATURES, 3).double()  # noqa: E731
        return MixtureOfExperts(gate(5), [factory] * 5, ranks, capacity_factor=capacity)

    alone_comm = comm.Split(comm.rank, 0)
    assert alone_comm is not None
    layer, alone = make(comm), make(alone_comm)
    x, mine = rows_of(comm, [6, 3])
    assert_same(layer(x[mine]), alone(x)[mine])
    assert torch.equal(layer.load, alone.load)
    assert list(layer.full_state_dict()) == list(alone.state_dict())
    for module in (layer, alone):
        module.free()
    alone_comm.Free()


def test_factories_leave_generators_in_step(comm: Communicator) -> None:
    layer = MixtureOfExperts(gate(3), [lambda: expert(0)] * 3, comm)
    drawn = float(torch.rand(()))
    assert comm.allgather(drawn) == [drawn] * comm.size
    layer.free()


# ---- types ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(comm: Communicator, autocast: bool) -> None:
    kind = torch.float32 if autocast else torch.bfloat16
    layer = MixtureOfExperts(
        gate(4, torch.float32),
        [expert(e, dtype=kind) for e in range(4)],
        comm,
        shared_expert=expert(9, dtype=kind),
    )
    reference = Dense(gate(4), [expert(e) for e in range(4)], shared=expert(9))
    x, mine = rows_of(comm, [8, 5, 0])
    x = x.bfloat16().double()
    part = x[mine].to(kind).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = layer(part)
    assert output.dtype is torch.bfloat16
    assert isinstance(layer.gate, TopKGate) and layer.gate.balancing_loss.dtype is torch.float32
    whole = x.clone().requires_grad_()
    expected = reference(whole)
    torch.testing.assert_close(output.double(), expected[mine], rtol=0.05, atol=0.05)
    output.float().sum().backward()
    expected.sum().backward()
    assert part.grad is not None and part.grad.dtype is kind and whole.grad is not None
    torch.testing.assert_close(part.grad.double(), whole.grad[mine], rtol=0.1, atol=0.1)
    layer.free()


# ---- errors -----------------------------------------------------------------------------------------------


def test_arguments_are_checked_on_all_ranks(comm: Communicator) -> None:
    experts = [expert(e) for e in range(3)]
    last = comm.rank == comm.size - 1
    with pytest.raises(MismatchError, match="output for each of 3 experts"):
        MixtureOfExperts(gate(4), experts, comm)
    with pytest.raises(MismatchError, match="at least one"):
        MixtureOfExperts(gate(4), [], comm)
    with pytest.raises(MismatchError, match="capacity_factor"):
        MixtureOfExperts(gate(3), experts, comm, capacity_factor=-1.0 if last else 1.0)
    if comm.size > 1:
        with pytest.raises(MismatchError, match="top_k=1"):
            MixtureOfExperts(gate(3), experts, comm, top_k=1 if last else 2)


def test_factory_that_raises_fails_on_all_ranks(comm: Communicator) -> None:
    def broken() -> nn.Module:
        raise ValueError("no memory")

    with pytest.raises((ValueError, MismatchError), match="no memory"):
        MixtureOfExperts(gate(4), [lambda: expert(0), lambda: expert(1), lambda: expert(2), broken], comm)


def test_different_features_or_modes_raise_on_all_ranks(comm: Communicator) -> None:
    layer = MixtureOfExperts(nn.Linear(FEATURES, 3).double(), [expert(e) for e in range(3)], comm)
    x = torch.zeros(2, FEATURES, dtype=torch.float64)
    layer.train(comm.rank != 0)
    if comm.size > 1:
        with pytest.raises(MismatchError, match="training"):
            layer(x)
    layer.train()
    layer(x)  # a mistake that all ranks know of leaves the layer usable
    layer.free()


def test_wrong_number_of_logits_raises_on_all_ranks(comm: Communicator) -> None:
    router = nn.Sequential(nn.Linear(FEATURES, 5).double())
    layer = MixtureOfExperts(router, [expert(e) for e in range(3)], comm)
    with pytest.raises(MismatchError, match="each of 3 experts"):
        layer(torch.zeros(2, FEATURES, dtype=torch.float64))
    layer.free()


def test_experts_of_different_widths_raise_on_all_ranks(comm: Communicator) -> None:
    layer = MixtureOfExperts(gate(4), [expert(e, out=3 + e // 3) for e in range(4)], comm)
    x, mine = rows_of(comm, [20])
    with pytest.raises(MismatchError, match="same number of features"):
        layer(x[mine])
    layer.free()


class Broken(nn.Module):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.inner = expert(0)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if self.where == "forward":
            raise ValueError("expert is out of order")
        output: torch.Tensor = self.inner(rows)
        output.register_hook(self.refuse)  # type: ignore[no-untyped-call]
        return output

    def refuse(self, gradient: torch.Tensor) -> torch.Tensor:
        raise ValueError("expert is out of order")


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.timeout_s(30)
def test_expert_that_raises_fails_all_ranks(comm: Communicator, where: str) -> None:
    last = 3
    experts = [expert(e) for e in range(last)]
    layer = MixtureOfExperts(gate(4), [*experts, Broken(where)], comm)
    x, mine = rows_of(comm, [20])
    with pytest.raises((ValueError, RankFailedError), match=r"out of order|ended the backward") as caught:
        layer(x[mine].clone().requires_grad_()).sum().backward()
    broken = comm.rank == comm.size - 1
    assert isinstance(caught.value, ValueError if broken else RankFailedError)
    if comm.size > 1:
        with pytest.raises(HpcparError):
            layer(x[mine])
    layer.free()


# ---- state ------------------------------------------------------------------------------------------------


def test_full_state_loads_on_any_number_of_ranks(comm: Communicator) -> None:
    layer, _ = pair(comm, 5, shared=True)
    state = layer.full_state_dict()
    alone_comm = comm.Split(comm.rank, 0)
    assert alone_comm is not None
    torch.manual_seed(1)
    alone = MixtureOfExperts(gate(5), [lambda: expert(50)] * 5, alone_comm, shared_expert=expert(51))
    assert list(alone.state_dict()) == list(state)
    alone.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in alone.state_dict().items())
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    layer.load_state_dict(alone.full_state_dict())
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    with pytest.raises(RuntimeError, match=r"experts\.7"):
        layer.load_state_dict({**state, "experts.7.0.weight": torch.zeros(1)})
    mine = next(iter(layer.experts))
    with pytest.raises(RuntimeError, match=rf"experts\.{mine}"):
        layer.load_state_dict({n: v for n, v in state.items() if not n.startswith(f"experts.{mine}.")})
    nested = nn.Sequential(nn.Identity(), layer)
    nested.load_state_dict({f"1.{name}": value for name, value in state.items()})
    for module in (layer, alone):
        module.free()
    alone_comm.Free()


def test_copy_works_and_pickling_is_refused(comm: Communicator) -> None:
    layer, dense = pair(comm, 3, bias_update_rate=0.1)
    x, mine = rows_of(comm, [4, 2])
    layer(x[mine])
    twin = copy.deepcopy(layer)
    dense(x)
    compare_steps(comm, twin, dense, [4, 2], steps=2)
    with pytest.raises(TypeError, match="full_state_dict"):
        pickle.dumps(layer)
    layer.free()
    with pytest.raises(CommunicatorFreedError):
        layer(x[mine])
    layer.free()
    twin(x[mine])  # a copy goes on
    twin.free()
