"""Partition: no cut is better than the one found, and measuring leaves no trace."""

from __future__ import annotations

import copy
import itertools
import random
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hpcpar.errors import MismatchError
from hpcpar.nn.pipeline.layers import Layers, LayerSpec
from hpcpar.nn.pipeline.memory import estimate_memory
from hpcpar.nn.pipeline.microbatch import Whole
from hpcpar.nn.pipeline.partition import balance_layers, check_balance
from hpcpar.nn.pipeline.profile import LayerProfile, profile_layers
from hpcpar.nn.pipeline.skip import pop, skippable, stash

pytestmark = pytest.mark.local

# ---- balance -----------------------------------------------------------------------------------------------


def all_cuts(layers: int, parts: int) -> list[list[int]]:
    cuts = itertools.combinations(range(1, layers), parts - 1)
    return [[b - a for a, b in itertools.pairwise((0, *cut, layers))] for cut in cuts]


def block_costs(costs: list[Any], balance: list[int]) -> list[Any]:
    ends = list(itertools.accumulate(balance, initial=0))
    return [sum(costs[a:b]) for a, b in itertools.pairwise(ends)]


def test_no_cut_has_a_smaller_largest_block_or_is_more_even() -> None:
    for seed in range(300):
        rng = random.Random(seed)
        layers = rng.randrange(1, 10)
        parts = rng.randrange(1, layers + 1)
        costs = [rng.choice([0, 1, 1, 2, 5, rng.randrange(50)]) for _ in range(layers)]
        balance = balance_layers(costs, parts)
        best = min(
            (max(block_costs(costs, cut)), sum(count**2 for count in cut)) for cut in all_cuts(layers, parts)
        )
        assert (sum(balance), len(balance), min(balance) >= 1) == (layers, parts, True), seed
        assert (max(block_costs(costs, balance)), sum(count**2 for count in balance)) == best, seed


@pytest.mark.parametrize(
    ("costs", "parts", "balance"),
    [
        ([4, 1, 1, 1, 2, 1], 3, [1, 2, 3]),
        ([3, 1, 1, 1, 2, 2], 3, [2, 2, 2]),
        ([1] * 12, 4, [3, 3, 3, 3]),
        ([0.0] * 6, 3, [2, 2, 2]),
        ([1] * 5, 2, [2, 3]),
        ([1, 1, 1, 100], 3, [1, 2, 1]),
        ([100, 0, 0, 0], 2, [2, 2]),
        ([5], 1, [1]),
        ([1, 2, 3], 3, [1, 1, 1]),
        ([1e-7] * 9, 3, [3, 3, 3]),
    ],
)
def test_known_balances(costs: list[float], parts: int, balance: list[int]) -> None:
    assert balance_layers(costs, parts) == balance


def test_rounding_of_sums_does_not_decide_between_cuts() -> None:
    for layers, parts in [(3, 2), (5, 3), (11, 6), (30, 10), (96, 8)]:
        assert balance_layers([0.1] * layers, parts) == balance_layers([1] * layers, parts)


def test_hundreds_of_layers_take_no_noticeable_time() -> None:
    rng = random.Random(0)
    costs = [rng.random() for _ in range(400)]
    balance = balance_layers(costs, 32)
    assert max(block_costs(costs, balance)) < 1.2 * sum(costs) / 32


@pytest.mark.parametrize(
    ("costs", "parts", "message"),
    [
        ([1.0] * 3, 4, "at least one layer per stage, got 4 stages for 3 layers. Use fewer ranks or chunks"),
        ([1.0], 0, "at least one stage, got 0"),
        ([1.0, -2.0], 1, "must be zero or more, got -2.0 for layer 1"),
        ([float("nan")], 1, "got nan for layer 0"),
        ([float("inf")], 1, "got inf"),
    ],
)
def test_impossible_balance_is_refused(costs: list[float], parts: int, message: str) -> None:
    with pytest.raises(MismatchError, match=message):
        balance_layers(costs, parts)


def test_balance_of_the_user_is_taken_if_it_fits() -> None:
    assert check_balance((1, 3, 2), 6, 3) == [1, 3, 2]


