"""Skip connections: values that go past layers, from the one that makes them to those that need them.

A layer of a sequence sees only what the layer before it returns. A U-Net's encoder hands its maps to the
decoder by name instead, after torchgpipe (Kim et al., arXiv:2004.09910)::

    @skippable(stash=["map"])                     @skippable(pop=["map"])
    class Down(nn.Module):                        class Up(nn.Module):
        def forward(self, x):                         def forward(self, x):
            yield stash("map", x)                         map = yield pop("map")
            return self.pool(x)                           return self.merge(x, map)

    Down ── Down ── Bottom ── Up ── Up
      │       └───────────────┘     │              each value goes straight to its stage, and no
      └─────────────────────────────┘              stage in between holds it

The class is changed in place: its forward becomes a driver that runs the generator and asks the *tracker* in
force to keep or give values. Without a pipeline that is a dict, so the same layers in an ``nn.Sequential``
compute the same thing in one process. The driver keeps nothing on the module: a checkpointed forward runs
twice. Names are declared, so the routes are known before anything runs (:func:`check_skips`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from hpcpar.errors import MismatchError

__all__ = [
    "Namespace",
    "SkipEdge",
    "SkipName",
    "SkipTracker",
    "check_skips",
    "current_tracker",
    "pop",
    "pop_names",
    "skippable",
    "stash",
    "stash_names",
    "use_tracker",
]

ModuleClass = TypeVar("ModuleClass", bound=type[nn.Module])
Tracker = TypeVar("Tracker", bound="SkipTracker")


class Namespace:
    """Tells equal names apart, for a block that a model repeats; see ``isolate`` of a skippable module.

    Compared by identity. A copied or pickled model has namespaces of its own, shared as in the original.
    """


@dataclass(frozen=True)
class SkipName:
    """A name, with the namespace it was put in."""

    namespace: Namespace | None
    name: str

    def __str__(self) -> str:
        return repr(self.name) if self.namespace is None else f"{self.name!r} (isolated)"


@dataclass(frozen=True)
class SkipEdge:
    """The way of one value, from layer to layer by index."""

    name: SkipName
    stash_layer: int
    pop_layer: int


@dataclass(frozen=True, eq=False)
class _Stash:
    name: str
    value: Any


@dataclass(frozen=True)
class _Pop:
    name: str


class _YieldError(MismatchError, TypeError):
    """A forward yielded something else than a request."""


def stash(name: str, value: Any) -> _Stash:
    """``yield stash("a", x)`` in the forward of a skippable: keep ``x``, any value, for its pops. Local."""
    return _Stash(name, value)


def pop(name: str) -> _Pop:
    """``x = yield pop("a")`` in the forward of a skippable: what was stashed under the name. Local."""
    return _Pop(name)


# ---- trackers ----------------------------------------------------------------------------------------------


class SkipTracker:
    """Keeps values by name; a pipeline puts one of its own in force that sends them.

    A value stays until another is stashed under its name, since several layers may pop it. So the values of
    the last forward pass live on, which :meth:`clear` ends.
    """

    def __init__(self) -> None:
        self._values: dict[SkipName, Any] = {}

    def stash(self, name: SkipName, value: Any) -> None:
        """Keep ``value``. Local."""
        self._values[name] = value

    def pop(self, name: SkipName) -> Any:
        """What was stashed last. Local.

        Raises
        ------
        MismatchError
            When nothing was.
        """
        if name not in self._values:
            raise MismatchError(
                f"a skip must be stashed before it is popped, got a pop of {name} first. Run the layer that "
                "stashes it before, in the same thread."
            )
        return self._values[name]

    def clear(self) -> None:
        """Drop all values. Local."""
        self._values.clear()


_TRACKER: ContextVar[SkipTracker] = ContextVar("hpcpar_skip_tracker")


def current_tracker() -> SkipTracker:
    """The tracker in force in this thread; one of the thread's own without :func:`use_tracker`. Local."""
    tracker = _TRACKER.get(None)
    if tracker is None:
        tracker = SkipTracker()
        _TRACKER.set(tracker)
    return tracker


