"""Modules that reduce gradients of their own, inside a data-parallel model.

A wrapper such as :class:`~hpcpar.nn.DataParallel` takes all ranks for replicas of one model. Some modules are
not: of a mixture of experts each rank has other experts, and only ranks with the same ones may add up their
gradients. Such a module says which parameters and buffers are its own business. The wrapper leaves these
alone, and tells the module over which ranks its gradients are to be a mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import nn

if TYPE_CHECKING:
    import torch

    from hpcpar.comm import Communicator
    from hpcpar.nn.reduction_options import ReductionOptions

__all__ = [
    "InjectsLosses",
    "OwnGradients",
    "SpreadState",
    "own_gradient_modules",
    "own_tensors",
    "replicated_buffers",
    "replicated_parameters",
]


@runtime_checkable
class OwnGradients(Protocol):
    """What a wrapper wants of a module that reduces some of its gradients itself.

    Attributes
    ----------
    synchronize : bool
        Whether the next backward reduces; false accumulates on this rank only.
    """

    synchronize: bool

    def own_parameters(self) -> list[nn.Parameter]:
        """Parameters whose gradients only this module may reduce. Local."""

    def own_buffers(self) -> list[torch.Tensor]:
        """Buffers that are not the same on all ranks. Local."""

    def share_gradients(self, comm: Communicator, *, average: bool, options: ReductionOptions) -> None:
        """From now on reduce over ``comm``, which has all ranks of the wrapper. Collective."""

    def keep_gradients(self) -> None:
        """End that; the module works by itself again. Collective."""

    def reduce_now(self) -> None:
        """Reduce the gradients that have accumulated without synchronisation. Collective."""

    def give_up(self) -> None:
        """Leave a reduction unfinished, since another rank has failed. Local."""

    def gradient_norm(self, norm_type: float) -> float:
        """Norm of the gradients of all such modules' own parameters together, each once. Collective."""

    def watch(self, outputs: object) -> None:
        """Notice when backward reaches an output of the whole model. Local."""


@runtime_checkable
class InjectsLosses(Protocol):
    """A module with losses of its own, which it can add to the backward pass where nobody else can."""

    def inject_losses(self, scale: float | None) -> None:
        """From now on give these losses the gradient ``scale`` in every backward. Local."""


@runtime_checkable
class SpreadState(Protocol):
    """A module of which each replica holds a part of the state."""

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """All of it, under the names that it has in one process. Collective."""

    def full_state_names(self) -> list[str]:
        """The names of all of it. Collective."""


def own_gradient_modules(module: nn.Module) -> list[OwnGradients]:
    """The modules inside ``module`` that reduce gradients of their own, in order. Local."""
    return [part for part in module.modules() if isinstance(part, OwnGradients)]


def own_tensors(module: nn.Module) -> set[int]:
    """Identities of the parameters and buffers that a wrapper must leave to such modules. Local."""
    return {
        id(tensor)
        for part in own_gradient_modules(module)
        for tensor in (*part.own_parameters(), *part.own_buffers())
    }


def replicated_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that replicas have alike, with their names. Local."""
    own = own_tensors(module)
    return [(name, parameter) for name, parameter in module.named_parameters() if id(parameter) not in own]


def replicated_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that replicas have alike, by name. Local."""
    own = own_tensors(module)
    return {name: buffer for name, buffer in module.named_buffers() if id(buffer) not in own}
