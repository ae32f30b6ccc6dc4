"""Structures: what is left of a nested value when its tensors are taken out.

Layers pass tensors, or tuples, dicts and dataclasses of tensors and constants. Only tensors can be cut, sent
and differentiated, so a value is taken apart into tensors and a description, and put together elsewhere::

    (x, {"mask": m, "causal": True})   ->   [x, m]   and   (·, {"mask": ·, "causal": True})

Two structures are equal when the values looked alike apart from the contents of their tensors, so that a
description need be sent only when it changes. Constants belong to it, compared by type and value: ``1``,
``True`` and ``1.0`` differ. One that can be changed in place is pickled when it is found, so that a later
change makes another structure, and every value made from a received structure has its own copy.

Most layers pass a bare tensor. That is one shared structure and costs no recursion.
"""

from __future__ import annotations

import dataclasses
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from hpcpar.errors import MismatchError

__all__ = ["BARE_TENSOR", "Structure", "flatten", "map_tensors", "unflatten"]


class Structure:
    """Description of a nested value whose tensors were taken out; made by :func:`flatten`.

    Hashable, and equal to the structure of every value that looks alike. Pickles by :meth:`to_bytes`.

    Attributes
    ----------
    slots : int
        Number of tensors that it lacks.
    """

    __slots__ = ("_bytes", "_root", "slots")

    def __init__(self, root: _Node, slots: int) -> None:
        self._root = root
        self.slots = slots
        self._bytes: bytes | None = None

    def to_bytes(self) -> bytes:
        """Something to send, for :meth:`from_bytes`. Local.

        Raises
        ------
        MismatchError
            For a class that cannot be pickled, such as one defined inside of a function.
        """
        if self._bytes is None:
            try:
                self._bytes = pickle.dumps((self._root, self.slots))
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                raise MismatchError(
                    f"a value that layers pass must consist of picklable parts, got {self} ({error}). Define "
                    "its classes at the top level of a module."
                ) from error
        return self._bytes

    @staticmethod
    def from_bytes(data: bytes) -> Structure:
        """The structure that ``to_bytes`` was called on. Local."""
        if data == BARE_TENSOR.to_bytes():
            return BARE_TENSOR
        structure = Structure(*pickle.loads(data))
        structure._bytes = data
        return structure

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Structure) and self._root == other._root)

    def __hash__(self) -> int:
        return hash(self._root)

    def __reduce__(self) -> tuple[Any, ...]:
        return Structure.from_bytes, (self.to_bytes(),)

    def __str__(self) -> str:
        return str(self._root)

    def __repr__(self) -> str:
        return f"Structure({self._root})"


def flatten(value: Any, *, also: type | tuple[type, ...] = ()) -> tuple[list[Any], Structure]:
    """Take the tensors out of a nested value. Local.

    Parameters
    ----------
    value
        A tensor, or tuples, lists, dicts, named tuples and dataclass instances, nested in any way, of tensors
        and constants. A constant is any other picklable object without tensors inside.
    also
        Types whose instances are taken out like tensors.

    Returns
    -------
    tensors : list of torch.Tensor
        In the order of the value; one that occurs twice is there twice.
    structure : Structure
        The rest, for :func:`unflatten`.

    Raises
    ------
    MismatchError
        For an object that cannot be pickled, or hides tensors.
    """
    if isinstance(value, torch.Tensor):
        return [value], BARE_TENSOR
    taken: list[Any] = []
    root = _take_apart(value, (torch.Tensor, also), taken)
    return taken, Structure(root, len(taken))


def unflatten(structure: Structure, tensors: Sequence[Any]) -> Any:
    """Put a nested value together, the reverse of :func:`flatten`. Local.

    Parameters
    ----------
    structure
        Of the value.
    tensors
        What to put in its slots; other objects are put there as well.

    Raises
    ------
    MismatchError
        When the number of tensors is not that of the slots.
    """
    if len(tensors) != structure.slots:
        raise MismatchError(f"{structure} must be given {structure.slots} tensors, got {len(tensors)}.")
    if structure is BARE_TENSOR:
        return tensors[0]
    return structure._root.put_together(iter(tensors))


def map_tensors(fn: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """A value like ``value`` with ``fn(tensor)`` in the place of each tensor. Local."""
    if isinstance(value, torch.Tensor):
        return fn(value)
    tensors, structure = flatten(value)
    return unflatten(structure, [fn(tensor) for tensor in tensors])


# ---- nodes of a structure ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class _Slot:
    """The place of a tensor."""

    def put_together(self, tensors: Iterator[Any]) -> Any:
        return next(tensors)

    def __str__(self) -> str:
        return "tensor"


@dataclasses.dataclass(frozen=True, slots=True)
class _Constant:
    """An immutable constant of a common type; the key tells apart what ``==`` does not."""

    value: Any = dataclasses.field(compare=False)
    key: tuple[object, ...]

    def put_together(self, tensors: Iterator[Any]) -> Any:
        return self.value

    def __str__(self) -> str:
        return repr(self.value)


_ABSENT = object()


class _Pickled:
    """Any other constant, as it was when it was found."""

    __slots__ = ("_original", "kind", "pickled")

    def __init__(self, kind: str, pickled: bytes, original: Any = _ABSENT) -> None:
        self.kind = kind
        self.pickled = pickled
        self._original = original

    def put_together(self, tensors: Iterator[Any]) -> Any:
        return pickle.loads(self.pickled) if self._original is _ABSENT else self._original

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Pickled) or self.kind != other.kind:
            return False
        return self.pickled == other.pickled or self._equals(other)

    def _equals(self, other: _Pickled) -> bool:
        """Equal by the type's own ``==``: equal sets, and more, have unequal pickles."""
        mine: Any = pickle.loads(self.pickled)
        theirs: Any = pickle.loads(other.pickled)
        try:
            return (mine == theirs) is True
        except (TypeError, ValueError, RuntimeError):
            return False

    def __hash__(self) -> int:
        return hash(self.kind)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Pickled, (self.kind, self.pickled)

    def __str__(self) -> str:
        return f"<{self.kind}>"


