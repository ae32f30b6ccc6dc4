"""An optimizer that stands in front of another: groups, state, defaults and all else are those of the other.

It is a ``torch.optim.Optimizer``, so learning-rate schedulers and ``torch.amp.GradScaler`` take it; what they
change in its groups is what the wrapped optimizer steps with.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["WrappedOptimizer"]


class WrappedOptimizer(torch.optim.Optimizer):
    """Hands everything that a subclass does not define to ``self.optimizer``. Local.

    Parameters
    ----------
    optimizer
        The one to wrap.

    Raises
    ------
    TypeError
        When it is none of torch's kind.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        # No super().__init__: that would make groups, state and hooks of our own.
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"the optimizer in {type(self).__name__} must be a torch optimizer, got "
                f"{type(optimizer).__name__}"
            )
        self.optimizer = optimizer

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch. Local."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch, before the model is wrapped. Local."""
        self.optimizer.add_param_group(param_group)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of the wrapped optimizer. Local."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The state of the wrapped optimizer. Local."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The defaults of the wrapped optimizer. Local."""
        return self.optimizer.defaults

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            f"{type(self).__name__} must not be pickled or copied: it belongs to its ranks. Use state_dict()"
        )
