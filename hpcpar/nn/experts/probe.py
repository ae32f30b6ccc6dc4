"""Probing: what an expert does is found out by running it once, and nothing must remember that.

An expert draws random numbers, counts batches in buffers, and may write to what it is given. A dummy batch
tells which of these it does (:class:`Traits`) and what it returns. The contexts below take back what a run
leaves behind: buffers, training mode. Forward and backward passes use them too. Random numbers come from a
generator of the run's own (:mod:`~hpcpar.nn.experts.private_random`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn

from hpcpar.errors import MismatchError
from hpcpar.nn.experts.descriptor import BatchTensorDescriptor
from hpcpar.nn.experts.private_random import PrivateRandom
from hpcpar.nn.experts.schema import ExpertSchema, descriptors_in, map_schema
from hpcpar.nn.pipeline.randomness import may_draw, without_autocast

__all__ = ["Traits", "buffers_restored", "device_of", "in_mode", "probe"]

_ROWS = 2  # batch norm cannot train on one
_FREE_LENGTHS = (8, 16)


@dataclass(frozen=True)
class Traits:
    """What an expert does besides computing.

    Attributes
    ----------
    draws : bool
        It draws random numbers in training.
    writes_inputs : bool
        It writes to its inputs, so it must be given copies.
    shares_outputs : bool
        What it returns is part of its inputs or of its own state, so it must be copied.
    mixes_rows : bool
        It contains batch norm, so a batch is run as a whole even where an update cuts it.
    """

    draws: bool
    writes_inputs: bool
    shares_outputs: bool
    mixes_rows: bool


# ---- contexts ----------------------------------------------------------------------------------------------


def device_of(expert: nn.Module) -> torch.device | None:
    """Where an expert computes; ``None`` when it has no state that would tell. Local."""
    state = next(chain(expert.parameters(), expert.buffers()), None)
    return None if state is None else state.device


@contextmanager
def in_mode(expert: nn.Module, training: bool) -> Iterator[None]:
    """Training or evaluation mode. Modules keep their own modes when the expert as a whole has it. Local."""
    if expert.training == training:
        yield
        return
    modes = [(module, module.training) for module in expert.modules()]
    expert.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def buffers_restored(expert: nn.Module, *, always: bool) -> Iterator[None]:
    """Put the buffers back: ``always``, or when the block fails. Local.

    They are copied at the end and not swapped: a graph that is alive would notice if a tensor it saved
    changed, so the block must contain its backward pass.
    """
    before = [
        (module._buffers, name, buffer, buffer.detach().clone())
        for module in expert.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    succeeded = False
    try:
        yield
        succeeded = True
    finally:
        if always or not succeeded:
            for slots, name, buffer, value in before:
                slots[name] = buffer  # a module may have put another tensor there
                buffer.detach().copy_(value)  # always: batch norm changes it without counting a version


# ---- probing -----------------------------------------------------------------------------------------------


def probe(
    expert: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
) -> tuple[ExpertSchema, Traits]:
    """Find out what an expert does and returns; leaves no trace. Local.

    Parameters
    ----------
    expert
        The expert.
    args, kwargs
        Descriptors of its arguments.
    outputs
        Descriptors of its outputs. ``None`` to find them: with axes of any length among the inputs, it runs
        twice, and an output's axis that differs is of any length too.

    Raises
    ------
    MismatchError
        When it does not run on zeros; not when the outputs are given, then the worst is assumed of it.
    """
    schema = ExpertSchema(args, kwargs, outputs if outputs is not None else BatchTensorDescriptor())
    try:
        value, traits = _dummy_run(expert, schema, _FREE_LENGTHS[0])
        if outputs is None and not all(descriptor.has_fixed_shape for descriptor in schema.inputs):
            other, _ = _dummy_run(expert, schema, _FREE_LENGTHS[1])
            outputs = _common(_describe(value), _describe(other))
    except Exception as error:
        if outputs is None:
            raise MismatchError(
                f"an expert must run on a batch of zeros that fits its schema, got {type(error).__name__}: "
                f"{error}. Correct args_schema and kwargs_schema, or give outputs_schema as well"
            ) from error
        return schema, Traits(
            draws=may_draw(expert), writes_inputs=True, shares_outputs=True, mixes_rows=_mixes_rows(expert)
        )
    if outputs is None:
        return ExpertSchema(args, kwargs, _describe(value)), traits
    schema = ExpertSchema(args, kwargs, outputs)
    schema.flatten_outputs(value)  # raises when it was described wrongly
    return schema, traits


def _dummy_run(expert: nn.Module, schema: ExpertSchema, free_length: int) -> tuple[Any, Traits]:
    device = device_of(expert)
    dummies = [descriptor.make_zeros(_ROWS, free_length=free_length) for descriptor in schema.inputs]
    dummies = [dummy.detach() if device is None else dummy.detach().to(device) for dummy in dummies]
    versions = [dummy._version for dummy in dummies]
    args, kwargs = schema.unflatten_call(dummies)
    with (
        torch.no_grad(),
        without_autocast(device or torch.device("cpu")),
        in_mode(expert, True),
        buffers_restored(expert, always=True),
        PrivateRandom(0) as random,
    ):
        value = expert(*args, **kwargs)
        state = [*expert.parameters(), *expert.buffers()]
    _describe(value)  # raises when it is nothing that can be sent
    return value, Traits(
        draws=random.has_drawn,
        writes_inputs=[dummy._version for dummy in dummies] != versions,
        shares_outputs=_share_memory(_tensors_in(value), [*dummies, *state]),
        mixes_rows=_mixes_rows(expert),
    )


def _mixes_rows(expert: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in expert.modules())


def _share_memory(outputs: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    owned = {other.untyped_storage().data_ptr() for other in others if other.numel()}
    return any(output.untyped_storage().data_ptr() in owned for output in outputs if output.numel())


def _tensors_in(value: Any) -> list[torch.Tensor]:
    tensors: list[torch.Tensor] = []
    _map_value(tensors.append, value)
    return tensors


def _describe(value: Any) -> Any:
    return _map_value(_descriptor_of_output, value)


def _descriptor_of_output(tensor: torch.Tensor) -> BatchTensorDescriptor:
    if tensor.ndim == 0 or len(tensor) != _ROWS:
        raise MismatchError(
            f"every output of an expert must have the batch as its first axis, got {tuple(tensor.shape)} for "
            f"a batch of {_ROWS}"
        )
    return BatchTensorDescriptor(*tensor.shape[1:], dtype=tensor.dtype)


def _map_value(function: Any, value: Any) -> Any:
    """A schema-like value with ``function(tensor)`` for each tensor, in flat order."""
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        parts = [_map_value(function, part) for part in value]
        return parts if isinstance(value, list) else tuple(parts)
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _map_value(function, value[key]) for key in sorted(value)}
    raise MismatchError(
        "an expert must return tensors in tuples, lists and dicts with string keys, got a "
        f"{type(value).__name__}"
    )


def _common(first: Any, second: Any) -> Any:
    """Descriptors that fit two outputs."""
    others = iter(descriptors_in(second))
    return map_schema(lambda descriptor: _merged(descriptor, next(others)), first)


def _merged(first: BatchTensorDescriptor, second: BatchTensorDescriptor) -> BatchTensorDescriptor:
    lengths = [one if one == other else None for one, other in zip(first.shape, second.shape, strict=True)]
    return BatchTensorDescriptor(*lengths, dtype=first.dtype)
