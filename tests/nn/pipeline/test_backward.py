"""A backward in two parts accumulates the same gradients as autograd's own, once, whatever the graph."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint

from hpcpar.nn.pipeline.backward import backward_inputs, backward_whole

pytestmark = pytest.mark.local

Outputs = Tensor | tuple[Tensor, ...]

WIDTH = 4


class Double(torch.autograd.Function):
    """Computes all of its gradients whatever is asked, and the same one for two of its inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.variable = "not a leaf"
        return x * weight + bias

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradient * weight, (gradient * x).sum(0), gradient.sum(0)


class SameGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, one: Tensor, other: Tensor) -> Tensor:
        return x + one + other

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return gradient, gradient, gradient


class Model(nn.Module):
    """Some parameters, and a function of them and the inputs."""

    def __init__(self, function: Callable[..., Outputs]) -> None:
        super().__init__()
        self.function = function
        self.one = nn.Linear(WIDTH, WIDTH)
        self.two = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.scale = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.shift = nn.Parameter(torch.rand(WIDTH))
        self.like_input = nn.Parameter(torch.rand(3, WIDTH))
        self.also_like_input = nn.Parameter(torch.rand(3, WIDTH))
        self.double()

    def forward(self, *inputs: Tensor) -> Outputs:
        return self.function(self, *inputs)


CASES: dict[str, Callable[..., Outputs]] = {}


def case(function: Callable[..., Outputs]) -> Callable[..., Outputs]:
    CASES[function.__name__] = function
    return function


@case
def chain(m: Model, x: Tensor, y: Tensor) -> Outputs:
    return m.norm(m.two(torch.tanh(m.one(x)))) + y


@case
def weight_used_twice(m: Model, x: Tensor, y: Tensor) -> Outputs:
    return m.one(torch.tanh(m.one(x))) * m.scale + y


@case
def weight_used_behind_itself(m: Model, x: Tensor, y: Tensor) -> Outputs:
    weight = m.one.weight @ m.one.weight
    return torch.tanh(x @ weight) @ weight.T + y @ m.two.weight


@case
def weight_computed_from_weights(m: Model, x: Tensor, y: Tensor) -> Outputs:
    weight = m.one.weight * m.scale.exp()
    return m.two(x @ weight) + y * weight.sum()


@case
def unused_input(m: Model, x: Tensor, y: Tensor) -> Outputs:
    return m.two(m.one(x))


@case
def unused_inputs(m: Model, x: Tensor, y: Tensor) -> Outputs:
    return m.two(m.one(torch.ones_like(x)))


@case
def input_passed_through(m: Model, x: Tensor, y: Tensor) -> Outputs:
    return m.one(x), y


@case
def inputs_passed_through(m: Model, x: Tensor, y: Tensor) -> Outputs:
    return y, x


@case
def input_passed_through_and_used(m: Model, x: Tensor, y: Tensor) -> Outputs:
    return m.one(x), x, x, y


@case
def view_outputs(m: Model, x: Tensor, y: Tensor) -> Outputs:
    hidden = m.one(x)
    return hidden[:, :2], hidden.T, hidden, x[:, 1:], y.view(-1)


@case
def outputs_of_one_node(m: Model, x: Tensor, y: Tensor) -> Outputs:
    first, second = m.one(x).chunk(2, dim=1)
    return first, second * y[:, :2]


@case
def several_outputs(m: Model, x: Tensor, y: Tensor) -> Outputs:
    hidden = m.one(x)
    return hidden, m.two(hidden), m.norm(hidden * y), m.norm(y)


@case
def parameter_as_output(m: Model, x: Tensor, y: Tensor) -> Outputs:
    return m.scale, m.one(x) + y


@case
def parameter_as_output_and_used(m: Model, x: Tensor, y: Tensor) -> Outputs:
    return m.scale, m.one(x) * m.scale + y


@case
def output_of_parameters_only(m: Model, x: Tensor, y: Tensor) -> Outputs:
    return m.one.weight @ m.two.weight, m.two(x) + y, m.shift.exp()


@case
def output_twice(m: Model, x: Tensor, y: Tensor) -> Outputs:
    hidden = m.one(x) + y
    return hidden, hidden


@case
def in_place_operations(m: Model, x: Tensor, y: Tensor) -> Outputs:
    hidden = m.one(x)
    hidden += y
    hidden[:, 0] = m.shift[0]
    hidden.relu_()
    return m.two(hidden).mul_(2.0)


@case
def python_function(m: Model, x: Tensor, y: Tensor) -> Outputs:
    return m.two(Double.apply(m.one(x), m.scale, m.shift)) + y


