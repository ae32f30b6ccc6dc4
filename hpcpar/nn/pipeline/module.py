"""The module side of a pipeline: this rank's layers under the names that they have in the unsplit model.

A container holds the layers of this rank, registered under their names in the whole model, so that
``named_parameters``, ``state_dict`` and optimizers see what they would see of the whole model, only less.
What concerns all stages (complete states, the norm of all gradients) is collective.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hpcpar.errors import MismatchError
from hpcpar.nn.own_gradients import own_gradient_modules, own_tensors
from hpcpar.nn.pipeline.state import StateOfStages

if TYPE_CHECKING:
    from hpcpar.comm import Alarm, Communicator

__all__ = ["PipelineModule"]


class PipelineModule(nn.Module):
    """Base of :class:`~hpcpar.nn.Pipeline`: parameters, gradients and states.

    Attributes
    ----------
    layers : torch.nn.Module
        Container of this rank's layers.
    """

    _comm: Communicator
    _state: StateOfStages
    _alarm: Alarm
    _placeholder: nn.Parameter
    _later_copies: Set[int]
    device: torch.device

    def __init__(self) -> None:
        super().__init__()
        # Past nn.Module, which would register it: it is in no state.
        self.__dict__["_placeholder"] = nn.Parameter(torch.empty(0))
        self.layers = nn.Module()

    def _open_state(
        self,
        order: tuple[str, ...],
        copies: Sequence[tuple[Communicator, Sequence[nn.Parameter]]],
        later_copies: Set[int],
    ) -> None:
        """After the layers have been registered. Collective.

        Parameters
        ----------
        order
            Names of all layers of the model.
        copies
            Parameters that other ranks have, too, with these ranks.
        later_copies
            Identities of the parameters that an earlier rank has, too.
        """
        self._state = StateOfStages(self.layers, self._comm, order, copies, self._placeholder)
        self._later_copies = later_copies

    def _listening(self) -> AbstractContextManager[None]:
        """Around a collective: hear that another rank has failed."""
        return self._alarm.armed()

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """Scale all gradients so that their norm over all stages is at most ``max_norm``. Collective.

        Returns
        -------
        torch.Tensor
            The norm before, 0-d; parameters that several ranks hold count once.
        """
        apart = self._later_copies | own_tensors(self.layers)
        counted = [p.grad for p in self.layers.parameters() if p.grad is not None and id(p) not in apart]
        mine = [float(torch.nn.utils.get_total_norm(counted, norm_type))]
        with self._listening():
            mine += [experts.gradient_norm(norm_type) for experts in own_gradient_modules(self.layers)]
            norms = [norm for part in self._comm.allgather(mine) for norm in part]
        # Combined in one order on all ranks, so that all scale by the same number.
        total = (
            max(norms) if norm_type == float("inf") else sum(n**norm_type for n in norms) ** (1 / norm_type)
        )
        norm = torch.tensor(total, dtype=torch.float64)
        torch.nn.utils.clip_grads_with_norm_(self.layers.parameters(), max_norm, norm.to(self.device))
        return norm

    def state_dict(self, *args: Any, full: bool = True, **kwargs: Any) -> Any:
        """Parameters and buffers under the names of the unsplit model.

        Parameters
        ----------
        full
            Those of all stages, complete on every rank: Collective. ``False`` for this rank's own: Local.

        Notes
        -----
        With any other argument, as other modules call it, it is local.
        """
        local = self.layers.state_dict(*args, **kwargs)
        if args or kwargs or not full:
            return local
        with self._listening():
            return self._state.gather(local)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Take the parameters of this rank's layers from a state of the unsplit model. Local.

        Raises
        ------
        MismatchError
            With ``strict``, when names of this rank are missing or the state has names that no stage knows.
            With ``assign``: a pipeline keeps its parameters, to which reductions and optimizers hold.
        """
        if assign:
            raise MismatchError("load_state_dict of a pipeline must copy, got assign=True")
        return self._state.load(state_dict, strict=strict)

    def optimizer_state_dict(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The state of every rank's optimizer by parameter names of the unsplit model. Collective.

        Without those of experts, which are saved one by one, see :func:`hpcpar.nn.layer_experts`.

        Returns
        -------
        dict
            ``"state"``: name to state; ``"param_groups"``: options and ``"params"``, a list of names.
        """
        with self._listening():
            return self._state.gather_optimizer(optimizer)

    def load_optimizer_state_dict(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """Take this rank's part of what :meth:`optimizer_state_dict` returned, on any number of ranks.

        Local.
        """
        self._state.load_optimizer(optimizer, state)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Parameters of this rank; where it has none, an empty one for the optimizer. Local."""
        found = [parameter for _, parameter in self.named_parameters(recurse=recurse)]
        yield from found or [self._placeholder]

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters of this rank under the names of the unsplit model. Local."""
        return self.layers.named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """Buffers of this rank under the names of the unsplit model. Local."""
        return self.layers.named_buffers(*args, **kwargs)