@pytest.mark.parametrize(
    ("balance", "message"),
    [
        ([3, 3], "a number for each of 3 stages, got"),
        ([6, 0, 0], "at least one layer to each stage"),
        ([7, -2, 1], "at least one layer to each stage"),
        ([2.0, 2, 2], "at least one layer to each stage"),
        ([True, 3, 2], "at least one layer to each stage"),
        ([2, 2, 1], r"sum to the 6 layers, got \[2, 2, 1\], which is 5"),
    ],
)
def test_balance_that_does_not_fit_is_refused(balance: list[Any], message: str) -> None:
    with pytest.raises(MismatchError, match=message):
        check_balance(balance, 6, 3)


# ---- memory ------------------------------------------------------------------------------------------------


def test_memory_of_a_stage_is_that_of_its_layers() -> None:
    profiles = [LayerProfile(str(i), 10**i, 4 * 10**i, 0.0, 0.0, 10**i, 5 * 10**i) for i in range(4)]
    first, second = estimate_memory(profiles, [3, 1], [2, 1])
    assert (first.stage, first.parameter_bytes, first.gradient_bytes) == (0, 444, 444)
    assert (first.optimizer_bytes, first.activation_bytes) == (888, 2 * (111 + 500))
    assert first.total_bytes == 444 + 444 + 888 + 1222
    assert (second.stage, second.parameter_bytes, second.activation_bytes) == (1, 4000, 6000)
    assert estimate_memory(profiles, [4], [1], optimizer_states=0)[0].optimizer_bytes == 0


def test_memory_needs_a_peak_for_each_stage() -> None:
    profiles = [LayerProfile("a", 0, 0, 0.0, 0.0, 0, 0)] * 3
    with pytest.raises(MismatchError, match="number for each of 3 stages"):
        estimate_memory(profiles, [2, 1], [1, 1, 1])


# ---- measuring ---------------------------------------------------------------------------------------------


def test_profile_tells_names_parameters_and_bytes() -> None:
    model = nn.Sequential()
    model.add_module("in", nn.Linear(8, 16))
    model.add_module("act", nn.Sigmoid())
    model.add_module("out", nn.Linear(16, 4, bias=False))
    profiles = profile_layers(Layers(model), torch.randn(32, 8))
    assert [profile.name for profile in profiles] == ["in", "act", "out"]
    assert [profile.parameters for profile in profiles] == [8 * 16 + 16, 0, 64]
    assert [profile.parameter_bytes for profile in profiles] == [4 * (8 * 16 + 16), 0, 256]
    assert [profile.output_bytes for profile in profiles] == [32 * 16 * 4, 32 * 16 * 4, 32 * 4 * 4]
    # A linear layer saves its input and its weight, which does not count; a sigmoid its output.
    assert [profile.saved_bytes for profile in profiles] == [32 * 8 * 4, 32 * 16 * 4, 32 * 16 * 4]
    assert all(profile.forward_s > 0 and profile.backward_s > 0 for profile in profiles)


def test_storage_that_is_saved_twice_counts_once() -> None:
    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.view(-1, 2).view(x.shape) * x

    (profile,) = profile_layers(Layers([Square()]), torch.randn(4, 4, requires_grad=True))
    assert profile.saved_bytes == 2 * 4 * 4 * 4  # x, and the first product


def test_checkpointed_layer_saves_its_input_only() -> None:
    class Block(nn.Module):
        def __init__(self, recompute: bool) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 64), nn.Sigmoid(), nn.Linear(64, 4))
            self.recompute = recompute

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False) if self.recompute else self.inner(x)

    layers = Layers([nn.Linear(4, 4), Block(False), Block(True)])
    _, plain, recomputed = profile_layers(layers, torch.randn(8, 4))
    assert plain.saved_bytes == (8 * 4 + 8 * 64) * 4  # the sigmoid's output is the second layer's input
    assert recomputed.saved_bytes == 8 * 4 * 4


