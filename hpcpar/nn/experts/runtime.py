"""The runtime: one thread that serves several task pools, the oldest request first.

It sleeps until a pool has a batch that is due, or is about to have one, and is woken by each submission;
nothing is polled. Whoever has an event loop of his own needs no runtime: the loop below is all there is.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpcpar.nn.experts.task_pool import TaskPool

__all__ = ["Runtime"]

_LOG = logging.getLogger(__name__)
_LONGEST_SLEEP_S = 3600.0  # a timeout may be infinite, which no lock takes


class Runtime:
    """Runs the batches of several pools in a thread of its own. Local.

    Parameters
    ----------
    pools
        Made with ``start=False``.
    name
        Of the thread.
    """

    def __init__(self, pools: Sequence[TaskPool], *, name: str = "hpcpar-experts") -> None:
        self._pools = tuple(pools)
        self._wake = threading.Condition()
        self._submissions = 0
        self._closing = False
        for pool in self._pools:
            pool.add_listener(self._on_submission)
        # A daemon: a program that forgets to shut down a pool ends all the same.
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def shutdown(self, wait: bool = True) -> None:
        """Run what is queued, then end the thread. Local.

        Parameters
        ----------
        wait
            Until the thread has ended. Called from that thread itself it does not wait.
        """
        with self._wake:
            self._closing = True
            self._wake.notify()
        if wait and self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()

    def _on_submission(self) -> None:
        with self._wake:
            self._submissions += 1
            self._wake.notify()

    def _serve(self) -> None:
        while (pool := self._next_pool()) is not None:
            try:
                pool.process_batch()
            except BaseException:  # the tasks have it too; others still wait for this thread
                _LOG.exception("task pool %r was interrupted", pool.name)
        for pool in self._pools:
            pool.remove_listener(self._on_submission)

    def _next_pool(self) -> TaskPool | None:
        """The pool whose batch is due and oldest; waits for one. ``None`` at the end."""
        while True:
            seen = self._submissions  # a later one makes the wait below return at once
            now = time.monotonic()
            pool = self._oldest(now)
            if pool is not None:
                return pool
            dues = [due for pool in self._pools if (due := pool.due_in(now)) is not None]
            if self._closing:
                return next((pool for pool in self._pools if pool.due_in(now) is not None), None)
            with self._wake:
                self._wake.wait_for(self._news_since(seen), min([*dues, _LONGEST_SLEEP_S]))

    def _news_since(self, seen: int) -> Callable[[], bool]:
        return lambda: self._closing or self._submissions != seen

    def _oldest(self, now: float) -> TaskPool | None:
        ages = [
            (age, place)
            for place, pool in enumerate(self._pools)
            if (age := pool.ready_since(now)) is not None
        ]
        return self._pools[min(ages)[1]] if ages else None
