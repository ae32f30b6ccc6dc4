"""Layers: what a pipeline is cut between, some of them only described.

A model is an ``nn.Sequential`` or a list, in which a layer may be an ``nn.Module``, or a :class:`LayerSpec`:
a recipe that is followed only on the rank where the layer lives, so that no rank needs memory for all layers.

One module may do its work at two places, such as an embedding that also makes the logits. A *use* is the
module seen through a function, with the module's own parameters under the module's own names::

    embedding = LayerSpec(nn.Embedding, words, width)
    layers = [embedding, LayerSpec(Block, width), embedding.using(lambda m, x: F.linear(x, m.weight))]
    state names of layers 0 and 2:  "0.weight"  "2.weight"      tied_groups():  [(0, 2)]

Layers that share something with a state are *tied*: wherever they live, they must stay equal. What is shared
is found by identity, so two layers that were built from one spec share a module, and two equal specs do not.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from hpcpar.errors import MismatchError

__all__ = ["LayerSpec", "Layers", "SpecUse", "Use"]

UseFunction = Callable[[Any, Any], Any]


class LayerSpec:
    """A layer to be built only where it lives.

    Parameters
    ----------
    factory
        A class of modules or a function that returns one.
    *args, **kwargs
        Passed to it. The same spec object at two places of a model is the same module used twice.

    Raises
    ------
    MismatchError
        When ``factory`` cannot be called, or is a finished module.
    """

    def __init__(self, factory: Callable[..., nn.Module], /, *args: Any, **kwargs: Any) -> None:
        if isinstance(factory, nn.Module) or not callable(factory):
            raise MismatchError(
                "LayerSpec must be given a class or function that makes the layer, got a "
                f"{type(factory).__name__}. Write LayerSpec(nn.Linear, 4, 5), or give the module itself to "
                "the pipeline."
            )
        self.factory = factory
        self.args = args
        self.kwargs = kwargs

    def build(self) -> nn.Module:
        """A new module. Local.

        Raises
        ------
        MismatchError
            When the factory returns something else.
        """
        module: object = self.factory(*self.args, **self.kwargs)
        if not isinstance(module, nn.Module):
            raise MismatchError(
                f"the factory of a LayerSpec must return an nn.Module, got a {type(module).__name__} from "
                f"{_callable_name(self.factory)}."
            )
        return module

    def using(self, function: UseFunction) -> SpecUse:
        """The same module at another place, which calls ``function(module, x)``. Local."""
        return SpecUse(self, function)

    def sketch(self) -> nn.Module:
        """A module to look at, on the meta device where it can be built there. Local.

        Random numbers are as if nothing had been built.
        """
        with torch.random.fork_rng(devices=[]):
            try:
                with torch.device("meta"):
                    return self.build()
            except MismatchError:
                raise
            except Exception:  # a constructor that reads values, which a meta tensor lacks
                return self.build()


class SpecUse:
    """A further use of the module of a :class:`LayerSpec`; made by :meth:`LayerSpec.using`.

    Parameters
    ----------
    spec
        Whose module it is.
    function
        Called as ``function(module, x)``.
    """

    def __init__(self, spec: LayerSpec, function: UseFunction) -> None:
        self.spec = spec
        self.function = function


class Use(nn.Module):
    """A module seen through a function, with the same parameters under the same names.

    Parameters
    ----------
    module
        The module whose parameters these are. It usually is a layer of its own elsewhere.
    function
        The forward pass is ``function(module, x)``.
    """

    module: nn.Module

    def __init__(self, module: nn.Module, function: UseFunction) -> None:
        super().__init__()
        # Not as a submodule, which would put "module." into the names; and the dicts themselves, so that a
        # parameter that is replaced in the module is replaced here.
        self.__dict__["module"] = module
        for shared in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[shared] = getattr(module, shared)
        self._version = module._version
        self.training = module.training
        self.function = function

    def forward(self, x: Any) -> Any:
        """What the function makes of ``x`` and the module. Local."""
        return self.function(self.module, x)

    def train(self, mode: bool = True) -> Use:
        """Set the mode of the module as well. Local."""
        self.module.train(mode)
        return super().train(mode)

    def extra_repr(self) -> str:
        """Name the module and the function. Local."""
        return f"{type(self.module).__name__}, {_callable_name(self.function)}"

    def _apply(self, fn: Any, recurse: bool = True) -> Use:
        # The module may know more of its parameters, as an LSTM does.
        self.module._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(self, *args: Any) -> None:
        self.module._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.module._load_from_state_dict(*args)


Layer = nn.Module | LayerSpec | SpecUse


class Layers:
    """The layers of a model, by index.

    Parameters
    ----------
    model
        An ``nn.Sequential``, or a list of modules, specs and uses of these. Sequentials inside are one layer
        each.

    Attributes
    ----------
    names : tuple of str
        Those of the children of a Sequential; ``"0"``, ``"1"``, ... for a list.
    items : tuple
        The layers as they were given.

    Raises
    ------
    MismatchError
        When ``model`` is something else, empty, or contains something else.
    """

    def __init__(self, model: nn.Module | Sequence[Layer]) -> None:
        named = dict(_named_items(model))
        if not named:
            raise MismatchError("a pipeline must have at least one layer, got an empty model.")
        for index, item in enumerate(named.values()):
            if not isinstance(item, Layer):
                raise MismatchError(
                    "layers of a pipeline must be nn.Module or LayerSpec objects, got a "
                    f"{type(item).__name__} as layer {index}."
                )
        self.names = tuple(named)
        self.items: tuple[Layer, ...] = tuple(named.values())
        self._built: dict[LayerSpec, nn.Module] = {}
        self._uses: dict[SpecUse, Use] = {}
        self._counts: dict[LayerSpec, int] = {}
        self._owners: dict[int, int] | None = None

    def __len__(self) -> int:
        return len(self.items)

    def spec(self, index: int) -> LayerSpec | None:
        """What layer ``index`` is built from; ``None`` if it was given as a module. Local."""
        item = self.items[index]
        return item.spec if isinstance(item, SpecUse) else item if isinstance(item, LayerSpec) else None

    def build(self, index: int) -> nn.Module:
        """The module of layer ``index``; one module for all places of one spec. Local."""
        item = self.items[index]
        if isinstance(item, nn.Module):
            return item
        if isinstance(item, SpecUse):
            if item not in self._uses:
                self._uses[item] = Use(self._build_spec(item.spec), item.function)
            return self._uses[item]
        return self._build_spec(item)

    def first_use(self, index: int) -> int:
        """The first layer that is the same module or is built from the same spec. Local."""
        spec, item = self.spec(index), self.items[index]
        return next(
            other
            for other in range(len(self))
            if self.items[other] is item or (spec and self.spec(other) is spec)
        )

    def visible_parameters(self, index: int) -> list[nn.Parameter]:
        """Parameters of layer ``index`` that every rank has: a module's, or those in a spec's arguments."""
        spec = self.spec(index)
        sources = [self.items[index]] if spec is None else [*spec.args, *spec.kwargs.values()]
        found: dict[int, nn.Parameter] = {}
        for source in sources:
            if isinstance(source, nn.Module):
                found.update((id(parameter), parameter) for parameter in source.parameters())
            elif isinstance(source, nn.Parameter):
                found[id(source)] = source
        return list(found.values())

    def is_built(self, index: int) -> bool:
        """Whether the module of layer ``index`` exists on this process. Local."""
        spec = self.spec(index)
        return spec is None or spec in self._built

    def sketch(self, index: int) -> nn.Module:
        """The module of layer ``index`` if it exists, else one without memory, to look at. Local."""
        if self.is_built(index):
            return self.build(index)
        item = self.items[index]
        if isinstance(item, SpecUse):
            return Use(item.spec.sketch(), item.function)
        assert isinstance(item, LayerSpec)  # modules are built
        return item.sketch()

    def tied_groups(self) -> list[tuple[int, ...]]:
        """Sets of layers that share parameters, or a module that has parameters or buffers. Local.

        Returns
        -------
        list of tuple of int
            Each with at least two indices in order; sorted. Layers of one spec are taken for tied, whatever
            it builds.
        """
        group_of = list(range(len(self)))  # each layer points towards the first of its group

        def first(index: int) -> int:
            while group_of[index] != index:
                index = group_of[index]
            return index

        owners: dict[int, int] = {}
        for index, item in enumerate(self.items):
            for identity in _identities(item):
                one, other = sorted((first(owners.setdefault(identity, index)), first(index)))
                group_of[other] = one
        groups: dict[int, list[int]] = {}
        for index in range(len(self)):
            groups.setdefault(first(index), []).append(index)
        return [tuple(group) for group in groups.values() if len(group) > 1]

    def describe(self, index: int) -> str:
        """One line by which ranks find out whether they have the same layer. Local.

        Returns
        -------
        str
            Of a module its class and the names, shapes and dtypes of its parameters and buffers; of a spec
            the factory and its arguments. It holds no addresses or values of tensors.
        """
        return _describe(self.items[index])

    def parameter_count(self, index: int) -> int:
        """Elements in the parameters of layer ``index``, 0 for those that an earlier layer has. Local.

        A spec is built on the meta device to be counted, or for a moment where that is impossible.

        Raises
        ------
        MismatchError
            For a lazy module whose parameters have no shape yet.
        """
        spec = self.spec(index)
        if spec is not None:
            if any(self.spec(earlier) is spec for earlier in range(index)):
                return 0
            if spec not in self._counts:
                self._counts[spec] = _count(
                    self._built[spec] if self.is_built(index) else spec.sketch(), set()
                )
            return self._counts[spec]
        if self._owners is None:
            self._owners = {}
            for place, item in enumerate(self.items):
                for parameter in item.parameters() if isinstance(item, nn.Module) else ():
                    self._owners.setdefault(id(parameter), place)
        elsewhere = {
            id(parameter)
            for parameter in self.build(index).parameters()
            if self._owners[id(parameter)] < index
        }
        return _count(self.build(index), elsewhere)

    def _build_spec(self, spec: LayerSpec) -> nn.Module:
        if spec not in self._built:
            self._built[spec] = spec.build()
        return self._built[spec]


def _named_items(model: object) -> Iterable[tuple[str, Any]]:
    if isinstance(model, nn.Sequential):
        if type(model).forward is not nn.Sequential.forward:
            raise MismatchError(
                "a Sequential in a pipeline must call its layers one after another, got a "
                f"{type(model).__name__} with a forward of its own. Pass a list of its layers."
            )
        return model._modules.items()  # named_children() leaves out a module that comes again
    if isinstance(model, (list, tuple, nn.ModuleList)):
        return ((str(index), item) for index, item in enumerate(model))
    raise MismatchError(
        "the model of a pipeline must be an nn.Sequential or a list of layers, got a "
        f"{type(model).__name__}. Write its forward as a sequence of layers with one argument each."
    )


def _count(module: nn.Module, seen: set[int]) -> int:
    count = 0
    for name, parameter in module.named_parameters():
        if is_lazy(parameter):
            raise MismatchError(
                f"parameters of a pipeline must have a shape, got an uninitialized {name} in a "
                f"{type(module).__name__}. Run the lazy layer once before."
            )
        count += 0 if id(parameter) in seen else parameter.numel()
    return count


# ---- what layers share -------------------------------------------------------------------------------------


def _identities(item: Layer) -> Iterator[int]:
    """Ids of all objects by which a layer can be tied to another. The layers keep them alive."""
    if isinstance(item, nn.Module):
        for module in item.modules():
            yield from map(id, module.parameters(recurse=False))
            if any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
                yield id(module.module if isinstance(module, Use) else module)
        return
    spec = item.spec if isinstance(item, SpecUse) else item
    yield id(spec)
    for argument in (*spec.args, *spec.kwargs.values()):
        if isinstance(argument, nn.Module):
            yield from _identities(argument)
        elif isinstance(argument, nn.Parameter):
            yield id(argument)


# ---- descriptions ------------------------------------------------------------------------------------------


def _describe(value: Any) -> str:
    """Text that is equal on all ranks for equal values: no addresses, no order of hashes."""
    if isinstance(value, Use):
        return f"{_describe(value.module)} used by {_callable_name(value.function)}"
    if isinstance(value, nn.Module):
        return f"{_callable_name(type(value))}({', '.join(_describe_state(value))})"
    if isinstance(value, SpecUse):
        return f"{_describe(value.spec)} used by {_callable_name(value.function)}"
    if isinstance(value, LayerSpec):
        arguments = [*map(_describe, value.args)]
        arguments += [f"{name}={_describe(part)}" for name, part in value.kwargs.items()]
        return f"{_callable_name(value.factory)}({', '.join(arguments)})"
    if isinstance(value, torch.Tensor):
        return _describe_tensor(value)
    return _describe_other(value)


def _describe_other(value: Any) -> str:
    if isinstance(value, (set, frozenset)):
        return f"{type(value).__name__}({sorted(map(_describe, value))})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_describe(k)}: {_describe(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}({', '.join(map(_describe, value))})"
    return _callable_name(value) if hasattr(value, "__qualname__") else _without_addresses(value)


def _describe_state(module: nn.Module) -> Iterator[str]:
    for name, parameter in module.named_parameters():
        yield f"{name} {_describe_tensor(parameter)}{'' if parameter.requires_grad else ' frozen'}"
    for name, buffer in module.named_buffers():
        yield f"buffer {name} {_describe_tensor(buffer)}"


def _describe_tensor(tensor: torch.Tensor) -> str:
    if is_lazy(tensor):
        return f"(uninitialized) {tensor.dtype}"
    return f"{tuple(tensor.shape)} {tensor.dtype}"


def _callable_name(function: Any) -> str:
    if isinstance(function, functools.partial):
        return _describe(LayerSpec(function.func, *function.args, **function.keywords))
    if hasattr(function, "__qualname__"):
        return f"{function.__module__}.{function.__qualname__}"
    return _without_addresses(function)


def _without_addresses(value: Any) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
