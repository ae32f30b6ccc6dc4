"""Which transport a reducer gets: what was asked for, or what fits best; the same on every rank.

Shared memory where ranks share a node and ``/dev/shm`` has room on all of them, MPI's messages otherwise. A
fallback is logged once, because it is slower and can be cured.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING

import torch

from hpcpar.comm.bucket import BucketLayout
from hpcpar.comm.shared_memory import has_space
from hpcpar.comm.transport import (
    MessageTransport,
    Partitions,
    SharedMemoryTransport,
    SingleTransport,
    Transport,
    segment_layout,
)
from hpcpar.errors import HpcparError, MismatchError

if TYPE_CHECKING:
    from hpcpar.comm.communicator import Communicator

__all__ = ["TransportKind", "choose_transport"]

_LOG = logging.getLogger(__name__)


class TransportKind(Enum):
    """How buckets travel; see :mod:`hpcpar.comm.transport`."""

    AUTO = "auto"
    SHARED_MEMORY = "shared_memory"
    MPI = "mpi"


def choose_transport(
    comm: Communicator,
    layouts: Sequence[BucketLayout],
    transport: str,
    wire_dtype: torch.dtype | None,
    partitions: Partitions,
    *,
    pinned: bool,
) -> tuple[Transport, str]:
    """The transport asked for, or the best that fits, and its name; the same on every rank. Collective.

    Parameters
    ----------
    comm, layouts, wire_dtype, partitions, pinned
        As in :class:`~hpcpar.comm.transport.SharedMemoryTransport`.
    transport
        A value of :class:`TransportKind`.

    Raises
    ------
    MismatchError
        For an unknown name.
    HpcparError
        When shared memory is asked for and has no room.
    """
    try:
        kind = TransportKind(transport)
    except ValueError:
        choices = ", ".join(repr(kind.value) for kind in TransportKind)
        raise MismatchError(f"transport must be one of {choices}, got {transport!r}") from None
    if comm.size == 1:
        return SingleTransport(layouts), "none"
    shared = "shared_memory" if comm.num_nodes == 1 else "shared_memory+rails"
    if kind is TransportKind.MPI or (kind is TransportKind.AUTO and comm.node_map.largest_node == 1):
        return MessageTransport(comm, layouts, wire_dtype, partitions, pinned=pinned), "mpi"
    _, nbytes = segment_layout(layouts)
    if has_space(comm, nbytes):
        return SharedMemoryTransport(comm, layouts, wire_dtype, partitions, pinned=pinned), shared
    if kind is TransportKind.SHARED_MEMORY:
        raise HpcparError(
            f"transport='shared_memory' must find room for {nbytes / 2**20:.1f} MiB per rank in /dev/shm on "
            f"every node, got less. Enlarge it (docker: --shm-size) or use transport='auto'"
        )
    if comm.rank == 0:
        _LOG.warning(
            "/dev/shm has no room for %.1f MiB per rank on every node; buckets go by MPI messages, which is "
            "slower. Enlarge it (docker: --shm-size).",
            nbytes / 2**20,
        )
    return MessageTransport(comm, layouts, wire_dtype, partitions, pinned=pinned), "mpi"
