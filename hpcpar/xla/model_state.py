"""What of a model takes part: its parameters and buffers in a fixed order, each once, however often tied.

Buffers that a checkpoint has (persistent ones), of numbers, are *tracked*: what the devices do to them comes
back with the gradients. Tables should be registered with ``persistent=False``: they would come back too, as
changes of zero. Other buffers, such as masks, only go to the devices.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from hpcpar.errors import HpcparError

__all__ = ["BufferPlace", "ModelState", "Snapshot", "all_buffers", "is_tracked"]

# Where the modules are that do what a manager does, or need all ranks.
_COMMUNICATING = ("hpcpar.nn.", "torch.nn.parallel.")


@dataclass(frozen=True)
class BufferPlace:
    """Where a buffer is registered; one that is tied has several."""

    owner: nn.Module
    key: str

    def get(self) -> torch.Tensor:
        """The tensor that is there now. A forward may have put in another one.

        Raises
        ------
        HpcparError
            When there is none any more.
        """
        tensor = self.owner._buffers.get(self.key)
        if tensor is None:
            raise HpcparError(
                f"the model of a TPUManager must keep its buffers, got {self.key!r} of a "
                f"{type(self.owner).__name__} removed; make a new manager"
            )
        return tensor

    def set(self, tensor: torch.Tensor) -> None:
        """Put in another tensor."""
        self.owner._buffers[self.key] = tensor


@dataclass(frozen=True)
class Snapshot:
    """What is seen of a model without its values: which tensors it has, how often they were written to."""

    tensors: tuple[torch.Tensor, ...]
    marks: tuple[tuple[int, int], ...]
    modes: tuple[bool, ...]

    def is_like(self, other: Snapshot) -> bool:
        """Whether nothing was seen to change in between."""
        is_same = len(self.tensors) == len(other.tensors) and all(
            map(operator.is_, self.tensors, other.tensors)
        )
        return is_same and self.marks == other.marks and self.modes == other.modes


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
    TypeError
        When it is no module, or one that communicates itself.
    ValueError
        When the model is not on the host, has nothing to train, or has parameters that are no real numbers.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        for name, module in model.named_modules():
            if type(module).__module__.startswith(_COMMUNICATING):
                raise TypeError(
                    f"the model must not communicate itself, got {type(module).__name__} "
                    f"({name or 'outermost'}); give the plain module, and comm= to the manager"
                )
        self.model = model
        self.parameters = list(model.parameters())
        self._buffers = all_buffers(model)
        self._requires_grad = [parameter.requires_grad for parameter in self.parameters]
        self.trainable = [i for i, wanted in enumerate(self._requires_grad) if wanted]
        self._names = [name for name, _ in model.named_parameters()]
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if is_lazy(tensor):
                raise ValueError(f"the model must have been called once, got {name} without a shape")
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
    def buffers(self) -> list[torch.Tensor]:
        """Those of the beginning, as they are now: a forward or the user may have put in other tensors.

        Buffers that a forward registers for itself, such as a cache, are that model's own affair.
        """
        return [places[0].get() for places in self._buffers]

    @property
    def tracked(self) -> list[torch.Tensor]:
        """Those that change with training."""
        return [places[0].get() for places in self._buffers if is_tracked(places)]

    @property
    def modes(self) -> tuple[bool, ...]:
        """Of each module, whether it is in training mode."""
        return tuple(module.training for module in self.model.modules())

    def snapshot(self) -> Snapshot:
        """What there is now. Changes through ``.data``, or by what is not torch, do not show."""
        tensors = (*self.parameters, *self.buffers)
        marks = tuple((t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors)
        return Snapshot(tensors, marks, self.modes)

    def check_kept(self) -> None:
        """Make sure that the parameters are those of the beginning.

        Raises
        ------
        HpcparError
            When one was replaced, added, frozen or unfrozen.
        """
        now = list(self.model.parameters())
        is_same = len(now) == len(self.parameters) and all(map(operator.is_, now, self.parameters))
        if not is_same:
            raise HpcparError(
                "the model of a TPUManager must keep its parameters, got others than when it was made; copy "
                "new values into them, or make a new manager"
            )
        if [parameter.requires_grad for parameter in now] != self._requires_grad:
            raise HpcparError(
                "the model of a TPUManager must keep requires_grad of its parameters, got it changed; make a "
                "new manager"
            )

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
        TypeError
            When one is no tensor.
        ValueError
            When there are more or fewer than parameters, or one has another shape.
        """
        if len(new) != len(self.parameters):
            raise ValueError(
                f"new parameters must be as many as the model's {len(self.parameters)}, got {len(new)}"
            )
        for tensor in new:
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"new parameters must be tensors, got {type(tensor).__name__}")
        for name, old, tensor in zip(self._names, self.parameters, new, strict=True):
            _check_shape(name, old, tensor)
        # One that is a view of what will be written to must be read before.
        own = {parameter.untyped_storage().data_ptr() for parameter in self.parameters}
        values = [
            each.detach().clone()
            if each is not old and each.device.type == "cpu" and each.untyped_storage().data_ptr() in own
            else each
            for each, old in zip(new, self.parameters, strict=True)
        ]
        with torch.no_grad():
            for old, tensor in zip(self.parameters, values, strict=True):
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
                change = part if buffer.is_floating_point() else part.round().to(torch.int64)
                buffer.add_(change.view(buffer.shape))


def _check_shape(name: str, old: torch.Tensor, new: torch.Tensor) -> None:
    if new.shape != old.shape:
        raise ValueError(
            f"new parameters must have the model's shapes, got {tuple(new.shape)} for {name} of "
            f"{tuple(old.shape)}"
        )


def all_buffers(model: nn.Module) -> list[list[BufferPlace]]:
    """Where the buffers are; each with all places where it is tied."""
    found: dict[int, list[BufferPlace]] = {}
    for owner in model.modules():
        for key, tensor in owner._buffers.items():
            if tensor is not None:
                found.setdefault(id(tensor), []).append(BufferPlace(owner, key))
    return list(found.values())


def is_tracked(places: Sequence[BufferPlace]) -> bool:
    """Whether changes of this buffer come back from the devices."""
    tensor = places[0].get()
    is_persistent = any(place.key not in place.owner._non_persistent_buffers_set for place in places)
    return is_persistent and tensor.dtype is not torch.bool and not tensor.is_complex()
