"""States as text and memory: what is small becomes JSON, what is large a numbered leaf.

A *node* is a JSON value. ``None``, booleans, strings, finite floats and usual integers stand for themselves,
a list for a list, and whatever JSON lacks is an object with the key ``$``::

    {"$": "dict", "items": [["lr", 0.1], [0, {...}]]}            keys keep their types
    {"$": "tuple", "items": [...]}
    {"$": "tensor", "n": 3, "dtype": "bfloat16", "shape": [2]}   contents: leaf number 3
    {"$": "mine", "part": 0}                                     a value that belongs to its rank

Values marked by :class:`PerRank` are kept apart, as *parts*, whose leaves have the last numbers: ranks that
differ in nothing but these have the same tree.

Decoding builds numbers, strings, containers and tensors, and executes nothing.
"""

from __future__ import annotations

import enum
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from hpcpar.checkpoint.leaves import LeafValue, describe_leaf
from hpcpar.errors import CheckpointError

__all__ = [
    "LEAF_KINDS",
    "MAPPINGS",
    "MARK",
    "SEQUENCES",
    "Node",
    "PerRank",
    "Tree",
    "decode",
    "encode",
    "gives_state",
    "items_of",
    "kind_of",
    "rebuild",
    "step_name",
    "takes_state",
    "value_of",
]

T = TypeVar("T")

Node = Any
MARK = "$"
LEAF_KINDS = frozenset({"tensor", "array", "scalar", "bytes"})
MAPPINGS: Mapping[str, type[dict[Any, Any]]] = {"dict": dict, "ordered": OrderedDict, "counter": Counter}
SEQUENCES = frozenset({"list", "tuple"})
_USUAL_INTEGERS = 2**63


class PerRank(Generic[T]):
    """Marks a value of a state that belongs to its rank, such as the state of random numbers.

    Parameters
    ----------
    value
        Anything that a state may hold. Ranks may have different ones.

    Attributes
    ----------
    value
        In a template, :func:`~hpcpar.checkpoint.load` puts the saved value here.
    """

    def __init__(self, value: T) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"PerRank({self.value!r})"


def gives_state(value: object) -> bool:
    """Whether it is an object with a ``state_dict()``: a module, an optimizer, a sampler. Local."""
    return not isinstance(value, type) and callable(getattr(value, "state_dict", None))


def takes_state(value: object) -> bool:
    """Whether it is an object with a ``load_state_dict()``. Local."""
    return not isinstance(value, type) and callable(getattr(value, "load_state_dict", None))


@dataclass
class Tree:
    """A state, taken apart.

    Attributes
    ----------
    node
        Its structure.
    leaves
        The contents that the structure numbers.
    parts
        Structures of the values that are marked as this rank's own, numbered by nodes of kind ``mine``.
    """

    node: Node = None
    leaves: list[LeafValue] = field(default_factory=list)
    parts: list[Node] = field(default_factory=list)


# ---- from a state to a tree --------------------------------------------------------------------------------


def encode(state: Any, subject: str = "state") -> Tree:
    """Take a state apart. Local, unless a ``state_dict()`` in it is collective.

    Parameters
    ----------
    state
        Nested dicts, lists and tuples of tensors, numpy arrays and scalars, numbers, strings, bytes,
        ``None``; objects with a ``state_dict()`` stand for what it returns.
    subject
        What errors call it.

    Raises
    ------
    CheckpointError
        Names the place of what cannot be saved.
    """
    encoder = _Encoder()
    encoder.tree.node = encoder.encode(state, subject)
    encoder.is_in_part = True
    encoder.tree.parts = [encoder.encode(value, where) for value, where in encoder.marked]
    if encoder.problems:
        raise encoder.problems[0]
    return encoder.tree


