"""What DASO wants of the things that it is given: a model that knows its node, a scaler with a state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from hpcpar.comm import NodeMap

__all__ = ["GradScalerLike", "NodeModel"]


class NodeModel(Protocol):
    """A model whose gradients are averaged over all ranks, or those of this node."""

    within_node: bool

    @property
    def node_map(self) -> NodeMap:
        """Which ranks are on which node."""

    def replicated_tensors(self) -> dict[str, torch.Tensor]:
        """The parameters and the buffers of which replicas hold the same values, by name."""


class GradScalerLike(Protocol):
    """A ``torch.amp.GradScaler``."""

    def state_dict(self) -> dict[str, Any]:
        """Scale and counts."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them."""
