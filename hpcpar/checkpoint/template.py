"""Templates: what of a checkpoint is wanted, and where it goes.

A template is matched with the saved structure first, so that every misfit is known, and named, before
anything is changed. Matching a place gives a function that reads and fills it::

    {"model": net, "epoch": 0, "mean": tensor}      "mean"  -> the tensor is filled in place
                                                    "epoch" -> template["epoch"] = 7
                                                    "model" -> net.load_state_dict(...)     last

Objects are given their states after all else, in the template's order and one at a time: that may be
collective, and so only one of the states is in memory beside the object's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from hpcpar.checkpoint.leaves import array_dtype, as_bytes, describe_leaf
from hpcpar.checkpoint.reading import LeafReader
from hpcpar.checkpoint.tree import (
    LEAF_KINDS,
    MAPPINGS,
    SEQUENCES,
    Node,
    PerRank,
    items_of,
    kind_of,
    rebuild,
    step_name,
    takes_state,
    value_of,
)
from hpcpar.errors import CheckpointError

__all__ = ["Place", "Template"]

Read = Callable[[], Any]

_MOST_NAMED = 6


class _Absent:
    """Nothing is saved for this rank."""


_ABSENT: Final = _Absent()


@dataclass(frozen=True)
class Place:
    """Which rank of how many loads, and how many have saved."""

    rank: int
    size: int
    saved_ranks: int


class Template:
    """Matches a template with what is saved; :meth:`fill` carries it out. Local.

    Parameters
    ----------
    reader
        Of the checkpoint.
    place
        This rank.
    strict
        Whether what is missing, or was saved for other ranks only, is an error; else it is left as it is.
    """

    def __init__(self, reader: LeafReader, place: Place, *, strict: bool) -> None:
        self._reader, self._place, self._strict = reader, place, strict
        self._missing: list[str] = []
        self._different: list[str] = []
        self._misfits: list[str] = []
        self._objects: list[tuple[str, Any, Read]] = []

    def match(self, template: Any, node: Node, subject: str = "state") -> Read:
        """What reads a template's values; without one (``None``) all that is saved. Local.

        Raises
        ------
        CheckpointError
            Names the places that do not fit.
        """
        read = self._match(template, node, subject)
        self._report()
        return read

    def load_objects(self) -> None:
        """Give the objects of the template their states. As collective as their ``load_state_dict()``.

        Raises
        ------
        CheckpointError
            When one cannot be read or does not fit; the others have been loaded.
        """
        problem: Exception | None = None
        for where, target, read in self._objects:
            try:
                target.load_state_dict(read())
            except CheckpointError as error:
                problem = problem or error
            except Exception as error:
                text = f"{where} must fit its {type(target).__name__}, got {type(error).__name__}: {error}"
                problem = problem or CheckpointError(text)
            self._reader.forget()
        if problem is not None:
            raise problem

    # ---- all that is saved --------------------------------------------------------------------------------

    def _whole(self, node: Node, where: str) -> Read | _Absent:
        """Reads a subtree as it is."""
        own = self._own(node, where)
        if isinstance(own, _Absent):
            return (lambda: None) if node["marked"] else own
        return self._whole_own(own, where)

    def _whole_own(self, node: Node, where: str) -> Read:
        kind = kind_of(node)
        if kind in LEAF_KINDS:
            return lambda: self._reader.value(node)
        if kind not in MAPPINGS and kind not in SEQUENCES:
            value = value_of(node)
            return lambda: value
        found = [(key, self._whole(item, step_name(where, key))) for key, item in self._items(node)]
        if kind in SEQUENCES:
            found = [(key, (lambda: None) if isinstance(read, _Absent) else read) for key, read in found]
        items = [(key, read) for key, read in found if not isinstance(read, _Absent)]
        return lambda: rebuild(kind, [(key, read()) for key, read in items])

    def _state_for(self, target: Any, node: Node, where: str) -> Read:
        """Of a module the names mean the same on all ranks: it may need those that other ranks had.

        An optimizer's keys are numbers of its own parameters, and others' must not get among them.
        """
        own = self._whole_own(node, where)
        if not isinstance(target, torch.nn.Module) or kind_of(node) not in MAPPINGS:
            return own
        if {key for key, _ in self._items(node)}.issuperset(name for name, _ in target.named_parameters()):
            return own
        found = [(key, self._whole(item, step_name(where, key))) for key, item in items_of(node)]
        items = [(key, read) for key, read in found if not isinstance(read, _Absent)]
        return lambda: {key: read() for key, read in items}

    def _items(self, node: Node) -> list[tuple[Any, Node]]:
        """What a container holds; on as many ranks as saved, only those keys that this rank had there."""
        items = items_of(node)
        place = self._place
        if kind_of(node) not in MAPPINGS or place.size != place.saved_ranks:
            return items
        had = next((places for ranks, places in node.get("own", ()) if place.rank in ranks), None)
        return items if had is None else [items[number] for number in had]

    def _own(self, node: Node, where: str) -> Node | _Absent:
        """What this rank has at a place where ranks have different values."""
        if kind_of(node) != "ranks":
            return node
        place = self._place
        own = next((item for ranks, item in node["items"] if place.rank in ranks), _ABSENT)
        if node["marked"]:
            return own
        if place.size == place.saved_ranks:
            return own
        self._different.append(where)
        return _ABSENT

    # ---- what a template wants ----------------------------------------------------------------------------

    def _match(self, template: Any, node: Node, where: str) -> Read:
        if isinstance(template, PerRank):
            return self._marked(template, node, where)
        if template is None:
            whole = self._whole(node, where)
            return (lambda: None) if isinstance(whole, _Absent) else whole
        own = self._own(node, where)
        if isinstance(own, _Absent):
            return lambda: template
        if takes_state(template):
            self._objects.append((where, template, self._state_for(template, own, where)))
            return lambda: template
        method = next((method for kinds, method in _MATCHERS if isinstance(template, kinds)), Template._value)
        return method(self, template, own, where)

    def _marked(self, template: PerRank[Any], node: Node, where: str) -> Read:
        read = self._match(template.value, node, where)

        def fill() -> PerRank[Any]:
            template.value = read()
            return template

        return fill

    def _mapping(self, template: Mapping[Any, Any], node: Node, where: str) -> Read:
        if kind_of(node) not in MAPPINGS:
            return self._misfit(template, where, "a dict", node)
        saved = dict(items_of(node))
        wanted = dict(template) if template else dict.fromkeys(key for key, _ in self._items(node))
        reads: dict[Any, Read] = {}
        for key, value in wanted.items():
            if key in saved:
                reads[key] = self._match(value, saved[key], step_name(where, key))
            else:
                self._missing.append(step_name(where, key))

        def fill() -> Any:
            target = template if isinstance(template, MutableMapping) else dict(template)
            for key, read in reads.items():
                target[key] = read()
            return target

        return fill

    def _sequence(self, template: Sequence[Any], node: Node, where: str) -> Read:
        if kind_of(node) not in SEQUENCES:
            return self._misfit(template, where, "a list or tuple", node)
        saved = [item for _, item in items_of(node)]
        wanted = template or [None] * len(saved)
        if len(wanted) != len(saved):
            self._misfits.append(f"{where} must have {len(saved)} items as saved, got {len(wanted)}")
            return lambda: template
        reads = [
            self._match(v, n, f"{where}[{i}]") for i, (v, n) in enumerate(zip(wanted, saved, strict=True))
        ]

        def fill() -> Any:
            values = [read() for read in reads]
            if isinstance(template, list):
                template[:] = values
                return template
            named: Any = type(template)
            return named(*values) if hasattr(template, "_fields") else tuple(values)

        return fill

    def _tensor(self, template: torch.Tensor, node: Node, where: str) -> Read:
        if kind_of(node) != "tensor":
            return self._misfit(template, where, "a tensor", node)
        problem = _why_not_to_fill(template, where)
        if problem is not None:
            self._misfits.append(problem)
            return lambda: template
        have = (list(template.shape), template.dtype)
        saved = (node["shape"], array_dtype(node))
        if have != saved:
            self._misfits.append(
                f"{where} must be of shape {saved[0]} and {saved[1]} as saved, got {have[0]} and {have[1]}"
            )
            return lambda: template

        def fill() -> torch.Tensor:
            with torch.no_grad():
                self._fill_tensor(template, node)
            return template

        return fill

    def _fill_tensor(self, template: torch.Tensor, node: Node) -> None:
        target = template.detach()
        is_plain = target.is_contiguous() and not (target.is_conj() or target.is_neg())
        if target.device.type == "cpu" and is_plain and target.layout is torch.strided:
            self._reader.fill(node, as_bytes(target))
            if target.numel() and not target.is_inference():
                target.reshape(-1)[:0].zero_()  # tells autograd, and others, that the contents have changed
        else:
            target.copy_(torch.as_tensor(self._reader.value(node)))
            self._reader.forget()

    def _array(self, template: np.ndarray[Any, Any], node: Node, where: str) -> Read:
        if kind_of(node) != "array":
            return self._misfit(template, where, "an array", node)
        if list(template.shape) != node["shape"] or template.dtype != array_dtype(node):
            self._misfits.append(
                f"{where} must be of shape {node['shape']} and {node['dtype']} as saved, got "
                f"{list(template.shape)} and {template.dtype.str}"
            )
            return lambda: template

        def fill() -> np.ndarray[Any, Any]:
            value = np.asarray(self._reader.value(node))
            if not template.flags.writeable:
                return value
            template[...] = value
            return template

        return fill

    def _value(self, template: Any, node: Node, where: str) -> Read:
        """Numbers, strings and so on take whatever value was saved."""
        kind = kind_of(node)
        if kind in MAPPINGS or kind in SEQUENCES:
            return self._misfit(template, where, "a value", node)
        if kind in LEAF_KINDS:
            return lambda: self._reader.value(node)
        value = value_of(node)
        return lambda: value

    def _misfit(self, template: Any, where: str, wanted: str, node: Node) -> Read:
        kind = kind_of(node)
        kind = type(node).__name__ if kind == "plain" else kind
        self._misfits.append(f"{where} is {wanted} of the template, and must be saved as such, got a {kind}")
        return lambda: template

    def _report(self) -> None:
        problems = _listed(self._misfits)
        if self._strict and self._missing:
            problems += [
                f"the checkpoint must have all that the template asks for, got no {_names(self._missing)}"
            ]
        if self._strict and self._different:
            problems += [
                f"values that differ between ranks must be loaded on as many as saved them, "
                f"{self._place.saved_ranks}, got {self._place.size} for {_names(self._different)}. Mark what "
                "belongs to a rank by PerRank before saving, load with a template that does not ask for it, "
                "or with strict=False"
            ]
        if problems:
            raise CheckpointError("; ".join(problems))


_MATCHERS: tuple[tuple[Any, Callable[[Template, Any, Node, str], Read]], ...] = (
    (torch.Tensor, Template._tensor),
    (np.ndarray, Template._array),
    (torch.Size, Template._value),
    (Mapping, Template._mapping),
    ((list, tuple), Template._sequence),
)


def _why_not_to_fill(template: torch.Tensor, where: str) -> str | None:
    """What makes it impossible to copy into a tensor."""
    try:
        describe_leaf(template, where)
    except CheckpointError as error:
        return str(error)
    sizes = zip(template.shape, template.stride(), strict=True)
    if any(extent > 1 and stride == 0 for extent, stride in sizes):
        return f"{where} must have memory for each element, got an expanded tensor. Give a clone()"
    return None


def _listed(lines: Sequence[str]) -> list[str]:
    more = len(lines) - _MOST_NAMED
    return [*lines[:_MOST_NAMED], *([f"{more} more do not fit"] if more > 0 else [])]


def _names(places: Sequence[str]) -> str:
    more = len(places) - _MOST_NAMED
    return ", ".join(places[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
