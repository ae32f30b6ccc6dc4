"""hpcpar trains PyTorch models over MPI: data parallel, pipelines, experts, ranks of unequal speed.

Start a script with ``mpirun -n 64 python train.py``; see the README for a first one. Importing this package
does not start MPI.
"""

import importlib
from types import ModuleType

from hpcpar import comm, errors, jobs, logs, nn, optim

__all__ = ["__version__", "checkpoint", "comm", "data", "errors", "jobs", "logs", "nn", "optim"]

__version__ = "0.1.0"


def __getattr__(name: str) -> ModuleType:
    """Import the packages that bring others with them (h5py, torch-xla) when they are first used."""
    if name in ("checkpoint", "data", "xla"):
        return importlib.import_module(f"hpcpar.{name}")
    raise AttributeError(f"module 'hpcpar' has no attribute {name!r}")
