"""DataParallelOptimizer: updates that wait for the next forward are those of one process, whoever looks."""

from __future__ import annotations

import copy
import io
import pickle
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hpcpar.comm import Communicator
from hpcpar.errors import HpcparError
from hpcpar.nn import DataParallel
from hpcpar.optim import DataParallelOptimizer
from tests.nn.training import (
    FEATURES,
    ROUTES,
    assert_close,
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

STEPS = 4


class CountingSGD(torch.optim.Optimizer):
    """Not one of torch's: its step size depends on a number that it keeps in its group."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"count": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["count"] += 1
            norm = torch.stack([p.grad.norm() for p in group["params"]]).norm()
            for parameter in group["params"]:
                parameter -= 0.1 / group["count"] / (1 + norm) * parameter.grad


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "AdamW loop": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "AdamW tensor rate": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), foreach=False),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p),
    "NAdam": lambda p: torch.optim.NAdam(p),
    "ASGD": lambda p: torch.optim.ASGD(p),
    "Adafactor": lambda p: torch.optim.Adafactor(p),
    "not torch's": CountingSGD,
}


def overlapped(
    net: nn.Module, comm: Communicator, make: Callable[[Any], torch.optim.Optimizer], **options: Any
) -> tuple[DataParallel, DataParallelOptimizer]:
    optimizer = DataParallelOptimizer(make(net.parameters()))
    return wrap(net, comm, optimizer=optimizer, **options), optimizer


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


# ---- parity ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_overlapped_steps_equal_one_process(comm: Communicator, name: str) -> None:
    batches = make_batches(comm, STEPS)
    reference = train_reference(mlp(), OPTIMIZERS[name], batches)
    for blocking in (False, True):
        net = mlp()
        optimizer = DataParallelOptimizer(OPTIMIZERS[name](net.parameters()), blocking=blocking)
        model = wrap(net, comm, optimizer=optimizer)
        train(model, optimizer, [local_part(comm, *b) for b in batches])
        assert_close(net, reference, blocking)
        model.free()


def test_several_groups(comm: Communicator) -> None:
    def make(net: nn.Module) -> torch.optim.Optimizer:
        layers = [
            {"params": [layer.weight, layer.bias], "lr": 0.01 * (i + 1)} for i, layer in enumerate(net[::2])
        ]
        return torch.optim.AdamW(layers[::-1])

    batches = make_batches(comm, STEPS)
    reference, net = mlp(), mlp()
    train(reference, make(reference), batches)
    optimizer = DataParallelOptimizer(make(net))
    model = wrap(net, comm, optimizer=optimizer)
    train(model, optimizer, [local_part(comm, *b) for b in batches])
    assert_close(net, reference)
    model.free()


def test_closures_work_where_nothing_is_under_way(comm: Communicator) -> None:
    x, y = make_batches(comm, 1)[0]

    def run(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, x, y)
            loss.backward()
            return loss

        for _ in range(2):
            optimizer.step(closure)  # type: ignore[arg-type]

    def lbfgs(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(parameters, lr=0.1, max_iter=4)

    reference, net = mlp(), mlp()
    run(reference, lbfgs(reference.parameters()), x, y)
    model, optimizer = overlapped(net, comm, lbfgs)
    run(model, optimizer, *local_part(comm, x, y))
    assert_close(net, reference)
    if comm.size > 1:
        loss_of(model, *local_part(comm, x, y)).backward()
        with pytest.raises(HpcparError, match="must not get a closure"):
            optimizer.step(lambda: 0.0)
    model.free()


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "exponential": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("error:Detected call of")
def test_rate_at_step_counts_whenever_it_is_applied(comm: Communicator, name: str) -> None:
    batches = make_batches(comm, STEPS)

    def run(model: nn.Module, optimizer: Any, scheduled: Any, data: Any) -> None:
        scheduler = SCHEDULERS[name](scheduled)
        for x, y in data:
            optimizer.zero_grad()
            loss_of(model, x, y).backward()
            optimizer.step()
            scheduler.step()

    for tensor_rate in (False, True):

        def make(parameters: Any, tensor_rate: bool = tensor_rate) -> torch.optim.Optimizer:
            rate = torch.tensor(0.1) if tensor_rate else 0.1
            return torch.optim.AdamW(parameters, lr=rate, foreach=False)

        reference = mlp()
        expected = make(reference.parameters())
        run(reference, expected, expected, batches)
        for inner in (False, True):
            net = mlp()
            model, optimizer = overlapped(net, comm, make)
            scheduled = optimizer.optimizer if inner else optimizer
            run(model, optimizer, scheduled, [local_part(comm, *b) for b in batches])
            assert_close(net, reference, (tensor_rate, inner))
            model.free()


@pytest.mark.parametrize("place", ["before forward", "after step", "before backward", "by model"])
def test_zero_grad_may_stand_anywhere(comm: Communicator, place: str) -> None:
    batches = make_batches(comm, STEPS)
    reference = train_reference(mlp(), momentum, batches)
    for set_to_none in (True, False):
        net = mlp()
        model, optimizer = overlapped(net, comm, momentum)
        for x, y in [local_part(comm, *b) for b in batches]:
            if place == "before forward":
                optimizer.zero_grad(set_to_none)
            loss = loss_of(model, x, y)
            if place == "before backward":
                optimizer.zero_grad(set_to_none)
            loss.backward()
            optimizer.step()
            if place == "after step":
                optimizer.zero_grad(set_to_none)
            if place == "by model":
                model.zero_grad(set_to_none)
        if place in ("after step", "by model"):
            assert all((p.grad is None) if set_to_none else not p.grad.any() for p in net.parameters())
        assert_close(net, reference, (place, set_to_none))
        model.free()


def test_gradients_dropped_before_the_step_are_not_applied(comm: Communicator) -> None:
    batch = local_part(comm, *make_batches(comm, 1)[0])
    net = mlp()
    model, optimizer = overlapped(net, comm, momentum)
    loss_of(model, *batch).backward()
    optimizer.zero_grad()
    optimizer.step()
    assert_close(net, mlp())
    loss_of(model, *batch).backward()
    loss_of(model, *batch).backward()  # accumulates
    optimizer.step()
    optimizer.step()  # a second step on the same gradients, as in torch
    reference = mlp()
    expected = momentum(reference.parameters())
    for _ in range(2):
        loss_of(reference, *make_batches(comm, 1)[0]).backward()
    expected.step()
    expected.step()
    assert_close(net, reference)
    model.free()


def test_unused_parameters_are_not_stepped(comm: Communicator) -> None:
    net = mlp()
    net.append(nn.Linear(3, 3).double())
    kept = net[5].weight.detach().clone()
    optimizer = DataParallelOptimizer(torch.optim.AdamW(net.parameters(), weight_decay=0.5))
    model = wrap(net, comm, optimizer=optimizer)
    net.forward = lambda x: net[4](net[3](net[2](net[1](net[0](x)))))  # type: ignore[method-assign]
    train(model, optimizer, [local_part(comm, *b) for b in make_batches(comm, 3)])
    assert torch.equal(net[5].weight, kept)
    assert net[5].weight.grad is None
    model.free()


def test_step_hooks_see_whole_steps(comm: Communicator) -> None:
    net = mlp()
    model, optimizer = overlapped(net, comm, momentum)
    calls: list[int] = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    train(model, optimizer, [local_part(comm, *b) for b in make_batches(comm, 3)])
    model.free()
    assert len(calls) == 3


def test_parameters_that_unfreeze_later_join_the_overlap(comm: Communicator) -> None:
    batches = make_batches(comm, 4)

    def run(model: nn.Module, net: Any, optimizer: Any, data: Any) -> None:
        net[0].requires_grad_(False)
        for step, (x, y) in enumerate(data):
            if step == 2:
                net[0].requires_grad_(True)
                optimizer.add_param_group({"params": list(net[0].parameters()), "lr": 0.01})
            optimizer.zero_grad()
            loss_of(model, x, y).backward()
            optimizer.step()

    def make(net: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for layer in net[1:] for p in layer.parameters()], lr=0.05)

    reference, net = mlp(), mlp()
    run(reference, reference, make(reference), batches)
    optimizer = DataParallelOptimizer(make(net))
    model = wrap(net, comm, optimizer=optimizer)
    run(model, net, optimizer, [local_part(comm, *b) for b in batches])
    assert_close(net, reference)
    model.free()


def test_two_models_under_one_optimizer(comm: Communicator) -> None:
    batches = make_batches(comm, 3)

    def run(models: Any, optimizer: Any, data: Any) -> None:
        for x, y in data:
            optimizer.zero_grad()
            (loss_of(models[0], x, y) + loss_of(models[1], x, y)).backward()
            optimizer.step()

    references, nets = [mlp(seed=1), mlp(seed=2)], [mlp(seed=1), mlp(seed=2)]
    run(references, momentum([p for net in references for p in net.parameters()]), batches)
    optimizer = DataParallelOptimizer(momentum([p for net in nets for p in net.parameters()]))
    models = [wrap(net, comm, optimizer=optimizer) for net in nets]
    run(models, optimizer, [local_part(comm, *b) for b in batches])
    for model, net, reference in zip(models, nets, references, strict=True):
        assert_close(net, reference)
        model.free()


def test_optimizer_state_can_be_saved_and_loaded(comm: Communicator) -> None:
    batches = make_batches(comm, 6)
    reference = train_reference(mlp(), OPTIMIZERS["Adam"], batches)
    mine = [local_part(comm, *b) for b in batches]
    first, second = mlp(), mlp(seed=9)
    model, optimizer = overlapped(first, comm, OPTIMIZERS["Adam"])
    train(model, optimizer, mine[:3])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)
    later, resumed = overlapped(second, comm, OPTIMIZERS["Adam"])
    train(later, resumed, mine[:1])
    later.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(later, resumed, mine[3:])
    assert_close(second, reference)
    later.free()
    model.free()


# ---- nobody sees a stale parameter -------------------------------------------------------------------------


class Zoo(nn.Module):
    """Tied weights, an LSTM, and a layer that reads another one's weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.embedding = nn.Embedding(13, 4)
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.head = nn.Linear(4, 13, bias=False)
        self.head.weight = self.embedding.weight
        self.lender = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.embedding(tokens))
        return self.head(F.linear(hidden, self.lender.weight) * self.scale)


