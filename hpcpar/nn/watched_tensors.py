"""Which tensors have changed? Written in place, or put in the place of another under the same name.

Modules change their buffers either way: ``self.running.mul_(0.9)`` raises the tensor's version, and
``self.running = 0.9 * self.running`` makes a new one. Versions are not enough: ``batch_norm`` writes its
running statistics without raising them. So the contents of all but large tensors are compared with a copy.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["WatchedTensors"]

_COPIED_BYTES = 1 << 20


class WatchedTensors:
    """Notices changes of named tensors since it was made, or since :meth:`remember`. Local.

    Parameters
    ----------
    tensors
        Returns the tensors by name. Names that appear later are ignored.

    Attributes
    ----------
    names : list of str
        The tensors that are watched.
    """

    def __init__(self, tensors: Callable[[], dict[str, torch.Tensor]]) -> None:
        self._tensors = tensors
        self.names = list(tensors())
        self._seen: dict[str, _Memory] = {}
        self.remember()

    def remember(self) -> None:
        """Take the present state for the unchanged one."""
        now = self._tensors()
        for name in self.names:
            if name in now and (name not in self._seen or self._seen[name].differs(now[name])):
                self._seen[name] = _Memory(now[name])

    def changes(self) -> list[float]:
        """A number for each name, 1.0 if it has changed; of one that is gone 0.0."""
        now = self._tensors()
        return [float(name in now and self._seen[name].differs(now[name])) for name in self.names]


class _Memory:
    """What a tensor was. It is kept itself, so that a new one cannot get its identity."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self._version = _version(tensor)
        self._copy = tensor.detach().clone() if tensor.nbytes <= _COPIED_BYTES else None

    def differs(self, tensor: torch.Tensor) -> bool:
        if tensor is not self._tensor or _version(tensor) != self._version:
            return True
        return self._copy is not None and not torch.equal(self._copy, tensor)


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
