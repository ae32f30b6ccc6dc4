"""Which optimizers may be cut anywhere, and what they are given.

An *elementwise* algorithm updates each element from its own gradient and state, and numbers that are the
same for all. Cut anywhere, it does the same as on whole tensors. Others look at a whole tensor (its rows and
columns, its norm, its matrix), and must get it whole. Some look at all tensors at once and cannot be split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from hpcpar.errors import HpcparError, MismatchError

__all__ = ["choose_cut", "describe", "digest", "parameter_groups"]

_ELEMENTWISE = (
    torch.optim.ASGD,
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.SGD,
)
_INSEPARABLE = (torch.optim.LBFGS, torch.optim.SparseAdam)
_CUTS = {None, "anywhere", "tensors"}


def choose_cut(optimizer_class: Any, wanted: str | None) -> str:
    """``"anywhere"`` for algorithms known to be elementwise, else ``"tensors"``; or what is wanted. Local.

    Raises
    ------
    TypeError
        When it is not a class of optimizers.
    HpcparError
        For an algorithm that cannot be split.
    MismatchError
        For an unknown wish.
    """
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)):
        raise TypeError(
            f"optimizer_class of ShardedOptimizer must be a class such as torch.optim.AdamW, "
            f"got {optimizer_class!r}"
        )
    if issubclass(optimizer_class, _INSEPARABLE):
        raise HpcparError(
            f"the optimizer of a ShardedOptimizer must update parameters one by one, got "
            f"{optimizer_class.__name__}"
        )
    if wanted not in _CUTS:
        raise MismatchError(f"cut must be None, 'anywhere' or 'tensors', got {wanted!r}")
    return wanted or ("anywhere" if optimizer_class in _ELEMENTWISE else "tensors")


def parameter_groups(given: Iterable[Any]) -> list[dict[str, Any]]:
    """Groups of parameters with their options, from any form that torch's optimizers take. Local.

    Raises
    ------
    TypeError, MismatchError
        For other things than parameters, for none, and for one that comes twice.
    """
    items = list(given)
    groups = items if items and isinstance(items[0], dict) else [{"params": items}]
    result = []
    for group in groups:
        members = group["params"]
        members = [members] if isinstance(members, torch.Tensor) else list(members)
        result.append({**group, "params": [_parameter(member) for member in members]})
    everything = [parameter for group in result for parameter in group["params"]]
    if not everything:
        raise MismatchError("a ShardedOptimizer must have parameters, got none")
    if len({id(parameter) for parameter in everything}) < len(everything):
        raise MismatchError("a parameter of a ShardedOptimizer must be in one group, got one that is in two")
    return result


def describe(groups: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each parameter and each option, to compare between ranks. Local."""
    lines = []
    for number, group in enumerate(groups):
        for p in group["params"]:
            kind = "trainable" if p.requires_grad else "frozen"
            lines.append(f"{kind} parameter {tuple(p.shape)} {p.dtype} of group {number}")
        lines += [f"{option} of group {number}" for option in _options(group)]
    return lines


def digest(groups: Sequence[dict[str, Any]]) -> int:
    """A number of 63 bits that differs when options differ, whatever the parameters. Local."""
    text = "\n".join(
        f"{number} {option}" for number, group in enumerate(groups) for option in _options(group)
    )
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def _options(group: dict[str, Any]) -> list[str]:
    """The options that are numbers or the like, in words."""
    plain = {name: _plain(value) for name, value in group.items() if name != "params"}
    return [f"{name} = {value!r}" for name, value in plain.items() if _is_plain(value)]


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    return tuple(_plain(item) for item in value) if isinstance(value, (list, tuple)) else value


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str, tuple))


def _parameter(member: Any) -> nn.Parameter:
    if isinstance(member, tuple) and len(member) == 2 and isinstance(member[0], str):
        member = member[1]  # torch takes named parameters, too
    if not isinstance(member, torch.Tensor) or not member.is_leaf:
        raise TypeError(f"parameters of a ShardedOptimizer must be leaf tensors, got {type(member).__name__}")
    return member  # type: ignore[return-value]
