"""Task pools: many small requests, few large batches.

An expert is fast on batches, and its callers send a few rows each. A pool collects their tasks, calls its
function on the rows of several of them at once, and gives each its own rows back::

    submit_task(2 rows) ─┐                                           ┌─> future: rows 0 to 1
    submit_task(5 rows) ─┼─> queue of this key ─> function(8 rows) ──┼─> future: rows 2 to 6
    submit_task(1 row)  ─┘                                           └─> future: row 7

Tasks of one key (dtypes, shapes of a sample, training or not) can share a batch. A key's queue is served in
the order of arrival, and the key whose first task is oldest goes first, so nobody starves. A batch is due
when it is full, when nothing else is to be done and ``min_batch_size`` rows are there, or when its oldest
task has waited for ``timeout``. Tasks larger than a batch are cut at multiples of ``max_batch_size``.

When the function raises, the tasks of the batch are run again one by one, so that only the bad one fails.

A pool has no opinion on threads. By default it starts a :class:`~hpcpar.nn.experts.runtime.Runtime` of its
own at the first task; with ``start=False`` a loop of someone else asks :meth:`TaskPool.ready_since` and calls
:meth:`TaskPool.process_batch`.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from hpcpar.errors import HpcparError, MismatchError
from hpcpar.nn.experts.batching import Batch, Key, Request, Task, cut
from hpcpar.nn.experts.runtime import Runtime

__all__ = ["Request", "Runtime", "TaskPool", "TaskPoolStats"]


@dataclass(frozen=True)
class TaskPoolStats:
    """What a pool has done so far. Cancelled tasks do not count, and the parts of a cut task count singly.

    Attributes
    ----------
    tasks, batches, rows
        Numbers of those that were run.
    mean_batch_size, largest_batch
        In rows.
    waiting_mean_s, waiting_max_s
        Seconds from the submission of a task to its batch.
    compute_s
        Seconds inside of the function.
    failed
        Number of tasks that got an exception from the function.
    """

    tasks: int = 0
    batches: int = 0
    rows: int = 0
    mean_batch_size: float = 0.0
    largest_batch: int = 0
    waiting_mean_s: float = 0.0
    waiting_max_s: float = 0.0
    compute_s: float = 0.0
    failed: int = 0


class TaskPool:
    """Runs a function on batches of tasks. Thread-safe. Local.

    Parameters
    ----------
    function
        ``function(*tensors)`` of batched tensors; returns a tensor, or a tuple or list of tensors and
        ``None``, with as many rows in the same order. It is never called by two threads at once.
    name
        Of the pool, in messages and of its thread.
    min_batch_size
        Rows that an idle pool waits for.
    max_batch_size
        Rows that the function takes at most.
    timeout
        Seconds after which a task is run though fewer than ``min_batch_size`` rows are there.
    max_queued
        Rows that may wait; then :meth:`submit_task` blocks. ``64 * max_batch_size`` by default. A task
        without rows takes the place of one row.
    start
        Run a thread for this pool, from the first task on. Else someone else calls :meth:`process_batch`.
    with_requests
        Call ``function(*tensors, requests=...)`` with a tuple of :class:`Request`, in the order of the rows.
    check
        Called with the tensors of each new task; raises when they are not fit for the function.

    Raises
    ------
    HpcparError
        When a size or the timeout makes no sense.

    Examples
    --------
    >>> with TaskPool(net, name="net", max_batch_size=64, timeout=0.01) as pool:
    ...     future = pool.submit_task(torch.randn(3, 8))
    ...     rows = future.result()
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str,
        min_batch_size: int = 1,
        max_batch_size: int,
        timeout: float,
        max_queued: int | None = None,
        start: bool = True,
        with_requests: bool = False,
        check: Callable[..., object] | None = None,
    ) -> None:
        max_queued = 64 * max_batch_size if max_queued is None else max_queued
        if not 1 <= min_batch_size <= max_batch_size or max_queued < 1:
            raise HpcparError(
                "batch sizes must be 1 <= min_batch_size <= max_batch_size and max_queued >= 1, got "
                f"{min_batch_size}, {max_batch_size} and {max_queued} (task pool {name!r})"
            )
        if not timeout >= 0:
            raise HpcparError(f"timeout must be a number of seconds, got {timeout} (task pool {name!r})")
        self.name = name
        self.min_batch_size, self.max_batch_size = min_batch_size, max_batch_size
        self.timeout, self.max_queued = timeout, max_queued
        self._function, self._check = function, check
        self._start, self._with_requests = start, with_requests
        self._queues: dict[Key, deque[Task]] = {}
        self._rows: dict[Key, int] = {}
        self._queued = 0  # rows, zero counted as one
        self._changed = threading.Condition()  # guards all of the above
        self._working = threading.RLock()  # one batch at a time
        self._runtime: Runtime | None = None
        self._listeners: tuple[Callable[[], object], ...] = ()
        self._closed = False
        self._tally = _Tally()

    # Submitting ------------------------------------------------------------------------------------------

    def submit_task(
        self, *tensors: torch.Tensor, seed: int | None = None, training: bool = True
    ) -> Future[Any]:
        """Queue a task; blocks while the queue is full. Local.

        Parameters
        ----------
        *tensors
            Arguments of the function, batched along their first axis. They are not copied: leave them alone
            until the future is done.
        seed
            Of the task's random numbers, for a function that is called with requests.
        training
            Passed on with the request; tasks that differ in it do not share a batch.

        Returns
        -------
        concurrent.futures.Future
            Its result is what the function returned, restricted to the rows of this task.

        Raises
        ------
        MismatchError
            When the tensors are not a batch, or ``check`` raises it.
        HpcparError
            When the pool is shut down, be it while this call waits for room.
        """
        tasks = self._prepare(tensors, seed, training)
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._has_room(tasks))
            self._enqueue(tasks)
        self._tell()
        return tasks[0].answer.future

    def try_submit(
        self, *tensors: torch.Tensor, seed: int | None = None, training: bool = True
    ) -> Future[Any] | None:
        """Like :meth:`submit_task`, but ``None`` when the queue is full. Local."""
        tasks = self._prepare(tensors, seed, training)
        with self._changed:
            if not self._closed and not self._has_room(tasks):
                return None
            self._enqueue(tasks)
        self._tell()
        return tasks[0].answer.future

    def add_listener(self, listener: Callable[[], object]) -> None:
        """Call ``listener()`` after each submission, in the submitting thread, and at shutdown. Local."""
        with self._changed:
            self._listeners += (listener,)

    def remove_listener(self, listener: Callable[[], object]) -> None:
        """Take a listener back. Local."""
        with self._changed:
            self._listeners = tuple(other for other in self._listeners if other != listener)

    def _prepare(self, tensors: Sequence[Any], seed: int | None, training: bool) -> list[Task]:
        if not tensors or not all(isinstance(t, torch.Tensor) and t.ndim > 0 for t in tensors):
            raise MismatchError(
                f"a task must consist of batched tensors, got {[type(t).__name__ for t in tensors]} "
                f"(task pool {self.name!r})"
            )
        if any(tensor.shape[0] != tensors[0].shape[0] for tensor in tensors):
            raise MismatchError(
                "tensors of a task must have the same number of rows, got "
                f"{[len(tensor) for tensor in tensors]} (task pool {self.name!r})"
            )
        if self._check is not None:
            self._check(*tensors)
        return cut([tensor.detach() for tensor in tensors], seed, training, self.max_batch_size)

    def _has_room(self, tasks: list[Task]) -> bool:
        """A task larger than the whole queue is let in when it is alone."""
        return self._queued == 0 or self._queued + _weight(tasks) <= self.max_queued

    def _enqueue(self, tasks: list[Task]) -> None:
        if self._closed:
            raise HpcparError(f"task pool {self.name!r} must be running, got a task after its shutdown")
        now = time.monotonic()
        key = tasks[0].key
        for task in tasks:
            task.arrived = now
        self._queues.setdefault(key, deque()).extend(tasks)
        self._rows[key] = self._rows.get(key, 0) + _weight(tasks)
        self._queued += _weight(tasks)
        if self._start and self._runtime is None:
            self._runtime = Runtime([self], name=f"hpcpar-{self.name}")

    def _tell(self) -> None:
        for listener in self._listeners:
            listener()

    # Running ---------------------------------------------------------------------------------------------

    def ready_since(self, now: float) -> float | None:
        """When the oldest task of a batch that is due came, on the clock of ``time.monotonic``. Local.

        ``None`` when no batch is due. A loop over pools calls :meth:`process_batch` of the one with the
        smallest value.
        """
        with self._changed:
            key = self._due_key(now)
            return None if key is None else self._queues[key][0].arrived

    def due_in(self, now: float) -> float | None:
        """Seconds until a batch becomes due by itself; ``None`` when the queue is empty. Local."""
        with self._changed:
            if self._due_key(now) is not None:
                return 0.0
            oldest = min((queue[0].arrived for queue in self._queues.values()), default=None)
            return None if oldest is None else max(0.0, oldest + self.timeout - now)

    def process_batch(self) -> bool:
        """Run the batch that is due, or else the oldest one, in this thread. Local.

        Returns
        -------
        bool
            Whether there was one.
        """
        with self._working:
            batch = self._take_batch(time.monotonic())
            if batch is None:
                return False
            self._tally.taken(batch, time.monotonic())
            started = time.perf_counter()
            failed = batch.run(self._call)
            self._tally.ran(time.perf_counter() - started, failed)
            return True

    def run_alone(
        self, *tensors: torch.Tensor, seed: int | None = None, training: bool = True
    ) -> tuple[Any] | None:
        """Run a task in this thread, past the queue, if that is empty and nothing would be waited for. Local.

        Returns
        -------
        tuple or None
            With the result; ``None`` when the task has to be submitted.

        Notes
        -----
        Raises what the function raises. The function must check its tensors itself.
        """
        rows = tensors[0].shape[0] if tensors and tensors[0].ndim else 0
        with self._changed:
            if self._closed or self._queued or not self.min_batch_size <= max(rows, 1) <= self.max_batch_size:
                return None
        with self._working:
            started = time.perf_counter()
            failed = True
            try:
                result = self._call(tensors, (Request(rows, seed, training),))
                failed = False
            finally:
                self._tally.ran_alone(rows, time.perf_counter() - started, failed)
        return (result,)

    def _due_key(self, now: float) -> Key | None:
        due = [
            (queue[0].arrived, place, key)
            for place, (key, queue) in enumerate(self._queues.items())
            if self._closed
            or self._rows[key] >= self.min_batch_size
            or now - queue[0].arrived >= self.timeout
        ]
        return min(due)[2] if due else None

    def _take_batch(self, now: float) -> Batch | None:
        """The first tasks of a key, as many as fit; cancelled ones are dropped."""
        with self._changed:
            tasks: list[Task] = []
            while self._queues and not tasks:
                key = self._due_key(now)
                key = min(self._queues, key=lambda k: self._queues[k][0].arrived) if key is None else key
                tasks = self._take_tasks(key)
            self._changed.notify_all()
        return Batch(tasks) if tasks else None

    def _take_tasks(self, key: Key) -> list[Task]:
        queue = self._queues[key]
        tasks: list[Task] = []
        rows = 0
        while queue and rows + queue[0].request.rows <= self.max_batch_size:
            task = queue.popleft()
            self._rows[key] -= _weight([task])
            self._queued -= _weight([task])
            if task.answer.begin():
                tasks.append(task)
                rows += task.request.rows
        if not queue:
            del self._queues[key], self._rows[key]
        return tasks

    def _call(self, tensors: Sequence[torch.Tensor], requests: tuple[Request, ...]) -> Any:
        if self._with_requests:
            return self._function(*tensors, requests=requests)
        return self._function(*tensors)

    # The end ---------------------------------------------------------------------------------------------

    def shutdown(self, wait: bool = True) -> None:
        """Take no more tasks. Local.

        Parameters
        ----------
        wait
            Finish what is queued and return when that is done; else it fails with an HpcparError, and only
            the batch that is under way is finished, in the background.
        """
        with self._changed:
            self._closed = True
            dropped = [] if wait else [task for queue in self._queues.values() for task in queue]
            if not wait:
                self._queues, self._rows, self._queued = {}, {}, 0
            runtime = self._runtime
            self._changed.notify_all()
        for task in dropped:
            if task.answer.begin():
                task.answer.fail(
                    HpcparError(f"task pool {self.name!r} was shut down before it ran this task")
                )
        self._tell()
        if runtime is not None:
            runtime.shutdown(wait)
        if wait:
            self._drain()

    def _drain(self) -> None:
        """Without a thread, this one does the rest; and it waits for a batch under way elsewhere."""
        while self.process_batch():
            continue

    def __enter__(self) -> TaskPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()

    def stats(self) -> TaskPoolStats:
        """What the pool has done so far. Local."""
        return self._tally.stats()