class _Encoder:
    """Builds one tree. Tensors that are the same memory twice become one leaf.

    It goes on after a problem: another ``state_dict()`` may be collective, and other ranks wait in it.
    """

    def __init__(self) -> None:
        self.tree = Tree()
        self.problems: list[CheckpointError] = []
        self.marked: list[tuple[Any, str]] = []
        self.is_in_part = False
        self._numbers: dict[tuple[Any, ...], int] = {}
        self._open: set[int] = set()

    def encode(self, value: Any, where: str) -> Node:
        """The node of a value."""
        method = next((method for kinds, method in _ENCODERS if isinstance(value, kinds)), _Encoder.stateful)
        try:
            return method(self, value, where)
        except CheckpointError as error:
            self.problems.append(error)
            return None

    def stateful(self, value: Any, where: str) -> Node:
        """Something that gives its state."""
        if gives_state(value):
            with self._inside(value, where):
                return self.encode(self._state_of(value, where), where)
        raise CheckpointError(
            f"{where} must be made of dicts, lists, tuples, tensors, arrays, numbers and strings, or have a "
            f"state_dict(), got a {type(value).__name__}"
        )

    def plain(self, value: Any, where: str) -> Node:
        """None, booleans and strings stand for themselves."""
        if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise CheckpointError(f"{where} must be text that Unicode can encode, got {value!r}")
        return value

    def integer(self, value: int, where: str) -> Node:
        """As a number, or hexadecimal: readers of JSON have limits."""
        return int(value) if abs(value) < _USUAL_INTEGERS else {MARK: "int", "value": hex(value)}

    def real(self, value: float, where: str) -> Node:
        """As a number where JSON has it."""
        return float(value) if math.isfinite(value) else {MARK: "float", "value": repr(float(value))}

    def complex(self, value: complex, where: str) -> Node:
        """Two reals."""
        return {MARK: "complex", "items": [self.real(value.real, where), self.real(value.imag, where)]}

    def mapping(self, value: Mapping[Any, Any], where: str) -> Node:
        """Pairs, since JSON has strings for keys only."""
        kind = next(
            (name for name, cls in reversed(list(MAPPINGS.items())) if isinstance(value, cls)), "dict"
        )
        with self._inside(value, where):
            pairs = [
                [self._key(key, where), self.encode(v, step_name(where, key))] for key, v in value.items()
            ]
        return {MARK: kind, "items": pairs}

    def sequence(self, value: Sequence[Any], where: str) -> Node:
        """Lists as they are, tuples with a mark."""
        with self._inside(value, where):
            items = [self.encode(item, f"{where}[{place}]") for place, item in enumerate(value)]
        return items if isinstance(value, list) else {MARK: "tuple", "items": items}

    def leaf(self, value: LeafValue, where: str) -> Node:
        """A numbered one."""
        head = describe_leaf(value, where)
        identity = _identity(value)
        number = self._numbers.get(identity)
        if number is None:
            number = self._numbers[identity] = len(self.tree.leaves)
            self.tree.leaves.append(value)
        return {**head, "n": number}

    def mark(self, value: PerRank[Any], where: str) -> Node:
        """Put a value aside."""
        if self.is_in_part:
            raise CheckpointError(f"{where} must not hold a PerRank inside of a PerRank, got {value!r:.100}")
        self.marked.append((value.value, where))
        return {MARK: "mine", "part": len(self.marked) - 1}

    def named(self, value: Any, where: str) -> Node:
        """Types of torch that are no more than a name."""
        kind = "dtype" if isinstance(value, torch.dtype) else "device"
        return {MARK: kind, "value": str(value).removeprefix("torch.")}

    def size(self, value: torch.Size, where: str) -> Node:
        """A torch.Size, which is a tuple to Python."""
        return {MARK: "size", "items": list(value)}

    def refuse(self, value: enum.Enum, where: str) -> Node:
        """Some enums are numbers or strings to Python, and would come back as these."""
        raise CheckpointError(f"{where} must not be a member of an enum, got {value!r}. Save its value")

    def _key(self, key: Any, where: str) -> Node:
        if isinstance(key, (np.generic, enum.Enum)) or not isinstance(key, str | int | float | None):
            raise CheckpointError(f"a key of {where} must be a string or number, got {key!r}")
        return self.encode(key, f"a key of {where}")

    def _state_of(self, value: Any, where: str) -> Any:
        try:
            return value.state_dict()
        except Exception as error:
            name = type(value).__name__
            raise CheckpointError(
                f"{where} must give its state, got {type(error).__name__}: {error} ({name})"
            ) from error

    @contextmanager
    def _inside(self, value: object, where: str) -> Iterator[None]:
        """Notice containers that hold themselves."""
        if id(value) in self._open:
            raise CheckpointError(f"{where} must not contain itself, got a {type(value).__name__} that does")
        self._open.add(id(value))
        try:
            yield
        finally:
            self._open.discard(id(value))