@contextmanager
def use_tracker(tracker: Tracker) -> Iterator[Tracker]:
    """Put ``tracker`` in force in this thread inside of the ``with`` block. Local."""
    token = _TRACKER.set(tracker)
    try:
        yield tracker
    finally:
        _TRACKER.reset(token)


# ---- the decorator -----------------------------------------------------------------------------------------


def skippable(stash: Iterable[str] = (), pop: Iterable[str] = ()) -> Callable[[ModuleClass], ModuleClass]:
    """Class decorator for modules that hand values past layers. Local.

    The class is changed in place and gets a method ``isolate(namespace, only=None)``, which puts its names,
    or only some, in a :class:`Namespace`, and returns the module.

    Parameters
    ----------
    stash
        Names that each forward pass stashes, each once.
    pop
        Names that each forward pass pops, each once.

    Raises
    ------
    MismatchError
        Here, when forward is no generator function, or a name is in both. In a forward pass, for names that
        are not declared, not used or used twice, and, also a ``TypeError``, for a yield of something else.
    """
    declared = {_Stash: _names(stash, "stash"), _Pop: _names(pop, "pop")}
    if both := set(declared[_Stash]) & set(declared[_Pop]):
        raise MismatchError(
            f"a module must not both stash and pop a name, got {sorted(both)}. Use a variable within a "
            "module, and another name for what is handed on."
        )

    def decorate(cls: ModuleClass) -> ModuleClass:
        generator = cls.forward
        if not inspect.isgeneratorfunction(generator):
            raise MismatchError(
                f"the forward of a skippable must be a generator function, got one without yield in "
                f"{cls.__name__}. Write `yield stash(name, value)` or `value = yield pop(name)`."
            )

        @functools.wraps(generator)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return _drive(self, generator(self, *args, **kwargs), declared)

        for name, value in {
            "forward": forward,
            "isolate": _isolate,
            "_skip_stash": declared[_Stash],
            "_skip_pop": declared[_Pop],
        }.items():
            setattr(cls, name, value)
        return cls

    return decorate


def _names(names: Iterable[str], kind: str) -> tuple[str, ...]:
    if isinstance(names, str):
        raise MismatchError(f'{kind} must be a list of names, got {names!r}. Write {kind}=["{names}"].')
    return tuple(dict.fromkeys(names))


def _isolate(self: nn.Module, namespace: Namespace, only: Iterable[str] | None = None) -> nn.Module:
    """Put the names of this module, or only some, in a namespace; returns the module. Local."""
    declared = (*self._skip_stash, *self._skip_pop)  # type: ignore[misc]
    chosen = declared if only is None else _names(only, "only")
    if unknown := set(chosen) - set(declared):
        raise MismatchError(
            f"isolate must be given names of the module, got {sorted(unknown)} for a "
            f"{type(self).__name__} that has {sorted(declared)}."
        )
    # A new dict: the one there may be shared with a shallow copy.
    self.__dict__["_skip_namespaces"] = {**_namespaces(self), **dict.fromkeys(chosen, namespace)}
    return self


def _namespaces(module: nn.Module) -> dict[str, Namespace]:
    found: dict[str, Namespace] = getattr(module, "_skip_namespaces", {})
    return found


def _drive(module: nn.Module, steps: Generator[Any, Any, Any], declared: dict[type, tuple[str, ...]]) -> Any:
    """Run a forward to its end, doing what it asks for. All state is local: it may run again, and nested."""
    tracker, owner, namespaces = current_tracker(), type(module).__name__, _namespaces(module)
    open_names = {kind: set(names) for kind, names in declared.items()}
    answer = None
    while True:
        try:
            request = steps.send(answer)
        except StopIteration as stop:
            _check_all_done(owner, open_names)
            return stop.value
        kind = type(request)
        if kind not in open_names:
            raise _YieldError(
                f"the forward of skippable {owner} must yield stash(...) or pop(...), got a {kind.__name__}."
            )
        if request.name not in open_names[kind]:
            _refuse(owner, kind, request.name, declared)
        open_names[kind].discard(request.name)
        name = SkipName(namespaces.get(request.name), request.name)
        if kind is _Pop:
            answer = tracker.pop(name)
        else:
            answer = None
            tracker.stash(name, request.value)


