"""Torch tensors over MPI: communicators, topology, shared memory, and the reducer.

This package knows nothing of modules, gradients or optimizers, and it is the only one that imports mpi4py.
Importing it does not start MPI; the first communicator does.
"""

from hpcpar.comm.alarm import Alarm, wait_for_peers
from hpcpar.comm.bucket import BucketLayout, Slot, plan_buckets, view_slot
from hpcpar.comm.calls import Call, CallExchange, ServedCall
from hpcpar.comm.communicator import Communicator, world
from hpcpar.comm.mpi import MPI, threads_allowed
from hpcpar.comm.parcels import Incoming, ParcelExchange
from hpcpar.comm.progress_thread import ProgressThread
from hpcpar.comm.reducer import Reducer, ReducerStats
from hpcpar.comm.request import Request, wait_all
from hpcpar.comm.tensor_spec import TensorSpec
from hpcpar.comm.topology import NodeMap, ProcessGrid
from hpcpar.comm.transport_choice import TransportKind

__all__ = [
    "MPI",
    "Alarm",
    "BucketLayout",
    "Call",
    "CallExchange",
    "Communicator",
    "Incoming",
    "NodeMap",
    "ParcelExchange",
    "ProcessGrid",
    "ProgressThread",
    "Reducer",
    "ReducerStats",
    "Request",
    "ServedCall",
    "Slot",
    "TensorSpec",
    "TransportKind",
    "plan_buckets",
    "threads_allowed",
    "view_slot",
    "wait_all",
    "wait_for_peers",
    "world",
]
