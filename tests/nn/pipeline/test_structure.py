"""Structures: a value comes back as it was, and equal descriptions mean values that look alike."""

from __future__ import annotations

import enum
import pickle
import random
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from hpcpar.errors import MismatchError
from hpcpar.nn.pipeline.structure import BARE_TENSOR, Structure, flatten, map_tensors, unflatten

pytestmark = pytest.mark.local


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclass(frozen=True)
class Frozen:
    x: Any
    steps: int = 0
    made_by: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.made_by.append("__post_init__")


@dataclass(slots=True)
class Slotted:
    x: Any


@dataclass
class Derived:
    x: Any

    def __post_init__(self) -> None:
        self.note = "not a field"


class Config:
    """No container, and without an equality of its own."""

    def __init__(self, width: int) -> None:
        self.width = width


class Hiding:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Mode(enum.Enum):
    FAST = 1
    EXACT = 2


def random_value(rng: random.Random, depth: int = 0) -> Any:
    """A nested value; leaves get likelier with depth."""
    kind = rng.randrange(14 if depth < 4 else 5)
    if kind < 3:
        return torch.full((rng.randrange(3),), rng.random())
    if kind < 5:
        return rng.choice(
            [1, True, 1.0, None, "a", b"b", Mode.FAST, frozenset({"p", "q"}), torch.float16, ()]
        )
    parts = [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind < 7:
        return tuple(parts)
    if kind < 9:
        return parts
    if kind < 11:
        return dict(zip(rng.sample(["a", "b", 3, (4, "c")], len(parts)), parts, strict=True))
    pair = random_value(rng, depth + 1), random_value(rng, depth + 1)
    return rng.choice([Pair(*pair), Frozen(pair[0]), Slotted(pair[1]), OrderedDict(x=pair[0])])


def same(one: Any, other: Any) -> bool:
    """Equal in types, order and contents, written without the code under test."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Frozen):
        return same(one.x, other.x) and (one.steps, one.made_by) == (other.steps, other.made_by)
    return same(one.x, other.x) if isinstance(one, Slotted) else one == other


def test_value_comes_back_as_it_was_here_and_elsewhere() -> None:
    for seed in range(300):
        value = random_value(random.Random(seed))
        tensors, structure = flatten(value)
        assert same(unflatten(structure, tensors), value), seed
        arrived = Structure.from_bytes(structure.to_bytes())
        assert (arrived == structure, hash(arrived)) == (True, hash(structure)), seed
        assert arrived.slots == len(tensors), seed
        assert same(unflatten(arrived, tensors), value), seed
        assert arrived.to_bytes() == structure.to_bytes(), seed
        assert flatten(unflatten(arrived, tensors))[1] == structure, seed


def test_values_of_different_looks_have_different_structures() -> None:
    x = torch.zeros(2)
    values = [
        *(
            x,
            (x,),
            [x],
            (x, x),
            ((x,),),
            (x, 1),
            (x, True),
            (x, 1.0),
            (x, "1"),
            (x, None),
            (x, 0.0),
            (x, -0.0),
        ),
        *({"a": x, "b": x}, {"b": x, "a": x}, {"a": (x, x)}, {1: x}, {True: x}, OrderedDict(a=x, b=x)),
        *(Pair(x, x), Pair(x, 1), Pair(1, x), Frozen(x), Frozen(x, 1), Slotted(x), Derived(x)),
        *((x, Config(1)), (x, Config(2)), (x, Mode.FAST), (x, Mode.EXACT), (x, {"a"}), (x, {"b"})),
        *(
            (x, torch.float32),
            (x, torch.float64),
            (x, slice(1)),
            (x, slice(2)),
            (x, torch.Size([1])),
            (x, (1,)),
        ),
    ]
    structures = [flatten(value)[1] for value in values]
    for i, one in enumerate(structures):
        for j, other in enumerate(structures):
            assert (one == other) is (i == j), (values[i], values[j])


def test_contents_and_shapes_of_tensors_do_not_matter() -> None:
    assert flatten((torch.zeros(2), 1))[1] == flatten((torch.ones(3, 3).int(), 1))[1]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (float("nan"), float("nan")),
        (Config(3), Config(3)),
        ({"a", "b", "c", "d"}, {"d", "c", "b", "a"}),
        (np.arange(3), np.arange(3)),
        ("ab" * 30, "".join(["ab"] * 30)),
    ],
    ids=["nan", "object", "set", "array", "string"],
)
def test_equal_constants_are_equal_though_they_are_two_objects(one: object, other: object) -> None:
    first, second = flatten((torch.zeros(1), one))[1], flatten((torch.zeros(1), other))[1]
    assert first == second
    assert hash(first) == hash(second)
    assert first == Structure.from_bytes(second.to_bytes())


def test_constant_that_is_changed_in_place_makes_another_structure() -> None:
    config = Config(3)
    before = flatten((torch.zeros(1), config))[1]
    config.width = 4
    after = flatten((torch.zeros(1), config))[1]
    assert before != after
    assert unflatten(Structure.from_bytes(after.to_bytes()), [torch.zeros(1)])[1].width == 4


def test_values_made_from_one_received_structure_do_not_share_mutable_constants() -> None:
    received = Structure.from_bytes(flatten((torch.zeros(1), Config(3)))[1].to_bytes())
    first, second = (unflatten(received, [torch.zeros(1)])[1] for _ in range(2))
    first.width = 9
    assert second.width == 3


def test_bare_tensor_is_one_shared_structure() -> None:
    x = torch.zeros(3)
    tensors, structure = flatten(x)
    assert tensors[0] is x
    assert structure is BARE_TENSOR
    assert structure is flatten(torch.nn.Parameter(x))[1]
    assert Structure.from_bytes(structure.to_bytes()) is BARE_TENSOR
    assert pickle.loads(pickle.dumps(structure)) is BARE_TENSOR


def test_tensor_that_occurs_twice_has_two_slots() -> None:
    x = torch.zeros(3)
    tensors, structure = flatten({"a": x, "b": [x]})
    assert [tensor is x for tensor in tensors] == [True, True]
    assert unflatten(structure, [1, 2]) == {"a": 1, "b": [2]}


def test_dataclass_is_rebuilt_without_running_post_init_again() -> None:
    value = Frozen(torch.zeros(2))
    assert map_tensors(torch.clone, value).made_by == ["__post_init__"]
    assert map_tensors(torch.clone, Derived(torch.zeros(2))).note == "not a field"


def test_result_of_torch_max_is_a_container() -> None:
    value = torch.arange(6.0).view(2, 3).max(0)
    doubled = map_tensors(lambda tensor: tensor * 2, value)
    assert type(doubled) is type(value)
    assert (doubled.values.tolist(), doubled.indices.tolist()) == ([6.0, 8.0, 10.0], [2, 2, 2])


def test_map_tensors_keeps_constants_themselves() -> None:
    config = Config(1)
    mapped = map_tensors(lambda tensor: tensor + 1, [torch.zeros(2), {"c": config}])
    assert torch.equal(mapped[0], torch.ones(2))
    assert mapped[1]["c"] is config


def test_also_takes_out_other_types() -> None:
    config = Config(1)
    taken, structure = flatten([torch.zeros(1), {"c": config}], also=Config)
    assert taken[1] is config
    assert unflatten(structure, ["a", "b"]) == ["a", {"c": "b"}]


@pytest.mark.parametrize("hidden", [Hiding(torch.zeros(2)), {torch.zeros(2)}, {torch.zeros(1): 1}, lambda: 0])
def test_what_hides_tensors_or_cannot_be_sent_is_refused(hidden: object) -> None:
    with pytest.raises(MismatchError, match="must consist of tensors, tuples, lists"):
        flatten((torch.zeros(1), hidden))


def test_class_that_no_other_process_knows_is_refused_when_it_is_to_be_sent() -> None:
    @dataclass
    class Local:
        x: Tensor

    tensors, structure = flatten(Local(torch.ones(2)))
    assert unflatten(structure, tensors).x is tensors[0]
    with pytest.raises(MismatchError, match="top level of a module"):
        structure.to_bytes()


def test_number_of_tensors_must_be_that_of_the_slots() -> None:
    structure = flatten((torch.zeros(1), torch.zeros(1)))[1]
    with pytest.raises(MismatchError, match="must be given 2 tensors, got 1"):
        unflatten(structure, [torch.zeros(1)])
