"""One copy of the parameters for many ranks: who may change them when, and what is noticed otherwise."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpcpar.comm import Communicator
from hpcpar.errors import HpcparError, MismatchError, RankFailedError
from hpcpar.nn import DataParallel, DataParallelMultiGPU
from hpcpar.optim import DASO, ShardedOptimizer
from tests.nn.training import (
    assert_close,
    assert_replicas_equal,
    local_part,
    loss_of,
    make_batches,
    mlp,
    pretended_nodes,
    train,
    wrap,
)

pytestmark = pytest.mark.mpi


def made(comm: Communicator, net: nn.Module, **options: Any) -> tuple[DataParallel, ShardedOptimizer]:
    model = wrap(net, comm)
    return model, ShardedOptimizer(model, torch.optim.AdamW, comm, **{"lr": 0.02, **options})


def backward(comm: Communicator, model: nn.Module, dtype: torch.dtype = torch.float64) -> None:
    loss_of(model, *local_part(comm, *make_batches(comm, 1, dtype=dtype)[0])).backward()


@pytest.mark.parametrize("how", ["data", "vector", "format"])
def test_other_memory_for_a_parameter_is_noticed(comm: Communicator, how: str) -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 2), nn.Flatten(), nn.Linear(16, 3)).double()
    model, optimizer = made(comm, net)
    if how == "data":
        net[0].bias.data = net[0].bias.data.clone()
    elif how == "vector":
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(net.parameters()), net.parameters())
    else:
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model(torch.ones(1, 2, 3, 3, dtype=torch.float64)).sum().backward()
    with pytest.raises(HpcparError, match=r"must keep the memory.*changing_parameters"):
        optimizer.step()
    with optimizer.changing_parameters():
        pass
    optimizer.step()
    optimizer.free()
    model.free()


def test_parameters_are_changed_once_inside_changing_parameters(comm: Communicator) -> None:
    batches, net = make_batches(comm, 4), mlp()
    twin = copy.deepcopy(net)
    plain = torch.optim.AdamW(twin.parameters(), lr=0.02)
    model, optimizer = made(comm, net)
    for number, batch in enumerate(batches):
        train(twin, plain, [batch])
        train(model, optimizer, [local_part(comm, *batch)])
        if number == 1:
            with torch.no_grad():
                for parameter in twin.parameters():
                    parameter.mul_(0.5)
            with optimizer.changing_parameters(), torch.no_grad():
                for number_, parameter in enumerate(net.parameters()):
                    if number_ % 2:
                        parameter.mul_(0.5)
                    else:
                        parameter.data = parameter * 0.5
            assert_close(net, twin)
    assert_close(net, twin)
    assert_replicas_equal(comm, net.parameters())
    assert optimizer.is_shared == (comm.size > 1)
    optimizer.free()
    model.free()


def test_a_failure_while_changing_parameters_reaches_all(comm: Communicator) -> None:
    _, optimizer = made(comm, mlp())
    odd = comm.rank == comm.size - 1
    with (
        pytest.raises(KeyError if odd else RankFailedError, match="lost"),
        optimizer.changing_parameters(),
    ):
        if odd:
            raise KeyError("lost")


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
def test_loading_a_model_of_16_bits_reaches_the_masters(comm: Communicator, order: str) -> None:
    net = mlp(torch.bfloat16)
    model, optimizer = made(comm, net, lr=0.0, weight_decay=0.0)
    backward(comm, model, torch.bfloat16)
    optimizer.step()
    wanted = {name: torch.full_like(value, 3.0) for name, value in net.state_dict().items()}
    state = optimizer.state_dict()
    for inner in state["state"].values():
        inner.pop("master", None)
    steps = [lambda: net.load_state_dict(wanted), lambda: optimizer.load_state_dict(state)]
    for step in steps if order == "model first" else reversed(steps):
        step()
    comm.Barrier()
    optimizer.zero_grad()
    backward(comm, model, torch.bfloat16)
    optimizer.step()
    assert all(bool((parameter == 3.0).all()) for parameter in net.parameters())
    optimizer.free()
    model.free()


def test_a_second_optimizer_over_a_model_is_refused_and_harms_nothing(comm: Communicator) -> None:
    if comm.size == 1:
        pytest.skip("one rank shares with nobody")
    batches, net = make_batches(comm, 2), mlp()
    twin = copy.deepcopy(net)
    train(twin, torch.optim.AdamW(twin.parameters(), lr=0.02), batches)
    model, optimizer = made(comm, net)
    with pytest.raises(HpcparError, match="to one optimizer"):
        ShardedOptimizer(model, torch.optim.SGD, comm, lr=0.1)
    train(model, optimizer, [local_part(comm, *batch) for batch in batches])
    assert_close(net, twin)
    optimizer.free()
    model.free()


def test_freeing_an_optimizer_leaves_the_parameters_of_its_successor(comm: Communicator) -> None:
    net = mlp()
    first = ShardedOptimizer(net, torch.optim.AdamW, comm, lr=0.02)
    second = ShardedOptimizer(net, torch.optim.AdamW, comm, lr=0.02)
    first.free()
    before = [parameter.detach().clone() for parameter in net.parameters()]
    train(net, second, [local_part(comm, *batch) for batch in make_batches(comm, 1)])
    assert all(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    second.free()


def test_what_still_refers_to_shared_memory_outlives_it(comm: Communicator) -> None:
    net = mlp()
    model, optimizer = made(comm, net)
    kept = net.state_dict()
    expected = {name: value.clone() for name, value in kept.items()}
    optimizer.free()
    model.free()
    for name, value in kept.items():
        assert torch.equal(value, expected[name])


def test_shared_memory_is_given_back_when_nothing_refers_to_it(comm: Communicator) -> None:
    def mapped() -> int:
        with open("/proc/self/maps", encoding="ascii") as file:
            return sum("shm" in line or "/dev/" in line for line in file)

    counts = []
    for _ in range(4):
        net = mlp()
        model, optimizer = made(comm, net)
        backward(comm, model)
        optimizer.step()
        optimizer.free()
        model.free()
        counts.append(mapped())
    assert counts[-1] <= counts[0]


def test_a_model_over_other_ranks_is_refused_before_anything_changes(comm: Communicator) -> None:
    if comm.size == 1:
        pytest.skip("there are no other ranks")
    net = mlp(seed=comm.rank)
    alone = comm.Split(comm.rank, 0)
    assert alone is not None
    model = wrap(net, alone)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    with pytest.raises(MismatchError, match="ranks of its model"):
        ShardedOptimizer(model, torch.optim.AdamW, comm)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    optimizer = ShardedOptimizer(model, torch.optim.AdamW)  # its own ranks by default
    train(model, optimizer, make_batches(alone, 1))
    optimizer.free()
    model.free()
    alone.Free()


def test_a_refused_constructor_leaves_the_model_as_it_was(comm: Communicator) -> None:
    net = mlp()
    model = wrap(net, comm)
    for wrong in ({"lr": -1.0}, {"nonsense": 3}, {"wire_dtype": torch.int8}, {"transport": "pigeons"}):
        with pytest.raises((ValueError, TypeError, MismatchError)):
            ShardedOptimizer(model, torch.optim.AdamW, comm, **wrong)  # type: ignore[arg-type]
    for wrong in ({"wire_dtype": torch.int16}, {"transport": "pigeons"}):
        with pytest.raises(MismatchError, match=next(iter(wrong))):
            ShardedOptimizer(net, torch.optim.AdamW, comm, **wrong)  # type: ignore[arg-type]
    plain = torch.optim.SGD(net.parameters(), lr=0.1)
    train(model, plain, [local_part(comm, *batch) for batch in make_batches(comm, 2)])
    model.free()


def test_a_learning_rate_of_its_own_on_one_rank_is_refused_at_the_step(comm: Communicator) -> None:
    if comm.size == 1:
        pytest.skip("one rank agrees with itself")
    model, optimizer = made(comm, mlp())
    if comm.rank == comm.size - 1:
        optimizer.param_groups[0]["lr"] = 0.5
    backward(comm, model)
    with pytest.raises(MismatchError, match="learning rate"):
        optimizer.step()


def test_embeddings_that_write_in_forward_are_refused(comm: Communicator) -> None:
    net = nn.Sequential(nn.Embedding(10, 4, max_norm=1.0), nn.Linear(4, 2))
    with pytest.raises(HpcparError, match="max_norm"):
        ShardedOptimizer(net, torch.optim.AdamW, comm)
    optimizer = ShardedOptimizer(net, torch.optim.AdamW, comm, shared=False)
    net(torch.tensor([1, 2, 3])).sum().backward()
    optimizer.step()
    optimizer.free()


def test_clipping_while_joining_needs_the_whole_step(comm: Communicator) -> None:
    batches, net = make_batches(comm, 4), mlp()
    model, optimizer = made(comm, net, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    def step() -> None:
        optimizer.clip_grad_norm_(0.1)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    with model.join(step=step):
        for x, y in [local_part(comm, *batch) for batch in batches][: 4 - comm.rank]:
            loss_of(model, x, y).backward()
            step()
    assert scheduler.get_last_lr() == [0.1 * 0.5**4]
    assert_replicas_equal(comm, net.parameters())
    if comm.size > 1:
        with model.join(optimizer=optimizer):
            backward(comm, model)
            with pytest.raises(HpcparError, match=r"join\(step=...\)"):
                optimizer.clip_grad_norm_(0.1)
            optimizer.step()
            optimizer.zero_grad()
    optimizer.free()
    model.free()


def test_a_wrong_argument_does_no_lasting_harm(comm: Communicator) -> None:
    model, optimizer = made(comm, mlp())
    backward(comm, model)
    with pytest.raises(MismatchError, match="norm_type"):
        optimizer.clip_grad_norm_(1.0, 0.0)
    assert float(optimizer.clip_grad_norm_(1.0)) > 0.0
    optimizer.step()
    optimizer.free()
    model.free()


def test_looking_at_gradients_of_the_groups_on_one_rank_asks_nobody(comm: Communicator) -> None:
    model, optimizer = made(comm, mlp())
    backward(comm, model)
    if comm.rank == 0:
        assert all(
            p.grad is None or bool(p.grad.isfinite().all())
            for group in optimizer.param_groups
            for p in group["params"]
        )
    optimizer.step()
    optimizer.free()
    model.free()


def test_new_gradients_at_the_address_of_old_ones_are_new(comm: Communicator) -> None:
    net = nn.Linear(40, 40).double()
    optimizer = ShardedOptimizer(net, torch.optim.SGD, comm, lr=0.1)
    for number in range(1, 20):
        for parameter in net.parameters():
            parameter.grad = torch.full_like(parameter, float(number))
        expected = number * (40 * 41) ** 0.5
        assert float(optimizer.clip_grad_norm_(1e9)) == pytest.approx(expected)
    optimizer.step()
    optimizer.free()


def test_a_gradient_changed_on_one_rank_after_clipping_hangs_nobody(comm: Communicator) -> None:
    net = mlp()
    optimizer = ShardedOptimizer(net, torch.optim.SGD, comm, lr=0.1)
    loss_of(net, *local_part(comm, *make_batches(comm, 1)[0])).backward()
    optimizer.clip_grad_norm_(1.0)
    if comm.rank == 0:
        gradient = net[0].weight.grad
        assert isinstance(gradient, Tensor)
        gradient.nan_to_num_()
    optimizer.step()
    assert_replicas_equal(comm, net.parameters())
    optimizer.free()


def test_residuals_survive_that_an_optimizer_comes_and_goes(comm: Communicator) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 400), nn.Tanh(), nn.Linear(400, 3))
    with pretended_nodes(comm, 1) as nodes:
        model = wrap(net, nodes, wire_dtype=torch.int8)
        backward(comm, model, torch.float32)
        before = model.residual_state()
        net.zero_grad()
        optimizer = ShardedOptimizer(model, torch.optim.AdamW, nodes)
        for name, residual in model.residual_state().items():
            torch.testing.assert_close(residual, before[name])
        optimizer.free()
        for name, residual in model.residual_state().items():
            torch.testing.assert_close(residual, before[name])
        model.free()


def test_hierarchical_and_sharded_steps_exclude_each_other(comm: Communicator) -> None:
    net = mlp()
    model, optimizer = made(comm, net)
    with pytest.raises(TypeError, match="whose steps are those of many ranks"):
        DASO(optimizer, comm, total_epochs=10)
    optimizer.free()
    model.free()
    daso = DASO(torch.optim.SGD(net.parameters(), lr=0.1), comm, total_epochs=10)
    grouped = DataParallelMultiGPU(net, daso, comm)
    with pytest.raises(HpcparError, match="must not be scattered"):
        ShardedOptimizer(grouped, torch.optim.AdamW, comm)
    grouped.free()
    daso.free()