_VERBS = {_Stash: ("stash", "stashes"), _Pop: ("pop", "pops")}


def _refuse(owner: str, kind: type, name: str, declared: dict[type, tuple[str, ...]]) -> None:
    verb, verbs = _VERBS[kind]
    if name in declared[kind]:
        raise MismatchError(
            f"skippable {owner} must {verb} each name once, got {name!r} for the second time."
        )
    raise MismatchError(
        f"skippable {owner} must declare what it {verbs}, got {name!r}. Add it: @skippable({verb}=[...])."
    )


def _check_all_done(owner: str, open_names: dict[type, set[str]]) -> None:
    for kind, names in open_names.items():
        if names:
            verb, remedy = _VERBS[kind][0], " Where there is no value, stash None." * (kind is _Stash)
            raise MismatchError(
                f"skippable {owner} must {verb} all names that it declares in each forward pass, got to the "
                f"end without {sorted(names)}.{remedy}"
            )


# ---- the routes --------------------------------------------------------------------------------------------


def stash_names(module: nn.Module) -> tuple[SkipName, ...]:
    """Names that ``module`` and all skippables inside of it stash, in a fixed order. Local."""
    return _collect(module, "_skip_stash")


def pop_names(module: nn.Module) -> tuple[SkipName, ...]:
    """Names that ``module`` and all skippables inside of it pop, in a fixed order. Local."""
    return _collect(module, "_skip_pop")


def _collect(module: nn.Module, attribute: str) -> tuple[SkipName, ...]:
    return tuple(
        SkipName(_namespaces(part).get(name), name)
        for part in module.modules()
        for name in getattr(type(part), attribute, ())
    )


def check_skips(layers: Sequence[tuple[Iterable[SkipName], Iterable[SkipName]]]) -> list[SkipEdge]:
    """Find where each stashed value goes. Local.

    Parameters
    ----------
    layers
        Of each layer the names that it stashes and those that it pops, as :func:`stash_names` and
        :func:`pop_names` return them.

    Returns
    -------
    list of SkipEdge
        Ordered by popping layer; a value that several layers pop has an edge to each of them. Both ends may
        be the same layer, where a layer has skippables inside.

    Raises
    ------
    MismatchError
        When a name is stashed twice, popped by a layer before that which stashes it, or one of the two never.
    """
    stashed: dict[SkipName, int] = {}
    for layer, (names, _) in enumerate(layers):
        for name in names:
            if name in stashed:
                raise MismatchError(
                    f"a skip must be stashed once, got {name} stashed by layers {stashed[name]} and {layer}. "
                    "Give each repetition of a block names of its own: module.isolate(Namespace())."
                )
            stashed[name] = layer
    edges = []
    for layer, (_, names) in enumerate(layers):
        for name in dict.fromkeys(names):
            source = stashed.get(name)
            if source is None or source > layer:
                where = "no layer stashes" if source is None else f"layer {source} stashes"
                raise MismatchError(
                    f"a skip must be stashed by an earlier layer, got {name} popped by layer {layer}, which "
                    f"{where}. Check the order of the layers, and that both are in one namespace."
                )
            edges.append(SkipEdge(name, source, layer))
    if unused := stashed.keys() - {edge.name for edge in edges}:
        name = min(unused, key=lambda name: stashed[name])
        raise MismatchError(
            f"a skip must be popped by a later layer, got {name} stashed by layer {stashed[name]} and popped "
            "by none. Remove it, or check that both are in one namespace."
        )
    return edges
