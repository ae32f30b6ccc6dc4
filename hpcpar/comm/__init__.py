"""Torch tensors over MPI: communicators, topology, shared memory, and the reducer.

This package knows nothing of modules, gradients or optimizers, and it is the only one that imports mpi4py.
Importing it does not start MPI; the first communicator does.
"""

from hpcpar.comm.agreement import agree, check_alike
from hpcpar.comm.alarm import Alarm, wait_for_peers
from hpcpar.comm.bucket import BucketLayout, Slot, plan_buckets, view_slot
from hpcpar.comm.bulletin import Bulletin, Decide
from hpcpar.comm.calls import Call, CallExchange, ServedCall
from hpcpar.comm.communicator import Communicator, world
from hpcpar.comm.device_group import DeviceGroup, make_device_group
from hpcpar.comm.member_reduction import MemberReduction
from hpcpar.comm.mpi import MPI, threads_allowed
from hpcpar.comm.node_copy import NodeCopy
from hpcpar.comm.packed_broadcast import broadcast_packed
from hpcpar.comm.parcels import Incoming, ParcelExchange
from hpcpar.comm.partition import Partition, even_partition, gather_parts, whole_tensors
from hpcpar.comm.progress_thread import ProgressThread
from hpcpar.comm.reducer import Reducer, ReducerStats
from hpcpar.comm.request import Request, wait_all
from hpcpar.comm.tensor_spec import TensorSpec
from hpcpar.comm.topology import NodeMap, ProcessGrid
from hpcpar.comm.transport_choice import TransportKind
from hpcpar.comm.wire import WIRE_DTYPES

__all__ = [
    "MPI",
    "WIRE_DTYPES",
    "Alarm",
    "BucketLayout",
    "Bulletin",
    "Call",
    "CallExchange",
    "Communicator",
    "DeviceGroup",
    "Decide",
    "Incoming",
    "MemberReduction",
    "NodeMap",
    "NodeCopy",
    "ParcelExchange",
    "Partition",
    "ProcessGrid",
    "ProgressThread",
    "Reducer",
    "ReducerStats",
    "Request",
    "ServedCall",
    "Slot",
    "TensorSpec",
    "TransportKind",
    "agree",
    "broadcast_packed",
    "check_alike",
    "even_partition",
    "gather_parts",
    "make_device_group",
    "plan_buckets",
    "threads_allowed",
    "view_slot",
    "wait_all",
    "wait_for_peers",
    "whole_tensors",
    "world",
]