def _weight(tasks: Sequence[Task]) -> int:
    return sum(max(1, task.request.rows) for task in tasks)


class _Tally:
    """Counts for the statistics; written by the thread that runs a batch, read by any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tasks = self._batches = self._rows = self._largest = self._failed = 0
        self._waiting_s = self._longest_wait_s = self._compute_s = 0.0

    def taken(self, batch: Batch, now: float) -> None:
        waits = [now - task.arrived for task in batch.tasks]
        with self._lock:
            self._tasks += len(batch.tasks)
            self._batches += 1
            self._rows += batch.rows
            self._largest = max(self._largest, batch.rows)
            self._waiting_s += math.fsum(waits)
            self._longest_wait_s = max(self._longest_wait_s, *waits)

    def ran(self, seconds: float, failed: int) -> None:
        with self._lock:
            self._compute_s += seconds
            self._failed += failed

    def ran_alone(self, rows: int, seconds: float, failed: bool) -> None:
        with self._lock:
            self._tasks += 1
            self._batches += 1
            self._rows += rows
            self._largest = max(self._largest, rows)
            self._compute_s += seconds
            self._failed += failed

    def stats(self) -> TaskPoolStats:
        with self._lock:
            return TaskPoolStats(
                tasks=self._tasks,
                batches=self._batches,
                rows=self._rows,
                mean_batch_size=self._rows / max(1, self._batches),
                largest_batch=self._largest,
                waiting_mean_s=self._waiting_s / max(1, self._tasks),
                waiting_max_s=self._longest_wait_s,
                compute_s=self._compute_s,
                failed=self._failed,
            )
