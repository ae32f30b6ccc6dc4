"""Parcels: several tensors that travel as one unit from rank to rank, without headers once they are known.

A parcel has a *description*: a label (bytes that mean something to the program) and the dtype and shape of
each tensor. The first parcel of a key (context, peer, tag) travels *described*: one message with description
and contents. Both ends remember it. As long as the next parcels of that key are alike they travel *plain*:
the receiver has posted receives of the right size, and each tensor goes straight from its memory into the
receiver's, with nothing else. When the description changes, that parcel is described again, in one message::

    key (train, 0 -> 1, tag 7)     step 1            step 2         step 3            step 4
    sender                         described ----->  plain ----->   described ----->  plain
    receiver                       probes            posted         posted, probes:   posted
                                                                    cancels, takes

*Replies* go back along the same edge. Their dtypes and shapes are those of tensors of the parcel, so they
need no description at all; a tensor that has no reply is a message of no bytes.

Invariants:

* Described parcels, plain parcels and replies have MPI communicators of their own, so a posted receive can
  only match a plain parcel of its key. MPI keeps messages of one sender, communicator and tag in order, so
  the tensors of a parcel share its tag.
* At most one parcel of a key is under way at a time. A sender that ran ahead by a whole step could put a
  plain parcel into a receive that was posted for the described one before it. Whoever uses this makes sure
  of it; the steps of a pipeline do, since no rank leaves a step before the last stage has ended its forwards.
* A sent tensor is kept alive and unchanged until MPI is done with it, and no longer.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from hpcpar.comm.buffers import HostBuffer, block_type, is_readable, memory, start_bytes
from hpcpar.comm.mpi import MPI
from hpcpar.comm.request import Request
from hpcpar.comm.tensor_spec import TensorSpec, decode_specs, encode_specs, spec_of
from hpcpar.errors import CommunicatorFreedError

if TYPE_CHECKING:
    from mpi4py import MPI as MPITypes

    from hpcpar.comm.communicator import Communicator

__all__ = ["Description", "Incoming", "ParcelExchange"]

_ALIGN_BYTES = 64


@dataclass(frozen=True, slots=True)
class Description:
    """What a parcel consists of.

    Attributes
    ----------
    label : bytes
        What the program says about it.
    specs : tuple of (torch.dtype, torch.Size)
        Of each tensor.
    """

    label: bytes
    specs: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor], label: bytes) -> Description:
        """Describe tensors. Local."""
        return cls(label, tuple([spec_of(tensor) for tensor in tensors]))


class Incoming:
    """A parcel or reply that is expected. Made by :class:`ParcelExchange`.

    Attributes
    ----------
    source : int
        The rank it comes from.
    description : Description
        Of the parcel that has arrived, or of the one that is expected; ``None`` as long as nothing is known.
    tensors : list of torch.Tensor or None
        Valid once :meth:`test` is true.
    """

    __slots__ = (
        "_buffers", "_exchange", "_handles", "_key", "_next", "_packed", "_received",
        "description", "source", "tensors",
    )  # fmt: skip

    def __init__(
        self,
        exchange: ParcelExchange,
        source: int,
        key: tuple[Hashable, int] | None,
        description: Description | None,
    ) -> None:
        self._exchange = exchange
        self._key = key
        self.source = source
        self.description = description
        self.tensors: list[torch.Tensor | None] = []
        self._buffers: list[HostBuffer] = []
        self._handles: list[MPITypes.Request] = []
        self._packed: tuple[MPITypes.Request, torch.Tensor] | None = None
        self._next = 0
        self._received = False

    def test(self) -> bool:
        """Whether everything is here. Local."""
        return self._received or self._exchange._advance(self)


class ParcelExchange:
    """Sends and receives parcels among the ranks of a communicator. Collective to make and to free.

    Parameters
    ----------
    comm
        The ranks.
    device
        Where received tensors are wanted; other devices than the host are staged.
    """

    def __init__(self, comm: Communicator, device: torch.device | None = None) -> None:
        self._comm = comm
        self._device = torch.device("cpu") if device is None else device
        self._on_host = self._device.type == "cpu"
        alone = comm.size == 1
        self._plain = None if alone else comm.mpi.Dup()
        self._described = None if alone else comm.mpi.Dup()
        self._replies = None if alone else comm.mpi.Dup()
        self._tags = int(comm.mpi.Get_attr(MPI.TAG_UB) or 32767)
        self._sent: dict[Hashable, Description] = {}
        self._known: dict[Hashable, Description] = {}
        self._sends: list[_Send] = []
        self._expected: dict[int, Incoming] = {}
        self._lock = threading.Lock()
        self.messages_sent = self.bytes_sent = self.described_sent = 0

    def send(
        self, dest: int, tag: int, tensors: Sequence[torch.Tensor], label: bytes, context: Hashable = None
    ) -> None:
        """Start sending a parcel; its tensors must not be written to any more. Point-to-point.

        Parameters
        ----------
        dest, tag
            As in MPI; tags beyond the bound of MPI wrap round.
        tensors
            Of any dtype, stride and device.
        label
            Goes along when the description changes.
        context
            Parcels of different contexts have descriptions of their own, such as training and evaluation.
        """
        description = Description.of(tensors, label)
        key = (context, dest, tag)
        with self._lock:
            if self._sent.get(key) == description:
                for tensor in tensors or (torch.empty(0),):  # a parcel of no tensors must arrive, too
                    self._start(self._plain, tensor, dest, tag)
            else:
                self._sent[key] = description
                self.described_sent += 1
                self._start(self._described, _pack(description, tensors), dest, tag)

    def expect(self, source: int, tag: int, context: Hashable = None) -> Incoming:
        """Prepare to receive a parcel, with receives posted if its like has come before. Point-to-point."""
        key = (context, source, tag)
        incoming = Incoming(self, source, (key, tag), self._known.get(key))
        with self._lock:
            if incoming.description is not None:
                self._post(self._plain, incoming, incoming.description.specs or [(torch.float32, (0,))], tag)
            self._expected[id(incoming)] = incoming
        return incoming

    def reply(self, dest: int, tag: int, tensors: Sequence[torch.Tensor | None]) -> None:
        """Start sending replies; ``None`` where there is none. Point-to-point."""
        with self._lock:
            for tensor in tensors:
                self._start(self._replies, torch.empty(0) if tensor is None else tensor, dest, tag)

    def expect_reply(self, source: int, tag: int, specs: Sequence[TensorSpec]) -> Incoming:
        """Post receives for the replies to tensors of ``specs``. Point-to-point."""
        incoming = Incoming(self, source, None, Description(b"", tuple(specs)))
        with self._lock:
            self._post(self._replies, incoming, specs, tag)
            self._expected[id(incoming)] = incoming
        return incoming

    def progress(self) -> None:
        """Let go of what has been sent, and take what has come. Never waits; safe from any thread. Local."""
        self._release_sent()
        for incoming in list(self._expected.values()):
            incoming.test()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way. Local."""
        return not self._sends and not self._expected

    @property
    def is_sent(self) -> bool:
        """Whether MPI is done with everything that was sent. Local."""
        self._release_sent()
        return not self._sends

    @property
    def slow_receivers(self) -> list[int]:
        """Ranks that have not received everything yet. Local."""
        return sorted({send.dest for send in self._sends})

    def abandon(self) -> None:
        """Give up everything that is under way, after a failure; nothing may be sent afterwards. Local."""
        with self._lock:
            for incoming in self._expected.values():
                self._drop(incoming)
            self._expected.clear()
            for send in self._sends:  # requests that are dropped keep their buffers until MPI is done
                Request("Isend", [send.handle], self._comm._peer_patience(send.dest), keep=send.host)
            self._sends.clear()

    def free(self, *, communicators: bool = True) -> None:
        """Give the communicators back, unless messages nobody received may be left in them. Collective."""
        self.abandon()
        for handle in (self._plain, self._described, self._replies):
            if handle is not None and communicators:
                handle.Free()
        self._plain = self._described = self._replies = None

    # Parts -----------------------------------------------------------------------------------------------

    def _release_sent(self) -> None:
        if self._sends:
            with self._lock:
                self._sends = [send for send in self._sends if not send.handle.Test()]

    def _start(self, mpi: MPITypes.Intracomm | None, tensor: torch.Tensor, dest: int, tag: int) -> None:
        host = tensor if is_readable(tensor) else HostBuffer.to_send(tensor.detach()).host
        self._sends.append(_Send(dest, self._call(_alive(mpi).Isend, host, dest, tag), host))
        self.messages_sent += 1
        self.bytes_sent += host.nbytes

    def _post(self, mpi: Any, incoming: Incoming, specs: Sequence[Any], tag: int) -> None:
        for dtype, shape in specs:
            target = torch.empty(shape, dtype=dtype, device=self._device)
            buffer = HostBuffer(target) if self._on_host else HostBuffer.to_receive(target)
            incoming._buffers.append(buffer)
            incoming._handles.append(self._call(_alive(mpi).Irecv, buffer.host, incoming.source, tag))

    def _call(self, operation: Any, host: torch.Tensor, peer: int, tag: int) -> MPITypes.Request:
        return start_bytes(operation, host, peer, tag % self._tags, self._comm._count_limit)

    def _advance(self, incoming: Incoming) -> bool:
        """Test the posted receives; look for a described parcel as long as the first has not arrived."""
        status = MPI.Status()
        with self._lock:
            if incoming._received:
                return True  # the progress thread was faster
            while incoming._next < len(incoming._handles):
                if not incoming._handles[incoming._next].Test(status):
                    return incoming._next == 0 and self._take_described(incoming)
                self._deliver(incoming, status)
            if incoming.description is None:
                return self._take_described(incoming)
            self._finish(incoming)
            return True

    def _deliver(self, incoming: Incoming, status: MPITypes.Status) -> None:
        buffer = incoming._buffers[incoming._next]
        incoming._next += 1
        if buffer.host.numel() and status.Get_elements(MPI.BYTE) == 0:
            incoming.tensors.append(None)
            return
        buffer.deliver()
        incoming.tensors.append(buffer.host if buffer.target is None else buffer.target)

    def _take_described(self, incoming: Incoming) -> bool:
        """Match a described parcel, then receive it; its sender may compute meanwhile, so never block."""
        if incoming._key is None:
            return False
        key, tag = incoming._key
        if incoming._packed is None:
            status = MPI.Status()
            message = _alive(self._described).Improbe(incoming.source, tag % self._tags, status)
            if message is None:
                return False
            data = torch.empty(status.Get_elements(MPI.BYTE), dtype=torch.uint8)
            kind, derived = block_type(data.dtype, data.numel(), self._comm._count_limit)
            incoming._packed = message.Irecv([memory(data), kind]), data
            if derived:
                kind.Free()
        handle, data = incoming._packed
        if not handle.Test():
            return False
        _cancel(incoming)
        incoming.description, tensors = _unpack(data)
        incoming.tensors = [tensor.to(self._device) for tensor in tensors]
        self._known[key] = incoming.description
        self._finish(incoming)
        return True

    def _drop(self, incoming: Incoming) -> None:
        """Withdraw what can be withdrawn without waiting: who has failed may never end what it has begun."""
        handles, buffers = incoming._handles[incoming._next :], [*incoming._buffers]
        for handle in handles:
            handle.Cancel()
        if incoming._packed is not None:
            handles.append(incoming._packed[0])
            buffers.append(HostBuffer(incoming._packed[1]))
        # A request that is dropped keeps its buffers until MPI is done with them.
        Request("Irecv", handles, self._comm._peer_patience(incoming.source), keep=buffers)
        incoming._handles, incoming._buffers, incoming._packed, incoming.tensors = [], [], None, []

    def _finish(self, incoming: Incoming) -> None:
        incoming._received = True
        incoming._handles, incoming._buffers, incoming._packed = [], [], None
        if incoming.description is not None:
            del incoming.tensors[len(incoming.description.specs) :]  # what stood for a parcel of no tensors
        del self._expected[id(incoming)]


