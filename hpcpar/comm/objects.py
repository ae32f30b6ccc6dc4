"""Python objects between ranks: mpi4py's lower-case methods, with the deadlines of the upper-case ones.

Objects are pickled, so these methods are for set-up and control, not for tensors in a training step. They
are built from the upper-case methods: lengths first, then bytes.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from hpcpar.comm.buffers import HostBuffer, block_type, memory
from hpcpar.comm.mpi import MPI
from hpcpar.comm.point_to_point import PointToPoint
from hpcpar.comm.reductions import Reductions
from hpcpar.comm.request import ObjectRequest, Request
from hpcpar.comm.transfers import Transfers
from hpcpar.errors import MismatchError

if TYPE_CHECKING:
    from mpi4py import MPI as MPITypes

__all__ = ["ObjectMessages"]


class ObjectMessages(Transfers, Reductions, PointToPoint):
    """The lower-case methods of :class:`~hpcpar.comm.communicator.Communicator`."""

    def send(self, obj: Any, dest: int, tag: int = 0) -> None:
        """Send an object. Point-to-point."""
        self.isend(obj, dest, tag).wait()

    def isend(self, obj: Any, dest: int, tag: int = 0) -> Request:
        """Start sending an object. Point-to-point."""
        return self._message("send", self.mpi.Isend, HostBuffer(_pack(obj)), dest, tag)

    def recv(
        self, source: int | None = None, tag: int | None = None, status: MPITypes.Status | None = None
    ) -> Any:
        """Receive an object. Point-to-point."""
        return self.irecv(source, tag).wait(status=status)

    def irecv(self, source: int | None = None, tag: int | None = None) -> ObjectRequest:
        """Start receiving an object; ``wait`` of the request returns it. Point-to-point."""
        source = MPI.ANY_SOURCE if source is None else source
        tag = MPI.ANY_TAG if tag is None else tag
        mpi, limit = self.mpi, self._count_limit

        def match() -> tuple[MPITypes.Request, torch.Tensor] | None:
            announced = MPI.Status()
            message = mpi.Improbe(source, tag, announced)
            if message is None:
                return None
            data = torch.empty(announced.Get_elements(MPI.BYTE), dtype=torch.uint8)
            kind, derived = block_type(data.dtype, data.numel(), limit)
            # Not a blocking receive: a long message moves only while its sender is in MPI, too.
            handle = message.Irecv([memory(data), kind])
            if derived:
                kind.Free()
            return handle, data

        return ObjectRequest("recv", self._peer_patience(source), match, _unpack)

    def sendrecv(
        self, sendobj: Any, dest: int, sendtag: int = 0, source: int | None = None, recvtag: int | None = None
    ) -> Any:
        """Send one object and receive another at once. Point-to-point."""
        request = self.isend(sendobj, dest, sendtag)
        received = self.recv(source, recvtag)
        request.wait()
        return received

    def barrier(self) -> None:
        """The same as ``Barrier``. Collective."""
        self.Barrier()

    def bcast(self, obj: Any, root: int = 0) -> Any:
        """Return the object of ``root`` on every rank. Collective."""
        self._check_root("bcast", root)
        data = _pack(obj) if self.rank == root else torch.empty(0, dtype=torch.uint8)
        length = torch.tensor([data.numel()])
        self.Bcast(length, root)
        if self.rank != root:
            data = torch.empty(int(length), dtype=torch.uint8)
        self.Bcast(data, root)
        return obj if self.rank == root else _unpack(data)

    def allgather(self, sendobj: Any) -> list[Any]:
        """Return the objects of all ranks, in rank order. Collective."""
        data = _pack(sendobj)
        lengths = torch.empty(self.size, dtype=torch.int64)
        self.Allgather(torch.tensor([data.numel()]), lengths)
        everything = torch.empty(int(lengths.sum()), dtype=torch.uint8)
        counts = lengths.tolist()
        self.Allgatherv(data, [everything, counts])
        return [_unpack(part) for part in torch.split(everything, counts)]

    def gather(self, sendobj: Any, root: int = 0) -> list[Any] | None:
        """Return the objects of all ranks on ``root``, ``None`` elsewhere. Collective."""
        self._check_root("gather", root)
        received = self.alltoall([sendobj if rank == root else None for rank in range(self.size)])
        return received if self.rank == root else None

    def scatter(self, sendobj: Sequence[Any] | None, root: int = 0) -> Any:
        """Return object *r* of the sequence of ``root`` on rank *r*. Collective."""
        self._check_root("scatter", root)
        wrong = None
        if self.rank == root and (sendobj is None or len(sendobj) != self.size):
            wrong = f"scatter must get {self.size} objects on its root, got {sendobj!r:.200}"
            sendobj = [None] * self.size
        received = self.alltoall([(wrong, obj) for obj in sendobj or [None] * self.size])
        problem, obj = received[root]
        if problem:
            raise MismatchError(f"{problem} ({self._where})")
        return obj

    def alltoall(self, sendobj: Sequence[Any]) -> list[Any]:
        """Send object *j* to rank *j*; return the objects sent to this rank. Collective."""
        if len(sendobj) != self.size:
            raise MismatchError(f"alltoall must get {self.size} objects, got {len(sendobj)} ({self._where})")
        parts = [_pack(obj) for obj in sendobj]
        send_counts = torch.tensor([part.numel() for part in parts])
        recv_counts = torch.empty_like(send_counts)
        self.Alltoall(send_counts, recv_counts)
        everything = torch.empty(int(recv_counts.sum()), dtype=torch.uint8)
        counts = recv_counts.tolist()
        self.Alltoallv([torch.cat(parts), send_counts.tolist()], [everything, counts])
        return [_unpack(part) for part in torch.split(everything, counts)]

    def allreduce(self, sendobj: Any, op: Any = None) -> Any:
        """Combine the objects of all ranks in rank order, by ``op`` (``MPI.SUM``: ``+``). Collective."""
        return _combine(self.allgather(sendobj), op)[-1]

    def reduce(self, sendobj: Any, op: Any = None, root: int = 0) -> Any:
        """As ``allreduce``, with the result on ``root`` and ``None`` elsewhere. Collective."""
        objects = self.gather(sendobj, root)
        return None if objects is None else _combine(objects, op)[-1]

    def scan(self, sendobj: Any, op: Any = None) -> Any:
        """Combine the objects of ranks 0 to this one. Collective."""
        return _combine(self.allgather(sendobj), op)[self.rank]

    def exscan(self, sendobj: Any, op: Any = None) -> Any:
        """Combine the objects of the ranks before this one; ``None`` on rank 0. Collective."""
        objects = self.allgather(sendobj)
        return _combine(objects, op)[self.rank - 1] if self.rank else None


def _combine(objects: Sequence[Any], op: Callable[[Any, Any], Any] | None) -> list[Any]:
    """All prefixes of the reduction, in rank order."""
    function = MPI.SUM if op is None else op
    results = [objects[0]]
    for obj in objects[1:]:
        results.append(function(results[-1], obj))
    return results


def _pack(obj: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(obj, pickle.HIGHEST_PROTOCOL)), dtype=torch.uint8)


def _unpack(data: torch.Tensor) -> Any:
    if not data.numel():
        return None  # from MPI.PROC_NULL; a pickled object is never empty
    return pickle.loads(data.numpy().tobytes())
