"""DataParallel trains as one process on the whole batch would, however the gradients travel."""

from __future__ import annotations

import copy
import gc
import io
import logging
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hpcpar.comm.progress_thread
from hpcpar.comm import MPI, Communicator
from hpcpar.errors import HpcparError, MismatchError
from hpcpar.nn import DataParallel
from hpcpar.optim import DataParallelOptimizer
from tests.nn.training import (
    FEATURES,
    ROUTES,
    assert_close,
    assert_gradients_close,
    assert_replicas_equal,
    local_part,
    loss_of,
    make_batches,
    mlp,
    pretended_nodes,
    train,
    train_reference,
    wrap,
)

pytestmark = pytest.mark.mpi

MODES = ("default", "blocking", "overlap")


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def wrap_in_mode(
    net: nn.Module, comm: Communicator, mode: str, optimizer: torch.optim.Optimizer, **options: Any
) -> tuple[DataParallel, torch.optim.Optimizer]:
    if mode == "overlap":
        optimizer = DataParallelOptimizer(optimizer)
        return wrap(net, comm, optimizer=optimizer, **options), optimizer
    return wrap(net, comm, blocking_parameter_updates=mode == "blocking", **options), optimizer


# ---- parity ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
def test_training_equals_one_process_in_every_mode(comm: Communicator, route: str) -> None:
    ranks_per_node, transport = ROUTES[route]
    batches = make_batches(comm, 5)
    reference = train_reference(mlp(), momentum, batches)
    mine = [local_part(comm, *batch) for batch in batches]
    with pretended_nodes(comm, ranks_per_node) as nodes:
        for mode in MODES:
            for bucket_mb in (1e-4, None):
                net = mlp(seed=comm.rank)  # rank 0's values must win
                model, optimizer = wrap_in_mode(
                    net, nodes, mode, momentum(net.parameters()), transport=transport, bucket_mb=bucket_mb
                )
                train(model, optimizer, mine)
                model.free()
                assert_close(net, reference, (route, mode, bucket_mb))
                assert_replicas_equal(comm, net.parameters(), (route, mode))


