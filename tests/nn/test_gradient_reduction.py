"""What autograd may do to a model: gradients are those of one process, whatever the graph looks like."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hpcpar.comm import Communicator
from hpcpar.errors import HpcparError
from hpcpar.nn import DataParallel
from hpcpar.optim import DataParallelOptimizer
from tests.nn.training import (
    FEATURES,
    ROUTES,
    assert_gradients_close,
    assert_replicas_equal,
    pretended_nodes,
    wrap,
)

pytestmark = pytest.mark.mpi

Forward = Callable[[nn.Module, Tensor, int], Tensor]
"""From a model (wrapped or not), one rank's input and that rank's number to its loss."""


def rank_input(rank: int, step: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(4, FEATURES, generator=generator, dtype=torch.float64)


def modes(net: nn.Module, comm: Communicator, **options: Any) -> list[DataParallel]:
    """Copies of ``net``, wrapped for each mode."""
    nets = [copy.deepcopy(net) for _ in range(3)]
    optimizer = DataParallelOptimizer(torch.optim.SGD(nets[2].parameters(), lr=0.1))
    return [
        wrap(nets[0], comm, **options),
        wrap(nets[1], comm, blocking_parameter_updates=True, **options),
        wrap(nets[2], comm, optimizer=optimizer, **options),
    ]


def check(comm: Communicator, net: nn.Module, forward: Forward, *, steps: int = 3, zero: bool = True) -> None:
    """Gradients of some backwards equal the mean of what every rank's would be in one process."""
    for number, model in enumerate(modes(net, comm)):
        reference = copy.deepcopy(net)
        for step in range(steps):
            if zero:
                model.zero_grad()
                reference.zero_grad()
            for rank in range(comm.size):
                (forward(reference, rank_input(rank, step), rank) / comm.size).backward()
            forward(model, rank_input(comm.rank, step), comm.rank).backward()
            assert_gradients_close(model.module, reference, f"step {step} of mode {number}")
        used = [p.grad for p in model.parameters() if p.grad is not None]
        assert_replicas_equal(comm, [g.coalesce().values() if g.is_sparse else g for g in used])
        model.free()