class _Send(NamedTuple):
    """A message on its way. Lighter than a :class:`Request`, for there is one per action of a pipeline."""

    dest: int
    handle: MPITypes.Request
    host: torch.Tensor


def _alive(mpi: MPITypes.Intracomm | None) -> MPITypes.Intracomm:
    if mpi is None:
        raise CommunicatorFreedError("a parcel exchange must not be used alone or after free()")
    return mpi


def _cancel(incoming: Incoming) -> None:
    """Withdraw posted receives, so that they take no later message."""
    for handle in incoming._handles[incoming._next :]:
        handle.Cancel()
        handle.Wait()
    incoming._handles, incoming._buffers, incoming.tensors = [], [], []


def _pack(description: Description, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Description and contents in one tensor of bytes: words, label, then each tensor, aligned."""
    words = [len(tensors), len(description.label)]
    words += encode_specs(description.specs)
    head = np.array([len(words), *words], dtype=np.int64).tobytes() + description.label
    starts, end = _layout(len(head), description.specs)
    packed = torch.empty(end, dtype=torch.uint8)
    packed[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
    for tensor, start in zip(tensors, starts, strict=True):
        flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().view(-1)
        if flat.numel():
            packed[start : start + flat.nbytes] = flat.view(torch.uint8)
    return packed


def _unpack(packed: torch.Tensor) -> tuple[Description, list[torch.Tensor]]:
    """The inverse of :func:`_pack`; the tensors lie in the memory of the message."""
    array = packed.numpy()
    count = int(array[:8].view(np.int64)[0])
    words = array[8 : 8 * (count + 1)].view(np.int64).tolist()
    slots, label_bytes = words[0], words[1]
    label_start = 8 * (count + 1)
    label = array[label_start : label_start + label_bytes].tobytes()
    specs = decode_specs(words[2:], slots)
    starts, _ = _layout(label_start + label_bytes, specs)
    tensors = []
    for start, (dtype, shape) in zip(starts, specs, strict=True):
        nbytes = shape.numel() * dtype.itemsize
        # By way of numpy: views of one tensor share a version, so a change of one would spoil all.
        part = torch.from_numpy(array[start : start + nbytes]).view(dtype) if nbytes else None
        tensors.append(torch.empty(shape, dtype=dtype) if part is None else part.view(shape))
    return Description(label, tuple(specs)), tensors


def _layout(head_bytes: int, specs: Sequence[TensorSpec]) -> tuple[list[int], int]:
    """Where each tensor starts after the head, and the length of the whole, in bytes."""
    starts, end = [], head_bytes
    for dtype, shape in specs:
        end = -(-end // _ALIGN_BYTES) * _ALIGN_BYTES
        starts.append(end)
        end += shape.numel() * dtype.itemsize
    return starts, end
