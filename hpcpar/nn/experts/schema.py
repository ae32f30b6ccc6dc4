"""Schemas: what an expert takes and returns, known before the first request.

A caller on another rank must know what to send, and the server what to receive, without a word about types
and shapes in any message. So an expert declares, once, a descriptor for each tensor; nested tuples, lists and
dicts of descriptors mirror its arguments and its outputs::

    expert(x, {"mask": m}, scale=s)   ->  args   (·, {"mask": ·})    kwargs  {"scale": ·}
    on the wire                       ->  [x, m, s], one flat list

Tensors are listed in the order of the arguments, then by keyword; the keys of every dict are sorted, so that
the order does not depend on how a caller wrote its call. The first axis of every tensor is the batch and not
part of a descriptor; it has the same length in all tensors of a call. A ``None`` among the other axes stands
for any length.

Schemas travel as plain lists, numbers and strings (:meth:`ExpertSchema.to_plain`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hpcpar.errors import MismatchError
from hpcpar.nn.experts.descriptor import BatchTensorDescriptor

__all__ = ["BatchTensorDescriptor", "ExpertSchema", "descriptors_in", "map_schema"]

_ANY = -1  # an axis of any length, in the plain form


@dataclass(frozen=True)
class ExpertSchema:
    """Inputs and outputs of an expert. Hashable. Local.

    Parameters
    ----------
    args
        Descriptors of the positional arguments, nested in tuples, lists and dicts.
    kwargs
        Descriptors of the keyword arguments.
    outputs
        Descriptor of the output, or nested descriptors. ``None`` inside stands for itself.

    Attributes
    ----------
    inputs : tuple of BatchTensorDescriptor
        Of all tensors that a call passes, in flat order.
    flat_outputs : tuple of BatchTensorDescriptor
        Of all tensors that it returns.

    Raises
    ------
    MismatchError
        When there is no input or no output, or something else than descriptors.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Any
    inputs: tuple[BatchTensorDescriptor, ...] = field(init=False, compare=False, repr=False)
    flat_outputs: tuple[BatchTensorDescriptor, ...] = field(init=False, compare=False, repr=False)
    _is_flat: bool = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "args", tuple(self.args))
        object.__setattr__(self, "kwargs", {name: self.kwargs[name] for name in sorted(self.kwargs)})
        object.__setattr__(self, "inputs", descriptors_in((self.args, self.kwargs)))
        object.__setattr__(self, "flat_outputs", descriptors_in(self.outputs))
        is_flat = not self.kwargs and all(isinstance(arg, BatchTensorDescriptor) for arg in self.args)
        object.__setattr__(self, "_is_flat", is_flat)
        if not self.inputs or not self.flat_outputs:
            raise MismatchError(
                f"a schema must have an input and an output at least, got {len(self.inputs)} inputs and "
                f"{len(self.flat_outputs)} outputs"
            )

    def __hash__(self) -> int:
        return hash((self.inputs, self.flat_outputs, self.keyword_names))

    # Facts -----------------------------------------------------------------------------------------------

    @property
    def keyword_names(self) -> tuple[str, ...]:
        """Names of the keyword arguments, sorted. Local."""
        return tuple(self.kwargs)

    @property
    def num_inputs(self) -> int:
        """Number of tensors that a call passes. Local."""
        return len(self.inputs)

    @property
    def num_outputs(self) -> int:
        """Number of tensors that it returns. Local."""
        return len(self.flat_outputs)

    @property
    def differentiable_inputs(self) -> tuple[bool, ...]:
        """Which inputs have gradients: those of floating or complex dtype. Local."""
        return tuple(descriptor.is_differentiable for descriptor in self.inputs)

    @property
    def differentiable_outputs(self) -> tuple[bool, ...]:
        """Which outputs have gradients: those of floating or complex dtype. Local."""
        return tuple(descriptor.is_differentiable for descriptor in self.flat_outputs)

    @property
    def grad_outputs(self) -> tuple[BatchTensorDescriptor, ...]:
        """Of the gradients that a backward pass takes: one for each differentiable output. Local."""
        return tuple(descriptor for descriptor in self.flat_outputs if descriptor.is_differentiable)

    # Calls -----------------------------------------------------------------------------------------------

    def flatten_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """The tensors of a call ``expert(*args, **kwargs)`` in flat order, checked. Local.

        Under autocast, tensors of another floating type are converted, as autocast does for layers.

        Raises
        ------
        MismatchError
            When arguments are missing or unknown, tensors do not fit their descriptors, or their batch sizes
            differ.
        """
        if len(args) != len(self.args):
            raise MismatchError(f"an expert's call must have {len(self.args)} arguments, got {len(args)}")
        if kwargs.keys() != self.kwargs.keys():
            raise MismatchError(
                f"keywords of an expert's call must be {list(self.kwargs)}, got {sorted(kwargs)}"
            )
        tensors: list[torch.Tensor] = []
        for place, (schema, value) in enumerate(zip(self.args, args, strict=True)):
            tensors += _take_apart(schema, value, f"argument {place}")
        for name, schema in self.kwargs.items():
            tensors += _take_apart(schema, kwargs[name], f"keyword {name!r}")
        _check_rows(tensors, "argument")
        return tensors

    def unflatten_call(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments and keywords of a call from its tensors, the reverse of :meth:`flatten_call`. Local."""
        if self._is_flat and len(tensors) == len(self.inputs):
            return tuple(tensors), {}  # as most experts have it
        args, kwargs = _put_together((self.args, self.kwargs), self.inputs, tensors)
        return args, kwargs

    def check_inputs(self, tensors: Sequence[torch.Tensor]) -> int:
        """Check the flat tensors of a call; their batch size. Local.

        Raises
        ------
        MismatchError
            When their number, a shape, a dtype or a batch size is wrong.
        """
        return _check_flat(self.inputs, tensors, "input")

    def check_backward(self, tensors: Sequence[torch.Tensor]) -> int:
        """Check flat inputs that are followed by gradients of outputs; their batch size. Local.

        Raises
        ------
        MismatchError
            When their number, a shape, a dtype or a batch size is wrong.
        """
        return _check_flat((*self.inputs, *self.grad_outputs), tensors, "input or gradient of an output")

    def flatten_outputs(self, value: Any) -> list[torch.Tensor]:
        """The tensors of what an expert returned, checked. Local.

        Raises
        ------
        MismatchError
            When it is nested otherwise, or a tensor does not fit its descriptor.
        """
        return _take_apart(self.outputs, value, "output")

    def unflatten_outputs(self, tensors: Sequence[Any]) -> Any:
        """Outputs as the expert nests them, from their tensors. Local."""
        return _put_together(self.outputs, self.flat_outputs, tensors)

    # On the wire -----------------------------------------------------------------------------------------

    def to_plain(self) -> dict[str, Any]:
        """The schema as nested lists, dicts, strings and integers, for :meth:`from_plain`. Local."""
        return {
            "args": [_to_plain(part) for part in self.args],
            "kwargs": {name: _to_plain(part) for name, part in self.kwargs.items()},
            "outputs": _to_plain(self.outputs),
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> ExpertSchema:
        """The schema that :meth:`to_plain` was called on. Local."""
        return cls(
            tuple(_from_plain(part) for part in plain["args"]),
            {name: _from_plain(part) for name, part in plain["kwargs"].items()},
            _from_plain(plain["outputs"]),
        )


# ---- nested values -----------------------------------------------------------------------------------------


def descriptors_in(schema: Any) -> tuple[BatchTensorDescriptor, ...]:
    """All descriptors of a nested schema, in flat order. Local.

    Raises
    ------
    MismatchError
        When there is something else than tuples, lists, dicts with string keys, descriptors and ``None``.
    """
    found: list[BatchTensorDescriptor] = []
    map_schema(found.append, schema)
    return tuple(found)


def map_schema(function: Callable[[BatchTensorDescriptor], Any], schema: Any) -> Any:
    """A value nested like ``schema`` with ``function(descriptor)`` for each descriptor. Local."""
    if isinstance(schema, BatchTensorDescriptor):
        return function(schema)
    if schema is None:
        return None
    if isinstance(schema, (tuple, list)):
        parts = [map_schema(function, part) for part in schema]
        return parts if isinstance(schema, list) else tuple(parts)
    if isinstance(schema, Mapping) and all(isinstance(key, str) for key in schema):
        return {key: map_schema(function, schema[key]) for key in sorted(schema)}
    raise MismatchError(
        "a schema must consist of descriptors in tuples, lists and dicts with string keys, got a "
        f"{type(schema).__name__}"
    )


def _take_apart(schema: Any, value: Any, name: str) -> list[torch.Tensor]:
    """The tensors of a value that is nested like its schema."""
    if isinstance(schema, BatchTensorDescriptor):
        if _is_converted(schema, value):
            value = value.to(schema.dtype)
        schema.check(value, name)
        return [value]
    if schema is None:
        if value is not None:
            raise MismatchError(f"{name} must be None, got a {type(value).__name__}")
        return []
    return [
        tensor
        for key, part, item in _paired(schema, value, name)
        for tensor in _take_apart(part, item, f"{name}[{key!r}]")
    ]


def _is_converted(schema: BatchTensorDescriptor, value: Any) -> bool:
    """Whether autocast would convert a tensor of this type."""
    return (
        isinstance(value, torch.Tensor)
        and value.dtype != schema.dtype
        and value.dtype.is_floating_point
        and schema.dtype.is_floating_point
        and torch.is_autocast_enabled(value.device.type)
    )


def _paired(schema: Any, value: Any, name: str) -> Iterator[tuple[Any, Any, Any]]:
    if isinstance(schema, Mapping):
        if not isinstance(value, Mapping) or value.keys() != schema.keys():
            got = sorted(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
            raise MismatchError(f"{name} must be a dict with the keys {sorted(schema)}, got {got}")
        return ((key, schema[key], value[key]) for key in sorted(schema))
    if not isinstance(value, (tuple, list)) or len(value) != len(schema):
        got = f"{len(value)} parts" if isinstance(value, (tuple, list)) else f"a {type(value).__name__}"
        raise MismatchError(f"{name} must have {len(schema)} parts, got {got}")
    return ((place, part, value[place]) for place, part in enumerate(schema))


def _put_together(schema: Any, descriptors: Sequence[BatchTensorDescriptor], tensors: Sequence[Any]) -> Any:
    if len(tensors) != len(descriptors):
        raise MismatchError(f"number of tensors must be {len(descriptors)}, got {len(tensors)}")
    remaining = iter(tensors)
    return map_schema(lambda _: next(remaining), schema)


def _check_flat(descriptors: Sequence[BatchTensorDescriptor], tensors: Sequence[Any], name: str) -> int:
    if len(tensors) != len(descriptors):
        raise MismatchError(f"number of tensors ({name}) must be {len(descriptors)}, got {len(tensors)}")
    for place, (descriptor, tensor) in enumerate(zip(descriptors, tensors, strict=True)):
        descriptor.check(tensor, f"{name}, number {place},")
    return _check_rows(tensors, name)


def _check_rows(tensors: Sequence[torch.Tensor], name: str) -> int:
    rows = tensors[0].shape[0]
    if any(tensor.shape[0] != rows for tensor in tensors):
        sizes = [tensor.shape[0] for tensor in tensors]
        raise MismatchError(f"batch size must be the same for every {name}, got {sizes}")
    return rows


# ---- plain form --------------------------------------------------------------------------------------------


def _to_plain(schema: Any) -> list[Any]:
    if schema is None:
        return ["none"]
    if isinstance(schema, BatchTensorDescriptor):
        shape = [_ANY if length is None else length for length in schema.shape]
        dtype = str(schema.dtype).removeprefix("torch.")
        return ["tensor", shape, dtype, schema.device, int(schema.requires_grad)]
    if isinstance(schema, Mapping):
        return ["dict", {key: _to_plain(schema[key]) for key in sorted(schema)}]
    return ["list" if isinstance(schema, list) else "tuple", [_to_plain(part) for part in schema]]


def _from_plain(plain: Sequence[Any]) -> Any:
    return _READERS[plain[0]](*plain[1:])


def _read_tensor(shape: Sequence[int], dtype: str, device: str, requires_grad: int) -> BatchTensorDescriptor:
    lengths = (None if length == _ANY else length for length in shape)
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        raise MismatchError(f"dtype of a descriptor must be one of torch's, got {dtype!r}")
    return BatchTensorDescriptor(*lengths, dtype=kind, device=device, requires_grad=bool(requires_grad))


_READERS: Mapping[str, Callable[..., Any]] = {
    "none": lambda: None,
    "tensor": _read_tensor,
    "tuple": lambda parts: tuple(_from_plain(part) for part in parts),
    "list": lambda parts: [_from_plain(part) for part in parts],
    "dict": lambda parts: {key: _from_plain(part) for key, part in parts.items()},
}