def tokens_of(rank: int, step: int) -> Tensor:
    return torch.randint(0, 13, (2, 5), generator=torch.Generator().manual_seed(10 * step + rank))


def zoo_loss(model: nn.Module, rank: int, step: int) -> Tensor:
    tokens = tokens_of(rank, step)
    return F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


class Watched:
    """A model one step after ``step()``, and what it must look like."""

    def __init__(self, comm: Communicator) -> None:
        reference = Zoo()
        expected = momentum(reference.parameters())
        self.comm, self.net = comm, Zoo()
        self.cached = list(self.net.parameters())
        self.model, self.optimizer = overlapped(self.net, comm, momentum)
        for step in range(2):
            expected.zero_grad()
            for rank in range(comm.size):
                (zoo_loss(reference, rank, step) / comm.size).backward()
            expected.step()
            self.optimizer.zero_grad()
            zoo_loss(self.model, comm.rank, step).backward()
            self.optimizer.step()
        self.reference, self.expected = reference, expected

    def parameters(self) -> dict[str, Tensor]:
        return dict(self.reference.named_parameters())


def first_of(saved: dict[str, Any], watched: Watched) -> list[tuple[Tensor, Tensor]]:
    expected = watched.reference.state_dict()
    return [(tensor, expected[name.removeprefix("module.")]) for name, tensor in saved.items()]


