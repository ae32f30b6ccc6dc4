"""The server: a ``with`` block that every rank enters, in which experts can be called from everywhere.

Ranks that serve experts and ranks that only call them write the same lines; the difference is in the dict::

    with ExpertServer(comm, {"expert.0": backend} if comm.rank == 0 else {}):
        if comm.rank > 0:
            train_through(RemoteExpert("expert.0", comm))

The end of the block is the end of service, for all ranks together: who has nothing more to call waits there,
and serves meanwhile.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any

from hpcpar.comm import Alarm, threads_allowed, wait_for_peers
from hpcpar.comm.progress import ENGINE
from hpcpar.errors import MismatchError
from hpcpar.nn.experts.backend import ExpertBackend
from hpcpar.nn.experts.network import ExpertNetwork, ExpertRecord
from hpcpar.nn.experts.replicas import ReplicaRounds
from hpcpar.nn.experts.service import ExpertService

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["ExpertServer"]

_UID = re.compile(r"[^\s.]+(\.[^\s.]+)*")


class ExpertServer:
    """Serves experts to all ranks of a communicator. Collective to enter and to leave.

    Parameters
    ----------
    comm
        The ranks. Messages travel on duplicates of it.
    backends
        The experts of this rank by uid, such as ``"expert.3.5"``; empty on ranks that serve none. Several
        ranks may serve a uid if each has a backend with ``replicas``.
    threaded
        Serve from a thread; by default where MPI allows it. Otherwise this rank serves while it waits in any
        call of hpcpar, and in :meth:`poll`.

    Raises
    ------
    MismatchError
        On every rank, when uids or replicas do not fit together.

    Notes
    -----
    An exception of an expert goes to who called it, as :class:`~hpcpar.errors.RemoteExpertError`; the server
    lives on. A caller whose process dies is forgotten, at the end of the block too. An exception that leaves
    the block on one rank reaches the others as :class:`~hpcpar.errors.RankFailedError`.
    """

    def __init__(
        self,
        comm: Communicator,
        backends: Mapping[str, ExpertBackend] | None = None,
        *,
        threaded: bool | None = None,
    ) -> None:
        self._comm = comm
        self._backends = dict(backends or {})
        self._threaded = threaded
        self._service: ExpertService | None = None
        self._armed = ExitStack()

    def __enter__(self) -> ExpertServer:
        self._agree(self._problem())
        served = {uid: (backend.schema, backend.traits.draws) for uid, backend in self._backends.items()}
        self._network = ExpertNetwork(self._comm, served)
        try:
            self._rounds = self._begin_rounds(self._network.records)
        except MismatchError:  # on all ranks
            self._network.free()
            raise
        self._alarm = Alarm([self._comm], deaths=False)  # those of callers and of servers are no disaster
        backends = {self._network.record(uid).number: backend for uid, backend in self._backends.items()}
        self._service = ExpertService(self._network.calls, backends, self._rounds)
        self._network.attach()
        for backend in self._backends.values():
            backend.is_served = True
        self._armed.enter_context(self._alarm.armed())
        if self._threads:
            self._service.start()
        else:
            ENGINE.add(self._service)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._service is None:
            return
        if error is not None:
            self._give_up(error)
            return
        try:
            self._network.close()
            self._end_rounds()
        except BaseException as failure:
            self._give_up(failure)
            raise
        self._end_service(wait=True)
        if self._network.calls.peers.known_dead:
            return  # communicators with dead ranks cannot be given back
        self._network.free()
        self._alarm.free()
        for rounds in self._rounds:
            rounds.free()

    def poll(self) -> bool:
        """Serve what has come, where there is no thread for it. Local.

        Returns
        -------
        bool
            Whether there was anything to do; always false where a thread serves.
        """
        return self._service is not None and not self._threads and self._service.turn()

    @property
    def uids(self) -> tuple[str, ...]:
        """The experts of all ranks. Local, inside of the block."""
        return tuple(ExpertNetwork.of(self._comm).records)

    # Parts -----------------------------------------------------------------------------------------------

    @property
    def _threads(self) -> bool:
        return threads_allowed() if self._threaded is None else self._threaded

    def _give_up(self, error: BaseException) -> None:
        """Tell the others, who may never come here, why; and leave what is under way as it is."""
        text = f"{type(error).__name__}: {error}, inside of `with ExpertServer`"
        self._alarm.sound(text)
        self._network.calls.failure = text  # for calls of other threads of this rank
        self._end_service(wait=False)

    def _end_service(self, *, wait: bool) -> None:
        self._armed.close()
        service, self._service = self._service, None
        if service is not None:
            service.stop()
            ENGINE.discard(service)
        for backend in self._backends.values():
            backend.shutdown(wait)
            backend.is_served = False
        if service is not None:
            service.flush()
        self._network.detach()

    def _begin_rounds(self, records: Mapping[str, ExpertRecord]) -> list[ReplicaRounds]:
        """The rounds of this rank's replicas, in one order on all ranks. Collective."""
        problem = None
        for uid, backend in self._backends.items():
            copies = 1 if backend.replicas is None else backend.replicas.size
            serving = len(records[uid].ranks)
            if copies != serving:
                problem = (
                    f"expert {uid!r} must be served by the {copies} rank(s) of its `replicas`, got {serving} "
                    "that serve it"
                )
        self._agree(problem)
        rounds = [
            ReplicaRounds(uid, backend, backend.replicas)
            for uid, backend in sorted(self._backends.items())
            if backend.replicas is not None
        ]
        self._agree(next((part.problem for part in rounds if part.problem), None))
        return rounds

    def _end_rounds(self) -> None:
        """Take part in the updates of replicas until all of them are leaving. Collective."""
        for rounds in self._rounds:
            rounds.leave()
        peers = self._network.calls.peers
        for rounds in self._rounds:
            wait_for_peers(
                lambda rounds=rounds: rounds.is_done or bool(peers.dead()),  # type: ignore[misc]
                rounds.comm,
                lambda uid=rounds.uid: (f"last update of the replicas of {uid!r}", []),  # type: ignore[misc]
            )

    def _agree(self, problem: str | None) -> None:
        """Raise on every rank what is wrong on any. Collective."""
        problems = [(rank, text) for rank, text in enumerate(self._comm.allgather(problem)) if text]
        if problems:
            rank, text = problems[0]
            raise MismatchError(f"{text} (rank {rank} of {self._comm.size})")

    def _problem(self) -> str | None:
        if self._service is not None or ExpertNetwork.runs_on(self._comm):
            return "a communicator must have one ExpertServer at a time, got a second. Pass comm.Dup()"
        if self._threaded and not threads_allowed():
            return "threaded=True must come with MPI_THREAD_MULTIPLE, got an MPI without. Leave it out"
        given: dict[Any, Any] = dict(self._backends)  # whatever it is
        for uid, backend in given.items():
            if not (isinstance(uid, str) and _UID.fullmatch(uid)):
                return f"uid must be words with dots between them, such as 'expert.3.5', got {uid!r}"
            if not isinstance(backend, ExpertBackend):
                return f"expert {uid!r} must be an ExpertBackend, got a {type(backend).__name__}"
            if backend.is_served:
                return f"a backend must be served once at a time, got that of {uid!r} a second time"
        return None