class Paths(nn.Module):
    """Linear layers, of which the call names the ones to use, in order."""

    def __init__(self, count: int, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.ModuleList(nn.Linear(FEATURES, FEATURES, **options) for _ in range(count)).double()

    def forward(self, x: Tensor, path: Sequence[int]) -> Tensor:
        for layer in path:
            x = torch.tanh(self.layers[layer](x))
        return x


# ---- unused, frozen, tied ----------------------------------------------------------------------------------


def test_unused_parameter_keeps_grad_none(comm: Communicator) -> None:
    check(comm, Paths(4), lambda model, x, _: model(x, [0, 2]).sum())


def test_parameter_used_on_one_rank_only(comm: Communicator) -> None:
    check(comm, Paths(3), lambda model, x, rank: model(x, [0, 1] if rank == 0 else [0]).square().sum())


def test_each_rank_uses_other_parameters(comm: Communicator) -> None:
    check(comm, Paths(5), lambda model, x, rank: model(x, [rank, 4]).square().sum())
    check(comm, Paths(5), lambda model, x, rank: model(x, [rank]).square().sum())


def test_use_changes_from_step_to_step(comm: Communicator) -> None:
    count = 0

    def forward(model: nn.Module, x: Tensor, rank: int) -> Tensor:
        nonlocal count
        count += 1
        return model(x, [rank, 4] if float(x[0, 0]) > 0 else [4, (rank + 1) % 4]).square().sum()

    for zero in (True, False):
        check(comm, Paths(5), forward, steps=6, zero=zero)


def test_random_models_with_random_use(comm: Communicator) -> None:
    """Drawn from one seed on every rank: layers, bucket sizes, routes, and who uses what when."""
    draw = torch.Generator().manual_seed(20240229)

    def choose(below: int) -> int:
        return int(torch.randint(below, (1,), generator=draw))

    for round_ in range(12):
        net = Paths(1 + choose(6), bias=bool(choose(2)))
        count = len(net.layers)
        ranks_per_node, transport = list(ROUTES.values())[choose(len(ROUTES))]
        bucket_mb = (0.0, 1e-4, 1e-3, 8.0)[choose(4)]
        blocking = bool(choose(2))
        with pretended_nodes(comm, ranks_per_node) as nodes:
            reference, mine = copy.deepcopy(net), copy.deepcopy(net)
            options = {"bucket_mb": bucket_mb, "transport": transport}
            model = wrap(mine, nodes, blocking_parameter_updates=blocking, **options)
            for step in range(4):
                paths = [[choose(count) for _ in range(1 + choose(count))] for _ in range(comm.size)]
                if choose(2):
                    model.zero_grad(set_to_none=bool(step % 2))
                    reference.zero_grad(set_to_none=bool(step % 2))
                for rank, path in enumerate(paths):
                    (reference(rank_input(rank, step), path).square().sum() / comm.size).backward()
                model(rank_input(comm.rank, step), paths[comm.rank]).square().sum().backward()
                assert_gradients_close(mine, reference, (round_, step, options, paths))
            model.free()


def test_frozen_parameters_are_left_alone(comm: Communicator) -> None:
    net = Paths(3)
    net.layers[1].requires_grad_(False)
    check(comm, net, lambda model, x, _: model(x, [0, 1, 2]).sum())


def test_parameters_may_be_frozen_and_unfrozen_later(comm: Communicator) -> None:
    for model in modes(Paths(3), comm):
        reference = copy.deepcopy(model.module)
        for step, frozen in enumerate([(), (0,), (0, 1), (), (0, 1, 2), (2,)]):
            for net in (model.module, reference):
                for index, layer in enumerate(net.layers):
                    layer.requires_grad_(index not in frozen)
                net.zero_grad()
            if len(frozen) < 3:
                for rank in range(comm.size):
                    (reference(rank_input(rank, step), [0, 1, 2]).sum() / comm.size).backward()
                model(rank_input(comm.rank, step), [0, 1, 2]).sum().backward()
            else:
                model(rank_input(comm.rank, step), [0, 1, 2])
            assert_gradients_close(model.module, reference, frozen)
        model.free()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(11, 4)
        self.middle = nn.Linear(4, 4)
        self.output = nn.Linear(4, 11, bias=False)
        self.output.weight = self.embedding.weight
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.middle(self.embedding(tokens(x))))


def tokens(x: Tensor) -> Tensor:
    return (x.abs() * 10).long() % 11


def test_tied_weights(comm: Communicator) -> None:
    check(comm, Tied(), lambda model, x, _: model(x).square().sum())


# ---- kinds of parameters -----------------------------------------------------------------------------------


