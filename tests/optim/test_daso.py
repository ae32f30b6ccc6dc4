"""DASO: equal to the algorithm in one process, and one model whenever it says so."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from hpcpar.comm import Communicator, DeviceGroup
from hpcpar.comm import reducer as reducer_module
from hpcpar.comm.staging import Staging
from hpcpar.errors import HpcparError, MismatchError
from hpcpar.nn import DataParallel, DataParallelMultiGPU
from hpcpar.nn import data_parallel_multi_gpu as multi_gpu
from hpcpar.optim import DASO
from hpcpar.optim.daso import Phase
from hpcpar.optim.daso.schedule import ScheduleOptions, SkipSchedule
from tests.nn.training import (
    FEATURES,
    Batch,
    MakeOptimizer,
    assert_close,
    assert_replicas_equal,
    local_part,
    loss_of,
    make_batches,
    mlp,
    pretended_nodes,
)
from tests.optim.daso_simulation import Simulation, batch_norm_net

pytestmark = pytest.mark.mpi

NODES = {"real nodes": None, "nodes of one": 1, "nodes of two": 2, "nodes of three": 3}
OPTIMIZERS: dict[str, MakeOptimizer] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
}
STEPS = 6  # of an epoch: a skip of four begins an average in it that two more steps do not end


def cut(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("ranks_per_node", [NODES[name] for name in names], ids=names)


apart = pytest.mark.mpi(min_size=2)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return OPTIMIZERS["SGD"](parameters)


@contextlib.contextmanager
def training(
    net: nn.Module,
    comm: Communicator,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    model_options: dict[str, Any] | None = None,
    **options: Any,
) -> Iterator[tuple[DataParallelMultiGPU, DASO]]:
    """A model under DASO, without phases of full sync unless asked for."""
    options = {
        "total_epochs": 9,
        "warmup_epochs": 0,
        "cooldown_epochs": 0,
        "wire_dtype": None,
        "progress": "hooks",
        **options,
    }
    daso = DASO(optimizer or sgd(net.parameters()), comm, **options)
    model = DataParallelMultiGPU(net, daso, comm, **{"bucket_mb": 1e-4, **(model_options or {})})
    daso.last_batch = STEPS - 1
    yield model, daso
    daso.free()
    model.free()


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, comm: Communicator, batches: Sequence[Batch]
) -> None:
    for x, y in batches:
        optimizer.zero_grad()
        loss_of(model, *local_part(comm, x, y)).backward()
        optimizer.step()


def assert_nodes_agree(comm: Communicator, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    assert_replicas_equal(comm.node, everything(model, optimizer), "of the node")


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    states = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
    kept = [v for state in states for v in state.values() if isinstance(v, torch.Tensor)]
    return [*model.parameters(), *model.buffers(), *kept]


# The algorithm ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks_per_node", "name"), [*((k, "SGD") for k in NODES.values()), (1, "Adam"), (3, "Adam")]
)
def test_training_is_that_of_one_process(comm: Communicator, ranks_per_node: int | None, name: str) -> None:
    make = OPTIMIZERS[name]
    epochs = {
        "total_epochs": 5,
        "warmup_epochs": 1,
        "cooldown_epochs": 1,
        "patience": 0,
        "max_global_skips": 8,
    }
    epochs["skip_reduction_factor"] = 4
    length, net = 10, batch_norm_net()
    batches = make_batches(comm, 5 * length)
    with pretended_nodes(comm, ranks_per_node) as nodes:
        schedule = SkipSchedule(ScheduleOptions(**epochs, stability_level=0.05))
        reference = Simulation(net, make, nodes.node_map.nodes, schedule)
        with training(net, nodes, make(net.parameters()), **epochs) as (model, daso):
            daso.last_batch = length - 1
            skips = []
            for epoch in range(5):
                skips.append((daso.global_skip, daso.batches_to_wait))
                part = batches[epoch * length : (epoch + 1) * length]
                train_epoch(model, daso, nodes, part)
                daso.epoch_loss_logic(math.nan)  # no number is a plateau
                reference.train_epoch(part, math.nan)
                assert_close(model.module, reference.nets[nodes.node_rank], f"after epoch {epoch}")
                assert_nodes_agree(nodes, model, daso)
            assert skips == [(0, 0), (4, 1), (1, 1), (8, 2), (0, 0)]
            assert_replicas_equal(nodes, everything(model, daso))


@cut("nodes of one", "nodes of two", "nodes of three")
def test_full_sync_is_data_parallel_bit_for_bit(comm: Communicator, ranks_per_node: int | None) -> None:
    batches = make_batches(comm, STEPS)
    with pretended_nodes(comm, ranks_per_node) as nodes:
        plain = DataParallel(batch_norm_net(), nodes, bucket_mb=1e-4)
        optimizer = sgd(plain.parameters())
        train_epoch(plain, optimizer, nodes, batches)
        with training(batch_norm_net(), nodes, warmup_epochs=9) as (model, daso):
            train_epoch(model, daso, nodes, batches)
            mine, other = everything(model, daso), everything(plain, optimizer)
            assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
            assert daso.stats().steps == 0
        plain.free()


def test_one_node_is_data_parallel_in_every_phase(comm: Communicator) -> None:
    batches = make_batches(comm, STEPS)
    with pretended_nodes(comm, None) as nodes:
        plain = DataParallel(mlp(), nodes, bucket_mb=1e-4)
        train_epoch(plain, sgd(plain.parameters()), nodes, batches)
        with training(mlp(), nodes) as (model, daso):
            train_epoch(model, daso, nodes, batches)
            assert daso.phase is Phase.CYCLING
            assert all(map(torch.equal, model.parameters(), plain.parameters()))
            assert (daso.stats().transport, model.within_node) == ("none", False)
        plain.free()


@apart
@pytest.mark.parametrize("wire_dtype", [torch.bfloat16, torch.float16, torch.int8], ids=str)
def test_a_narrow_wire_rounds_changes_only(comm: Communicator, wire_dtype: torch.dtype) -> None:
    batches = make_batches(comm, 2 * STEPS, dtype=torch.float32)
    results = []
    with pretended_nodes(comm, comm.size // 2) as nodes:
        for wire in (None, wire_dtype):
            torch.manual_seed(5)
            net = nn.Sequential(nn.Linear(FEATURES, 300), nn.BatchNorm1d(300), nn.Tanh(), nn.Linear(300, 3))
            optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
            with training(net, nodes, optimizer, wire_dtype=wire) as (model, daso):
                for epoch in range(2):
                    train_epoch(model, daso, nodes, batches[epoch * STEPS : (epoch + 1) * STEPS])
                    daso.epoch_loss_logic(1.0)
                    assert_nodes_agree(nodes, model, daso)
                daso.synchronize()
                assert_replicas_equal(nodes, everything(model, daso))
                results.append([tensor.detach().clone() for tensor in model.parameters()])
        assert not torch.equal(results[0][0], results[1][0])
        for exact, rounded in zip(*results, strict=True):
            torch.testing.assert_close(rounded, exact, rtol=0, atol=1e-3)


@apart
@pytest.mark.parametrize("wire_dtype", [None, torch.bfloat16], ids=str)
def test_an_average_waits_for_its_step_and_the_last_batch_for_nothing(
    comm: Communicator, wire_dtype: torch.dtype | None
) -> None:
    batches = make_batches(comm, STEPS)
    with (
        pretended_nodes(comm, 1) as nodes,
        training(batch_norm_net(), nodes, wire_dtype=wire_dtype) as (model, daso),
    ):
        daso._schedule.global_skip, daso._schedule.batches_to_wait = 3, 2
        for epoch in range(2):
            under_way = []
            for batch in batches:
                train_epoch(model, daso, nodes, [batch])
                under_way.append(daso._average.is_under_way)
            assert under_way == [False, False, True, True, False, False]  # the last one is merged at once
            assert_replicas_equal(nodes, [t for t in model.state_dict().values() if t.is_floating_point()])
            assert daso.stats().steps == 2 * (epoch + 1)


@apart
def test_without_a_last_batch_steps_are_counted_on(comm: Communicator) -> None:
    batches = make_batches(comm, STEPS)
    with pretended_nodes(comm, 1) as nodes, training(mlp(), nodes) as (model, daso):
        daso.last_batch = None
        for _ in range(2):
            train_epoch(model, daso, nodes, batches)
            daso.epoch_loss_logic(1.0)
        assert daso.stats().steps == 2 * STEPS // 4
        assert daso._average.is_under_way
        daso.finish()
        assert not daso._average.is_under_way


def test_a_rank_s_unused_parameters_and_their_states_are_averaged_all_the_same(comm: Communicator) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.all = nn.Linear(FEATURES, 3).double()
            self.first = nn.Linear(FEATURES, 3).double()
            self.none = nn.Linear(2, 2).double()

        def forward(self, x: torch.Tensor, extra: bool) -> torch.Tensor:
            return self.all(x) + self.first(x) if extra else self.all(x)

    torch.manual_seed(1)
    with pretended_nodes(comm, 1) as nodes:
        net = Branches()
        adam = torch.optim.Adam(net.parameters())
        with training(net, nodes, adam, total_epochs=1) as (model, daso):
            for x, y in make_batches(comm, STEPS):
                daso.zero_grad()
                part = local_part(nodes, x, y)
                nn.functional.mse_loss(model(part[0], nodes.rank == 0), part[1]).backward()
                daso.step()
            daso.epoch_loss_logic(1.0)
            assert daso.phase is Phase.COOL_DOWN
            assert float(adam.state[net.first.weight]["step"]) == STEPS
            assert not adam.state.get(net.none.weight)
            assert_replicas_equal(nodes, everything(model, daso))


@apart
def test_counts_are_those_of_rank_0_after_an_exact_average(comm: Communicator) -> None:
    with pretended_nodes(comm, 1) as nodes, training(batch_norm_net(), nodes) as (model, daso):
        model.module[1].num_batches_tracked.fill_(nodes.rank + 5)
        daso.synchronize()
        assert int(model.module[1].num_batches_tracked) == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex128], ids=str)
def test_parameters_of_other_types_are_merged(comm: Communicator, dtype: torch.dtype) -> None:
    net = nn.Module()
    net.weight = nn.Parameter(torch.zeros(3, 2, dtype=dtype))
    with pretended_nodes(comm, 1) as nodes, training(net, nodes, max_global_skips=1) as (_, daso):
        daso.last_batch = 0
        with torch.no_grad():
            net.weight.fill_(nodes.rank)
        daso.step()
        torch.testing.assert_close(net.weight, torch.full_like(net.weight, (nodes.size - 1) / 2))
        with torch.no_grad():
            net.weight.fill_(nodes.rank)
        daso.synchronize()
        torch.testing.assert_close(net.weight, torch.full_like(net.weight, (nodes.size - 1) / 2))


# What users do besides --------------------------------------------------------------------------------------


@cut("nodes of one", "nodes of two")
def test_clipping_and_accumulation_work_within_a_node(comm: Communicator, ranks_per_node: int | None) -> None:
    (x, y), (v, w) = make_batches(comm, 2)
    with pretended_nodes(comm, ranks_per_node) as nodes, training(mlp(), nodes) as (model, daso):
        reference = mlp()
        local = nodes.node_map.ranks_of(nodes.node_rank) if nodes.num_nodes > 1 else range(nodes.size)
        for rank in local:
            for a, b in ((x, y), (v, w)):
                part = a.chunk(nodes.size)[rank], b.chunk(nodes.size)[rank]
                (loss_of(reference, *part) / len(local)).backward()
        expected = nn.utils.clip_grad_norm_(reference.parameters(), 0.01)
        optimizer = sgd(reference.parameters())
        with model.no_sync():
            loss_of(model, *local_part(nodes, x, y)).backward()
        loss_of(model, *local_part(nodes, v, w)).backward()
        torch.testing.assert_close(nn.utils.clip_grad_norm_(model.parameters(), 0.01), expected)
        daso.step()
        optimizer.step()
        assert_close(model.module, reference)


@apart
@pytest.mark.parametrize("unscale", [False, True], ids=["scaled", "unscaled by the user"])
def test_a_node_that_overflows_skips_its_update_and_nothing_else(comm: Communicator, unscale: bool) -> None:
    with pretended_nodes(comm, 1) as nodes, training(mlp(torch.float32), nodes, total_epochs=1) as pair:
        model, daso = pair
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1000)
        daso.add_scaler(scaler)
        reference = mlp(torch.float32)
        optimizer = sgd(reference.parameters())
        for index, (x, y) in enumerate(make_batches(comm, STEPS, dtype=torch.float32)):
            x, y = local_part(nodes, x, y)
            overflows = index == 1 and nodes.rank == nodes.size - 1
            daso.zero_grad()
            scaler.scale(loss_of(model, x * (float("inf") if overflows else 1.0), y)).backward()
            if unscale:
                scaler.unscale_(daso)
            before = [parameter.detach().clone() for parameter in model.parameters()]
            scaler.step(daso)
            scaler.update()
            if overflows:
                assert all(map(torch.equal, before, model.parameters()))
            elif index < 3:  # until the first average
                optimizer.zero_grad()
                loss_of(reference, x, y).backward()
                optimizer.step()
                assert_close(model.module, reference, f"after step {index}")
        assert daso.stats().steps == 1
        assert scaler.get_scale() == (32.0 if nodes.rank == nodes.size - 1 else 64.0)
        daso.epoch_loss_logic(1.0)
        assert scaler.get_scale() == 64.0
        assert_replicas_equal(nodes, everything(model, daso))


@pytest.mark.parametrize("over", ["the local optimizer", "DASO itself"])
def test_the_scheduler_is_stepped_once_per_epoch(comm: Communicator, over: str) -> None:
    net = mlp()
    optimizer = sgd(net.parameters())
    with pretended_nodes(comm, 1) as nodes, training(net, nodes, optimizer) as (model, daso):
        owner = optimizer if over == "the local optimizer" else daso
        daso.scheduler = torch.optim.lr_scheduler.StepLR(owner, step_size=2, gamma=0.5)
        rates = []
        for batch in make_batches(comm, 5):
            rates.append(daso.param_groups[0]["lr"])
            train_epoch(model, daso, nodes, [batch])
            daso.epoch_loss_logic(torch.tensor(1.0))
        assert rates == [0.1, 0.1, 0.05, 0.05, 0.025]


def test_a_scheduler_on_the_plateau_gets_the_mean_loss(comm: Communicator) -> None:
    net = mlp()
    optimizer = sgd(net.parameters())
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    with pretended_nodes(comm, 1) as nodes, training(net, nodes, optimizer, scheduler=scheduler) as (_, daso):
        daso.epoch_loss_logic(float(nodes.rank))
        assert scheduler.best == (nodes.size - 1) / 2
        daso.epoch_loss_logic(float(nodes.size - nodes.rank))  # worse in the mean, though not on every rank
        assert optimizer.param_groups[0]["lr"] == 0.05


def test_all_ranks_adapt_to_the_loss_of_all(comm: Communicator) -> None:
    with pretended_nodes(comm, 1) as nodes, training(mlp(), nodes, patience=0) as (_, daso):
        daso.epoch_loss_logic(1.0)
        daso.epoch_loss_logic(0.0 if nodes.rank == 0 else 5.0)
        daso.epoch_loss_logic(nodes.rank, loss_globally_averaged=True)  # that of rank 0
        assert len(set(nodes.allgather((daso.global_skip, daso.epoch)))) == 1


@apart
def test_a_state_is_one_model_and_continues_as_if_nothing_had_happened(comm: Communicator) -> None:
    batches = make_batches(comm, 3 * STEPS)
    with pretended_nodes(comm, 1) as nodes, training(batch_norm_net(), nodes, patience=0) as (model, daso):
        train_epoch(model, daso, nodes, batches[: STEPS + 3])
        daso.epoch_loss_logic(1.0)
        daso.epoch_loss_logic(1.0)
        train_epoch(model, daso, nodes, batches[STEPS + 3 : 2 * STEPS])
        state = copy.deepcopy(daso.state_dict())
        parameters = copy.deepcopy(model.state_dict())
        assert_replicas_equal(nodes, everything(model, daso))
        with training(batch_norm_net(), nodes, patience=0) as (other, resumed):
            resumed.load_state_dict(state)
            other.load_state_dict(parameters)
            assert (resumed.epoch, resumed.global_skip) == (2, 2)
            for one, optimizer in ((model, daso), (other, resumed)):
                train_epoch(one, optimizer, nodes, batches[2 * STEPS :])
                optimizer.epoch_loss_logic(1.0)
            mine, others = everything(model, daso), everything(other, resumed)
            assert all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))


@pytest.mark.parametrize("before", [1, 2], ids=["from nodes of one", "from nodes of two"])
def test_a_state_loads_on_other_nodes(comm: Communicator, before: int) -> None:
    batches = make_batches(comm, 2 * STEPS)
    with pretended_nodes(comm, before) as nodes, training(mlp(), nodes) as (model, daso):
        train_epoch(model, daso, nodes, batches[:STEPS])
        daso.epoch_loss_logic(1.0)
        state, parameters = copy.deepcopy(daso.state_dict()), copy.deepcopy(model.state_dict())
    expected = mlp()
    expected.load_state_dict(model.module.state_dict())
    with pretended_nodes(comm, 3 - before) as nodes:
        net = mlp()
        optimizer = sgd(net.parameters())
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        with training(net, nodes, optimizer, scheduler=scheduler, total_epochs=2) as (other, resumed):
            resumed.load_state_dict(state)
            other.load_state_dict(parameters)
            assert resumed.epoch == 1
            assert_replicas_equal(nodes, everything(other, resumed))
            train_epoch(other, resumed, nodes, batches[STEPS:])
            resumed.epoch_loss_logic(1.0)
            assert_replicas_equal(nodes, everything(other, resumed))
    plain = sgd(expected.parameters())
    plain.load_state_dict(state)
    assert plain.state_dict()["state"].keys() == state["state"].keys()


def test_a_state_of_the_plain_optimizer_loads(comm: Communicator) -> None:
    net = mlp()
    optimizer = sgd(net.parameters())
    loss_of(net, *make_batches(comm, 1)[0]).backward()
    optimizer.step()
    with pretended_nodes(comm, 1) as nodes, training(mlp(), nodes) as (_, daso):
        daso.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert len(daso.state_dict()["state"]) == len(list(net.parameters()))


@pytest.mark.parametrize("wire_dtype", [None, torch.bfloat16], ids=str)
@cut("real nodes", "nodes of one", "nodes of three")
def test_other_parameters_may_become_trainable(
    comm: Communicator, ranks_per_node: int | None, wire_dtype: torch.dtype | None
) -> None:
    batches = make_batches(comm, 2 * STEPS)
    net = mlp()
    with pretended_nodes(comm, ranks_per_node) as nodes:
        net[0].requires_grad_(False)
        with training(net, nodes, wire_dtype=wire_dtype) as (model, daso):
            for layer in (0, 2):
                train_epoch(model, daso, nodes, batches[:4])  # an average is under way
                everyone = nodes.allgather([p.detach().clone() for p in net.parameters()])
                net[0].requires_grad_(layer == 0)
                net[2].requires_grad_(layer == 2)
                model(local_part(nodes, *batches[5])[0])
                for parameter, *others in zip(net.parameters(), *everyone, strict=True):
                    mean = torch.stack(others).mean(0)
                    torch.testing.assert_close(
                        parameter.detach(), mean, rtol=0, atol=1e-2 * bool(wire_dtype) or 1e-12
                    )
                assert_replicas_equal(nodes, everything(model, daso))
                train_epoch(model, daso, nodes, batches[4:STEPS])
                assert not torch.equal(net[layer].weight, everyone[0][layer])
                assert model.within_node is (nodes.num_nodes > 1)


def test_a_module_may_replace_its_buffers(comm: Communicator) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(FEATURES, 3).double()
            self.register_buffer("largest", torch.zeros((), dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.largest = torch.maximum(self.largest, x.abs().max())
            return self.linear(x)

    torch.manual_seed(1)
    batches = make_batches(comm, STEPS)
    with pretended_nodes(comm, 1) as nodes, training(Counting(), nodes) as (model, daso):
        train_epoch(model, daso, nodes, batches[:4])
        largest = nodes.allgather(max(local_part(nodes, x)[0].abs().max() for x, _ in batches[:4]))
        daso.finish()
        expected = largest[0] if nodes.size == 1 else torch.stack(largest).mean()
        torch.testing.assert_close(model.module.largest, expected)


@cut("nodes of two")
def test_ranks_may_keep_buffers_of_their_own(comm: Communicator, ranks_per_node: int | None) -> None:
    keep = {"broadcast_buffers": False}
    with (
        pretended_nodes(comm, ranks_per_node) as nodes,
        training(batch_norm_net(), nodes, model_options=keep) as (model, daso),
    ):
        train_epoch(model, daso, nodes, make_batches(comm, STEPS))
        daso.synchronize()
        assert_replicas_equal(nodes, model.parameters())
        means = nodes.allgather(model.module[1].running_mean)
        assert all(not torch.equal(means[0], other) for other in means[1:])


def test_a_closure_is_the_local_optimizer_s(comm: Communicator) -> None:
    (x, y), *_ = make_batches(comm, 1)
    with pretended_nodes(comm, 1) as nodes, training(mlp(), nodes) as (model, daso):

        def closure() -> float:
            daso.zero_grad()
            loss = loss_of(model, *local_part(nodes, x, y))
            loss.backward()
            return loss.item()

        first = daso.step(closure)
        assert daso.step(closure) < first


def test_a_thread_makes_the_progress_where_it_is_wanted(comm: Communicator) -> None:
    batches = make_batches(comm, STEPS)
    results = []
    with pretended_nodes(comm, 1) as nodes:
        for progress in ("thread", "hooks"):
            with training(mlp(), nodes, progress=progress) as (model, daso):
                train_epoch(model, daso, nodes, batches)
                results.append(everything(model, daso))
    assert all(map(torch.equal, *results))


@apart
@cut("nodes of one", "nodes of two", "nodes of three")
def test_gradients_on_devices_are_averaged_by_a_group_of_torch(
    comm: Communicator, ranks_per_node: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = make_batches(comm, STEPS)
    results = []
    with pretended_nodes(comm, ranks_per_node) as nodes:
        for by_group in (False, True):
            if by_group:  # the host as if it were a device, and gloo in the place of NCCL
                monkeypatch.setattr(reducer_module, "Staging", functools.partial(Staging, separate=True))
                monkeypatch.setattr(multi_gpu, "make_device_group", lambda node, _: DeviceGroup(node, "gloo"))
            with training(batch_norm_net(), nodes) as (model, daso):
                train_epoch(model, daso, nodes, batches)
                assert_nodes_agree(nodes, model, daso)
                results.append(copy.deepcopy(model.module))
                assert (model._device_group is not None) is (by_group and nodes.num_nodes > 1)
    assert_close(*results)


# Models, copies and mistakes --------------------------------------------------------------------------------


def test_the_model_is_a_data_parallel_one(comm: Communicator) -> None:
    with pretended_nodes(comm, 1) as nodes, training(batch_norm_net(), nodes) as (model, daso):
        assert isinstance(model, DataParallel)
        assert isinstance(daso, torch.optim.Optimizer)
        assert model.append == model.module.append  # found in the module
        assert list(model.state_dict()) == [f"module.{name}" for name in model.module.state_dict()]
        twin = copy.deepcopy(model)
        assert not twin.within_node
        assert_close(twin.module, model.module)
        assert torch.equal(
            twin.eval()(torch.ones(2, FEATURES).double()), twin.module(torch.ones(2, FEATURES).double())
        )
        assert isinstance(pickle.loads(pickle.dumps(model)), DataParallelMultiGPU)


@apart
def test_ranks_must_not_run_out_of_batches_one_by_one(comm: Communicator) -> None:
    with (
        pretended_nodes(comm, 1) as nodes,
        training(mlp(), nodes) as (model, _),
        pytest.raises(HpcparError, match=r"join\(\) of DataParallelMultiGPU"),
        model.join(),
    ):
        pass


def test_a_step_without_a_model_says_what_to_do(comm: Communicator) -> None:
    daso = DASO(sgd(mlp().parameters()), comm, 9)
    with pytest.raises(HpcparError, match=r"hpcpar\.nn\.DataParallelMultiGPU"):
        daso.step()
    daso.free()
    daso.free()


def test_a_second_model_or_another_optimizer_is_refused(comm: Communicator) -> None:
    with training(mlp(), comm) as (_, daso), pytest.raises(HpcparError, match="one model"):
        DataParallelMultiGPU(mlp(), daso, comm)
    with pytest.raises(TypeError, match="DASO"):
        DataParallelMultiGPU(mlp(), sgd(mlp().parameters()), comm)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="torch optimizer"):
        DASO("SGD", comm, 9)  # type: ignore[arg-type]


def test_a_module_with_experts_is_refused(comm: Communicator) -> None:
    class Experts(nn.Linear):
        synchronize = True
        own_parameters = own_buffers = share_gradients = keep_gradients = nn.Linear.forward
        reduce_now = give_up = gradient_norm = watch = nn.Linear.forward

    net = Experts(2, 2)
    daso = DASO(sgd(net.parameters()), comm, 9)
    with pytest.raises(HpcparError, match="experts"):
        DataParallelMultiGPU(net, daso, comm)
    daso.free()


@apart
def test_a_model_of_other_nodes_is_refused(comm: Communicator) -> None:
    daso = DASO(sgd(mlp().parameters()), comm, 9)
    with pretended_nodes(comm, 1) as nodes, pytest.raises(MismatchError, match="the same ranks"):
        DataParallelMultiGPU(mlp(), daso, nodes)
    daso.free()


@pytest.mark.parametrize(
    "options",
    [{"total_epochs": 7}, {"wire_dtype": torch.float64}, {"progress": "both"}, {"max_global_skips": 0}],
    ids=str,
)
def test_wrong_options_are_refused(comm: Communicator, options: dict[str, Any]) -> None:
    with pytest.raises(MismatchError):
        DASO(sgd(mlp().parameters()), comm, **{"total_epochs": 9, **options})


@apart
def test_ranks_with_other_options_are_refused(comm: Communicator) -> None:
    with pytest.raises(MismatchError, match="alike"):
        DASO(sgd(mlp().parameters()), comm, 9 + comm.rank)


def test_it_is_not_pickled(comm: Communicator) -> None:
    with training(mlp(), comm) as (_, daso), pytest.raises(TypeError, match="state_dict"):
        pickle.dumps(daso)


def test_an_unknown_scaler_is_refused_where_nodes_would_drift_apart(comm: Communicator) -> None:
    with pretended_nodes(comm, 1) as nodes:
        net = mlp(torch.float32)
        daso = DASO(torch.optim.SGD(net.parameters(), lr=0.1), nodes, total_epochs=10)
        model = DataParallelMultiGPU(net, daso, nodes)
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(model(torch.ones(2, FEATURES)).sum()).backward()
        if nodes.num_nodes > 1:
            with pytest.raises(HpcparError, match="add_scaler"):
                scaler.step(daso)
        model.free()
        daso.free()


def test_parameters_outside_of_the_model_are_refused(comm: Communicator) -> None:
    net, weight = mlp(), nn.Parameter(torch.ones(()))
    daso = DASO(torch.optim.SGD([*net.parameters(), weight], lr=0.1), comm, total_epochs=10)
    with pytest.raises(MismatchError, match="a part of the module"):
        DataParallelMultiGPU(net, daso, comm)


def test_a_model_goes_on_over_all_ranks_after_daso_is_freed(comm: Communicator) -> None:
    with pretended_nodes(comm, 1) as nodes:
        net = mlp()
        options = {"warmup_epochs": 0, "cooldown_epochs": 0}
        daso = DASO(torch.optim.SGD(net.parameters(), lr=0.1), nodes, total_epochs=10, **options)
        model = DataParallelMultiGPU(net, daso, nodes)
        for x, y in make_batches(comm, 2):
            daso.zero_grad()
            loss_of(model, *local_part(comm, x, y)).backward()
            daso.step()
        daso.free()
        with pytest.raises(HpcparError, match="after free"):
            daso.step()
        assert_replicas_equal(comm, net.parameters())
        net.zero_grad()
        loss_of(model, *local_part(comm, *make_batches(comm, 1)[0])).backward()
        assert_replicas_equal(comm, [p.grad for p in net.parameters() if p.grad is not None])
        model.free()


def test_ranks_with_another_last_batch_are_told(comm: Communicator) -> None:
    net = mlp()
    daso = DASO(torch.optim.SGD(net.parameters(), lr=0.1), comm, total_epochs=10)
    model = DataParallelMultiGPU(net, daso, comm)
    daso.last_batch = 3 + (comm.rank == comm.size - 1)
    if comm.size > 1:
        with pytest.raises(MismatchError, match="last_batch"):
            daso.epoch_loss_logic(1.0)
    model.free()
    daso.free()
