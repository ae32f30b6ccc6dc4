"""ShardedOptimizer against the plain optimizer in one process, on the batches of all ranks together."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpcpar.comm import Communicator
from hpcpar.errors import HpcparError, MismatchError, RankFailedError
from hpcpar.nn import DataParallel
from hpcpar.optim import ShardedOptimizer
from tests.nn.training import (
    ROUTES,
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

ELEMENTWISE: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "AdamW fused": (torch.optim.AdamW, {"lr": 0.01, "fused": True}),
    "Adam amsgrad": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True, "foreach": True}),
    "Adamax": (torch.optim.Adamax, {"lr": 0.01}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.01}),
    "RAdam": (torch.optim.RAdam, {"lr": 0.01}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5, "centered": True}),
    "Rprop": (torch.optim.Rprop, {"lr": 0.01}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.05}),
    "Adadelta": (torch.optim.Adadelta, {"lr": 0.5}),
    "ASGD": (torch.optim.ASGD, {"lr": 0.05}),
    "Adafactor": (torch.optim.Adafactor, {"lr": 0.05}),
}
ADAM = (torch.optim.AdamW, {"lr": 0.01})


def reference(net: nn.Module, kind: Any, options: dict[str, Any], batches: Any) -> tuple[nn.Module, Any]:
    twin = copy.deepcopy(net)
    optimizer = kind(twin.parameters(), **options)
    train(twin, optimizer, batches)
    return twin, optimizer


def local(comm: Communicator, batches: Any) -> list[list[Tensor]]:
    return [local_part(comm, *batch) for batch in batches]


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_every_optimizer_does_what_it_does_in_one_process(comm: Communicator, name: str) -> None:
    kind, options = ELEMENTWISE[name]
    net, batches = mlp(), make_batches(comm, 4)
    expected, _ = reference(net, kind, options, batches)
    model = wrap(net, comm, bucket_mb=3e-4)
    optimizer = ShardedOptimizer(model, kind, comm, **options)
    train(model, optimizer, local(comm, batches))
    assert_close(net, expected, name)
    assert_replicas_equal(comm, net.parameters())
    optimizer.free()
    model.free()


def test_muon_sees_whole_matrices(comm: Communicator) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Linear(6, 6, bias=False) for _ in range(3)]).double()
    batches = [(x, x.flip(1)) for x, _ in make_batches(comm, 3)]
    expected, _ = reference(net, torch.optim.Muon, {"lr": 0.05}, batches)
    model = wrap(net, comm)
    optimizer = ShardedOptimizer(model, torch.optim.Muon, comm, lr=0.05)
    train(model, optimizer, local(comm, batches))
    for got, wanted in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)  # it iterates in bfloat16
    optimizer.free()
    model.free()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adafactor])
def test_every_route_and_kind_of_source(comm: Communicator, route: str, kind: Any) -> None:
    ranks_per_node, transport = ROUTES[route]
    batches = make_batches(comm, 3)
    expected, _ = reference(mlp(), kind, {"lr": 0.02}, batches)
    with pretended_nodes(comm, ranks_per_node) as nodes:
        for attached in (True, False):
            net = mlp()
            model = wrap(net, nodes, transport=transport)
            if attached:
                optimizer = ShardedOptimizer(model, kind, nodes, lr=0.02)
            else:
                optimizer = ShardedOptimizer(net, kind, nodes, lr=0.02, transport=transport)
            train(model, optimizer, local(comm, batches))
            assert_close(net, expected, (route, attached))
            assert_replicas_equal(comm, net.parameters())
            optimizer.free()
            model.free()


def test_parameters_that_nobody_reduces_are_averaged_at_the_step(comm: Communicator) -> None:
    batches = make_batches(comm, 3)
    expected, _ = reference(mlp(), torch.optim.AdamW, {"lr": 0.02}, batches)
    net = mlp(seed=comm.rank)  # rank 0's parameters reach all
    with ShardedOptimizerOf(net.parameters(), comm, lr=0.02) as optimizer:
        train(net, optimizer, local(comm, batches))
        assert_close(net, expected)
        optimizer.zero_grad(set_to_none=False)
        assert all(p.grad is not None and not p.grad.any() for p in net.parameters())


class ShardedOptimizerOf:
    """A ShardedOptimizer over AdamW for the time of a block."""

    def __init__(self, source: Any, comm: Communicator, **options: Any) -> None:
        self.optimizer = ShardedOptimizer(source, torch.optim.AdamW, comm, **options)

    def __enter__(self) -> ShardedOptimizer:
        return self.optimizer

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self.optimizer.free()


def test_groups_have_their_own_options_and_frozen_parameters_stay(comm: Communicator) -> None:
    def groups(net: nn.Module) -> list[dict[str, Any]]:
        named = list(net.named_parameters())
        return [
            {"params": [p for n, p in named if "weight" in n], "weight_decay": 0.3},
            {"params": [p for n, p in named if "bias" in n], "lr": 0.05, "weight_decay": 0.0},
        ]

    batches, net = make_batches(comm, 4), mlp()
    net[2].weight.requires_grad_(False)
    twin = copy.deepcopy(net)
    plain = torch.optim.AdamW(groups(twin), lr=0.01)
    train(twin, plain, batches)
    model = wrap(net, comm)
    with ShardedOptimizerOf(model, comm, parameters=groups(net), lr=0.01) as optimizer:
        train(model, optimizer, local(comm, batches))
        assert_close(net, twin)
        state = optimizer.state_dict()
        assert [g["weight_decay"] for g in state["param_groups"]] == [0.3, 0.0]
        assert [g["params"] for g in state["param_groups"]] == [[0, 1, 2], [3, 4, 5]]
        assert state["state"].keys() == plain.state_dict()["state"].keys()
    model.free()


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.sometimes, self.never = (nn.Linear(6, 3) for _ in range(3))
        self.take = False

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x) + (self.sometimes(x) if self.take else 0.0)


def test_unused_parameters_are_left_out_of_the_step(comm: Communicator) -> None:
    torch.manual_seed(0)
    net = Branches().double()
    twin = copy.deepcopy(net)
    plain = torch.optim.AdamW(twin.parameters(), weight_decay=0.5)
    model = wrap(net, comm)
    with ShardedOptimizerOf(model, comm, weight_decay=0.5) as optimizer:
        for number, (x, y) in enumerate(make_batches(comm, 3)):
            net.take = number == 1 and comm.rank == 0  # on one rank only; the others count as zero
            plain.zero_grad()
            for rank, rows in enumerate(zip(x.chunk(comm.size), y.chunk(comm.size), strict=True)):
                twin.take = number == 1 and rank == 0
                (loss_of(twin, *rows) / comm.size).backward()
            plain.step()
            train(model, optimizer, [local_part(comm, x, y)])
        assert_close(net, twin)
        assert not any(int(i) in optimizer.state_dict()["state"] for i in (4, 5))
    model.free()


def test_memory_formats_and_complex_parameters(comm: Communicator) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 8, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.phase = nn.Parameter(torch.randn(70, dtype=torch.complex64))
            self.scalar = nn.Parameter(torch.tensor(0.5))
            self.gap = nn.Parameter(torch.randn(10, 20)[:, ::2])

        def forward(self, x: Tensor) -> Tensor:
            return (
                self.conv(x).square().mean() * self.scalar
                + self.phase.abs().sum() * 0.1
                + self.gap.sin().sum()
            )

    torch.manual_seed(0)
    net = Odd()
    twin = copy.deepcopy(net)
    plain = torch.optim.AdamW(twin.parameters(), lr=0.05)
    model = wrap(net, comm)
    with ShardedOptimizerOf(model, comm, lr=0.05) as optimizer:
        for seed in range(3):
            x = torch.randn(comm.size, 2, 5, 5, generator=torch.Generator().manual_seed(seed))
            plain.zero_grad()
            (sum(twin(part) for part in x.split(1)) / comm.size).backward()
            plain.step()
            optimizer.zero_grad()
            model(x[comm.rank : comm.rank + 1]).backward()
            optimizer.step()
        assert_close(net, twin)
        assert net.conv.weight.is_contiguous(memory_format=torch.channels_last)
        got, expected = optimizer.state_dict()["state"], plain.state_dict()["state"]
        for index, state in expected.items():
            for name, value in state.items():
                torch.testing.assert_close(got[index][name], value)
        fresh = torch.optim.AdamW(twin.parameters(), lr=0.05)
        fresh.load_state_dict(optimizer.state_dict())
    model.free()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_parameters_are_updated_by_way_of_float32(comm: Communicator, dtype: torch.dtype) -> None:
    net = mlp(torch.float32).to(dtype)
    master = [p.detach().float() for p in net.parameters()]
    plain = torch.optim.AdamW([nn.Parameter(m) for m in master], lr=1e-4)  # too small for 16 bits
    model = wrap(net, comm)
    before = [p.detach().clone() for p in net.parameters()]
    with ShardedOptimizerOf(model, comm, lr=1e-4) as optimizer:
        for x, y in make_batches(comm, 30, dtype=dtype):
            optimizer.zero_grad()
            loss_of(model, *local_part(comm, x, y)).backward()
            gathered = gradients_of(optimizer, comm)
            for group in plain.param_groups:
                for p, g in zip(group["params"], gathered, strict=True):
                    p.grad = g.float()
            plain.step()
            optimizer.step()
        for p, m, b in zip(net.parameters(), plain.param_groups[0]["params"], before, strict=True):
            torch.testing.assert_close(p, m.to(dtype), rtol=0.01, atol=1e-4)
            assert not torch.equal(p, b)
        state = optimizer.state_dict()["state"]
        for index, m in enumerate(plain.param_groups[0]["params"]):
            assert state[index]["master"].dtype is torch.float32
            torch.testing.assert_close(state[index]["master"], m.detach())
    model.free()


def gradients_of(optimizer: ShardedOptimizer, comm: Communicator) -> list[Tensor]:
    """The whole mean gradients, from their owners, in the order of the parameters."""
    from hpcpar.comm import gather_parts, view_slot

    optimizer._settle()  # one rank reduces nothing before
    parts = optimizer._parts
    flats = [flat.clone() for flat in parts.flats]
    gather_parts(comm, range(comm.size), flats, parts.partitions)
    whole = {
        slot.index: view_slot(flats[bucket], slot, parts.parameters[slot.index])
        for bucket, layout in enumerate(parts.layouts)
        for slot in layout.slots
    }
    return [whole[index] for index in sorted(whole, reverse=True)]


def test_accumulation_without_synchronisation(comm: Communicator) -> None:
    batches, net = make_batches(comm, 4), mlp()
    twin = copy.deepcopy(net)
    plain = torch.optim.AdamW(twin.parameters(), lr=0.02)
    model = wrap(net, comm)
    with ShardedOptimizerOf(model, comm, lr=0.02) as optimizer:
        for first, second in (batches[:2], batches[2:]):
            plain.zero_grad()
            (loss_of(twin, *first) + loss_of(twin, *second)).backward()
            plain.step()
            optimizer.zero_grad()
            with model.no_sync():
                loss_of(model, *local_part(comm, *first)).backward()
            loss_of(model, *local_part(comm, *second)).backward()
            optimizer.step()
        assert_close(net, twin)
    model.free()


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
@pytest.mark.parametrize("attached", [True, False])
def test_clipping_by_the_norm_of_all_gradients(comm: Communicator, norm_type: float, attached: bool) -> None:
    batches, net = make_batches(comm, 3), mlp()
    twin = copy.deepcopy(net)
    plain = torch.optim.AdamW(twin.parameters(), lr=0.02)
    model = wrap(net, comm)
    with ShardedOptimizerOf(model if attached else net, comm, lr=0.02) as optimizer:
        for x, y in batches:
            plain.zero_grad()
            loss_of(twin, x, y).backward()
            expected = nn.utils.clip_grad_norm_(twin.parameters(), 0.05, norm_type)
            plain.step()
            optimizer.zero_grad()
            loss_of(model, *local_part(comm, x, y)).backward()
            torch.testing.assert_close(optimizer.clip_grad_norm_(0.05, norm_type), expected.detach())
            optimizer.step()
        assert_close(net, twin)
        optimizer.zero_grad()
        model(torch.full((2, 6), float("inf"), dtype=torch.float64)).sum().backward()
        with pytest.raises(HpcparError, match="must be finite"):
            optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True)
    model.free()


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("unscale", [True, False])
def test_an_overflow_on_one_rank_is_skipped_by_all_and_lowers_every_scale(
    comm: Communicator, attached: bool, unscale: bool
) -> None:
    batches, net = make_batches(comm, 5, dtype=torch.float32), mlp(torch.float32)
    twin = copy.deepcopy(net)
    plain = torch.optim.AdamW(twin.parameters(), lr=0.02)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)
    model = wrap(net, comm)
    with ShardedOptimizerOf(model if attached else net, comm, lr=0.02) as optimizer:
        for number, (x, y) in enumerate(batches):
            a, b = local_part(comm, x, y)
            overflow = number in (0, 3)
            if overflow and comm.rank == comm.size - 1:
                a = a * float("inf")
            optimizer.zero_grad()
            scaler.scale(loss_of(model, a, b)).backward()
            if unscale:
                scaler.unscale_(optimizer)
                optimizer.clip_grad_norm_(1e6)
            scaler.step(optimizer)
            scaler.update()
            if not overflow:
                train(twin, plain, [(x, y)])
            assert_close(net, twin)
        assert scaler.get_scale() == 2.0
    model.free()


def test_schedules(comm: Communicator) -> None:
    batches, net = make_batches(comm, 6), mlp()
    twin = copy.deepcopy(net)
    plain = torch.optim.AdamW(twin.parameters(), lr=0.05)
    model = wrap(net, comm)
    make: Callable[[Any], Any] = lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=6)  # noqa: E731
    with ShardedOptimizerOf(model, comm, lr=0.05) as optimizer:
        schedulers = make(plain), make(optimizer)
        for x, y in batches:
            train(twin, plain, [(x, y)])
            train(model, optimizer, [local_part(comm, x, y)])
            for scheduler in schedulers:
                scheduler.step()
        assert schedulers[0].get_last_lr() == schedulers[1].get_last_lr()
        assert_close(net, twin)
    model.free()


def test_ranks_that_run_out_of_batches_go_on_with_the_optimizer(comm: Communicator) -> None:
    batches, net = make_batches(comm, 4), mlp()
    model = wrap(net, comm)
    with ShardedOptimizerOf(model, comm, lr=0.02) as optimizer:
        if comm.size > 1:
            with pytest.raises(HpcparError, match="ShardedOptimizer"), model.join():
                raise AssertionError("not reached")
        mine = local(comm, batches)[: 4 - comm.rank]
        with model.join(optimizer=optimizer):
            train(model, optimizer, mine)
        assert_replicas_equal(comm, net.parameters())
        steps = {float(state["step"]) for state in optimizer.state_dict()["state"].values()}
        assert steps == {4.0}
    model.free()


def test_a_node_has_one_copy_until_it_is_freed(comm: Communicator) -> None:
    net = mlp()
    model = wrap(net, comm)
    optimizer = ShardedOptimizer(model, torch.optim.AdamW, comm)
    assert optimizer.is_shared == (comm.size > 1)
    elements = sum(shard.value.numel() for shard in optimizer._shards.own)
    total = sum(p.numel() for p in net.parameters())
    assert comm.allreduce(elements) == total
    train(model, optimizer, local(comm, make_batches(comm, 1)))
    held = sum(v.numel() for state in optimizer.state.values() for v in state.values() if v.dim())
    assert held == 2 * elements
    comm.Barrier()
    if comm.rank == 0:
        net[0].bias.data.fill_(7.0)
    comm.Barrier()
    assert bool((net[0].bias == 7.0).all()) == (comm.size > 1 or comm.rank == 0)
    comm.Barrier()
    optimizer.free()
    optimizer.free()
    net[0].bias.data.fill_(float(comm.rank))
    comm.Barrier()
    assert bool((net[0].bias == comm.rank).all())
    loss_of(model, *local_part(comm, *make_batches(comm, 1)[0])).backward()
    assert all(type(p.grad) is Tensor for p in net.parameters())  # whole means again
    model.free()


def test_without_sharing_every_rank_has_its_own_copy(comm: Communicator) -> None:
    batches, net = make_batches(comm, 3), mlp()
    expected, _ = reference(net, *ADAM, batches)
    model = wrap(net, comm)
    with ShardedOptimizerOf(model, comm, lr=0.01, shared=False) as optimizer:
        assert not optimizer.is_shared
        train(model, optimizer, local(comm, batches))
        assert_close(net, expected)
        assert_replicas_equal(comm, net.parameters())
    model.free()


def test_a_gradient_that_is_spread_over_ranks_cannot_be_mistaken_for_a_whole_one(comm: Communicator) -> None:
    if comm.size == 1:
        pytest.skip("one rank has all of each gradient")
    net = mlp()
    model = wrap(net, comm)
    with ShardedOptimizerOf(model, comm) as optimizer:
        x, y = local_part(comm, *make_batches(comm, 1)[0])
        loss_of(model, x, y).backward()
        gradient = net[0].weight.grad
        assert gradient is not None and gradient.shape == net[0].weight.shape
        assert "ScatteredGradient" in repr(gradient)
        with pytest.raises(HpcparError, match=r"clip_grad_norm_\(\) of the ShardedOptimizer"):
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        with pytest.raises(HpcparError, match="spread over the ranks"):
            torch.optim.SGD(net.parameters(), lr=0.1).step()
        optimizer.step()
        with pytest.raises(HpcparError, match="zero_grad"):
            loss_of(model, x, y).backward()
        optimizer.zero_grad()
        with model.no_sync():
            loss_of(model, x, y).backward()
        with pytest.raises((HpcparError, RankFailedError), match=r"outside of no_sync|failed"):
            optimizer.step()


def test_closures_compute_the_loss_once(comm: Communicator) -> None:
    batches, net = make_batches(comm, 2), mlp()
    expected, _ = reference(net, *ADAM, batches)
    model = wrap(net, comm)
    with ShardedOptimizerOf(model, comm, lr=0.01) as optimizer:
        for x, y in local(comm, batches):

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, x, y)
                loss.backward()
                return loss

            assert optimizer.step(closure).item() > 0.0
        assert_close(net, expected)
    model.free()


class Failing(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        raise ValueError("out of order")


def test_a_failure_of_one_rank_reaches_the_others_in_the_step(comm: Communicator) -> None:
    net = mlp()
    model = wrap(net, comm)
    optimizer = ShardedOptimizer(model, torch.optim.SGD, comm, lr=0.1)
    if comm.rank == comm.size - 1:
        optimizer.optimizer.__class__ = Failing
    loss_of(model, *local_part(comm, *make_batches(comm, 1)[0])).backward()
    with pytest.raises(ValueError if comm.rank == comm.size - 1 else RankFailedError, match="out of order"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"optimizer_class": torch.optim.LBFGS}, HpcparError, "one by one"),
        ({"optimizer_class": "AdamW"}, TypeError, "must be a class"),
        ({"cut": "rows"}, MismatchError, "cut must be"),
        ({"parameters": []}, MismatchError, "must have parameters"),
        ({"parameters": ["weights"]}, TypeError, "leaf tensors"),
    ],
)
def test_wrong_arguments(
    comm: Communicator, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        ShardedOptimizer(mlp(), **{"optimizer_class": torch.optim.AdamW, **options}, comm=comm)


def test_ranks_with_other_options_or_parameters(comm: Communicator) -> None:
    if comm.size == 1:
        pytest.skip("one rank agrees with itself")
    odd = comm.rank == comm.size - 1
    with pytest.raises(MismatchError, match="alike on all ranks"):
        ShardedOptimizer(mlp(), torch.optim.AdamW, comm, lr=0.1 if odd else 0.2)
    with pytest.raises(MismatchError, match="alike on all ranks"):
        ShardedOptimizer(nn.Linear(3, 4 + odd), torch.optim.AdamW, comm)


def test_what_is_refused(comm: Communicator) -> None:
    net = mlp()
    model = wrap(net, comm)
    with ShardedOptimizerOf(model, comm) as optimizer:
        with pytest.raises(HpcparError, match="another group"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
        with pytest.raises(TypeError, match="pickled"):
            copy.deepcopy(optimizer)
        if comm.size > 1:
            net[0].weight.requires_grad_(False)
            with pytest.raises(HpcparError, match="requires_grad"):
                model(torch.zeros(2, 6, dtype=torch.float64))
            net[0].weight.requires_grad_(True)
    with pytest.raises(HpcparError, match="after free"):
        optimizer.step()
    model.free()


@pytest.mark.cuda
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adafactor])
def test_parameters_on_a_gpu_stay_there(comm: Communicator, kind: Any) -> None:
    batches = make_batches(comm, 3)
    expected, _ = reference(mlp(), kind, {"lr": 0.02}, batches)
    device = torch.device("cuda", comm.rank % torch.cuda.device_count())
    for attached in (True, False):
        net = mlp().to(device)
        model = wrap(net, comm)
        optimizer = ShardedOptimizer(model if attached else net, kind, comm, lr=0.02)
        assert not optimizer.is_shared
        train(model, optimizer, [[part.to(device) for part in batch] for batch in local(comm, batches)])
        assert all(p.is_cuda for p in net.parameters())
        state = optimizer.state_dict()
        assert not any(v.is_cuda for s in state["state"].values() for v in s.values())
        optimizer.load_state_dict(state)
        assert_close(net.cpu(), expected, attached)
        optimizer.free()
        model.free()


def test_a_copy_of_the_model_has_memory_of_its_own(comm: Communicator) -> None:
    net = mlp()
    model = wrap(net, comm)
    with ShardedOptimizerOf(model, comm):
        twin = copy.deepcopy(net)
        with torch.no_grad():
            twin[0].weight.fill_(float(comm.rank))
        comm.Barrier()
        assert bool((twin[0].weight == comm.rank).all())
        assert not bool((net[0].weight == comm.rank).all())
    model.free()


def test_autograd_notices_a_step_between_forward_and_backward(comm: Communicator) -> None:
    net = mlp()
    model: DataParallel = wrap(net, comm)
    with ShardedOptimizerOf(model, comm) as optimizer:
        x, y = local_part(comm, *make_batches(comm, 1)[0])
        late = loss_of(net, x, y)
        loss_of(model, x, y).backward()
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            late.backward()
    model.free()
