"""hpcpar trains PyTorch models over MPI: data parallel, pipelines, experts, ranks of unequal speed.

Start a script with ``mpirun -n 64 python train.py``; see the README for a first one. Importing this package
does not start MPI.
"""

from hpcpar import comm, errors, nn, optim

__all__ = ["__version__", "comm", "errors", "nn", "optim"]

__version__ = "0.1.0"
