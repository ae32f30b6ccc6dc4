"""Layers: what is one module stays one module, and every process describes a layer alike."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcpar.errors import MismatchError
from hpcpar.nn.pipeline.layers import Layers, LayerSpec, SpecUse, Use

pytestmark = pytest.mark.local


def logits(module: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, module.weight)


class Counted(nn.Linear):
    """Counts how often it is built, by device."""

    built: ClassVar[list[str]] = []

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.built.append(self.weight.device.type)


class ReadsValues(nn.Linear):
    """Cannot be built on the meta device."""

    def __init__(self) -> None:
        super().__init__(2, 3)
        self.norm = self.weight.norm().item()


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(4, 4), persistent=False)


class Branching(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return self[0](x) + self[1](x)


@pytest.fixture(autouse=True)
def _reset_counts() -> None:
    Counted.built.clear()


# ---- what a model may be -----------------------------------------------------------------------------------


def test_sequential_gives_the_names_of_its_children_and_inner_ones_stay_whole() -> None:
    relu = nn.ReLU()
    model = nn.Sequential()
    for name, module in {"a": nn.Linear(2, 2), "b": relu, "c": nn.Sequential(relu), "d": relu}.items():
        model.add_module(name, module)
    layers = Layers(model)
    assert layers.names == ("a", "b", "c", "d")
    assert [layers.build(index) for index in range(len(layers))] == [model.a, relu, model.c, relu]


@pytest.mark.parametrize("container", [list, tuple, nn.ModuleList])
def test_list_gives_indices_as_names(container: Any) -> None:
    relu = nn.ReLU()
    layers = Layers(container([nn.Linear(2, 2), relu, relu]))
    assert layers.names == ("0", "1", "2")
    assert layers.build(1) is layers.build(2) is relu


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2), "must be an nn.Sequential or a list of layers, got a Linear"),
        ({"a": nn.ReLU()}, "must be an nn.Sequential or a list of layers, got a dict"),
        (Branching(nn.ReLU(), nn.ReLU()), "got a Branching with a forward of its own"),
        ([], "at least one layer"),
        (nn.Sequential(), "at least one layer"),
        ([nn.ReLU(), torch.relu], "got a builtin_function_or_method as layer 1"),
        ([[nn.ReLU()]], "got a list as layer 0"),
        ([nn.Linear], "got a type as layer 0"),
    ],
)
def test_what_is_no_sequence_of_layers_is_refused(model: Any, message: str) -> None:
    with pytest.raises(MismatchError, match=message):
        Layers(model)


@pytest.mark.parametrize("factory", [nn.Linear(2, 2), 3, None])
def test_spec_of_something_that_makes_no_layer_is_refused(factory: Any) -> None:
    with pytest.raises(MismatchError, match="class or function that makes the layer"):
        LayerSpec(factory)


def test_factory_that_returns_no_module_is_refused_when_it_is_called() -> None:
    spec = LayerSpec(dict, a=1)
    for build in (spec.build, spec.sketch):
        with pytest.raises(MismatchError, match=r"must return an nn\.Module, got a dict from builtins\.dict"):
            build()


# ---- building ----------------------------------------------------------------------------------------------


def test_spec_is_built_once_and_only_when_asked_for() -> None:
    spec = LayerSpec(Counted, 2, 2)
    use = spec.using(logits)
    layers = Layers([spec, LayerSpec(Counted, 2, 2), use, spec, use, spec.using(logits)])
    assert Counted.built == []
    assert not layers.is_built(0)
    built = [layers.build(index) for index in range(6)]
    assert Counted.built == ["cpu", "cpu"]
    assert layers.is_built(5)
    assert built[0] is built[3] is layers.build(0)
    assert built[2] is built[4]
    assert built[2] is not built[5]
    assert built[2].weight is built[0].weight is built[5].weight
    assert built[1].weight is not built[0].weight
    assert isinstance(use, SpecUse)


def test_factory_gets_its_arguments() -> None:
    linear = LayerSpec(nn.Linear, 3, out_features=2, bias=False).build()
    assert (tuple(linear.weight.shape), linear.bias) == ((2, 3), None)


def test_sketch_has_shapes_and_needs_neither_memory_nor_random_numbers() -> None:
    layers = Layers([LayerSpec(Counted, 4, 5), LayerSpec(ReadsValues), nn.Linear(2, 2)])
    state = torch.get_rng_state()
    sketches = [layers.sketch(index) for index in range(3)]
    assert torch.equal(torch.get_rng_state(), state)
    assert sketches[0].weight.is_meta
    assert sketches[0].weight.shape == (5, 4)
    assert not sketches[1].weight.is_meta
    assert sketches[2] is layers.build(2)
    assert not layers.is_built(0)
    assert not layers.build(0).weight.is_meta
    assert layers.sketch(0) is layers.build(0)


# ---- uses --------------------------------------------------------------------------------------------------


def tied_model() -> nn.Sequential:
    embedding = LayerSpec(nn.Embedding, 7, 3)
    layers = Layers([embedding, LayerSpec(nn.Linear, 3, 3), embedding.using(logits)])
    return nn.Sequential(*map(layers.build, range(3)))


def test_use_has_the_names_of_its_module_and_its_gradients_add_up() -> None:
    model = tied_model()
    words = torch.tensor([0, 3])
    assert list(model.state_dict()) == ["0.weight", "1.weight", "1.bias", "2.weight"]
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "1.weight", "1.bias"]
    weight = model[0].weight.detach().clone().requires_grad_()
    F.linear(model[1](F.embedding(words, weight)), weight).pow(2).sum().backward()
    model.zero_grad()
    model(words).pow(2).sum().backward()
    torch.testing.assert_close(model[0].weight.grad, weight.grad)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_use_in_a_copy_belongs_to_the_module_in_the_copy(copied: Any) -> None:
    model = tied_model()
    other = copied(model)
    assert other[2].weight is other[0].weight
    assert other[2].module is other[0]
    assert other[0].weight is not model[0].weight
    other[0].weight = nn.Parameter(torch.zeros(7, 3))
    assert other[2].weight is other[0].weight


def test_use_follows_conversion_mode_and_loading() -> None:
    norm = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout())
    use = Use(norm, lambda module, x: module(x) * 2)
    state = {name: torch.full_like(value, 2) for name, value in norm.state_dict().items()}
    use.load_state_dict(state)
    assert list(use.state_dict()) == list(state)
    assert all(bool((value == 2).all()) for value in norm.state_dict().values())
    use.eval()
    assert not norm.training
    assert not norm[1].training
    use.double()
    assert norm[0].running_mean.dtype == norm[0].weight.dtype == torch.float64
    x = torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(use(x), norm(x) * 2)


def test_use_of_an_lstm_converts_what_only_the_lstm_knows_of() -> None:
    lstm = nn.LSTM(2, 2)
    Use(lstm, lambda module, x: module(x)[0]).double()
    assert lstm(torch.zeros(1, 1, 2, dtype=torch.float64))[0].dtype == torch.float64


# ---- ties --------------------------------------------------------------------------------------------------


def test_parameter_in_two_layers_ties_them_at_any_depth() -> None:
    first, last = nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(2, 2)))
    last[1][0].weight = first.weight
    assert Layers([nn.ReLU(), first, nn.Linear(2, 2), last]).tied_groups() == [(1, 3)]


def test_ties_are_transitive_and_groups_sorted() -> None:
    a, b, c, d = (nn.Parameter(torch.zeros(1)) for _ in range(4))
    lists = [[d], [a], [b], [c], [c, b], [d], [a, c]]
    assert Layers([nn.ParameterList(part) for part in lists]).tied_groups() == [(0, 5), (1, 2, 3, 4, 6)]


def test_shared_module_ties_by_its_state_only() -> None:
    gelu, masked, linear = nn.GELU(), Masked(), nn.Linear(2, 2)
    assert Layers([gelu, nn.Sequential(gelu), gelu]).tied_groups() == []
    assert Layers([masked, gelu, nn.Sequential(masked)]).tied_groups() == [(0, 2)]
    assert Layers([linear, linear]).tied_groups() == [(0, 1)]
    assert Layers([Masked(), Masked(), nn.Linear(2, 2), nn.Linear(2, 2)]).tied_groups() == []


def test_use_is_tied_to_its_module() -> None:
    masked, embedding = Masked(), nn.Embedding(3, 3)
    use = Use(masked, lambda module, x: x)
    assert Layers([masked, nn.ReLU(), use]).tied_groups() == [(0, 2)]
    assert Layers([embedding, nn.ReLU(), Use(embedding, logits)]).tied_groups() == [(0, 2)]
    assert Layers([Use(masked, logits), use]).tied_groups() == [(0, 1)]


def test_specs_are_tied_by_identity_and_by_parameters_among_their_arguments() -> None:
    spec, weight, linear = LayerSpec(nn.Linear, 2, 2), nn.Parameter(torch.zeros(2)), nn.Linear(2, 2)
    other = LayerSpec(nn.Linear, 2, 2)
    assert Layers([spec, other, spec.using(logits), spec]).tied_groups() == [(0, 2, 3)]
    assert Layers([LayerSpec(Use, linear, logits), other, linear]).tied_groups() == [(0, 2)]
    assert Layers([LayerSpec(nn.ParameterList, weight), LayerSpec(len, x=weight)]).tied_groups() == [(0, 1)]


# ---- counts and descriptions -------------------------------------------------------------------------------


def test_parameters_are_counted_once_at_their_first_place() -> None:
    linear, shared = nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    shared[0].weight = linear.weight
    layers = Layers([linear, nn.ReLU(), shared, linear, nn.Sequential(linear, linear)])
    assert [layers.parameter_count(index) for index in range(5)] == [8, 0, 2 + 6, 0, 0]
    assert Layers([nn.Sequential(linear, linear)]).parameter_count(0) == 8


def test_parameters_of_specs_are_counted_without_keeping_or_needing_memory() -> None:
    spec = LayerSpec(Counted, 3, 2)
    layers = Layers(
        [spec, LayerSpec(ReadsValues), spec.using(logits), LayerSpec(nn.Linear, 10**6, 10**6), spec]
    )
    assert [layers.parameter_count(index) for index in range(5)] == [8, 9, 0, 10**12 + 10**6, 0]
    assert layers.parameter_count(0) == 8
    assert Counted.built == ["meta"]
    assert not layers.is_built(0)


def test_lazy_layer_cannot_be_counted_but_described() -> None:
    layers = Layers([nn.LazyLinear(3)])
    with pytest.raises(MismatchError, match="uninitialized weight in a LazyLinear"):
        layers.parameter_count(0)
    assert "weight (uninitialized) torch.float32" in layers.describe(0)


def test_description_of_a_module_tells_names_shapes_dtypes_and_what_is_frozen() -> None:
    linear = nn.Linear(3, 2).double()
    linear.bias.requires_grad_(False)
    assert Layers([linear]).describe(0) == (
        "torch.nn.modules.linear.Linear(weight (2, 3) torch.float64, bias (2,) torch.float64 frozen)"
    )
    assert Layers([Masked()]).describe(0).endswith("Masked(buffer mask (4, 4) torch.float32)")


def test_description_of_a_spec_tells_factory_and_arguments() -> None:
    spec = LayerSpec(nn.Linear, 3, torch.zeros(2, 4), bias=False)
    assert Layers([spec]).describe(0) == (
        "torch.nn.modules.linear.Linear(3, (2, 4) torch.float32, bias=False)"
    )
    assert Layers([spec.using(logits)]).describe(0).endswith("bias=False) used by " + __name__ + ".logits")
    inner = Use(nn.Linear(1, 1, bias=False), logits)
    assert "Linear(weight (1, 1) torch.float32) used by" in Layers([inner]).describe(0)


class Opaque:
    pass


@pytest.mark.parametrize(
    "make",
    [
        lambda: LayerSpec(nn.Linear, 2, Opaque()),
        lambda: LayerSpec(
            functools.partial(nn.Linear, Opaque(), bias=lambda: 0), [Opaque()], {"a": Opaque()}
        ),
        lambda: LayerSpec(nn.Linear, {"a", "b", "c"}, activation=nn.ReLU, lazy=(LayerSpec(nn.ReLU),)),
        lambda: LayerSpec(nn.Linear, 2).using(lambda module, x: x),
        lambda: Use(nn.Linear(2, 2), functools.partial(logits)),
    ],
)
def test_description_has_no_addresses(make: Any) -> None:
    text = Layers([make()]).describe(0)
    assert "0x" not in text
    assert text == Layers([make()]).describe(0)


def test_descriptions_of_different_layers_differ() -> None:
    items = [
        *(nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(2, 3).double(), nn.Linear(2, 3, bias=False), nn.ReLU()),
        *(LayerSpec(nn.Linear, 2, 3), LayerSpec(nn.Linear, 2, 4), LayerSpec(nn.Linear, 2, out_features=3)),
        *(LayerSpec(Counted, 2, 3), LayerSpec(nn.Linear, 2, 3).using(logits), LayerSpec(nn.Linear, [2], 3)),
        *(LayerSpec(nn.Linear, torch.zeros(2)), LayerSpec(nn.Linear, torch.zeros(3))),
        LayerSpec(functools.partial(nn.Linear, 2), 3),
    ]
    assert len({Layers([item]).describe(0) for item in items}) == len(items)
