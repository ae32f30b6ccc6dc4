"""Sums of GPU buckets inside a node by torch's own NCCL group, so that they need not cross to the host.

A reduction that stays within the node has nothing to do on the host when its buckets are on GPUs: NCCL sums
them over the links between these. The group is one of ``torch.distributed`` without its global state, whose
ranks find each other through a file on their node, so it needs no address and no port::

                       bucket on a GPU                         bucket on the host
    all ranks          staging, shared memory, rails           shared memory, rails
    within the node    NCCL                                    shared memory

Invariants: a bucket is given to the group when the kernels that fill it have ended, and is done when the
sum is there, so streams need not be ordered with those of the program. Every rank of the node starts buckets
in index order, as all transports want it.

Any backend of ``torch.distributed`` with an ``allreduce`` will do; gloo serves tests on the host.
"""

from __future__ import annotations

import datetime
import logging
import math
import os
import tempfile
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from hpcpar.comm.progress import timeout_from_environment
from hpcpar.comm.transport import Transport, scale_by

if TYPE_CHECKING:
    from hpcpar.comm.communicator import Communicator
    from hpcpar.comm.reducer import Reducer

__all__ = ["DeviceGroup", "DeviceTransport", "make_device_group"]

_LOG = logging.getLogger(__name__)
_FOREVER_S = 10 * 365 * 24 * 3600.0


class DeviceGroup:
    """The ranks of a node as a group of ``torch.distributed``. Collective over the node.

    Parameters
    ----------
    node
        The ranks that share this machine.
    backend
        ``"nccl"``, for which each rank must have a GPU of its own, or ``"gloo"`` for the host.
    """

    def __init__(self, node: Communicator, backend: str = "nccl") -> None:
        self._node = node
        self._group: Any = None
        if node.size == 1:
            return
        folder = tempfile.mkdtemp(prefix="hpcpar-group-") if node.rank == 0 else None
        self._folder: str = node.bcast(folder, 0)
        path = os.path.join(self._folder, "store")
        store = distributed.FileStore(path, node.size)  # type: ignore[attr-defined]
        seconds = timeout_from_environment()
        timeout = datetime.timedelta(seconds=_FOREVER_S if math.isinf(seconds) else seconds)
        self._group = _BACKENDS[backend](store, node.rank, node.size, timeout)

    def start(self, flat: torch.Tensor) -> Any:
        """Begin to sum a flat tensor in place. Collective over the node, does not wait.

        Returns
        -------
        torch.distributed.Work
            Its ``is_completed()`` tells whether the sum is there.
        """
        return _Completed() if self._group is None else self._group.allreduce([flat])

    def carry(self, reducer: Reducer) -> None:
        """Sum the reducer's buckets on devices when a step stays within the node. Local, once per reducer."""
        buckets = {index for index, staging in enumerate(reducer._stagings) if staging.copies}
        reducer._transport = DeviceTransport(reducer._transport, self, reducer.flats, buckets)
        for bucket in buckets:
            reducer._stagings[bucket].stays = lambda: reducer._within_node

    def free(self) -> None:
        """End the group. Collective over the node."""
        if self._group is None:
            return
        self._node.Barrier()  # nobody's sum is under way any more
        self._group.shutdown()
        if self._node.rank == 0:
            for name in os.listdir(self._folder):
                os.unlink(os.path.join(self._folder, name))
            os.rmdir(self._folder)


class _Completed:
    """The work of one rank."""

    def is_completed(self) -> bool:
        """It is. Local."""
        return True

    def wait(self) -> None:
        """Nothing to wait for."""


class DeviceTransport(Transport):
    """Hands buckets on devices to a group when they stay within the node, all else to another transport.

    Parameters
    ----------
    host
        The other transport.
    group
        Of this node's ranks.
    flats
        The flat tensor of each bucket, where the program fills it.
    buckets
        Which of them are on devices.
    """

    def __init__(
        self, host: Transport, group: DeviceGroup, flats: list[torch.Tensor], buckets: Collection[int]
    ) -> None:
        self._host, self._group = host, group
        self._flats, self._buckets = flats, buckets
        self._works: dict[int, Any] = {}
        self.storage = host.storage

    def publish(self, bucket: int, step: int, scale: float, *, within_node: bool = False) -> None:
        """Start the sum, scaled before it, so that a 16-bit one does not overflow."""
        if not (within_node and bucket in self._buckets):
            self._host.publish(bucket, step, scale, within_node=within_node)
            return
        scale_by(self._flats[bucket], scale)
        self._works[bucket] = self._group.start(self._flats[bucket])

    def advance(self, bucket: int, step: int) -> bool:
        """Look whether it is there."""
        if bucket not in self._works:
            return self._host.advance(bucket, step)
        if not self._works[bucket].is_completed():
            return False
        self._works.pop(bucket).wait()  # it has ended: raises if it failed, and orders the current stream
        return True

    def delivered(self, rank: int, bucket: int, step: int) -> bool | None:
        """The group does not tell."""
        return None if bucket in self._works else self._host.delivered(rank, bucket, step)

    def owes(self, rank: int, bucket: int, step: int) -> str:
        """The group does not tell."""
        return "" if bucket in self._works else self._host.owes(rank, bucket, step)

    def outstanding(self, bucket: int) -> torch.Tensor:
        """What the other transport has kept back; nothing is within a node."""
        return self._host.outstanding(bucket)

    def load_outstanding(self, bucket: int, total: torch.Tensor) -> None:
        """For the other transport."""
        self._host.load_outstanding(bucket, total)

    def free(self) -> None:
        """Free the other transport; the group may carry more than one reducer."""
        super().free()
        self._flats = []
        self._host.free()


def make_device_group(node: Communicator, device: torch.device) -> DeviceGroup | None:
    """NCCL for the ranks of a node, if torch has it and each has a GPU of its own. Collective over the node.

    Parameters
    ----------
    node
        The ranks of this node.
    device
        Where this rank's model is.

    Returns
    -------
    DeviceGroup or None
        The same on all ranks of the node.
    """
    everyone: list[str | None] = node.allgather(_gpu_identity(device))
    if None in everyone:
        return None
    if len(set(everyone)) < node.size:
        if node.rank == 0:
            _LOG.warning(
                "ranks of one node share GPUs, which NCCL does not allow; gradients are averaged by way of "
                "the host. Give each rank a GPU of its own."
            )
        return None
    return DeviceGroup(node)


def _gpu_identity(device: torch.device) -> str | None:
    if device.type != "cuda" or not (distributed.is_available() and distributed.is_nccl_available()):
        return None
    return str(torch.cuda.get_device_properties(device).uuid)


def _nccl(store: Any, rank: int, size: int, timeout: datetime.timedelta) -> Any:
    group: Any = distributed.ProcessGroupNCCL  # in CUDA builds only
    options = group.Options()
    options._timeout = timeout
    return group(store, rank, size, options)


def _gloo(store: Any, rank: int, size: int, timeout: datetime.timedelta) -> Any:
    group: Any = distributed.ProcessGroupGloo
    options = group._Options()
    options._timeout = timeout
    options._devices = [group.create_device(hostname="127.0.0.1")]  # all on this machine
    return group(store, rank, size, options)


_BACKENDS: dict[str, Callable[[Any, int, int, datetime.timedelta], Any]] = {"nccl": _nccl, "gloo": _gloo}
