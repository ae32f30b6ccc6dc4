"""The state of a layer whose experts are spread: names are those of one process that has all experts.

A state dict of a rank has the experts of that rank, under their numbers. One of all ranks has them all, and
loads on any number of ranks: each takes its own and ignores the others.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

__all__ = ["expert_number", "ignore_absent_experts"]

_NAME = re.compile(r"experts\.(\d+)\.")


def expert_number(name: str) -> int | None:
    """The expert that a tensor is of, by its name in a layer; ``None`` for none. Local."""
    match = _NAME.match(name)
    return None if match is None else int(match[1])


def ignore_absent_experts(layer: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Drop the tensors of experts that live on other ranks, before a state is loaded. Local."""
    local = {int(number) for number in layer.get_submodule("experts")._modules}
    for name in list(state):
        number = expert_number(name[len(prefix) :]) if name.startswith(prefix) else None
        if number is not None and number not in local and number < layer.num_experts:  # type: ignore[operator]
            del state[name]
