"""Devices of torch-xla, such as TPU cores, in an MPI job: each rank drives those of its host.

Needs torch-xla; without it, importing this package (or naming ``hpcpar.xla``) raises an ImportError that says
what to install, and the rest of hpcpar works. With it, torch-xla is imported when one of the names below is
first used; a process that only reads a dataset for a manager never does so.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpcpar.xla.adapter import local_devices
    from hpcpar.xla.manager import TPUManager
    from hpcpar.xla.stats import ManagerStats

__all__ = ["ManagerStats", "TPUManager", "local_devices"]

if importlib.util.find_spec("torch_xla") is None:
    importlib.import_module("hpcpar.xla.adapter")  # says so

_HOMES = {"ManagerStats": "stats", "TPUManager": "manager", "local_devices": "adapter"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hpcpar.xla' has no attribute {name!r}")
    return getattr(importlib.import_module(f"hpcpar.xla.{_HOMES[name]}"), name)