@pytest.mark.parametrize("progress", ["hooks", "thread", "auto"])
def test_who_makes_progress_changes_nothing(
    comm: Communicator, progress: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # "auto" measures only with cores to spare
    batches = make_batches(comm, 18)
    reference = train_reference(mlp(), momentum, batches)
    mine = [local_part(comm, *batch) for batch in batches]
    for mode in MODES:
        for ranks_per_node, transport in (None, "shared_memory"), (None, "mpi"), (2, "auto"):
            with pretended_nodes(comm, ranks_per_node) as nodes:
                net = mlp()
                model, optimizer = wrap_in_mode(
                    net, nodes, mode, momentum(net.parameters()), progress=progress, transport=transport
                )
                train(model, optimizer, mine)
                model.free()
            assert_close(net, reference, (mode, transport))
            assert_replicas_equal(comm, net.parameters(), (mode, transport))


def test_progress_thread_ends_with_the_model(comm: Communicator) -> None:
    model = wrap(mlp(), comm, progress="thread")
    running = [t for t in hpcpar.comm.progress_thread.threading.enumerate() if t.name == "hpcpar-progress"]
    assert len(running) == (comm.size > 1)
    model.free()
    assert not any(thread.is_alive() for thread in running)


class Mixed(nn.Module):
    """Wide and narrow parameters, which lie in buckets of their own."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.wide = mlp(torch.float32, seed)
        self.narrow = nn.Linear(3, 3).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.wide(x).bfloat16()).float()


@pytest.mark.parametrize("route", ROUTES)
def test_replicas_are_bitwise_equal_after_many_steps(comm: Communicator, route: str) -> None:
    ranks_per_node, transport = ROUTES[route]
    batches = [local_part(comm, *b) for b in make_batches(comm, 10, dtype=torch.float32)]
    with pretended_nodes(comm, ranks_per_node) as nodes:
        for mode in MODES:
            net = Mixed(seed=comm.rank)
            optimizer: Any = torch.optim.AdamW(net.parameters(), lr=0.01)
            model, optimizer = wrap_in_mode(net, nodes, mode, optimizer, transport=transport)
            train(model, optimizer, batches * (10 if mode == "default" else 3))
            model.free()
            assert_replicas_equal(comm, net.parameters(), (route, mode))
            assert all(bool(p.isfinite().all()) for p in net.parameters())


@pytest.mark.parametrize("wire_dtype", [torch.bfloat16, torch.float16])
def test_narrow_wire_rounds_gradients_and_keeps_replicas_equal(
    comm: Communicator, wire_dtype: torch.dtype
) -> None:
    batches = make_batches(comm, 3)
    reference = train_reference(mlp(), momentum, batches)
    for ranks_per_node, transport in (None, "mpi"), (2, "auto"), (None, "shared_memory"):
        with pretended_nodes(comm, ranks_per_node) as nodes:
            net = mlp()
            model = wrap(net, nodes, wire_dtype=wire_dtype, transport=transport)
            train(model, momentum(net.parameters()), [local_part(comm, *b) for b in batches])
            if transport == "shared_memory":
                assert_close(net, reference)  # nothing of it was on the wire
            model.free()
        assert_replicas_equal(comm, net.parameters(), transport)
        for mine, other in zip(net.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=0.02, atol=0.02)


def test_several_parameter_groups_and_clipping(comm: Communicator) -> None:
    batches = make_batches(comm, 4)

    def groups(net: nn.Module) -> torch.optim.Optimizer:
        weights = [p for p in net.parameters() if p.dim() > 1]
        biases = [p for p in net.parameters() if p.dim() == 1]
        return torch.optim.AdamW(
            [{"params": weights}, {"params": biases, "lr": 0.05, "weight_decay": 0.0}], lr=0.01
        )

    def clipped(net: nn.Module, model: nn.Module, optimizer: Any, data: Any, cached: bool) -> None:
        parameters = list(model.parameters())
        for x, y in data:
            optimizer.zero_grad()
            loss_of(model, x, y).backward()
            norm = nn.utils.clip_grad_norm_(parameters if cached else model.parameters(), 0.05)
            assert norm > 0.05
            optimizer.step()

    reference = mlp()
    clipped(reference, reference, groups(reference), batches, False)
    mine = [local_part(comm, *batch) for batch in batches]
    for mode in MODES:
        for cached in (False, True):
            net = mlp()
            model, optimizer = wrap_in_mode(net, comm, mode, groups(net))
            clipped(net, model, optimizer, mine, cached)
            model.free()
            assert_close(net, reference, (mode, cached))


def test_autocast(comm: Communicator) -> None:
    """Under autocast the parameters stay wide, and so do their gradients."""
    batches = make_batches(comm, 3, dtype=torch.float32)

    def run(model: nn.Module, optimizer: Any, data: Any) -> None:
        for x, y in data:
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                output = model(x)
            nn.functional.mse_loss(output.float(), y).backward()
            optimizer.step()

    reference = mlp(torch.float32)
    run(reference, momentum(reference.parameters()), batches)
    for mode in MODES:
        net = mlp(torch.float32)
        model, optimizer = wrap_in_mode(net, comm, mode, momentum(net.parameters()))
        run(model, optimizer, [local_part(comm, *b) for b in batches])
        model.free()
        for mine, other in zip(net.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=0.02, atol=0.01)
        assert_replicas_equal(comm, net.parameters(), mode)


@pytest.mark.parametrize("kind", ["plain", "fused"])
def test_infinite_gradient_on_one_rank_makes_all_skip_the_step(comm: Communicator, kind: str) -> None:
    x, y = local_part(comm, *make_batches(comm, 1, dtype=torch.float32)[0])
    for mode in MODES:
        net = mlp(torch.float32)
        optimizer: Any = torch.optim.AdamW(net.parameters(), lr=0.1, fused=kind == "fused")
        model, optimizer = wrap_in_mode(net, comm, mode, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(4):
            before = [p.detach().clone() for p in net.parameters()]
            optimizer.zero_grad()
            factor = float("inf") if step == 1 and comm.rank == comm.size - 1 else 1.0
            scaler.scale(loss_of(model, x, y) * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            changed = [not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True)]
            assert changed == [step != 1] * len(before), (mode, step)
            assert scaler.get_scale() == (1024.0 if step < 1 else 512.0)
        model.free()
        assert_replicas_equal(comm, net.parameters(), mode)


def test_grad_scaler_training_equals_one_process(comm: Communicator) -> None:
    """Fused optimizers take the scale themselves; the wrapper must not lose it on the way."""
    batches = make_batches(comm, 3, dtype=torch.float32)

    def run(model: nn.Module, optimizer: Any, data: Any) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for x, y in data:
            optimizer.zero_grad()
            scaler.scale(loss_of(model, x, y)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()

    for fused in (False, True):
        reference = mlp(torch.float32)
        run(reference, torch.optim.SGD(reference.parameters(), lr=0.1, fused=fused), batches)
        for mode in MODES:
            net = mlp(torch.float32)
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1, fused=fused)
            model, optimizer = wrap_in_mode(net, comm, mode, optimizer)
            run(model, optimizer, [local_part(comm, *b) for b in batches])
            model.free()
            assert_close(net, reference, (mode, fused))


# ---- when to synchronise -----------------------------------------------------------------------------------


def test_no_sync_accumulates_and_the_next_backward_reduces_the_sum(comm: Communicator) -> None:
    batches = make_batches(comm, 6)
    mine = [local_part(comm, *batch) for batch in batches]
    reference = mlp()
    expected = momentum(reference.parameters())
    for index, batch in enumerate(batches):
        loss_of(reference, *batch).backward()
        if index % 3 == 2:
            expected.step()
            expected.zero_grad()
    for mode in MODES:
        net = mlp()
        model, optimizer = wrap_in_mode(net, comm, mode, momentum(net.parameters()))
        for index, batch in enumerate(mine):
            if index % 3 == 2:
                loss_of(model, *batch).backward()
                optimizer.step()
                optimizer.zero_grad()
            else:
                with model.no_sync():
                    loss_of(model, *batch).backward()
        assert model.stats().steps in (2, 0)
        model.free()
        assert_close(net, reference, mode)


def test_parameter_used_only_without_sync_on_one_rank_still_counts(comm: Communicator) -> None:
    torch.manual_seed(1)
    net = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)}).double()
    model = wrap(Chosen(net), comm)
    x = torch.ones(2, 3, dtype=torch.float64) * (comm.rank + 1)
    with model.no_sync():
        model(x, ["a", "b"] if comm.rank == comm.size - 1 else ["a"]).sum().backward()
    model(x, ["a"]).sum().backward()
    assert net["b"].weight.grad is not None
    expected = torch.full((3, 3), 2.0 * comm.size / comm.size, dtype=torch.float64)
    torch.testing.assert_close(net["b"].weight.grad, expected)
    assert_replicas_equal(comm, [p.grad for p in net.parameters()])
    model.free()


class Chosen(nn.Module):
    """Sums the outputs of the layers that are named in the call."""

    def __init__(self, layers: nn.ModuleDict) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor, names: list[str]) -> Tensor:
        return torch.stack([self.layers[name](x) for name in names]).sum(0)


def test_two_backwards_before_a_step_add_up(comm: Communicator) -> None:
    batches = make_batches(comm, 4)
    mine = [local_part(comm, *batch) for batch in batches]
    for set_to_none in (True, False):
        reference = mlp()
        expected = momentum(reference.parameters())
        for index in range(2):
            for batch in batches[2 * index : 2 * index + 2]:
                loss_of(reference, *batch).backward()
            expected.step()
            expected.zero_grad(set_to_none=set_to_none)
        for mode in MODES:
            net = mlp()
            model, optimizer = wrap_in_mode(net, comm, mode, momentum(net.parameters()))
            for index in range(2):
                for batch in mine[2 * index : 2 * index + 2]:
                    loss_of(model, *batch).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=set_to_none)
            assert_close(net, reference, mode)
            assert all((p.grad is None) == set_to_none for p in model.parameters())
            model.free()


def test_two_models_train_against_each_other(comm: Communicator) -> None:
    """As in a GAN: the generator's backward runs through the discriminator."""
    batches = make_batches(comm, 4)

    def play(generator: nn.Module, critic: nn.Module, optimizers: Any, data: Any, freeze: bool) -> None:
        for x, y in data:
            optimizers[1].zero_grad()
            (critic(y).mean() - critic(generator(x).detach()).mean()).backward()
            optimizers[1].step()
            optimizers[0].zero_grad()
            critic.requires_grad_(not freeze)
            critic(generator(x)).mean().backward()
            critic.requires_grad_(True)
            optimizers[0].step()

    def make() -> tuple[nn.Module, nn.Module]:
        return mlp(seed=1), nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()

    for freeze in (False, True):
        references = make()
        play(*references, [momentum(net.parameters()) for net in references], batches, freeze)
        for mode in MODES:
            nets = make()
            wrapped = [wrap_in_mode(net, comm, mode, momentum(net.parameters())) for net in nets]
            models, optimizers = zip(*wrapped, strict=True)
            play(*models, optimizers, [local_part(comm, *b) for b in batches], freeze)
            for model, net, reference in zip(models, nets, references, strict=True):
                model.free()
                assert_close(net, reference, (mode, freeze))


# ---- evaluation --------------------------------------------------------------------------------------------


def test_one_rank_evaluates_alone(comm: Communicator) -> None:
    batches = [local_part(comm, *b) for b in make_batches(comm, 2)]
    for mode in MODES:
        net = nn.Sequential(mlp(), nn.BatchNorm1d(3).double())
        model, optimizer = wrap_in_mode(net, comm, mode, momentum(net.parameters()))
        train(model, optimizer, batches)
        finish(optimizer)  # an update under way needs every rank
        if comm.rank == comm.size - 1:
            model.eval()
            x = batches[0][0].clone().requires_grad_()
            with torch.no_grad():
                without = model(x)
            output = model(x)
            assert torch.equal(output, without)
            (gradient,) = torch.autograd.grad(output.sum(), x)
            assert gradient.shape == x.shape
            model.train()
        train(model, optimizer, batches)
        model.free()
        assert_replicas_equal(comm, net.parameters())


def finish(optimizer: torch.optim.Optimizer) -> None:
    if isinstance(optimizer, DataParallelOptimizer):
        optimizer.finish()


def test_model_in_evaluation_mode_can_be_trained(comm: Communicator) -> None:
    batches = make_batches(comm, 3)
    reference = train_reference(mlp(), momentum, batches)
    mine = [local_part(comm, *batch) for batch in batches]
    net = mlp(seed=comm.rank)
    model = wrap(net, comm).eval()
    train(model, momentum(net.parameters()), mine)
    assert_close(net, reference)
    twin = copy.deepcopy(wrap(mlp(), comm)).eval()
    train(twin, momentum(twin.parameters()), mine)
    assert_close(twin.module, reference)
    twin.free()
    model.free()


# ---- buffers -----------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Buffers that are written in place, replaced, never changed, integer, and half."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, 3).double()
        self.register_buffer("in_place", torch.zeros(3))
        self.register_buffer("replaced", torch.zeros(2, 2))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("narrow", torch.zeros(5, dtype=torch.bfloat16))
        self.register_buffer("constant", torch.ones(1000, 100))
        self.register_buffer("absent", None)

    def forward(self, x: Tensor, amount: float = 1.0) -> Tensor:
        if self.training:
            self.in_place += amount
            self.replaced = self.replaced + amount
            self.count += int(amount)
            self.narrow.add_(amount)
        return self.layer(x)


def test_buffers_that_changed_follow_rank_0(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    original = Communicator.Bcast

    def counting(self: Communicator, buf: Any, root: int = 0) -> None:
        sent.append(buf.nbytes)
        original(self, buf, root)

    for mode in MODES:
        net = Counting()
        net.constant.fill_(comm.rank)
        model, optimizer = wrap_in_mode(net, comm, mode, momentum(net.parameters()))
        assert bool((net.constant == 0).all())
        x, y = local_part(comm, *make_batches(comm, 1)[0])
        monkeypatch.setattr(Communicator, "Bcast", counting)
        for step in range(3):
            optimizer.zero_grad()
            (model(x, float(comm.rank + 1)) - y).square().sum().backward()
            optimizer.step()
            expected = step + 1.0
            assert bool((net.in_place == expected).all()), (mode, step, net.in_place)
            assert bool((net.replaced == expected).all())
            assert bool((net.narrow == expected).all())
            assert int(net.count) == int(expected)
        assert sum(sent) < net.constant.nbytes
        monkeypatch.setattr(Communicator, "Bcast", original)
        model.free()


def test_buffer_changed_on_one_rank_only_follows_rank_0(comm: Communicator) -> None:
    net = Counting()
    model = wrap(net, comm)
    x, _ = local_part(comm, *make_batches(comm, 1)[0])
    if comm.rank == comm.size - 1:
        net.constant.fill_(9.0)
    model(x).sum().backward()
    assert bool((net.constant == (9.0 if comm.size == 1 else 1.0)).all())
    model.free()
    apart = wrap(Counting(), comm, broadcast_buffers=False)
    apart(x, float(comm.rank)).sum().backward()
    assert bool((apart.module.in_place == comm.rank).all())
    apart.free()


def test_batch_norm_statistics_of_rank_0_are_everywhere_after_backward(comm: Communicator) -> None:
    for mode in MODES:
        net = nn.Sequential(nn.Linear(FEATURES, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
        model, optimizer = wrap_in_mode(net, comm, mode, momentum(net.parameters()))
        x, y = local_part(comm, *make_batches(comm, 1)[0])
        single = copy.deepcopy(net)
        single(x)
        comm.Bcast(single[1].running_mean, 0)
        loss_of(model, x, y).backward()
        torch.testing.assert_close(net[1].running_mean, single[1].running_mean)
        optimizer.step()
        train(model, optimizer, [(x, y)] * 3)
        model.free()
        assert_replicas_equal(comm, [*net.parameters(), *net.buffers()], mode)


# ---- copies and attributes ---------------------------------------------------------------------------------


def by_pickle(model: DataParallel) -> DataParallel:
    return pickle.loads(pickle.dumps(model))


def by_torch(model: DataParallel) -> DataParallel:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_torch])
def test_copy_trains_on_its_own(
    comm: Communicator, duplicate: Callable[[DataParallel], DataParallel]
) -> None:
    batches = make_batches(comm, 4)
    mine = [local_part(comm, *batch) for batch in batches]
    reference = train_reference(mlp(), momentum, batches)
    halfway = train_reference(mlp(), torch.optim.SGD, batches[:2])
    for mode in MODES:
        net = mlp()
        model, optimizer = wrap_in_mode(net, comm, mode, torch.optim.SGD(net.parameters()))
        train(model, optimizer, mine[:2])
        twin = duplicate(model)  # while updates may be under way
        assert_close(twin.module, halfway, mode)
        twin.load_state_dict(wrap_state(mlp()))
        train(twin, momentum(twin.parameters()), mine)
        assert_close(twin.module, reference, mode)
        assert_close(net, halfway, mode)
        assert_replicas_equal(comm, twin.parameters())
        twin.free()
        model.free()


def wrap_state(net: nn.Module) -> dict[str, Tensor]:
    return {f"module.{name}": value for name, value in net.state_dict().items()}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle])