class Noisy(nn.Module):
    """Changes everything that a layer may change, and what it gets in place."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", None)
        self.register_buffer("wide", torch.ones(1).expand(3))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        self.last = x.detach()
        return self.norm(self.dropout(x.relu_()))


@pytest.mark.parametrize("mode", [True, False])
def test_measuring_leaves_no_trace(mode: bool) -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), Noisy(), nn.Linear(3, 3), nn.ReLU(inplace=True)).train(mode)
    model[2].weight.grad = torch.full((3, 3), 7.0)
    model[1].dropout.train()
    calls, before = model[1].calls, copy.deepcopy(model.state_dict())
    sample = torch.randn(5, 3, requires_grad=True)
    copied, state = sample.detach().clone(), torch.get_rng_state()
    with torch.no_grad():  # a caller's choice, which must not keep us from measuring backward
        profiles = profile_layers(Layers(model), sample)
    assert torch.equal(torch.get_rng_state(), state)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert model[1].calls is calls
    assert model[1].last is None
    assert model[2].weight.grad.tolist() == [[7.0] * 3] * 3
    assert model[2].bias.grad is None
    assert sample.grad is None
    assert torch.equal(sample, copied)
    assert [module.training for module in model] == [mode] * 4
    assert model[1].dropout.training
    assert all(profile.backward_s > 0 for profile in profiles)


ALIVE: weakref.WeakSet[nn.Module] = weakref.WeakSet()
MOST_ALIVE: list[int] = []


class Tracked(nn.Linear):
    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        ALIVE.add(self)
        MOST_ALIVE.append(len(ALIVE))


def test_described_layers_are_built_one_after_another_and_dropped() -> None:
    MOST_ALIVE.clear()
    layers = Layers([LayerSpec(Tracked, 3) for _ in range(4)])
    sample, state = torch.randn(2, 3), torch.get_rng_state()
    profiles = profile_layers(layers, sample)
    assert MOST_ALIVE == [1, 1, 1, 1]
    assert len(ALIVE) == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert [profile.parameters for profile in profiles] == [12] * 4
    assert not any(layers.is_built(index) for index in range(4))


def test_tied_layers_are_built_once_and_count_at_their_first_place() -> None:
    MOST_ALIVE.clear()
    tied, ready = LayerSpec(Tracked, 3), nn.Linear(3, 3)
    layers = Layers(
        [tied, ready, LayerSpec(Tracked, 3), tied.using(lambda m, x: F.linear(x, m.weight)), ready, tied]
    )
    profiles = profile_layers(layers, torch.randn(2, 3))
    assert MOST_ALIVE == [1, 2]
    assert [profile.parameters for profile in profiles] == [12, 12, 12, 0, 0, 0]
    assert [profile.parameter_bytes for profile in profiles] == [48, 48, 48, 0, 0, 0]


def test_layers_without_anything_to_differentiate_have_no_backward() -> None:
    class Shift(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    layers = Layers([Shift(), nn.Embedding(9, 4), Shift(), nn.Linear(4, 4).requires_grad_(False)])
    profiles = profile_layers(layers, torch.tensor([1, 2, 3]))
    assert profiles[0].backward_s == 0.0
    assert all(profile.backward_s > 0.0 for profile in profiles[1:])  # the embedding needs gradients
    assert profile_layers(Layers([Shift()]), torch.zeros(3))[0].backward_s == 0.0


def test_nested_values_whole_parts_and_skips_go_through() -> None:
    @skippable(stash=["skip"])
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Any) -> Any:
            yield stash("skip", self.linear(x["x"]))
            return x["x"] @ x["mask"], x["n"]

    @skippable(pop=["skip"])
    class Last(nn.Module):
        def forward(self, x: Any) -> Any:
            skip = yield pop("skip")
            return x[0] * skip * x[1]

    layers = Layers([First(), Last()])
    first, last = profile_layers(layers, {"x": torch.randn(2, 4), "mask": Whole(torch.ones(4, 4)), "n": 3})
    assert first.backward_s > 0  # through the skip alone: the output needs no gradients
    assert last.backward_s > 0
    assert (first.output_bytes, last.output_bytes) == (32, 32)
    with pytest.raises(MismatchError, match="stashed before"):
        Last()((torch.zeros(1), 1))  # the values were of the measurement


def test_something_must_be_measured() -> None:
    layers = Layers([nn.ReLU()])
    with pytest.raises(MismatchError, match="repetitions must be 1 or more, got 0"):
        profile_layers(layers, torch.zeros(2), repetitions=0)
    with pytest.raises(MismatchError, match="samples in dimension 0"):
        profile_layers(layers, 3)