def saved_by_torch(watched: Watched) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(watched.model.state_dict(), file)
    file.seek(0)
    return torch.load(file)


def averaged(watched: Watched) -> list[tuple[Tensor, Tensor]]:
    start = Zoo()
    average = AveragedModel(start, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(watched.net)  # the first update copies
    return list(zip(average.module.parameters(), watched.reference.parameters(), strict=True))


def averaged_over_cached_list(watched: Watched) -> list[tuple[Tensor, Tensor]]:
    means = [torch.zeros_like(p) for p in watched.reference.parameters()]
    torch._foreach_lerp_(means, [p.detach() for p in watched.cached], 1.0)
    return list(zip(means, watched.reference.parameters(), strict=True))


def states(watched: Watched, optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, Tensor]]:
    mine, other = optimizer.state_dict()["state"], watched.expected.state_dict()["state"]
    return [(mine[key]["momentum_buffer"], other[key]["momentum_buffer"]) for key in other]


def pairs(watched: Watched, look: Callable[[nn.Parameter], Any]) -> list[tuple[Tensor, Tensor]]:
    """What ``look`` sees, each through a parameter that nobody has touched before."""
    return [
        (torch.as_tensor(look(mine)), torch.as_tensor(look(other)))
        for mine, other in zip(watched.cached, watched.reference.parameters(), strict=True)
    ]


