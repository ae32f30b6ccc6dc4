"""What of a model takes part: its parameters and buffers in a fixed order, each once, however often tied.

Buffers that a checkpoint has (persistent ones), of numbers, are *tracked*: what the devices do to them comes
back with the gradients. Masks and tables should be registered with ``persistent=False``: they would come back
too, as changes of zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["BufferPlace", "ModelState", "persistent_buffers"]


@dataclass(frozen=True)
class BufferPlace:
    """Where a buffer is registered; one that is tied has several."""

    owner: nn.Module
    key: str

    def get(self) -> torch.Tensor:
        """The tensor that is there now. A forward may have put in another one."""
        tensor = self.owner._buffers[self.key]
        assert tensor is not None
        return tensor

    def set(self, tensor: torch.Tensor) -> None:
        """Put in another tensor."""
        self.owner._buffers[self.key] = tensor


class ModelState:
    """The tensors of a model on the host. Local.

    Parameters
    ----------
    model
        Its parameters and buffers are looked up once.

    Attributes
    ----------
    parameters : list of nn.Parameter
        In the order of ``model.parameters()``.
    trainable : list of int
        Places in it of those that require a gradient.
    dtype : torch.dtype
        In which gradients are summed: float64 if a parameter is, else float32.

    Raises
    ------
    ValueError
        When the model is not on the host, has nothing to train, or has parameters that are no real numbers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parameters = list(model.parameters())
        self.trainable = [i for i, parameter in enumerate(self.parameters) if parameter.requires_grad]
        self._names = [name for name, _ in model.named_parameters()]
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.device.type != "cpu":
                raise ValueError(f"the model must be on the host, got {name} on {tensor.device}")
            if tensor.layout is not torch.strided:
                raise ValueError(f"the model must have dense tensors, got {name} of layout {tensor.layout}")
        for index in self.trainable:
            dtype = self.parameters[index].dtype
            if not dtype.is_floating_point:
                raise ValueError(f"parameters must be real numbers, got {self._names[index]} of {dtype}")
        if not self.trainable:
            raise ValueError("the model must have parameters that require a gradient, got none")
        dtypes = {self.parameters[index].dtype for index in self.trainable}
        self.dtype = torch.float64 if torch.float64 in dtypes else torch.float32

    @property
    def tracked(self) -> list[torch.Tensor]:
        """The buffers that change with training, as they are now."""
        return [places[0].get() for places in persistent_buffers(self.model)]

    @property
    def versions(self) -> tuple[tuple[int, int], ...]:
        """Differs when a tensor was replaced, or written to by an operation that torch counts."""
        return tuple((id(tensor), tensor._version) for tensor in [*self.parameters, *self.tracked])

    def describe(self) -> list[str]:
        """A line for each parameter and buffer, which must be the same on all ranks."""
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        return [
            f"{name} {tuple(tensor.shape)} {tensor.dtype}{'' if tensor.requires_grad else ' frozen'}"
            for name, tensor in named
        ]

    def assign(self, new: Sequence[torch.Tensor]) -> None:
        """Copy new values into the parameters; all or, when one does not fit, none.

        Raises
        ------
        ValueError
            When there are more or fewer than parameters, or one has another shape.
        """
        if len(new) != len(self.parameters):
            raise ValueError(
                f"new parameters must be as many as the model's {len(self.parameters)}, got {len(new)}"
            )
        for name, old, tensor in zip(self._names, self.parameters, new, strict=True):
            _check_shape(name, old, tensor)
        with torch.no_grad():
            for old, tensor in zip(self.parameters, new, strict=True):
                if tensor is not old:
                    old.copy_(tensor)

    def assign_named(self, new: Mapping[str, torch.Tensor]) -> None:
        """Copy new values into parameters and buffers by name, as ``state_dict()`` has them; all or none.

        Raises
        ------
        ValueError
            When a name is missing or unknown, or a shape is another.
        """
        current = self.model.state_dict()
        if current.keys() != new.keys():
            different = sorted(current.keys() ^ new.keys())
            raise ValueError(f"new parameters must have the model's names, got a difference in {different}")
        for name, old in current.items():
            _check_shape(name, old, new[name])
        self.model.load_state_dict(new)

    def change_tracked(self, changes: torch.Tensor) -> None:
        """Add flat changes to the tracked buffers, whole numbers to whole numbers. Zero leaves one alone."""
        tracked = self.tracked
        parts = torch.split(changes, [buffer.numel() for buffer in tracked])
        for buffer, part in zip(tracked, parts, strict=True):
            if part.any():
                change = part if buffer.is_floating_point() else part.round()
                buffer.add_(change.view(buffer.shape).to(buffer.dtype))


def _check_shape(name: str, old: torch.Tensor, new: torch.Tensor) -> None:
    if new.shape != old.shape:
        raise ValueError(
            f"new parameters must have the model's shapes, got {tuple(new.shape)} for {name} of "
            f"{tuple(old.shape)}"
        )


def persistent_buffers(model: nn.Module) -> list[list[BufferPlace]]:
    """Where the buffers of numbers are that ``state_dict()`` has; each with all places where it is tied."""
    found: dict[int, list[BufferPlace]] = {}
    for owner, key, tensor in _registered(model):
        if key not in owner._non_persistent_buffers_set and tensor.dtype is not torch.bool:
            found.setdefault(id(tensor), []).append(BufferPlace(owner, key))
    return list(found.values())


def _registered(model: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    for module in model.modules():
        for key, tensor in module._buffers.items():
            if tensor is not None and not tensor.is_complex():
                yield module, key, tensor