class Kinds(nn.Module):
    """A scalar, an empty and a complex parameter, several dtypes, a transposed one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.no_complex = nn.Parameter(torch.zeros(0, dtype=torch.complex64))
        self.phase = nn.Parameter(torch.randn(FEATURES, dtype=torch.complex128))
        self.single = nn.Parameter(torch.randn(FEATURES, dtype=torch.complex64))
        self.narrow = nn.Parameter(torch.ones(FEATURES, dtype=torch.bfloat16))
        self.turned = nn.Parameter(torch.randn(FEATURES, 3, dtype=torch.float64).t())
        self.real = nn.Parameter(torch.randn(3, FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        y = (x * self.phase + self.single).abs() * self.scale
        z = x @ (self.turned + self.real).t()
        extra = self.empty.sum() + self.no_complex.abs().sum() + (self.narrow * 4).sum()
        return y.sum() + z.sum() + extra


def test_parameters_of_every_kind(comm: Communicator) -> None:
    check(comm, Kinds(), lambda model, x, _: model(x.round()))
    model = wrap(Kinds(), comm)
    model(rank_input(comm.rank)).backward()
    assert model.module.turned.grad.stride() == model.module.turned.stride()
    model.free()


def test_channels_last_weights_keep_their_strides(comm: Communicator) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)).double().to(memory_format=torch.channels_last)
    net = nn.Sequential(nn.Unflatten(1, (3, 4, 4)), net)

    def forward(model: nn.Module, x: Tensor, _: int) -> Tensor:
        return model(x.repeat(1, 8)).square().sum()

    check(comm, net, forward)
    model = wrap(net, comm)
    forward(model, rank_input(comm.rank), 0).backward()
    for parameter in net.parameters():
        assert parameter.grad.stride() == parameter.stride()
    model.free()


# ---- checkpointing -----------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool, segments: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.paths = Paths(4)
        self.reentrant, self.segments = reentrant, segments

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        for segment in self.segments:
            x = checkpoint(self.paths, x, segment, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(comm: Communicator, reentrant: bool) -> None:
    for segments in ([[0, 1], [2, 3]], [[0, 1], [2], [1, 0, 3]], [[0], [0], [0]]):
        net = Checkpointed(reentrant, segments)
        check(comm, net, lambda model, x, _: model(x).square().sum())
        check(comm, net, lambda model, x, _: model(x).square().sum(), zero=False)


def test_whole_model_may_be_checkpointed(comm: Communicator) -> None:
    for reentrant in (True, False):

        def forward(model: nn.Module, x: Tensor, _: int, reentrant: bool = reentrant) -> Tensor:
            return checkpoint(model, x.requires_grad_(), [0, 1], use_reentrant=reentrant).square().sum()

        check(comm, Paths(2), forward)


def test_more_reentrant_segments_than_before_is_an_error_or_right(comm: Communicator) -> None:
    """A parameter that fires again after its bucket was sent cannot be helped: it must be told."""
    if comm.size == 1:
        pytest.skip("one rank sends nothing")
    net = Checkpointed(True, [[0]])
    model = wrap(net, comm, bucket_mb=0.0)
    model(rank_input(comm.rank)).sum().backward()
    net.segments = [[0], [0], [0]]
    with pytest.raises(HpcparError, match="must get its gradient as often"):
        model(rank_input(comm.rank)).sum().backward()
    comm.Barrier()


# ---- several passes ----------------------------------------------------------------------------------------


def test_several_forwards_before_one_backward(comm: Communicator) -> None:
    def forward(model: nn.Module, x: Tensor, rank: int) -> Tensor:
        return model(x, [0, 1]).sum() + model(x + 1, [1]).square().sum() + model(x * 2, [rank % 2]).sum()

    check(comm, Paths(3), forward)


def test_two_forwards_then_two_backwards(comm: Communicator) -> None:
    for model in modes(Paths(3), comm):
        reference = copy.deepcopy(model.module)
        for rank in range(comm.size):
            (reference(rank_input(rank), [0, 1]).sum() / comm.size).backward()
            (reference(rank_input(rank, 1), [1, 2]).sum() / comm.size).backward()
        first = model(rank_input(comm.rank), [0, 1]).sum()
        second = model(rank_input(comm.rank, 1), [1, 2]).sum()
        first.backward()
        second.backward()
        assert_gradients_close(model.module, reference)
        model.free()


def test_backward_without_sync_may_follow_one_that_is_under_way(comm: Communicator) -> None:
    for model in modes(Paths(2), comm):
        reference = copy.deepcopy(model.module)
        for rank in range(comm.size):
            (reference(rank_input(rank), [0, 1]).sum() / comm.size).backward()
        reference(rank_input(comm.rank, 1), [0, 1]).sum().backward()
        first = model(rank_input(comm.rank), [0, 1]).sum()
        second = model(rank_input(comm.rank, 1), [0, 1]).sum()
        first.backward()
        with model.no_sync():
            second.backward()
        assert_gradients_close(model.module, reference)
        model.free()


def test_backward_twice_through_one_graph(comm: Communicator) -> None:
    for model in modes(Paths(2), comm):
        reference = copy.deepcopy(model.module)
        for rank in range(comm.size):
            (2 * reference(rank_input(rank), [0, 1]).sum() / comm.size).backward()
        loss = model(rank_input(comm.rank), [0, 1]).sum()
        loss.backward(retain_graph=True)
        loss.backward()
        assert_gradients_close(model.module, reference)
        model.free()


def test_gradient_penalty(comm: Communicator) -> None:
    """``autograd.grad`` inside the loss, and a graph of the gradients."""

    def forward(model: nn.Module, x: Tensor, _: int) -> Tensor:
        x = x.clone().requires_grad_()
        output = model(x, [0, 1])
        (gradient,) = torch.autograd.grad(output.sum(), x, create_graph=True)
        return output.square().sum() + gradient.square().sum()

    check(comm, Paths(2), forward)


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph")
def test_backward_with_a_graph_of_the_gradients(comm: Communicator) -> None:
    net = Paths(2)
    model = wrap(net, comm)
    reference = copy.deepcopy(net)
    for step in range(3):
        model.zero_grad()
        reference.zero_grad()
        for rank in range(comm.size):
            (reference(rank_input(rank, step), [0, 1]).sum() / comm.size).backward()
        model(rank_input(comm.rank, step), [0, 1]).sum().backward(create_graph=True)
        for mine, other in zip(net.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(mine.grad.detach(), other.grad)
    model.free()
    model.zero_grad()


# ---- outputs -----------------------------------------------------------------------------------------------


@dataclass
class Output:
    value: Tensor
    more: dict[str, Any]


class Shaped(nn.Module):
    """Returns its output in the given packaging."""

    def __init__(self, pack: Callable[[nn.Module, Tensor], object]) -> None:
        super().__init__()
        self.paths = Paths(3)
        self.logit_scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        self.pack = pack
        self.loss = torch.zeros(())

    def forward(self, x: Tensor) -> Any:
        y = self.paths(x, [0, 1])
        self.loss = y.square().sum()
        return self.pack(self, y)


def test_outputs_of_any_shape(comm: Communicator) -> None:
    shapes: list[tuple[Callable[[Any, Tensor], object], Callable[[Any, Any], Tensor]]] = [
        (lambda _, y: {"a": [y]}, lambda _, out: out["a"][0].sum()),
        (lambda _, y: (None, (y, 3)), lambda _, out: out[1][0].sum()),
        (lambda _, y: Output(y, {"b": y * 2}), lambda _, out: out.value.sum() + out.more["b"].sum()),
        (lambda _, y: None, lambda model, _: model.loss),
        (lambda net, y: (y, net.logit_scale), lambda _, out: (out[0] * out[1]).sum()),
        (lambda _, y: y.detach(), lambda model, out: model.loss + out.sum()),
    ]
    for pack, loss in shapes:
        net = Shaped(pack)

        def forward(model: nn.Module, x: Tensor, _: int, loss: Any = loss) -> Tensor:
            return loss(model, model(x))

        for _ in range(2):
            check_without_copy(comm, net, forward)


def check_without_copy(comm: Communicator, net: Any, forward: Forward) -> None:
    """As ``check``, for a module that keeps a tensor with a graph, which cannot be copied."""
    net.loss = torch.zeros(())
    reference = copy.deepcopy(net)
    for rank in range(comm.size):
        (forward(reference, rank_input(rank), rank) / comm.size).backward()
    model = wrap(net, comm)
    forward(model, rank_input(comm.rank), comm.rank).backward()
    assert_gradients_close(net, reference)
    model.free()
    net.zero_grad()


def test_returned_parameters_gather_no_hooks(comm: Communicator) -> None:
    net = Shaped(lambda net, y: (y, net.logit_scale))
    model = wrap(net, comm)
    for step in range(5):
        value, scale = model(rank_input(comm.rank, step))
        (value * scale).sum().backward()
    assert not net.logit_scale._backward_hooks
    model.free()


# ---- sparse gradients --------------------------------------------------------------------------------------


class Lookup(nn.Module):
    def __init__(self, *, bag: bool = False, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(6)
        kind = nn.EmbeddingBag if bag else nn.Embedding
        self.table: Any = kind(50, 3, sparse=True, **({"mode": "sum"} if bag else {}))
        self.head = nn.Linear(3, 50)
        if tied:
            self.head.weight = self.table.weight
        self.double()

    def forward(self, indices: Tensor | None) -> Tensor:
        if indices is None:
            return self.head(torch.ones(2, 3, dtype=torch.float64))
        return self.head(self.table(indices))


def indices_of(rank: int, step: int) -> Tensor | None:
    if rank == 1 and step == 1:
        return None  # no lookup at all
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randint(0, 50, (3, 4), generator=generator)


@pytest.mark.parametrize("kind", ["embedding", "bag", "tied"])
def test_sparse_embeddings_train_as_in_one_process(comm: Communicator, kind: str) -> None:
    make = {"embedding": Lookup, "bag": lambda: Lookup(bag=True), "tied": lambda: Lookup(tied=True)}[kind]

    def optimizers(net: Lookup) -> list[torch.optim.Optimizer]:
        if kind == "tied":
            return [torch.optim.SGD(net.parameters(), lr=0.1)]
        return [
            torch.optim.SparseAdam(net.table.parameters()),
            torch.optim.SGD(net.head.parameters(), lr=0.1),
        ]

    for ranks_per_node, transport in ((None, "auto"), (None, "mpi"), (2, "auto")):
        for samples in (False, True):
            with pretended_nodes(comm, ranks_per_node) as nodes:
                reference, net = make(), make()
                model = wrap(net, nodes, transport=transport)
                mine, expected = optimizers(net), optimizers(reference)
                with model.join("samples" if samples else "ranks", optimizer=None if samples else Quiet()):
                    for step in range(3):
                        for optimizer in mine + expected:
                            optimizer.zero_grad()
                        for rank in range(comm.size):
                            (reference(indices_of(rank, step)).square().sum() / comm.size).backward()
                        model(indices_of(comm.rank, step)).square().sum().backward()
                        if not samples:
                            assert_sparse_close(net, reference, (kind, transport, step))
                        for optimizer in mine + (expected if not samples else []):
                            optimizer.step()
                        assert_replicas_equal(comm, net.parameters())
                model.free()


class Quiet(torch.optim.SGD):
    """Steps nothing."""

    def __init__(self) -> None:
        super().__init__([torch.zeros(1)])


def assert_sparse_close(net: nn.Module, reference: nn.Module, what: object) -> None:
    for mine, other in zip(net.parameters(), reference.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None), what
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad.to_dense(), other.grad.to_dense())


def test_sparse_table_that_no_rank_looked_at_keeps_grad_none(comm: Communicator) -> None:
    net = Lookup()
    model = wrap(net, comm)
    model(None).sum().backward()
    assert net.table.weight.grad is None
    model(torch.tensor([[1]]) if comm.rank == 0 else None).sum().backward()
    assert net.table.weight.grad.is_sparse
    assert net.table.weight.grad.coalesce().indices().tolist() == [[1]]
    model.free()


def test_sparse_embedding_under_the_overlapping_optimizer(comm: Communicator) -> None:
    reference, net = Lookup(), Lookup()
    expected = torch.optim.SGD(reference.parameters(), lr=0.1)
    optimizer = DataParallelOptimizer(torch.optim.SGD(net.parameters(), lr=0.1))
    model = wrap(net, comm, optimizer=optimizer)
    for step in range(4):
        for rank in range(comm.size):
            (reference(indices_of(rank, step)).square().sum() / comm.size).backward()
        model(indices_of(comm.rank, step)).square().sum().backward()
        for each in (expected, optimizer):
            each.step()
            each.zero_grad()
    for mine, other in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, other)
    model.free()


def test_flattened_transformer_layers(comm: Communicator) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(FEATURES, 2, 8, dropout=0.0, batch_first=True, dtype=torch.float64)
    check(comm, layer, lambda model, x, _: F.mse_loss(model(x[None]), x[None]))