@case
def python_function_twice(m: Model, x: Tensor, y: Tensor) -> Outputs:
    return Double.apply(Double.apply(x, m.scale, m.shift), m.shift, m.scale) + y


@case
def python_function_of_parameters_only(m: Model, x: Tensor, y: Tensor) -> Outputs:
    return Double.apply(m.one.weight, m.scale, m.shift) @ x.T, y


@case
def python_function_with_one_gradient_for_all(m: Model, x: Tensor, y: Tensor) -> Outputs:
    return SameGradient.apply(x, m.like_input, m.also_like_input), y


@case
def expanded_gradients(m: Model, x: Tensor, y: Tensor) -> Outputs:
    shared = m.like_input + m.like_input
    return (x + shared).sum(), y.sum()


@case
def sum_of_leaves(m: Model, x: Tensor, y: Tensor) -> Outputs:
    return x + m.like_input + y + m.also_like_input + m.like_input


@case
def without_reentry_checkpointed(m: Model, x: Tensor, y: Tensor) -> Outputs:
    return m.two(checkpoint(lambda a: torch.tanh(m.one(a)) * m.scale, x, use_reentrant=False)) + y


@case
def with_reentry_checkpointed(m: Model, x: Tensor, y: Tensor) -> Outputs:
    return m.two(checkpoint(lambda a: torch.tanh(m.one(a)) * m.scale, x, use_reentrant=True)) + y


@case
def embedding(m: Model, x: Tensor, y: Tensor) -> Outputs:
    return torch.nn.functional.embedding(torch.tensor([0, 1, 1]), m.one.weight) * x + y


@case
def long_chain(m: Model, x: Tensor, y: Tensor) -> Outputs:
    for _ in range(1200):  # deeper than Python may recurse
        x = x * 0.999
    return m.one(x) + y


ROUNDS = 2


def gradients_by_autograd(
    model: nn.Module, batches: list[list[Tensor]], wanted: Sequence[bool]
) -> tuple[list[list[Tensor | None]], list[Tensor | None]]:
    """Of the inputs in each round, and of the parameters in the end."""
    of_inputs = []
    for batch in batches:
        leaves = [x.clone().requires_grad_(want) for x, want in zip(batch, wanted, strict=True)]
        roots, seeds = roots_of(model(*leaves))
        if roots:
            torch.autograd.backward(roots, seeds)
        of_inputs.append([leaf.grad for leaf in leaves])
    return of_inputs, [p.grad for p in model.parameters()]


def roots_of(outputs: Outputs) -> tuple[list[Tensor], list[Tensor]]:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    roots = [output for output in outputs if output.requires_grad]
    generator = torch.Generator().manual_seed(5)
    return roots, [torch.rand(root.shape, generator=generator, dtype=root.dtype) for root in roots]


def same_gradients(got: list[Tensor | None], expected: list[Tensor | None]) -> bool:
    return len(got) == len(expected) and all(
        (one is None and other is None)
        or (one is not None and other is not None and torch.allclose(one, other, rtol=1e-10, atol=1e-12))
        for one, other in zip(got, expected, strict=True)
    )


def make_batches(rounds: int = ROUNDS) -> list[list[Tensor]]:
    return [[torch.rand(3, WIDTH, dtype=torch.float64) for _ in range(2)] for _ in range(rounds)]


FROZEN: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "one layer": ("one.weight", "one.bias", "scale"),
    "all": ("one", "two", "norm", "scale", "shift", "like_input", "also_like_input"),
}


# Inputs of which the gradient is wanted, and what is frozen.
COMBINATIONS = (
    ((True, True), "nothing"),
    ((True, True), "one layer"),
    ((True, True), "all"),
    ((True, False), "nothing"),
    ((False, False), "nothing"),
    ((False, False), "one layer"),
)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_split_backward_equals_autograd(name: str) -> None:
    for wanted, frozen in COMBINATIONS:
        model = Model(CASES[name])
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(not parameter_name.startswith(FROZEN[frozen] or ("-",)))
        reference, batches = copy.deepcopy(model), make_batches()
        expected = gradients_by_autograd(reference, batches, wanted)
        deferred, found = [], []
        for batch in batches:  # several are under way at once, as in a pipeline
            leaves = [x.clone().requires_grad_(want) for x, want in zip(batch, wanted, strict=True)]
            roots, seeds = roots_of(model(*leaves))
            edges = [get_gradient_edge(root) for root in roots]
            del roots
            mine, rest = backward_inputs(edges, seeds, [leaf for leaf in leaves if leaf.requires_grad])
            assert all(leaf.grad is None for leaf in leaves)
            of_wanted = iter(mine)
            found.append([next(of_wanted) if want else None for want in wanted])
            deferred.append(rest)
        kept = copy.deepcopy(found)
        for rest in deferred:
            rest.run()
            rest.run()  # the second time there is nothing left
        what = (name, wanted, frozen)
        for got, other in zip(found, expected[0], strict=True):
            assert same_gradients(got, other), what
        assert same_gradients([p.grad for p in model.parameters()], expected[1]), what
        for got, before in zip(found, kept, strict=True):
            assert same_gradients(got, before), what  # it may still be under way to another rank


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_whole_backward_equals_autograd(name: str) -> None:
    model = Model(CASES[name])
    reference, batches = copy.deepcopy(model), make_batches()
    expected = gradients_by_autograd(reference, batches, (True, True))
    for batch, of_inputs in zip(batches, expected[0], strict=True):
        leaves = [x.clone().requires_grad_() for x in batch]
        roots, seeds = roots_of(model(*leaves))
        edges = [get_gradient_edge(root) for root in roots]
        del roots
        backward_whole(edges, seeds)
        assert same_gradients([leaf.grad for leaf in leaves], of_inputs)
    assert same_gradients([p.grad for p in model.parameters()], expected[1])


