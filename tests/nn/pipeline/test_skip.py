"""Skip connections: layers in a row compute what a function with variables computes; mistakes are named."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hpcpar.errors import MismatchError
from hpcpar.nn.pipeline.skip import (
    Namespace,
    SkipEdge,
    SkipName,
    SkipTracker,
    check_skips,
    current_tracker,
    pop,
    pop_names,
    skippable,
    stash,
    stash_names,
    use_tracker,
)

pytestmark = pytest.mark.local


@skippable(stash=["map"])
class Down(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Any:
        yield stash("map", x)
        return self.linear(x)


@skippable(pop=["map"])
class Up(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Any:
        skip = yield pop("map")
        return self.linear(x) * skip


@skippable(stash=["c"], pop=["a", "b"])
class Three(nn.Module):
    def forward(self, x: Any) -> Any:
        one = yield pop("a")
        two = yield pop("b")
        yield stash("c", one + two)
        return x


@pytest.fixture(autouse=True)
def _forget() -> None:
    current_tracker().clear()


def a(name: str) -> SkipName:
    return SkipName(None, name)


# ---- without a pipeline ------------------------------------------------------------------------------------


def test_layers_in_a_sequential_compute_what_variables_would() -> None:
    model = nn.Sequential(Down(), nn.Tanh(), Up())
    x = torch.randn(4, 3, requires_grad=True)
    expected = model[2].linear(torch.tanh(model[0].linear(x))) * x
    (reference,) = torch.autograd.grad(expected.sum(), x)
    output = model(x)
    (gradient,) = torch.autograd.grad(output.sum(), x)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradient, reference)


def test_repeated_blocks_keep_apart_what_isolate_has_put_apart() -> None:
    inner, outer = Namespace(), Namespace()
    model = nn.Sequential(
        Down().isolate(outer), Down().isolate(inner), Up().isolate(inner), Up().isolate(outer)
    )
    x = torch.randn(4, 3)
    hidden = model[0].linear(x)
    expected = model[3].linear(model[2].linear(model[1].linear(hidden)) * hidden) * x
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copy_of_a_model_keeps_its_blocks_together_and_apart(copied: Any) -> None:
    inner, outer = Namespace(), Namespace()
    model = nn.Sequential(
        Down().isolate(outer), Down().isolate(inner), Up().isolate(inner), Up().isolate(outer)
    )
    other = copied(model)
    names = [*map(stash_names, other[:2]), *map(pop_names, other[2:])]
    assert names[0] == names[3] != names[1] == names[2]
    assert names[0] != stash_names(model[0])
    x = torch.randn(2, 3)
    torch.testing.assert_close(other(x), model(x))


def test_value_may_be_anything_and_popped_by_several() -> None:
    value = {"x": torch.ones(2), "n": None}

    @skippable(stash=["v", "none"])
    class Stashing(nn.Module):
        def forward(self, x: Any) -> Any:
            yield stash("v", value)
            yield stash("none", None)
            return x

    @skippable(pop=["v", "none"])
    class Popping(nn.Module):
        def forward(self, x: Any) -> Any:
            got = yield pop("v")
            assert (yield pop("none")) is None
            return [*x, got]

    output = nn.Sequential(Stashing(), Popping(), Popping())([])
    assert [part is value for part in output] == [True, True]


def test_threads_do_not_see_each_other() -> None:
    Down()(torch.zeros(1, 3))
    errors: list[Exception] = []

    def pop_alone() -> None:
        try:
            Up()(torch.zeros(1, 3))
        except MismatchError as error:
            errors.append(error)

    thread = threading.Thread(target=pop_alone)
    thread.start()
    thread.join()
    assert "must be stashed before it is popped, got a pop of 'map'" in str(errors[0])


def test_tracker_in_force_gets_all_values_and_only_inside_of_the_block() -> None:
    outside, x = current_tracker(), torch.ones(1, 3)
    with use_tracker(SkipTracker()) as tracker:
        assert current_tracker() is tracker
        Down()(x)
        with use_tracker(SkipTracker()), pytest.raises(MismatchError, match="stashed before"):
            Up()(x)
        assert tracker.pop(a("map")) is x
    assert current_tracker() is outside
    with pytest.raises(MismatchError, match="stashed before"):
        Up()(x)
    tracker.clear()
    with pytest.raises(MismatchError, match="stashed before"):
        tracker.pop(a("map"))


def test_checkpointed_forward_runs_twice_with_the_same_result() -> None:
    model = nn.Sequential(Down(), nn.Tanh(), Up())
    x = torch.randn(4, 3, requires_grad=True)
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    output = checkpoint(model, x, use_reentrant=False)
    (gradient,) = torch.autograd.grad(output.sum(), x)
    torch.testing.assert_close(gradient, expected)
    assert set(vars(model[0])) == set(vars(Down()))  # nothing is kept on the module


# ---- the class ---------------------------------------------------------------------------------------------


def test_class_stays_the_same_class() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = 2.0

        def forward(self, x: Tensor) -> Any:
            """Say something."""
            yield stash("a", x)
            return x * self.scale

    decorated = skippable(stash=["a"])(Plain)
    assert decorated is Plain
    assert decorated.forward.__doc__ == "Say something."
    assert decorated()(torch.ones(1)).item() == 2.0
    assert type(pickle.loads(pickle.dumps(Down()))) is Down


def test_subclass_may_call_the_forward_of_its_base() -> None:
    @skippable(stash=["map"], pop=["late"])
    class Both(Down):
        def forward(self, x: Tensor) -> Any:
            late = yield pop("late")
            yield stash("map", x + late)
            return super().forward(x)

    current_tracker().stash(a("late"), 1.0)
    module, x = Both(), torch.zeros(2, 3)
    torch.testing.assert_close(module(x), module.linear(x))
    assert torch.equal(current_tracker().pop(a("map")), x)  # by the base, which came last


def test_names_are_those_of_all_skippables_inside_in_a_fixed_order() -> None:
    space = Namespace()
    nested = nn.Sequential(nn.ReLU(), Three(), nn.Sequential(Down().isolate(space), Up()))
    assert stash_names(nested) == (a("c"), SkipName(space, "map"))
    assert pop_names(nested) == (a("a"), a("b"), a("map"))
    assert stash_names(nn.Linear(2, 2)) == pop_names(nn.Linear(2, 2)) == ()


def test_isolate_puts_all_or_some_names_in_a_namespace() -> None:
    one, two = Namespace(), Namespace()
    module = Three()
    assert module.isolate(one) is module
    module.isolate(two, only=["b"])
    assert pop_names(module) == (SkipName(one, "a"), SkipName(two, "b"))
    assert stash_names(module) == (SkipName(one, "c"),)
    assert stash_names(Three()) == (a("c"),)
    with pytest.raises(MismatchError, match=r"names of the module, got \['x'\] for a Three"):
        module.isolate(one, only=["x"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stash": "a"}, r"stash must be a list of names, got 'a'"),
        ({"pop": "a"}, r"pop must be a list of names"),
        ({"stash": ["a", "b"], "pop": ["b"]}, r"must not both stash and pop a name, got \['b'\]"),
    ],
)
def test_wrong_declarations_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MismatchError, match=message):
        skippable(**options)


def test_forward_without_yield_is_refused() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(MismatchError, match="must be a generator function, got one without yield in Plain"):
        skippable(stash=["a"])(Plain)


def forward_of(*requests: Any) -> nn.Module:
    @skippable(stash=["a"], pop=["b"])
    class Module(nn.Module):
        def forward(self, x: Any) -> Any:
            for request in requests:
                _ = yield request
            return x

    return Module()


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([stash("x", 1)], r"must declare what it stashes, got 'x'. Add it: @skippable\(stash="),
        ([pop("a")], "must declare what it pops, got 'a'"),
        ([pop("b")], r"must stash all names .* without \['a'\]. Where there is no value, stash None"),
        ([stash("a", 1)], r"must pop all names .* without \['b'\]\.$"),
        ([stash("a", 1), stash("a", 2)], "must stash each name once, got 'a' for the second time"),
        ([pop("b"), pop("b")], "must pop each name once, got 'b'"),
    ],
)
def test_forward_that_does_not_do_what_it_declares_is_refused(requests: list[Any], message: str) -> None:
    current_tracker().stash(a("b"), 0)
    with pytest.raises(MismatchError, match="skippable Module " + message):
        forward_of(*requests)(torch.zeros(1))


@pytest.mark.parametrize("request_", [None, 3, torch.zeros(1), "a"])
def test_yield_of_something_else_is_a_type_error(request_: Any) -> None:
    for kind in (TypeError, MismatchError):
        with pytest.raises(kind, match=r"must yield stash\(...\) or pop\(...\), got a "):
            forward_of(request_)(torch.zeros(1))


# ---- the routes --------------------------------------------------------------------------------------------


def names(layers: list[tuple[str, str]]) -> list[tuple[list[SkipName], list[SkipName]]]:
    return [([*map(a, stashes)], [*map(a, pops)]) for stashes, pops in layers]


def test_routes_of_a_u_net() -> None:
    edges = check_skips(names([("a", ""), ("b", ""), ("", ""), ("", "b"), ("", "a")]))
    assert edges == [SkipEdge(a("b"), 1, 3), SkipEdge(a("a"), 0, 4)]


def test_value_may_have_several_routes_and_stay_in_its_layer() -> None:
    edges = check_skips(names([("ab", ""), ("c", "cab"), ("", "ca"), ("", "aa")]))
    assert edges == [
        *(SkipEdge(a("c"), 1, 1), SkipEdge(a("a"), 0, 1), SkipEdge(a("b"), 0, 1)),
        *(SkipEdge(a("c"), 1, 2), SkipEdge(a("a"), 0, 2), SkipEdge(a("a"), 0, 3)),
    ]
    assert check_skips(names([("", ""), ("", "")])) == []


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([("a", ""), ("a", ""), ("", "a")], r"got 'a' stashed by layers 0 and 1. .*isolate"),
        ([("aa", ""), ("", "a")], "got 'a' stashed by layers 0 and 0"),
        ([("a", ""), ("b", "a")], "got 'b' stashed by layer 1 and popped by none"),
        ([("", "a"), ("a", "")], "got 'a' popped by layer 0, which layer 1 stashes"),
        ([("", ""), ("", "a")], "got 'a' popped by layer 1, which no layer stashes"),
    ],
)
def test_impossible_routes_are_refused(layers: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(MismatchError, match=message):
        check_skips(names(layers))


def test_namespaces_tell_routes_apart() -> None:
    one, two = SkipName(Namespace(), "a"), SkipName(Namespace(), "a")
    edges = check_skips([([one], []), ([two], []), ([], [one, two])])
    assert edges == [SkipEdge(one, 0, 2), SkipEdge(two, 1, 2)]
    with pytest.raises(MismatchError, match=r"got 'a' \(isolated\) popped by layer 1, which no layer"):
        check_skips([([one], []), ([], [two])])