def test_copy_evaluates_on_one_rank_alone(comm: Communicator, duplicate: Callable[[Any], Any]) -> None:
    model = wrap(mlp(), comm)
    x, _ = local_part(comm, *make_batches(comm, 1)[0])
    if comm.rank == comm.size - 1:
        twin = duplicate(model).eval()
        with torch.no_grad():
            expected = model.module(x)
            assert torch.equal(twin(x), expected)
        assert torch.equal(twin(x), expected)
    model.free()


def test_attributes_fall_through(comm: Communicator) -> None:
    net = mlp()
    net.note = "here"  # type: ignore[assignment]
    model = wrap(net, comm)
    assert model.note == "here"
    assert model.module is net
    with pytest.raises(AttributeError, match="nowhere"):
        _ = model.nowhere
    assert [name for name, _ in model.named_parameters()] == [
        f"module.{n}" for n, _ in net.named_parameters()
    ]
    model.free()


def test_construction_leaves_random_state_alone_and_keeps_rank_0s_weights(comm: Communicator) -> None:
    net = mlp(seed=100 + comm.rank)
    pretrained = copy.deepcopy(net)
    torch.manual_seed(comm.rank)
    state = torch.get_rng_state()
    model = wrap(net, comm)
    assert torch.equal(torch.get_rng_state(), state)
    expected = mlp(seed=100)
    assert_close(net, expected)
    if comm.rank == 0:
        assert_close(net, pretrained)
    model.free()


