"""A replica: the model on one device, and the sums that it makes there.

A microbatch is traced, forward, backward and summation, into one graph, the same each time::

    forward, backward
    sums    = (keep ? sums : 0) + weight * [gradients | loss]         keep: false for the first of a step
    buffers = updates_buffers ? new : old

so that only data changes from pass to pass, and nothing is ever compiled again. After the last microbatch
of a step the sums leave the device in one transfer, together with what has become of the buffers: their
difference to what was uploaded, which is exactly zero for those that nobody has changed.

A replica is used by one thread only, that of its device.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hpcpar.xla import adapter
from hpcpar.xla.feed import DeviceMicrobatch
from hpcpar.xla.model_state import BufferPlace, ModelState, all_buffers, is_tracked

__all__ = ["Contribution", "Replica"]


@dataclass(frozen=True)
class Contribution:
    """What one device adds to a step.

    Attributes
    ----------
    sums : torch.Tensor or None
        On the host, of shape (elements of trainable parameters + 1 + elements of tracked buffers,): sums of
        gradients times samples, of losses times samples, and changes of buffers. None without samples.
    samples : int
        That it has seen in this step.
    used : frozenset of int
        Trainable parameters that had a gradient, by their place among these.
    """

    sums: torch.Tensor | None = None
    samples: int = 0
    used: frozenset[int] = frozenset()


class Replica:
    """A copy of a model on a device; tied parameters and buffers are tied there, too. Local.

    Parameters
    ----------
    state
        The model on the host.
    device
        Where to compute.
    """

    def __init__(self, state: ModelState, device: torch.device) -> None:
        self.device = device
        self._dtype = state.dtype
        originals = [*state.parameters, *state.buffers]
        copies = adapter.upload(originals, device)
        memo: dict[int, Any] = {}
        self._parameters: list[nn.Parameter] = []
        for original, tensor in zip(originals, copies, strict=True):
            if isinstance(original, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=original.requires_grad)
                self._parameters.append(tensor)
            memo[id(original)] = tensor
        # deepcopy() takes what is in the memo for copied, so it copies modules and leaves ties as they are.
        self.model = copy.deepcopy(state.model, memo)
        self._trainable = [self._parameters[index] for index in state.trainable]
        self._buffers = all_buffers(self.model)
        self._tracked = [places for places in self._buffers if is_tracked(places)]
        numel = sum(parameter.numel() for parameter in self._trainable)
        self._summed = numel + 1
        changes = sum(places[0].get().numel() for places in self._tracked)
        values = [torch.zeros(self._summed + changes, dtype=self._dtype), *map(torch.tensor, (False, True))]
        self._sums, no, yes = adapter.upload(values, device)
        self._keep = {False: no, True: yes}  # data, so that the graph is the same for both
        self._bases = adapter.upload(state.tracked, device)

    def load(self, state: ModelState) -> None:
        """Copy parameters and buffers from the host, in one transfer, and take over its modes."""
        tensors = [*state.parameters, *state.buffers, *state.tracked]
        copies = iter(adapter.upload(tensors, self.device))
        # Each zip() takes as many copies as its first argument has, and the next goes on behind them.
        for parameter, tensor in zip(self._parameters, copies, strict=False):
            parameter.data = tensor
        for places, tensor in zip(self._buffers, copies, strict=False):
            _set_all(places, tensor)
        self._bases = list(copies)
        for module, is_training in zip(self.model.modules(), state.modes, strict=True):
            module.training = is_training

    def add(self, microbatch: DeviceMicrobatch, *, is_first: bool) -> frozenset[int]:
        """Trace and start one pass. Does not wait for the device.

        Returns
        -------
        frozenset of int
            Trainable parameters that had a gradient.

        Raises
        ------
        TypeError, ValueError
            When the model returns no scalar loss. Whatever the model raises is raised here.
        """
        old_buffers = [places[0].get().clone() for places in self._tracked]
        try:
            loss = find_loss(call(self.model, microbatch.data))
            # In this thread: those of autograd know the devices of the time of the process's first backward()
            # only, and this one may have run before anybody asked for an XLA device.
            with torch.autograd.set_multithreading_enabled(False):
                loss.backward()  # type: ignore[no-untyped-call]
            used = frozenset(i for i, each in enumerate(self._trainable) if each.grad is not None)
            with torch.no_grad():
                self._sum(loss, microbatch, keep=not is_first, old_buffers=old_buffers)
        except BaseException:
            for places, tensor in zip(self._tracked, old_buffers, strict=True):
                _set_all(places, tensor)
            raise
        finally:
            for parameter in self._trainable:
                parameter.grad = None
        adapter.launch()
        return used

    def take(self) -> torch.Tensor:
        """The sums of the step, on the host, in one transfer. Waits for the device."""
        return adapter.download(self._sums)

    def _sum(
        self,
        loss: torch.Tensor,
        microbatch: DeviceMicrobatch,
        *,
        keep: bool,
        old_buffers: list[torch.Tensor],
    ) -> None:
        parts = [
            torch.zeros_like(each) if each.grad is None else each.grad.to_dense() for each in self._trainable
        ]
        current = torch.cat([part.reshape(-1).to(self._dtype) for part in [*parts, loss.detach()]])
        # Chosen, not multiplied: what a step that overflowed has left behind must not reach the next.
        earlier = torch.where(self._keep[keep], self._sums[: self._summed], 0.0)
        changes = []
        for places, old, base in zip(self._tracked, old_buffers, self._bases, strict=True):
            new = torch.where(microbatch.updates_buffers, places[0].get().detach(), old)
            _set_all(places, new)
            changes.append(_difference(new, base).reshape(-1).to(self._dtype))
        self._sums = torch.cat([earlier + microbatch.weight * current, *changes])


def call(model: nn.Module, data: Any) -> Any:
    """Call a model as its collate function means it: a mapping by keywords, a tuple or list by position."""
    if isinstance(data, Mapping):
        return model(**data)
    if isinstance(data, tuple | list):
        return model(*data)
    return model(data)


def find_loss(output: Any) -> torch.Tensor:
    """The loss of a model's output: ``output["loss"]``, ``output.loss``, ``output[0]``, or all of it.

    Raises
    ------
    TypeError, ValueError
        When there is none, or it is no scalar.
    """
    loss = output
    if isinstance(output, Mapping):
        if "loss" not in output:
            raise ValueError(f"a mapping that the model returns must have a 'loss', got {sorted(output)}")
        loss = output["loss"]
    elif isinstance(getattr(output, "loss", None), torch.Tensor):
        loss = output.loss
    elif isinstance(output, tuple | list):
        loss = output[0] if output else None
    if not isinstance(loss, torch.Tensor):
        raise TypeError(f"the model must return its loss as a tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"the model's loss must be a scalar, got a tensor of shape {tuple(loss.shape)}")
    if not loss.requires_grad:
        raise ValueError(
            "the model's loss must depend on parameters that require a gradient, got one without"
        )
    return loss.reshape(())


def _difference(new: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """``new - base``, and zero where both are the same, such as infinite."""
    if not new.is_floating_point():
        return new.to(torch.int64) - base.to(torch.int64)  # small integers, or unsigned ones, would wrap
    return torch.where(new == base, 0, new - base)


def _set_all(places: list[BufferPlace], tensor: torch.Tensor) -> None:
    for place in places:
        place.set(tensor)
