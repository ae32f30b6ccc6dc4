"""The service: one thread's loop that takes calls in, computes batches, and answers.

::

    take() ──> held back while its pool is full
        └────> pool of the expert, forward or backward ──> oldest batch that is due ──> answer

One thread does all of it, so a request that finds the experts idle is computed by the thread that received
it, without a hand-over (two threads would cost two switches of Python's interpreter lock, each as long as a
small expert computes). While a batch is computed, requests gather in the MPI library, and are the next batch.

Without ``MPI_THREAD_MULTIPLE`` nobody may run a thread that calls MPI. Then :meth:`ExpertService.turn` is
called by whatever waits in hpcpar, and by :meth:`ExpertServer.poll <hpcpar.nn.experts.server.ExpertServer>`.

Invariants:

* What a request does wrong is told to its caller, and never ends the service.
* An expert runs in a thread in which nothing else does, whoever waits meanwhile, and in whatever mode.
* While a request is held back, no new one is taken: the queues are bounded, and callers wait instead.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import torch

from hpcpar.errors import HpcparError
from hpcpar.nn.experts.network import Procedure

if TYPE_CHECKING:
    from hpcpar.comm import CallExchange, ServedCall
    from hpcpar.nn.experts.backend import ExpertBackend
    from hpcpar.nn.experts.task_pool import TaskPool

__all__ = ["ExpertService", "Rounds"]

logger = logging.getLogger(__name__)

_SPIN_S = 0.002
_SHORT_NAP_S, _LONG_NAP_S = 50e-6, 500e-6
_LONG_NAPS_AFTER_S = 0.05


class Rounds(Protocol):
    """Something that takes part in what several services do together, such as updates of replicas."""

    def turn(self) -> bool:
        """Do what can be done now; never wait. Whether anything was done."""


class ExpertService:
    """Serves calls of the experts of this rank. Local.

    Parameters
    ----------
    calls
        Where they come from.
    backends
        The experts, by number.
    rounds
        What else has to be done now and then.
    """

    needed_by_others = False

    def __init__(
        self, calls: CallExchange, backends: Mapping[int, ExpertBackend], rounds: Sequence[Rounds] = ()
    ) -> None:
        self._calls = calls
        self._backends = dict(backends)
        self._pools: dict[tuple[int, int], TaskPool] = {}
        for number, backend in self._backends.items():
            forward, backward = backend.get_pools(start=False)
            self._pools[number, Procedure.FORWARD] = forward
            self._pools[number, Procedure.BACKWARD] = backward
        # Most pools of many experts are empty: those that may have tasks, in the order in which these came.
        self._waiting: dict[TaskPool, None] = {}
        self._listeners = [(pool, functools.partial(self._expect, pool)) for pool in self._pools.values()]
        for pool, listener in self._listeners:
            pool.add_listener(listener)
        self._rounds = list(rounds)
        self._held: deque[ServedCall] = deque()
        self._done: deque[tuple[ServedCall, Future[Any]]] = deque()
        self._worker: ThreadPoolExecutor | None = None
        self._turning = threading.Lock()
        self._stopping = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Serve from a thread of its own. Local; needs ``MPI_THREAD_MULTIPLE``."""
        self._thread = threading.Thread(target=self._run, name="hpcpar-experts", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop serving, and tell callers that are still waiting. Local."""
        self._stopping = True
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        for pool, listener in self._listeners:
            pool.remove_listener(listener)
        if self._worker is not None:
            self._worker.shutdown()
        for call in (*self._held, *self._calls.take()):
            call.fail("the server is leaving")
        self._held.clear()

    def flush(self) -> None:
        """Send the answers that are there. Point-to-point, does not wait."""
        while self._done:
            _answer(*self._done.popleft())

    def turn(self) -> bool:
        """Take in what has come, compute the batch that waited longest. Never waits for others. Local.

        Returns
        -------
        bool
            Whether there was anything to do; never in a turn of another thread, or of an expert that waits.
        """
        if not self._turning.acquire(blocking=False):
            return False
        try:
            return self._turn()
        finally:
            self._turning.release()

    def progress(self) -> None:
        """As :meth:`turn`, for waits of the program. Local."""
        self.turn()

    # Parts -----------------------------------------------------------------------------------------------

    def _turn(self) -> bool:
        held, self._held = self._held, deque()
        for call in held:
            self._accept(call)
        arrived = self._calls.take(accept=not self._held)
        alone = len(arrived) == 1 and not (self._held or self._waiting) and self._thread is not None
        for call in arrived:
            if not (alone and self._serve_alone(call)):
                self._accept(call)
        pool = self._next_pool()
        if pool is not None:
            self._compute(pool)
        self.flush()
        worked = [rounds.turn() for rounds in self._rounds]
        self._calls.progress()
        self._calls.peers.dead()  # so that what dead callers have begun is dropped
        return bool(arrived) or pool is not None or any(worked)

    def _compute(self, pool: TaskPool) -> None:
        if self._thread is not None:
            self._run_batch(pool)
            return
        # The thread that waits may be inside of a backward, a checkpoint or a mode of torch, in which an
        # expert has no part. Another thread is in none; it computes while this one waits, and calls no MPI.
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="hpcpar-experts")
        self._worker.submit(self._run_batch, pool).result()

    def _serve_alone(self, call: ServedCall) -> bool:
        """Compute the only request there is without the detour through a queue, if its pool agrees."""
        procedure, number, training, seed = call.words
        pool = self._pools.get((number, procedure))
        if pool is None:
            return False
        self._calls.answering_thread = threading.get_ident()
        try:
            result = pool.run_alone(*call.tensors, seed=None if seed < 0 else seed, training=bool(training))
        except BaseException as error:  # SystemExit too: an expert does not decide when the server exits
            _fail(call, error)
            return True
        finally:
            self._calls.answering_thread = None
        if result is None:
            return False
        _reply(call, *result)
        return True

    def _run_batch(self, pool: TaskPool) -> None:
        self._calls.answering_thread = threading.get_ident()
        try:
            pool.process_batch()
        except SystemExit:  # the callers know; an expert does not decide when the server exits
            logger.exception("an expert tried to end the process")
        finally:
            self._calls.answering_thread = None

    def _run(self) -> None:
        last_s = time.monotonic()
        while not self._stopping:
            if self.turn():
                last_s = time.monotonic()
                continue
            idle_s = time.monotonic() - last_s
            if idle_s < _SPIN_S:
                os.sched_yield()
            else:
                time.sleep(_SHORT_NAP_S if idle_s < _LONG_NAPS_AFTER_S else _LONG_NAP_S)

    def _next_pool(self) -> TaskPool | None:
        """The pool whose batch is due for the longest time."""
        if not self._waiting:
            return None
        now = time.monotonic()
        oldest, chosen = float("inf"), None
        for pool in list(self._waiting):
            del self._waiting[pool]  # before looking: a task that comes meanwhile puts it back
            since = pool.ready_since(now)
            if since is not None and since < oldest:
                oldest, chosen = since, pool
            if since is not None or pool.due_in(now) is not None:
                self._expect(pool)
        return chosen

    def _expect(self, pool: TaskPool) -> None:
        self._waiting[pool] = None

    def _accept(self, call: ServedCall) -> None:
        try:
            procedure, number, training, seed = call.words
            backend = self._backends.get(number)
            if backend is None:
                raise HpcparError(f"expert number {number} is not served on this rank")
            if procedure == Procedure.STATISTICS:
                call.reply([_statistics(backend)])
                return
            pool = self._pools[number, Procedure(procedure)]
            future = pool.try_submit(*call.tensors, seed=None if seed < 0 else seed, training=bool(training))
        except Exception as error:
            call.fail(_describe(error))
            return
        if future is None:
            self._held.append(call)
        else:
            future.add_done_callback(lambda done: self._done.append((call, done)))


def _answer(call: ServedCall, done: Future[Any]) -> None:
    """Send the outcome of a task back."""
    error = HpcparError("the server is leaving") if done.cancelled() else done.exception()
    if error is None:
        _reply(call, done.result())
    else:
        _fail(call, error)


def _reply(call: ServedCall, result: Sequence[torch.Tensor | None]) -> None:
    try:
        call.reply([tensor for tensor in result if tensor is not None])
    except Exception as error:  # what it returned cannot be sent
        _fail(call, error)


def _fail(call: ServedCall, error: BaseException) -> None:
    call.fail(_describe(error))
    traceback.clear_frames(error.__traceback__)  # which hold the tensors of the request


def _describe(error: BaseException) -> str:
    return "".join(traceback.format_exception(type(error), error, error.__traceback__))


def _statistics(backend: ExpertBackend) -> torch.Tensor:
    stats = backend.get_stats()
    return torch.tensor([stats["updates"], stats["examples_processed"]], dtype=torch.int64)