LOOKS: dict[str, Callable[[Watched], list[tuple[Tensor, Tensor]]]] = {
    "state_dict": lambda w: first_of(w.model.state_dict(), w),
    "state_dict of the module": lambda w: first_of(w.net.state_dict(), w),
    "torch.save": lambda w: first_of(saved_by_torch(w), w),
    "pickle": lambda w: first_of(pickle.loads(pickle.dumps(w.net)).state_dict(), w),
    "pickled parameter": lambda w: pairs(w, lambda p: pickle.loads(pickle.dumps(p)).detach()),
    "pickled state": lambda w: first_of(pickle.loads(pickle.dumps(w.net.state_dict())), w),
    "deepcopy": lambda w: first_of(copy.deepcopy(w.net).state_dict(), w),
    "deepcopy of the parameter": lambda w: pairs(w, lambda p: copy.deepcopy(p).detach()),
    "copy of the parameter": lambda w: pairs(w, lambda p: copy.copy(p).detach()),
    "deepcopy of the list": lambda w: list(
        zip(copy.deepcopy(w.cached), w.reference.parameters(), strict=True)
    ),
    "detach": lambda w: pairs(w, lambda p: p.detach()),
    "data": lambda w: pairs(w, lambda p: p.data),
    "numpy": lambda w: pairs(w, lambda p: p.detach().numpy().copy()),
    "numpy array": lambda w: pairs(w, lambda p: p.data.numpy().copy()),
    "tolist": lambda w: pairs(w, lambda p: torch.tensor(p.tolist())),
    "repr": lambda w: [(torch.tensor(repr(a) == repr(b)), torch.tensor(True)) for a, b in zip_parameters(w)],
    "format": lambda w: [(torch.tensor(str(a) == str(b)), torch.tensor(True)) for a, b in zip_parameters(w)],
    "item": lambda w: [(torch.tensor(w.net.scale.item()), torch.tensor(w.reference.scale.item()))],
    "bool": lambda w: [(torch.tensor(bool(w.net.scale > 1)), torch.tensor(bool(w.reference.scale > 1)))],
    "indexing": lambda w: pairs(w, lambda p: p[..., :1] if p.dim() else p[()]),
    "arithmetic": lambda w: pairs(w, lambda p: 1.0 - p),
    "comparison": lambda w: pairs(w, lambda p: (p == p) * p),
    "iteration": lambda w: [(torch.stack(list(w.net.lender.weight)), w.reference.lender.weight)],
    "untyped_storage": lambda w: [
        (storage_of(w.net.lender.weight), storage_of(w.reference.lender.weight)),
    ],
    "data_ptr": lambda w: pairs(w, lambda p: values_at(p.data_ptr(), p)),
    "dlpack": lambda w: pairs(w, lambda p: torch.from_dlpack(p.detach())),
    "parameters_to_vector": lambda w: [
        (nn.utils.parameters_to_vector(w.cached), nn.utils.parameters_to_vector(w.reference.parameters()))
    ],
    "foreach": lambda w: list(
        zip(
            torch._foreach_mul(w.cached, 2.0),
            torch._foreach_mul(list(w.reference.parameters()), 2.0),
            strict=True,
        )
    ),
    "tied name": lambda w: [(w.net.head.weight.detach(), w.reference.head.weight)],
    "outside of its module": lambda w: [
        tuple(F.linear(torch.ones(4).double(), m.lender.weight) for m in (w.net, w.reference))
    ],
    "average": averaged,
    "average over a cached list": averaged_over_cached_list,
    "optimizer state": lambda w: states(w, w.optimizer),
    "wrapped optimizer state": lambda w: states(w, w.optimizer.optimizer),
    "functional_call": lambda w: [
        (
            torch.func.functional_call(
                w.net.lender, dict(w.net.lender.named_parameters()), torch.ones(4).double()
            ),
            w.reference.lender(torch.ones(4).double()),
        )
    ],
    "vmap": lambda w: [
        (
            torch.func.vmap(torch.sum)(w.net.lender.weight),
            torch.func.vmap(torch.sum)(w.reference.lender.weight),
        )
    ],
    "lstm": lambda w: [tuple(m.lstm(torch.ones(1, 3, 4).double())[0] for m in (w.net, w.reference))],
    "evaluation": lambda w: [(w.model.eval()(tokens_of(0, 7)), w.reference(tokens_of(0, 7)))],
    "to another dtype": lambda w: pairs(w, lambda p: p.float()),
    "gradient": lambda w: pairs(w, lambda p: torch.zeros(()) if p.grad is None else p.grad.clone()),
}


