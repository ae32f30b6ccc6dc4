"""Calls: a rank asks another one for something, from any thread, and gets an answer or the reason why not.

::

    caller, any thread                          callee, one thread
    call(dest, words, tensors) -- header -----> take() -> ServedCall     any source, tag 0
                               -- tensors ---->                          exact source, the call's tag
                               <---- header -- reply(tensors) or fail(text)
    wait() -> tensors          <--- tensors --                           exact source, the call's tag

A header is a row of integers: what the program wants to say (``words``), and dtype and shape of each tensor
that follows. Nothing is pickled, and each tensor goes from the memory of the one into memory of the other.
Requests and replies have MPI communicators of their own.

Invariants:

* A tag belongs to one call of its caller from the header to the end of the reply. A call that its caller no
  longer waits for (:meth:`Call.abandon`) keeps tag and memory until the late reply has been received, so
  that this cannot be taken for the reply of another call.
* Headers fit into what every MPI sends at once, so to receive an announced one never waits.
* Nobody waits inside of this module but :meth:`Call.wait`, which has a deadline and looks whether the
  process of the callee is alive.
* A header is sent only when all that it announces is ready to be sent: what can fail, fails before.
* Tensors that are sent are kept alive until MPI is done with them; the program must not change them before
  the call has ended.
* An error of MPI in a message to or from a rank means that this rank is dead, and hurts no other call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from hpcpar.comm.message import HEADER_WORDS, Message, all_advance, check_length, header, on_host
from hpcpar.comm.mpi import MPI
from hpcpar.comm.peers import Farewell, Peers
from hpcpar.comm.progress import Patience, wait_until
from hpcpar.comm.request import Request
from hpcpar.comm.served_call import ServedCall
from hpcpar.comm.tensor_spec import TensorSpec, decode_specs, encode_specs, spec_of
from hpcpar.errors import CommunicatorFreedError, HpcparError, RankFailedError

if TYPE_CHECKING:
    from mpi4py import MPI as MPITypes

    from hpcpar.comm.communicator import Communicator

__all__ = ["Call", "CallExchange", "ServedCall"]

_HEADER_TAG = 0
_FAREWELL_TAG = 0  # among the replies, which have those of calls
_MOST_ARRIVING = 64
_LOOKS = 30


class CallExchange:
    """Calls among the ranks of a communicator, to oneself too. Collective to make and to free.

    Parameters
    ----------
    comm
        The ranks.

    Attributes
    ----------
    failure : str or None
        Set by the program when nobody will answer any more: calls that wait here raise it.
    answering_thread : int or None
        The thread that computes an answer now, and must not wait for one.

    Notes
    -----
    Several threads may call at once where MPI allows it (:func:`hpcpar.comm.threads_allowed`).
    """

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm
        self.peers = Peers(comm)
        self._requests: MPITypes.Intracomm | None = comm.mpi.Dup()
        self._replies: MPITypes.Intracomm | None = comm.mpi.Dup()
        self._tags = int(comm.mpi.Get_attr(MPI.TAG_UB) or 32767)
        self._last_tag = 0
        self._open: dict[int, Call] = {}
        self._abandoned: list[Call] = []
        self._sent: list[Message] = []
        self._arriving: list[ServedCall] = []
        self._lost: list[Message] = []  # from the dead: MPI may still write to their memory
        self._status = MPI.Status()
        self._lock = threading.Lock()
        self.bytes_sent = 0
        self.failure: str | None = None
        self.answering_thread: int | None = None

    # Calling ---------------------------------------------------------------------------------------------

    def call(self, dest: int, words: Sequence[int], tensors: Sequence[torch.Tensor]) -> Call:
        """Start a call. Point-to-point.

        Parameters
        ----------
        dest
            The rank that is asked.
        words
            Integers for the program there.
        tensors
            Of any dtype, stride and device. They must not be changed until the call has ended.

        Raises
        ------
        MismatchError
            For more tensors than fit a header, about 40.
        RankFailedError
            When the process of ``dest`` is known to be dead.
        """
        hosts = [on_host(tensor) for tensor in tensors]
        announced = [len(words), len(hosts), *words, *encode_specs(map(spec_of, hosts))]
        check_length(1 + len(announced))
        for host in hosts:
            host.data_ptr()  # raises for tensors without memory, such as those of a compiler
        if dest in self.peers.known_dead:
            raise self._failed(dest)
        self.progress()
        requests, replies = self._alive(self._requests), self._alive(self._replies)
        with self._lock:
            call = Call(self, dest, self._free_tag())
            self._open[call.tag] = call
        try:
            call._expect(replies)
            self._send(requests, header([call.tag, *announced]), dest, _HEADER_TAG)
            for host in hosts:
                self._send(requests, host, dest, call.tag)
        except MPI.Exception as error:
            self.peers.report(dest, error)
            call.abandon()
            raise self._failed(dest) from error
        except BaseException:
            call.abandon()
            raise
        return call

    def all_answered(self) -> bool:
        """Whether no call of this rank is under way, abandoned or not; those of the dead are none. Local."""
        self.progress()
        dead = self.peers.dead()
        with self._lock:
            return all(call.dest in dead for call in self._open.values())

    # Serving ---------------------------------------------------------------------------------------------

    def take(self, *, accept: bool = True) -> list[ServedCall]:
        """Calls that have arrived with all their tensors; never waits. Point-to-point, by one thread.

        Parameters
        ----------
        accept
            Whether to look for new ones. Those that are left alone stay with MPI and their callers.
        """
        self._forget_the_dead()
        while accept and len(self._arriving) < _MOST_ARRIVING and (call := self._accept()) is not None:
            self._arriving.append(call)
            for _ in range(_LOOKS):  # its tensors are right behind the header
                if call._has_arrived():
                    break
        if not self._arriving:
            return []
        ready = [call for call in self._arriving if call._has_arrived()]
        if ready:
            self._arriving = [call for call in self._arriving if not call._arrived]
        return ready

    def progress(self) -> None:
        """Let go of what has been sent, and of late replies. Never waits; any thread. Local."""
        if (self._sent or self._abandoned) and self._lock.acquire(blocking=False):
            try:
                self._sent = [m for m in self._sent if not self._is_over(m.advance, m.peer)]
                late = []
                for call in self._abandoned:
                    if self._is_over(call._advance, call.dest):
                        del self._open[call.tag]
                    else:
                        late.append(call)
                self._abandoned = late
            finally:
                self._lock.release()

    def farewell(self) -> Farewell:
        """Tell all ranks that this one calls no more, and hear it from them. Point-to-point."""
        return Farewell(self._alive(self._replies), self.peers, _FAREWELL_TAG)

    def free(self) -> None:
        """Give the communicators back, unless messages may be left in them. Collective."""
        clean = not (self._open or self._arriving or self.peers.known_dead)
        for message in self._sent:  # requests that are dropped keep their buffers until MPI is done
            Request("Isend", [message.handle], self.comm._peer_patience(), keep=message.host)
        self._sent, self._arriving = [], []
        for handle in (self._requests, self._replies):
            if handle is not None and clean:
                handle.Free()
        self._requests = self._replies = None

    # Parts -----------------------------------------------------------------------------------------------

    def _accept(self) -> ServedCall | None:
        requests, status = self._alive(self._requests), self._status
        try:
            message = requests.Improbe(MPI.ANY_SOURCE, _HEADER_TAG, status)
        except MPI.Exception as error:
            self.peers.acknowledge(requests, error)
            return None
        if message is None:
            return None
        header = np.empty(status.Get_count(MPI.BYTE) // 8, dtype=np.int64)
        source = status.source
        try:
            message.Recv([header, MPI.BYTE])
            tag, word_count, count, *rest = header.tolist()
            call = ServedCall(self, source, tag, tuple(rest[:word_count]))
            call._expect(requests, decode_specs(rest[word_count:], count))
        except MPI.Exception as error:
            self.peers.report(source, error)
            return None
        return call

    def _forget_the_dead(self) -> None:
        dead = self.peers.known_dead
        if dead and self._arriving:
            self._lost += [part for call in self._arriving if call.source in dead for part in call._parts]
            self._arriving = [call for call in self._arriving if call.source not in dead]

    def _is_over(self, advance: Callable[[], bool], peer: int) -> bool:
        try:
            return advance()
        except MPI.Exception as error:
            self.peers.report(peer, error)
            return True

    def _free_tag(self) -> int:
        for _ in range(self._tags):
            self._last_tag = self._last_tag % (self._tags - 1) + 1
            if self._last_tag not in self._open:
                return self._last_tag
        raise HpcparError(f"at most {self._tags - 1} calls must be under way at once on one rank")

    def _send(self, mpi: MPITypes.Intracomm, host: torch.Tensor, dest: int, tag: int) -> None:
        message = Message.send(mpi, host, dest, tag, self.comm._count_limit)
        if not message.advance():
            with self._lock:
                self._sent.append(message)
        self.bytes_sent += host.nbytes

    def _receive(self, mpi: MPITypes.Intracomm, spec: TensorSpec, source: int, tag: int) -> Message:
        return Message.receive(mpi, spec, source, tag, self.comm._count_limit)

    def _close(self, call: Call) -> None:
        with self._lock:
            self._open.pop(call.tag, None)

    def _abandon(self, call: Call) -> None:
        with self._lock:
            if self._open.get(call.tag) is call and call not in self._abandoned:
                self._abandoned.append(call)

    def _failed(self, rank: int) -> RankFailedError:
        return RankFailedError([rank], f"{self.comm._where} called rank {rank}, whose process died")

    @staticmethod
    def _alive(mpi: MPITypes.Intracomm | None) -> MPITypes.Intracomm:
        if mpi is None:
            raise CommunicatorFreedError("a call exchange must not be used after free()")
        return mpi


class Call:
    """A call of this rank. Made by :meth:`CallExchange.call`; used by one thread.

    Attributes
    ----------
    dest, tag : int
        The rank that was asked, and the call's number.
    tensors : list of torch.Tensor
        The reply, once :meth:`test` is true.
    failure : str or None
        Why there is no reply, in the words of the callee.
    """

    __slots__ = ("_ended", "_exchange", "_header", "_parts", "dest", "failure", "tag", "tensors")

    def __init__(self, exchange: CallExchange, dest: int, tag: int) -> None:
        self._exchange = exchange
        self.dest, self.tag = dest, tag
        self.tensors: list[torch.Tensor] = []
        self.failure: str | None = None
        self._header: Message | None = None
        self._parts: list[Message] | None = None
        self._ended = False

    def test(self) -> bool:
        """Whether the call has ended. Local; not after :meth:`abandon`.

        Raises
        ------
        RankFailedError
            When MPI says that the callee is dead.
        """
        if self._ended:
            return True
        try:
            self._ended = self._advance()
        except MPI.Exception as error:
            self._exchange.peers.report(self.dest, error)
            raise self._exchange._failed(self.dest) from error
        if self._ended:
            self._exchange._close(self)
        return self._ended

    def wait(self, timeout_s: float | None = None) -> list[torch.Tensor]:
        """Wait for the end of the call; after an error it is abandoned. Point-to-point.

        Parameters
        ----------
        timeout_s
            Seconds, ``HPCPAR_TIMEOUT_S`` by default.

        Returns
        -------
        list of torch.Tensor
            As ``tensors``; empty after a failure.

        Raises
        ------
        StalledError
            When there was no reply in time.
        RankFailedError
            When the process of the callee died.
        """
        try:
            wait_until(self.test, _CallPatience(self, timeout_s))
        except BaseException:
            self.abandon()
            raise
        return self.tensors

    def check_alive(self) -> None:
        """Look whether the callee's process lives; cheap to ask often. Local.

        Raises
        ------
        RankFailedError
            When it does not.
        """
        if self._exchange.failure is not None:
            raise HpcparError(f"a call must be answered, but nobody will: {self._exchange.failure}")
        if self.dest in self._exchange.peers.dead():
            raise self._exchange._failed(self.dest)

    def abandon(self) -> None:
        """Stop waiting; a late reply is received and dropped. Local."""
        self._exchange._abandon(self)

    def _expect(self, replies: MPITypes.Intracomm) -> None:
        spec = (torch.int64, torch.Size([HEADER_WORDS]))
        self._header = self._exchange._receive(replies, spec, self.dest, self.tag)

    def _advance(self) -> bool:
        """Receive what has come; whether that is all."""
        if self._header is None:  # it could not be begun
            return True
        if self._parts is None:
            if not self._header.advance():
                return False
            failed, count, length, *_ = self._header.host[:3].tolist()
            self.failure = "" if failed else None
            replies = self._exchange._alive(self._exchange._replies)
            specs = decode_specs(self._header.host[3:length].tolist(), count)
            self._parts = [self._exchange._receive(replies, spec, self.dest, self.tag) for spec in specs]
        if not all_advance(self._parts):
            return False
        self.tensors = [part.host for part in self._parts]
        if self.failure is not None:
            self.failure = self.tensors.pop().numpy().tobytes().decode(errors="replace")
        return True


class _CallPatience(Patience):
    """The patience of a caller: looks whether the callee is alive."""

    def __init__(self, call: Call, timeout_s: float | None) -> None:
        where = call._exchange.comm._where
        super().__init__("call", missing=lambda: [call.dest], where=where, timeout_s=timeout_s)
        self._call = call

    def on_tick(self, waited_s: float, timeout_s: float) -> None:
        """Look for a death now and then."""
        self._call.check_alive()
