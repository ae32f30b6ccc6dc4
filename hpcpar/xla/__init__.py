"""Devices of torch-xla, such as TPU cores, in an MPI job: each rank drives those of its host.

Needs torch-xla, ``pip install 'hpcpar[xla]'``; without it, importing this package (or naming ``hpcpar.xla``)
raises an ImportError that says so, and the rest of hpcpar works.
"""

from hpcpar.xla.adapter import local_devices
from hpcpar.xla.manager import TPUManager
from hpcpar.xla.stats import ManagerStats

__all__ = ["ManagerStats", "TPUManager", "local_devices"]