def zip_parameters(watched: Watched) -> list[tuple[nn.Parameter, nn.Parameter]]:
    return list(zip(watched.cached, watched.reference.parameters(), strict=True))[-1:]


def storage_of(tensor: Tensor) -> Tensor:
    return (
        torch.tensor(tensor.untyped_storage().tolist(), dtype=torch.uint8)
        .view(tensor.dtype)
        .view(tensor.shape)
    )


def values_at(address: int, like: Tensor) -> Tensor:
    import ctypes

    count = like.numel()
    return torch.tensor(list((ctypes.c_double * count).from_address(address)), dtype=torch.float64).view(
        like.shape
    )


@pytest.mark.parametrize("look", LOOKS)
def test_stale_parameter_is_never_seen(comm: Communicator, look: str) -> None:
    watched = Watched(comm)
    if comm.size > 1:
        assert (
            type(watched.cached[0]) is not nn.Parameter
        )  # something is under way, or the test tests nothing
    compared = LOOKS[look](watched)
    assert compared
    for mine, expected in compared:
        torch.testing.assert_close(mine, expected.detach(), check_device=False)
    assert_close(watched.net, watched.reference)
    watched.model.free()


def test_metadata_settles_nothing(comm: Communicator) -> None:
    watched = Watched(comm)
    for parameter in watched.cached:
        kind = type(parameter)
        assert isinstance(parameter, nn.Parameter)
        assert isinstance(parameter, Tensor)
        seen = (
            parameter.shape,
            parameter.dtype,
            parameter.device,
            parameter.requires_grad,
            parameter.is_leaf,
        )
        assert len(seen) == 5
        assert parameter.numel() == parameter.shape.numel()
        assert parameter.dim() == parameter.ndim == len(parameter.stride())
        assert parameter.is_floating_point() and not parameter.is_complex() and parameter.is_contiguous()
        assert parameter.element_size() == 8
        assert hash(parameter) == id(parameter)
        assert any(parameter is other for other in watched.net.parameters())
        assert len({parameter, parameter}) == 1
        assert type(parameter) is kind
    assert (type(watched.cached[0]) is nn.Parameter) == (comm.size == 1)
    watched.optimizer.finish()
    assert all(type(parameter) is nn.Parameter for parameter in watched.cached)
    watched.model.free()


def test_gradients_may_be_looked_at_between_backward_and_step(comm: Communicator) -> None:
    net, reference = mlp(), mlp()
    model, optimizer = overlapped(net, comm, momentum)
    expected = momentum(reference.parameters())
    for step, (x, y) in enumerate(make_batches(comm, 4)):
        for trained, its, part in ((reference, expected, (x, y)), (model, optimizer, local_part(comm, x, y))):
            its.zero_grad()
            loss_of(trained, *part).backward()
            if step == 0:
                nn.utils.clip_grad_norm_(trained.parameters(), 0.01)
            elif step == 1:
                nn.utils.clip_grad_value_(trained.parameters(), 0.01)
            elif step == 2:
                for parameter in trained.parameters():
                    parameter.grad.mul_(2.0)
            else:
                for parameter in trained.parameters():
                    parameter.grad = torch.ones_like(parameter)
            its.step()
    assert_close(net, reference)
    model.free()


