"""What hpcpar/xla/adapter.py calls of torch_xla, on devices that are pretended: copies on the host.

It proves what hpcpar does around devices: who gets which samples, what is summed, what becomes of errors.
Nothing is lazy here, so nothing is compiled, and host tensors do not fail where a device's are needed. Tests
of those are marked ``xla`` and need the real one.
"""

from __future__ import annotations

import torch

__all__ = ["device", "sync"]


def device(index: int | None = None) -> torch.device:
    return torch.device("cpu", index or 0)


def sync() -> None:
    """Everything was done at once."""