@dataclasses.dataclass(frozen=True, slots=True)
class _Container:
    """A container: its type, its keys or field names where it has any, and its parts."""

    kind: type
    names: tuple[_Node, ...]
    parts: tuple[_Node, ...]

    def put_together(self, tensors: Iterator[Any]) -> Any:
        names = [name.put_together(tensors) for name in self.names]
        parts = [part.put_together(tensors) for part in self.parts]
        family = _family_of(self.kind)
        assert family is not None  # it had one when it was taken apart
        return family.build(self.kind, names, parts)

    def __str__(self) -> str:
        shown = [str(part) for part in self.parts]
        if self.names:
            shown = [f"{name}: {part}" for name, part in zip(self.names, shown, strict=True)]
        return f"{self.kind.__name__}({', '.join(shown)})"


_Node = _Slot | _Constant | _Pickled | _Container
_SLOT = _Slot()
BARE_TENSOR = Structure(_SLOT, 1)

_IMMUTABLE = {int, bool, str, bytes, type(None), type(...), torch.dtype, torch.device, torch.Size}
_KEYED_BY_REPR = {float, complex}  # NaN equals itself, and 0.0 is not -0.0


def _take_apart(value: Any, out: Any, taken: list[Any]) -> _Node:
    if isinstance(value, out):
        taken.append(value)
        return _SLOT
    kind = type(value)
    if kind in _IMMUTABLE:
        return _Constant(value, (kind, value))
    if kind in _KEYED_BY_REPR:
        return _Constant(value, (kind, repr(value)))
    family = _family_of(kind)
    if family is None:
        return _Pickled(f"{kind.__module__}.{kind.__qualname__}", _pickle_constant(value), value)
    names, parts = family.content(value)
    nodes = tuple(_take_apart(part, out, taken) for part in parts)
    # A tensor as a key is caught here too: nothing may be taken out of a name.
    return _Container(kind, tuple(_take_apart(name, (), taken) for name in names), nodes)


class _ConstantPickler(pickle.Pickler):
    """Refuses tensors: nobody would cut, send or differentiate them."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor):
            raise TypeError("it hides a tensor")
        return NotImplemented


def _pickle_constant(value: Any) -> bytes:
    buffer = io.BytesIO()
    try:
        _ConstantPickler(buffer, pickle.HIGHEST_PROTOCOL).dump(value)
    except Exception as error:  # whatever an object's own __reduce__ raises
        raise MismatchError(
            "a value that layers pass must consist of tensors, tuples, lists, dicts, named tuples, "
            f"dataclasses and picklable constants, got a {type(value).__qualname__} ({error}). Pass its "
            "tensors in one of these containers."
        ) from error
    return buffer.getvalue()


# ---- containers --------------------------------------------------------------------------------------------


class _Family(NamedTuple):
    """Containers that are taken apart and built in the same way."""

    matches: Callable[[type], bool]
    content: Callable[[Any], tuple[Sequence[Any], Sequence[Any]]]
    build: Callable[[type, list[Any], list[Any]], Any]


def _dataclass_content(value: Any) -> tuple[Sequence[Any], Sequence[Any]]:
    names = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
    names += [name for name in getattr(value, "__dict__", ()) if name not in names]
    return names, [getattr(value, name) for name in names]


def _build_dataclass(kind: type, names: list[Any], parts: list[Any]) -> Any:
    """Not by calling it: ``__post_init__`` has run for this value and may not be fit to run twice."""
    value: Any = object.__new__(kind)
    for name, part in zip(names, parts, strict=True):
        object.__setattr__(value, name, part)  # a frozen one allows no other way
    return value


def _is_dataclass(kind: type) -> bool:
    return dataclasses.is_dataclass(kind) and not issubclass(kind, (dict, list, tuple))


def _is_result_tuple(kind: type) -> bool:
    """What ``torch.max(x, 0)`` returns: a structseq, which has no Python class for its ancestors."""
    return issubclass(kind, tuple) and hasattr(kind, "n_sequence_fields")


_FAMILIES = (
    _Family(lambda kind: kind in (tuple, list), lambda v: ((), v), lambda kind, _, parts: kind(parts)),
    _Family(
        lambda kind: kind in (dict, OrderedDict),
        lambda v: (list(v), list(v.values())),
        lambda kind, names, parts: kind(zip(names, parts, strict=True)),
    ),
    _Family(_is_dataclass, _dataclass_content, _build_dataclass),
    _Family(
        lambda kind: issubclass(kind, tuple) and hasattr(kind, "_make"),
        lambda v: ((), v),
        lambda kind, _, parts: kind._make(parts),  # type: ignore[attr-defined]
    ),
    _Family(_is_result_tuple, lambda v: ((), v), lambda kind, _, parts: kind(parts)),
)


def _family_of(kind: type) -> _Family | None:
    return next((family for family in _FAMILIES if family.matches(kind)), None)