# The first that fits: an np.float64 is a float to Python, a bool an int, a torch.Size a tuple.
_ENCODERS: tuple[tuple[Any, Callable[[_Encoder, Any, str], Node]], ...] = (
    (enum.Enum, _Encoder.refuse),
    (PerRank, _Encoder.mark),
    ((torch.Tensor, np.ndarray, np.generic, bytes, bytearray), _Encoder.leaf),
    ((type(None), bool, str), _Encoder.plain),
    (int, _Encoder.integer),
    (float, _Encoder.real),
    (complex, _Encoder.complex),
    ((torch.dtype, torch.device), _Encoder.named),
    (torch.Size, _Encoder.size),
    (Mapping, _Encoder.mapping),
    ((list, tuple), _Encoder.sequence),
)


def _identity(value: LeafValue) -> tuple[Any, ...]:
    """What two names of one tensor have in common. The values live as long as the tree that holds them."""
    if not isinstance(value, torch.Tensor) or not value.numel():
        return (id(value),)
    flags = (value.is_conj(), value.is_neg())
    return (value.device, value.data_ptr(), value.dtype, value.shape, value.stride(), flags)


# ---- nodes -------------------------------------------------------------------------------------------------


def kind_of(node: Node) -> str:
    """``list`` for lists, ``plain`` for what stands for itself, else what is under the mark. Local."""
    if isinstance(node, list):
        return "list"
    if isinstance(node, dict):
        return str(node[MARK])
    return "plain"


def items_of(node: Node) -> list[tuple[Any, Node]]:
    """Keys or places, and nodes, of what a container holds. Local."""
    kind = kind_of(node)
    if kind in MAPPINGS:
        return [(value_of(key), item) for key, item in node["items"]]
    return list(enumerate(node if kind == "list" else node["items"]))


def step_name(where: str, key: Any) -> str:
    """The name of a part of something named: ``state['model']``. Local."""
    return f"{where}[{key!r}]"


def value_of(node: Node) -> Any:
    """The value of a node that is neither a container nor a leaf. Local.

    Raises
    ------
    CheckpointError
        For a kind that this version does not know.
    """
    kind = kind_of(node)
    if kind == "plain":
        return node
    if kind == "int":
        return int(node["value"], 16)
    if kind == "float":
        return float(node["value"])
    if kind == "complex":
        return complex(*map(value_of, node["items"]))
    if kind == "size":
        return torch.Size(node["items"])
    if kind == "dtype" and isinstance(getattr(torch, str(node["value"]), None), torch.dtype):
        return getattr(torch, node["value"])
    if kind == "device":
        return torch.device(node["value"])
    raise CheckpointError(f"a saved value must be of a kind that this hpcpar knows, got {node!r:.100}")


def rebuild(kind: str, items: Sequence[tuple[Any, Any]]) -> Any:
    """A container of a kind with these keys and values. Local."""
    if kind in MAPPINGS:
        return MAPPINGS[kind](dict(items))
    values = [value for _, value in items]
    return values if kind == "list" else tuple(values)


def decode(node: Node, leaf: Callable[[Node], Any]) -> Any:
    """The state of a tree without values of single ranks. Local.

    Parameters
    ----------
    node
        The structure.
    leaf
        Called with the node of a leaf; returns its value.
    """
    kind = kind_of(node)
    if kind in LEAF_KINDS:
        return leaf(node)
    if kind in MAPPINGS or kind in SEQUENCES:
        return rebuild(kind, [(key, decode(item, leaf)) for key, item in items_of(node)])
    return value_of(node)