# ---- mistakes ----------------------------------------------------------------------------------------------


def different_models(odd: bool) -> Iterator[tuple[str, nn.Module]]:
    def linear(**changes: Any) -> nn.Module:
        options = {"in_features": 3, "out_features": 4, **(changes if odd else {})}
        return nn.Sequential(nn.Linear(**options), nn.Conv2d(2, 3, 2), nn.BatchNorm1d(4))

    yield "(5, 3)", linear(out_features=5)
    yield "torch.float64", linear(dtype=torch.float64)
    yield "on rank", linear(bias=False)
    yield "buffer", nn.Sequential(nn.BatchNorm1d(3, track_running_stats=not odd))
    yield "frozen", linear().requires_grad_(not odd)
    yield "other.weight", nn.ModuleDict({"other" if odd else "one": nn.Linear(2, 2)})
    layout = torch.channels_last if odd else torch.contiguous_format
    yield "axes", nn.Conv2d(3, 4, 3).to(memory_format=layout)
    yield "sparse", nn.Sequential(nn.Embedding(5, 2, sparse=odd), nn.Linear(2, 2))


def test_different_models_raise_the_same_error_everywhere(comm: Communicator) -> None:
    if comm.size == 1:
        pytest.skip("needs two ranks")
    for said, net in different_models(comm.rank == comm.size - 1):
        with pytest.raises(MismatchError, match="the model must be the same on all ranks") as caught:
            DataParallel(net, comm)
        assert said in str(caught.value)
        assert len(set(comm.allgather(str(caught.value)))) == 1