def test_gradients_of_parameters_have_memory_of_their_own() -> None:
    """Or the next microbatch would add to several at once, or to what is being sent."""
    for function in (python_function_with_one_gradient_for_all, expanded_gradients, sum_of_leaves):
        model = Model(function)
        leaves = [x.requires_grad_() for x in make_batches(1)[0]]
        roots, seeds = roots_of(model(*leaves))
        sent, deferred = backward_inputs([get_gradient_edge(root) for root in roots], seeds, leaves)
        deferred.run()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        memories = [gradient.untyped_storage().data_ptr() for gradient in gradients]
        taken = {t.untyped_storage().data_ptr() for t in [*sent, *seeds] if t is not None}
        assert len(set(memories)) == len(memories), function.__name__
        assert not taken & set(memories), function.__name__
        for gradient in gradients:
            gradient.add_(1.0)  # expanded memory would refuse


def test_weights_are_left_to_the_second_part() -> None:
    model = Model(chain)
    leaves = [x.requires_grad_() for x in make_batches(1)[0]]
    roots, seeds = roots_of(model(*leaves))
    _, deferred = backward_inputs([get_gradient_edge(root) for root in roots], seeds, leaves)
    assert all(p.grad is None for p in model.parameters())
    deferred.run()
    used = (*model.one.parameters(), *model.two.parameters(), *model.norm.parameters())
    assert all(p.grad is not None for p in used)


def test_stage_without_wanted_inputs_leaves_everything_to_the_second_part() -> None:
    model = Model(several_outputs)
    roots, seeds = roots_of(model(*make_batches(1)[0]))
    found, deferred = backward_inputs([get_gradient_edge(root) for root in roots[:1]], seeds[:1], [])
    assert found == []
    assert all(p.grad is None for p in model.parameters())
    deferred.run()
    assert all(p.grad is not None for p in model.one.parameters())


def test_nothing_to_start_from_gives_no_gradients() -> None:
    leaf = torch.ones(3, requires_grad=True)
    backward_whole([], [])
    found, deferred = backward_inputs([], [], [leaf])
    deferred.run()
    assert found == [None]
    assert leaf.grad is None


def test_sparse_gradients_accumulate() -> None:
    layer = nn.Embedding(5, WIDTH, sparse=True).double()
    dense = nn.Embedding.from_pretrained(layer.weight.detach().clone(), freeze=False)
    tokens, x = torch.tensor([1, 1, 3]), torch.rand(3, WIDTH, dtype=torch.float64)
    for _ in range(3):
        (dense(tokens) * x).sum().backward()
        leaf = x.clone().requires_grad_()
        root = (layer(tokens) * leaf).sum()
        _, deferred = backward_inputs([get_gradient_edge(root)], [torch.ones_like(root)], [leaf])
        deferred.run()
    assert layer.weight.grad is not None
    assert layer.weight.grad.is_sparse
    torch.testing.assert_close(layer.weight.grad.to_dense(), dense.weight.grad)


def test_second_part_frees_the_graph_as_it_goes() -> None:
    model = Model(chain)
    leaves = [x.requires_grad_() for x in make_batches(1)[0]]
    saved: list[weakref.ref[Any]] = []

    def note(tensor: Tensor) -> Tensor:
        copied = tensor.clone()
        saved.append(weakref.ref(copied))
        return copied

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        roots, seeds = roots_of(model(*leaves))
    edges = [get_gradient_edge(root) for root in roots]
    del roots
    _, deferred = backward_inputs(edges, seeds, leaves)
    del edges
    assert any(ref() is not None for ref in saved)
    deferred.run()
    assert all(ref() is None for ref in saved)
