"""Labels: what a parcel of tensors says about itself besides dtypes and shapes.

A value on its way between stages is flattened into tensors and a structure
(:mod:`~hpcpar.nn.pipeline.structure`). The label carries the structure, which tensors want a gradient back,
and how much of the batch this microbatch is. It travels only when it changes, so after the first step
nothing but the tensors themselves does.

A microbatch without samples has an *empty* label and no tensors: each stage passes it on, computing nothing.
"""

from __future__ import annotations

import functools
import struct
from typing import Any, NamedTuple

import torch

from hpcpar.nn.pipeline.structure import Structure, flatten, unflatten

__all__ = ["Label", "Parcel", "pack"]

_HEAD = struct.Struct("<qqq")


class Label(NamedTuple):
    """See the module's description.

    Attributes
    ----------
    structure : Structure or None
        Of the value; ``None`` for a microbatch without samples.
    wants_gradient : tuple of bool
        Of each tensor.
    samples, total : int
        Samples in this microbatch and in the whole batch.
    """

    structure: Structure | None
    wants_gradient: tuple[bool, ...]
    samples: int
    total: int

    @property
    def is_empty(self) -> bool:
        """Whether the microbatch has no samples. Local."""
        return self.structure is None

    def to_bytes(self) -> bytes:
        """The label as it travels. Local."""
        head = _HEAD.pack(self.samples, self.total, len(self.wants_gradient))
        structure = b"" if self.structure is None else self.structure.to_bytes()
        return head + bytes(self.wants_gradient) + structure

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def from_bytes(data: bytes) -> Label:
        """The inverse of :meth:`to_bytes`. Local."""
        samples, total, count = _HEAD.unpack_from(data)
        flags, rest = data[_HEAD.size : _HEAD.size + count], data[_HEAD.size + count :]
        structure = Structure.from_bytes(rest) if rest else None
        return Label(structure, tuple(map(bool, flags)), samples, total)


class Parcel(NamedTuple):
    """One value between two stages: its label and its tensors, without a graph."""

    label: Label
    tensors: list[torch.Tensor]

    def value(self) -> Any:
        """The value with its structure. Local."""
        assert self.label.structure is not None  # nobody asks an empty microbatch for its value
        return unflatten(self.label.structure, self.tensors)


def pack(value: Any, samples: int, total: int) -> tuple[Label, list[torch.Tensor]]:
    """Flatten a value that a stage has computed. Local."""
    tensors, structure = flatten(value)
    return Label(structure, tuple([t.requires_grad for t in tensors]), samples, total), tensors