def test_parameters_may_be_written_between_step_and_forward(comm: Communicator) -> None:
    net, reference = mlp(), mlp()
    model, optimizer = overlapped(net, comm, momentum)
    expected = momentum(reference.parameters())
    for x, y in make_batches(comm, 3):
        for trained, its, part in ((reference, expected, (x, y)), (model, optimizer, local_part(comm, x, y))):
            its.zero_grad()
            loss_of(trained, *part).backward()
            its.step()
            with torch.no_grad():
                for parameter in trained.parameters():
                    parameter.clamp_(-0.3, 0.3)
            for parameter in trained.parameters():
                parameter.data = parameter.data * 0.9
    assert_close(net, reference)
    model.free()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_compiled_and_scripted_modules_see_no_stale_parameter(comm: Communicator) -> None:
    batches = make_batches(comm, 3)
    reference = train_reference(mlp(), momentum, batches)
    x, _ = batches[0]
    kinds: list[Callable[[nn.Module], nn.Module]] = [
        torch.jit.script,
        lambda net: torch.jit.trace(net, torch.zeros(2, FEATURES).double()),
        lambda net: torch.compile(net, backend="eager"),
        lambda net: nn.Sequential(net[0], torch.compile(net[1:], backend="eager")),
    ]
    for kind in kinds:
        net = mlp()
        optimizer = DataParallelOptimizer(momentum(net.parameters()))
        model = wrap(kind(net), comm, optimizer=optimizer)
        train(model, optimizer, [local_part(comm, *b) for b in batches])
        with torch.no_grad():
            torch.testing.assert_close(model(x), reference(x))
        assert_close(net, reference, kind)
        model.free()


# ---- ranks do different things -----------------------------------------------------------------------------


def test_ranks_settle_in_different_order(comm: Communicator) -> None:
    for ranks_per_node, transport in ROUTES.values():
        with pretended_nodes(comm, ranks_per_node) as nodes:
            net, reference = mlp(), mlp()
            model, optimizer = overlapped(net, nodes, momentum, transport=transport)
            expected = momentum(reference.parameters())
            for x, y in make_batches(comm, 3):
                expected.zero_grad()
                loss_of(reference, x, y).backward()
                expected.step()
                optimizer.zero_grad()
                loss_of(model, *local_part(comm, x, y)).backward()
                optimizer.step()
                order = list(net.parameters())
                random.Random(comm.rank).shuffle(order)
                for parameter in order:
                    parameter.sum().item()
            assert_close(net, reference, transport)
            model.free()


def test_one_rank_settles_while_the_others_wait_elsewhere(comm: Communicator) -> None:
    for ranks_per_node, transport in ROUTES.values():
        with pretended_nodes(comm, ranks_per_node) as nodes:
            net = mlp()
            model, optimizer = overlapped(net, nodes, momentum, transport=transport)
            train(model, optimizer, [local_part(comm, *b) for b in make_batches(comm, 2)])
            if comm.rank == 0:
                sum(p.sum() for p in net.parameters()).item()
            comm.Barrier()
            if comm.rank == comm.size - 1:
                time.sleep(0.05)
                model.state_dict()
            comm.Barrier()
            model.free()
            assert_replicas_equal(comm, net.parameters())


def test_end_of_training_applies_the_last_step(comm: Communicator) -> None:
    batches = make_batches(comm, 3)
    reference = train_reference(mlp(), momentum, batches)
    net = mlp()
    model, optimizer = overlapped(net, comm, momentum)
    train(model, optimizer, [local_part(comm, *b) for b in batches])
    model.free()
    assert all(type(p) is nn.Parameter for p in net.parameters())
    assert_close(net, reference)
    if comm.rank == 0:
        train(model, optimizer, batches)  # by itself, now


def test_copies_of_the_optimizer_work(comm: Communicator) -> None:
    net = mlp()
    model, optimizer = overlapped(net, comm, OPTIMIZERS["Adam"])
    train(model, optimizer, [local_part(comm, *b) for b in make_batches(comm, 2)])
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert isinstance(twin, DataParallelOptimizer)
        assert len(twin.state_dict()["state"]) == len(list(net.parameters()))
        for parameter in twin.param_groups[0]["params"]:
            parameter.grad = torch.ones_like(parameter)
        twin.step()
        twin.zero_grad()
    assert "DataParallelOptimizer(Adam" in repr(optimizer)
    assert isinstance(optimizer, torch.optim.Optimizer)
    model.free()
