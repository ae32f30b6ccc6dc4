"""The experts of synchronous layers one by one, for checkpoints that load on another number of ranks.

A model with expert layers has two kinds of state: what all ranks have alike, and experts, of which each rank
has its own. The first is saved as always, by one rank. Of the second each expert is taken by itself, with its
part of the optimizer's state, under a uid that does not depend on ranks::

    blocks.1.mlp  on 2 ranks   blocks.1.mlp.expert.0  .1 | .2  .3
                  on 4 ranks   blocks.1.mlp.expert.0 | .1 | .2 | .3
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hpcpar.errors import MismatchError
from hpcpar.nn.data_parallel import DataParallel
from hpcpar.nn.experts.layer import MixtureOfExperts
from hpcpar.nn.own_gradients import own_tensors
from hpcpar.nn.pipeline.pipeline import Pipeline

__all__ = ["LayerExpert", "SharedState", "layer_experts", "shared_state"]


def layer_experts(
    module: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, LayerExpert]:
    """Experts of this rank in all :class:`~hpcpar.nn.MixtureOfExperts` of a model, by uid. Local.

    Parameters
    ----------
    module
        The model. The uids are the same in :class:`~hpcpar.nn.DataParallel`, in a pipeline, and compiled.
    optimizer
        Of the model; with it the state of an expert includes that of its parameters.

    Examples
    --------
    >>> hpcpar.checkpoint.save_experts("run/experts", hpcpar.nn.layer_experts(model, optimizer), comm)
    """
    found = {}
    module = _unwrapped(module)
    for name, layer in module.named_modules():
        if isinstance(layer, MixtureOfExperts):
            for number, expert in layer.experts.items():
                found[".".join(filter(None, [name, "expert", number]))] = LayerExpert(expert, optimizer)
    return found


def shared_state(module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> SharedState:
    """All of a model but its experts, which all ranks have alike, to be saved beside them. Local.

    Parameters
    ----------
    module, optimizer
        As in :func:`layer_experts`. Not of a pipeline, of which each rank has other layers.

    Examples
    --------
    >>> parts = {"trunk": hpcpar.nn.shared_state(model, opt), **hpcpar.nn.layer_experts(model, opt)}
    >>> hpcpar.checkpoint.save_experts("run/step-100", parts, comm)
    >>> hpcpar.checkpoint.load_experts("run/step-100", parts, comm)  # on any number of ranks
    """
    module = _unwrapped(module)
    apart = own_tensors(module)
    named: list[tuple[str, torch.Tensor]] = [*module.named_parameters(), *module.named_buffers()]
    return SharedState({name: tensor for name, tensor in named if id(tensor) not in apart}, optimizer)


def _unwrapped(module: nn.Module) -> nn.Module:
    """The model inside of data parallelism, of a pipeline, and of ``torch.compile``. Local."""
    while True:
        if isinstance(module, DataParallel):
            module = module.module
        elif isinstance(module, Pipeline):
            return module.layers
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        else:
            return module


class SharedState:
    """Tensors by name, and an optimizer's state of them, which can be taken and given back. Local.

    Parameters
    ----------
    tensors
        Parameters and buffers.
    optimizer
        Of the parameters, among others; ``None`` for states without it.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer | None) -> None:
        self._tensors = dict(tensors)
        self._optimizer = optimizer

    def get_full_state(self) -> dict[str, Any]:
        """A copy: ``model``, and by parameter name ``optimizer``, ``None`` without one. Local."""
        self._settle()
        model = {name: value.detach().clone() for name, value in self._tensors.items()}
        if self._optimizer is None:
            return {"model": model, "optimizer": None}
        states = {
            name: copy.deepcopy(dict(self._optimizer.state[tensor]))
            for name, tensor in self._tensors.items()
            if tensor in self._optimizer.state
        }
        return {"model": model, "optimizer": states}

    @torch.no_grad()
    def load_full_state(self, state: Mapping[str, Any]) -> None:
        """Go on from such a state. Local.

        Raises
        ------
        MismatchError
            When it is not one of such tensors, or lacks the optimizer's part that is wanted here.
        """
        if self._optimizer is not None and state.get("optimizer") is None:
            raise MismatchError("the state must have that of its optimizer, got one without")
        wanted = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        given = {name: tuple(tensor.shape) for name, tensor in state.get("model", {}).items()}
        if wanted != given:
            different = sorted(set(wanted.items()) ^ set(given.items()))
            raise MismatchError(
                f"the state must be of the same names and shapes, got another in {different[0][0]!r}"
            )
        self._settle()
        for name, tensor in self._tensors.items():
            tensor.copy_(state["model"][name])
            if self._optimizer is not None:
                self._load_optimizer(tensor, state["optimizer"].get(name))

    def _load_optimizer(self, tensor: torch.Tensor, saved: Mapping[str, Any] | None) -> None:
        assert self._optimizer is not None
        self._optimizer.state.pop(tensor, None)
        if saved is not None:
            self._optimizer.state[tensor] = {
                key: value.to(tensor.device, copy=True) if _is_elementwise(value) else copy.copy(value)
                for key, value in saved.items()
            }

    def _settle(self) -> None:
        """An overlapping optimizer may have steps to do."""
        finish = getattr(self._optimizer, "finish", None)
        if finish is not None:
            finish()


class LayerExpert(SharedState):
    """One expert of a layer, as something whose state can be taken and given back. Local.

    Parameters
    ----------
    expert
        The module.
    optimizer
        Of its parameters, among others; ``None`` for states without it.
    """

    def __init__(self, expert: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        state = expert.state_dict(keep_vars=True)
        tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
        super().__init__(tensors, optimizer)


def _is_elementwise(value: object) -> bool:
    """Whether it belongs where the parameter is; counts of steps stay on the host."""
    return isinstance(value, torch.Tensor) and value.dim() > 0