def test_different_options_raise_the_same_error_everywhere(comm: Communicator) -> None:
    if comm.size == 1:
        pytest.skip("needs two ranks")
    odd = comm.rank == comm.size - 1
    for options in (
        {"bucket_mb": 3 + odd},
        {"transport": "mpi" if odd else "auto"},
        {"broadcast_buffers": odd},
    ):
        with pytest.raises(MismatchError, match="first difference: 'option") as caught:
            DataParallel(mlp(), comm, **options)
        assert len(set(comm.allgather(str(caught.value)))) == 1


def test_unknown_options_raise_on_any_number_of_ranks(comm: Communicator) -> None:
    wrong: list[dict[str, Any]] = [
        {"transport": "pigeon"},
        {"progress": "magic"},
        {"wire_dtype": torch.int16},
    ]
    for options in wrong:
        with pytest.raises(MismatchError, match=f"{next(iter(options))} must be one of .* got"):
            DataParallel(mlp(), comm, **options)


def test_backward_that_broke_off_is_noticed_by_the_next_forward(comm: Communicator) -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            raise ValueError("broken")

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = mlp()
            self.broken = True

        def forward(self, x: Tensor) -> Tensor:
            x = self.layers[0](x)
            return self.layers[1:](Fails.apply(x) if self.broken else x)

    model = wrap(Broken(), comm)
    x, y = local_part(comm, *make_batches(comm, 1)[0])
    with pytest.raises(ValueError, match="broken"):
        loss_of(model, x, y).backward()
    if comm.size > 1:
        with pytest.raises(HpcparError, match="an exception has ended half-way"):
            model(x)
        with torch.no_grad():
            model(x)
    model.free()
    model.module.broken = False
    loss_of(model, x, y).backward()


