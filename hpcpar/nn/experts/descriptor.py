"""Descriptors: one tensor of an expert's arguments or outputs, known by one sample of its batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hpcpar.errors import MismatchError

__all__ = ["BatchTensorDescriptor"]

_FREE_LENGTH = 8  # of an axis of any length, in a dummy batch


@dataclass(frozen=True, init=False)
class BatchTensorDescriptor:
    """Describes a batch of tensors by one sample of it. Hashable. Local.

    Parameters
    ----------
    *shape
        Of one sample, without the batch axis. ``None`` for an axis of any length: requests of different
        lengths are then batched apart.
    dtype
        Of the tensor.
    device
        Where dummy batches are made. Requests may come from any device.
    requires_grad
        Whether dummy batches require gradients.

    Raises
    ------
    MismatchError
        When the shape is not made of lengths, or an integer is to require gradients.
    """

    shape: tuple[int | None, ...]
    dtype: torch.dtype
    device: str
    requires_grad: bool

    def __init__(
        self,
        *shape: int | None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        requires_grad: bool = False,
    ) -> None:
        if any(length is not None and not _is_length(length) for length in shape):
            raise MismatchError(
                f"shape of one sample must be made of lengths, got {shape}. Leave the batch axis out, and "
                "write None for an axis of any length"
            )
        if requires_grad and not _is_differentiable(dtype):
            raise MismatchError(f"dtype of a tensor with requires_grad must be floating, got {dtype}")
        object.__setattr__(self, "shape", tuple(shape))
        object.__setattr__(self, "dtype", dtype)
        object.__setattr__(self, "device", str(torch.device(device)))
        object.__setattr__(self, "requires_grad", bool(requires_grad))

    @classmethod
    def from_tensor(cls, tensor: torch.Tensor) -> BatchTensorDescriptor:
        """The descriptor of a batch that is at hand; its first axis is the batch. Local."""
        if tensor.ndim == 0:
            raise MismatchError("a batch must have a first axis for its samples, got a tensor without axes")
        return cls(
            *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device, requires_grad=tensor.requires_grad
        )

    @property
    def is_differentiable(self) -> bool:
        """Whether gradients exist for this dtype. Local."""
        return _is_differentiable(self.dtype)

    @property
    def has_fixed_shape(self) -> bool:
        """Whether every axis has a length of its own. Local."""
        return None not in self.shape

    def make_zeros(self, batch: int, *, free_length: int = _FREE_LENGTH) -> torch.Tensor:
        """A batch of zeros, with ``free_length`` for axes of any length. Local."""
        return torch.zeros(
            self._lengths(batch, free_length),
            dtype=self.dtype,
            device=self.device,
            requires_grad=self.requires_grad,
        )

    def make_random(
        self, batch: int, *, free_length: int = _FREE_LENGTH, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """A batch of normal numbers; of zeros and ones for integers and bools. Local."""
        lengths = self._lengths(batch, free_length)
        if not self.is_differentiable:
            ones = torch.randint(0, 2, lengths, generator=generator, device=self.device)
            return ones.to(self.dtype)
        normal = torch.randn(lengths, generator=generator, device=self.device)
        return normal.to(self.dtype).requires_grad_(self.requires_grad)

    def check(self, tensor: object, name: str) -> None:
        """Raise unless a batch fits. Local.

        Parameters
        ----------
        tensor
            The batch, of any number of rows.
        name
            The subject of the error message.

        Raises
        ------
        MismatchError
            When it is no tensor, or one of another number of axes, shape or dtype.
        """
        if not isinstance(tensor, torch.Tensor):
            raise MismatchError(f"{name} must be a tensor, got a {type(tensor).__name__}")
        if tensor.layout is not torch.strided:
            raise MismatchError(f"{name} must be dense, got layout {tensor.layout}. Call .to_dense()")
        if tensor.dtype != self.dtype:
            raise MismatchError(f"{name} must have dtype {self.dtype}, got {tensor.dtype}. Convert it")
        shape = tensor.shape
        if len(shape) != len(self.shape) + 1 or not self._fits(shape[1:]):
            raise MismatchError(f"{name} must have shape {self._wanted()}, got {tuple(shape)}")

    def _fits(self, shape: Sequence[int]) -> bool:
        if None not in self.shape:
            return tuple(shape) == self.shape
        return all(want is None or want == got for want, got in zip(self.shape, shape, strict=True))

    def _wanted(self) -> str:
        lengths = ["batch", *("any" if length is None else str(length) for length in self.shape)]
        return f"({', '.join(lengths)})"

    def _lengths(self, batch: int, free_length: int) -> list[int]:
        return [batch, *(free_length if length is None else length for length in self.shape)]


def _is_length(length: object) -> bool:
    return isinstance(length, int) and not isinstance(length, bool) and length >= 0


def _is_differentiable(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex
