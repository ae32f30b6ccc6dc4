"""The state of a pipeline, under the names of the unsplit model.

Each rank's layers are registered under the names they have in the whole model, so its own state needs no
translation. Complete states are gathered; a rank loads what is its own out of a complete one, which is why a
checkpoint does not know how many stages there were. Optimizers number their parameters; here they are named,
by the first name that a parameter has in the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hpcpar.comm import broadcast_packed
from hpcpar.errors import MismatchError
from hpcpar.nn.own_gradients import SpreadState, own_tensors

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["StateOfStages"]


class StateOfStages:
    """Gathers and distributes states. Collective to make.

    Parameters
    ----------
    layers
        Container of this rank's layers under their names in the whole model.
    comm
        The ranks of the pipeline.
    order
        Names of all layers, in order.
    copies
        Parameters that other ranks have, too, in the same order there, with a communicator of these ranks.
    placeholder
        What a rank without parameters gives to its optimizer.
    """

    def __init__(
        self,
        layers: nn.Module,
        comm: Communicator,
        order: tuple[str, ...],
        copies: Sequence[tuple[Communicator, Sequence[nn.Parameter]]],
        placeholder: nn.Parameter,
    ) -> None:
        self._layers = layers
        self._placeholder = placeholder
        self._apart = own_tensors(layers)
        self._comm = comm
        self._place = {name: index for index, name in enumerate(order)}
        self._spread = {name: part for name, part in layers.named_modules() if isinstance(part, SpreadState)}
        mine = list(layers.state_dict().keys())
        for prefix, part in self._spread.items():
            mine += [f"{prefix}.{name}" for name in part.full_state_names()]
        self._known = {name for names in comm.allgather(mine) for name in names}
        aliases: dict[int, list[str]] = {}
        for name, parameter in layers.named_parameters(remove_duplicate=False):
            aliases.setdefault(id(parameter), []).append(name)
        self._aliases = {id(p): aliases[id(p)] for p in layers.parameters()}
        for group, parameters in copies:
            theirs = group.allgather([self._aliases[id(p)] for p in parameters])
            for parameter, names in zip(parameters, zip(*theirs, strict=True), strict=True):
                # In one order on all ranks and on any number of them: the first one names the state.
                everywhere = {name for some in names for name in some}
                self._aliases[id(parameter)] = sorted(everywhere, key=self._place_of)

    def gather(self, local: Mapping[str, Any]) -> dict[str, Any]:
        """The states of all ranks together, in the order of the layers. Collective.

        Over the replicas as well, when there are layers of which each has a part.
        """
        local = dict(local)
        for prefix, part in self._spread.items():
            local.update({f"{prefix}.{name}": value for name, value in part.full_state_dict().items()})
        full: dict[str, Any] = {}
        for root in range(self._comm.size):
            full.update(self._broadcast(local, root))
        return dict(sorted(full.items(), key=lambda item: self._place_of(item[0])))

    def load(self, state: Mapping[str, Any], *, strict: bool) -> Any:
        """Load this rank's part. Local."""
        own = self._layers.state_dict().keys()
        missing = [name for name in own if name not in state]
        unexpected = [name for name in state if name not in self._known]
        if strict and (missing or unexpected):
            raise MismatchError(
                f"a state must have the names of the unsplit model, got {missing or 'none'} missing for rank "
                f"{self._comm.rank} and {unexpected or 'none'} that no stage knows. strict=False ignores them"
            )
        mine = {name: value for name, value in state.items() if name in own}
        self._layers.load_state_dict(mine, strict=False)
        return nn.modules.module._IncompatibleKeys(missing, unexpected)

    def gather_optimizer(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The states of all ranks' optimizers by name, without those of experts. Collective."""
        groups = [
            {**{k: v for k, v in group.items() if k not in ("params", "param_names")},
             "params": [self._name(p) for p in group["params"] if not self._is_left_out(p)]}
            for group in optimizer.param_groups
        ]  # fmt: skip
        states = {
            self._name(p): dict(state) for p, state in optimizer.state.items() if not self._is_left_out(p)
        }
        full: dict[str, Any] = {"state": {}, "param_groups": []}
        for root in range(self._comm.size):
            theirs = self._comm.bcast(groups, root)
            full["state"].update(_unflatten(self._broadcast(_flatten(states), root)))
            for index, group in enumerate(theirs):
                if index == len(full["param_groups"]):
                    full["param_groups"].append({**group, "params": []})
                known = full["param_groups"][index]["params"]
                known.extend(name for name in group["params"] if name not in known)
        return full

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """Load this rank's part into an optimizer with as many groups. Local."""
        if len(optimizer.param_groups) != len(state["param_groups"]):
            raise MismatchError(
                "an optimizer must have as many parameter groups as its state, got "
                f"{len(optimizer.param_groups)} groups for a state of {len(state['param_groups'])}"
            )
        numbered: dict[str, Any] = {"state": {}, "param_groups": []}
        number = 0
        for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
            numbers = range(number, number + len(group["params"]))
            number = numbers.stop
            numbered["param_groups"].append({**group, **saved, "params": list(numbers)})
            numbered["param_groups"][-1].pop("param_names", None)
            for place, parameter in zip(numbers, group["params"], strict=True):
                if self._is_left_out(parameter):
                    if parameter in optimizer.state:
                        numbered["state"][place] = optimizer.state[parameter]
                    continue
                self._check_known(parameter, saved["params"])
                found = next((n for n in self._aliases[id(parameter)] if n in state["state"]), None)
                if found is not None:
                    numbered["state"][place] = state["state"][found]
        optimizer.load_state_dict(numbered)

    def _check_known(self, parameter: torch.Tensor, names: Sequence[str]) -> None:
        name = self._name(parameter)
        if not set(self._aliases[id(parameter)]) & set(names):
            raise MismatchError(
                f"the state of an optimizer must have parameter {name!r} in the group in which it is here, "
                f"got a group of {len(names)} others. Make the groups as they were when the state was saved"
            )

    def _is_left_out(self, parameter: torch.Tensor) -> bool:
        """Whether it stands for none, or is an expert's, of which other replicas have not heard."""
        return parameter is self._placeholder or id(parameter) in self._apart

    def _place_of(self, name: str) -> int:
        return self._place.get(name.partition(".")[0], 0)

    def _name(self, parameter: torch.Tensor) -> str:
        if id(parameter) not in self._aliases:
            raise MismatchError(
                "an optimizer must hold parameters of this pipeline, got one of shape "
                f"{tuple(parameter.shape)} that is not. Make it from pipe.parameters()"
            )
        return self._aliases[id(parameter)][0]

    def _broadcast(self, entries: dict[Any, Any], root: int) -> dict[Any, Any]:
        """One rank's entries on all: tensors by value, the rest as objects. Collective."""
        heads = {
            key: (value.shape, value.dtype) if isinstance(value, torch.Tensor) else None
            for key, value in entries.items()
        }
        rest = {key: value for key, value in entries.items() if not isinstance(value, torch.Tensor)}
        heads, rest = self._comm.bcast((heads, rest), root)
        result: dict[Any, Any] = {}
        for key, head in heads.items():
            if head is None:
                result[key] = rest[key]
            elif self._comm.rank == root:
                # A copy, as all other ranks get one: a state must not change in part when training goes on.
                result[key] = entries[key].detach().to("cpu", copy=True)
            else:
                result[key] = torch.empty(head[0], dtype=head[1])
        tensors = [result[key] for key, head in heads.items() if head is not None]
        broadcast_packed(tensors, self._comm, root)
        return result


def _flatten(states: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, str], Any]:
    return {(name, key): value for name, state in states.items() for key, value in state.items()}


def _unflatten(entries: Mapping[tuple[str, str], Any]) -> dict[str, dict[str, Any]]:
    states: dict[str, dict[str, Any]] = {}
    for (name, key), value in entries.items():
        states.setdefault(name, {})[key] = value
    return states