def test_freed_model_works_on_without_ranks(comm: Communicator) -> None:
    for mode in MODES:
        net = mlp()
        model, optimizer = wrap_in_mode(net, comm, mode, momentum(net.parameters()))
        x, y = local_part(comm, *make_batches(comm, 1)[0])
        loss_of(model, x, y).backward()
        gradients = [p.grad.clone() for p in net.parameters()]
        model.free()
        model.free()
        for parameter, gradient in zip(net.parameters(), gradients, strict=True):
            assert torch.equal(parameter.grad, gradient)
        if comm.rank == 0:
            train(model, optimizer, [(x, y)] * 3)
            assert bool(torch.isfinite(loss_of(model, x, y)))
        assert model.stats().steps == 0


# ---- costs -------------------------------------------------------------------------------------------------


def test_stats_count_what_happened(comm: Communicator) -> None:
    net = mlp()
    model = wrap(net, comm, transport="mpi")
    train(model, momentum(net.parameters()), [local_part(comm, *b) for b in make_batches(comm, 3)])
    stats = model.stats()
    if comm.size == 1:
        assert (stats.steps, stats.buckets, stats.bytes_reduced, stats.transport) == (0, 0, 0, "none")
    else:
        assert stats.steps == 3
        assert stats.buckets > 2
        assert stats.bytes_reduced >= 3 * sum(p.nbytes for p in net.parameters())
        assert 0.0 <= stats.exposed_s <= stats.communication_s
        assert stats.communication_s > 0.0
        assert stats.transport == "mpi"
    model.free()


def test_gradients_live_in_the_buckets_and_memory_does_not_grow(comm: Communicator) -> None:
    net = mlp()
    model = wrap(net, comm)
    optimizer = momentum(net.parameters())
    batches = [local_part(comm, *b) for b in make_batches(comm, 1)]

    def tensors() -> int:
        gc.collect()
        return sum(1 for thing in gc.get_objects() if issubclass(type(thing), Tensor))

    train(model, optimizer, batches * 5)
    before = tensors()
    train(model, optimizer, batches * 50)
    assert tensors() <= before + 2
    if comm.size > 1:
        memory = [p.grad.untyped_storage().data_ptr() for p in net.parameters()]
        train(model, optimizer, batches)
        assert [p.grad.untyped_storage().data_ptr() for p in net.parameters()] == memory
    model.free()


def test_model_without_trainable_parameters_runs(comm: Communicator) -> None:
    for net in (nn.Tanh(), mlp().requires_grad_(False)):
        model = wrap(net, comm)
        x = torch.zeros(2, FEATURES, dtype=torch.float64, requires_grad=True)
        model(x).sum().backward()
        assert x.grad is not None
        with model.no_sync(), model.join():
            model(x)
        model.free()


def test_full_dev_shm_falls_back_to_messages_with_one_warning(
    comm: Communicator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if comm.size == 1:
        pytest.skip("one rank needs no shared memory")
    monkeypatch.setattr("hpcpar.comm.shared_memory._free_bytes", lambda: 1000)
    with caplog.at_level(logging.WARNING, "hpcpar"):
        model = wrap(mlp(), comm)
    assert len(caplog.records) == (comm.rank == 0)
    assert model.stats().transport == "mpi"
    model.free()
    with pytest.raises(HpcparError, match="must find room"):
        wrap(mlp(), comm, transport="shared_memory")


def test_gradients_are_there_when_backward_returns(comm: Communicator) -> None:
    batch = make_batches(comm, 1)[0]
    reference = mlp()
    loss_of(reference, *batch).backward()
    for mode in MODES:
        net = mlp()
        model, _ = wrap_in_mode(net, comm, mode, momentum(net.parameters()))
        loss_of(model, *local_part(comm, *batch)).backward()
        assert_gradients_close(net, reference, mode)
        model.free()


def test_plain_optimizer_as_overlapping_one_is_refused(comm: Communicator) -> None:
    net = nn.Linear(2, 1)
    with pytest.raises(TypeError, match=r"must be an hpcpar\.optim\.DataParallelOptimizer, got SGD"):
        DataParallel(net, comm, torch.optim.SGD(net.parameters()))  # type: ignore[arg-type]


@pytest.mark.parametrize("ranks_per_node", ["", "2"])
def test_training_under_debug_checks(
    comm: Communicator, ranks_per_node: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPCPAR_DEBUG", "1")
    monkeypatch.setenv("HPCPAR_RANKS_PER_NODE", ranks_per_node)
    nodes = Communicator(comm.mpi)
    net = nn.Linear(3, 1)
    optimizer = DataParallelOptimizer(torch.optim.SGD(net.parameters(), lr=0.1))
    model = DataParallel(net, nodes, optimizer)
    large = torch.zeros(1 << 15)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 3) * comm.rank).sum().backward()
        optimizer.step()
        if comm.rank % 2:
            net.weight.sum()  # settles here, while the others are in the next collective
        nodes.Allreduce(MPI.IN_PLACE, large)
    model.free()
    nodes.Free()
