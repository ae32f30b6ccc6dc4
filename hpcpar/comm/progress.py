"""Waiting: every wait in hpcpar goes through :func:`wait_until`, which has two duties besides waiting.

*Progress.* MPI moves its own messages on inside any MPI call, but it knows nothing of our operations that
have several stages (an ordered reduction, a reducer's buckets). If rank 0 waits for a bucket while rank 1
waits in a barrier, rank 1 must still sum its slice or both wait for ever. So whatever has stages registers
with the process's :data:`ENGINE`, and every waiting loop advances all of it.

*Deadline.* No wait is silent: after ``HPCPAR_TIMEOUT_S`` seconds (default 600, 0 means never) the wait ends
with a :class:`~hpcpar.errors.StalledError` that names the operation and the ranks from which nothing came.

A wait polls; between two polls it yields the processor, and after two milliseconds it sleeps, because
ranks may outnumber cores and the rank that is waited for needs one.

The engine is the one piece of module state in hpcpar: progress is a property of the process, as MPI's own
progress is, and a wait on one communicator must advance what another one has under way. The exit of a
process is a wait too: a rank that leaves first completes what the others still need from it.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from hpcpar.errors import HpcparError, StalledError

__all__ = [
    "ENGINE",
    "DescribedPatience",
    "Patience",
    "ProgressEngine",
    "Progressable",
    "timeout_from_environment",
    "wait_until",
]

_YIELD_S = 0.002
_SHORT_SLEEP_S = 50e-6
_LONG_SLEEP_S = 500e-6
_TICK_S = 0.05
_DEFAULT_TIMEOUT_S = 600


class Progressable(Protocol):
    """Something with stages that others may be waiting for."""

    @property
    def needed_by_others(self) -> bool:
        """Whether a rank may wait for this rank's part. A send to somebody who may never receive is not."""

    def progress(self) -> None:
        """Do what can be done now; never wait. Called from any waiting loop, by one thread at a time."""


class ProgressEngine:
    """The operations of this process that have more stages to go."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._advancing = threading.Lock()
        self._items: tuple[Progressable, ...] = ()
        self._adopted: deque[Progressable] = deque()
        self._drains_at_exit = False

    def add(self, item: Progressable) -> None:
        """Keep ``item`` alive and advance it in every wait until it is discarded. Local."""
        with self._lock:
            if not self._drains_at_exit:
                self._drains_at_exit = True
                atexit.register(self.drain)
            if not any(item is other for other in self._items):
                self._items = (*self._items, item)

    def discard(self, item: Progressable) -> None:
        """Forget ``item``; unknown items are ignored. Local."""
        with self._lock:
            self._items = tuple(other for other in self._items if other is not item)

    def adopt(self, item: Progressable) -> None:
        """As ``add``, for finalizers: these may run inside ``add``, so this takes no lock. Local."""
        self._adopted.append(item)

    def advance(self) -> None:
        """Advance everything once, unless that is being done already, further up or by another thread.

        Local, never waits.
        """
        if not (self._items or self._adopted) or not self._advancing.acquire(blocking=False):
            return
        try:
            while self._adopted:
                self.add(self._adopted.popleft())
            for item in self._items:
                item.progress()
        finally:
            self._advancing.release()

    def drain(self) -> None:
        """Finish what other ranks need from this one before it leaves; they have all begun it. Local."""
        try:
            deadline = time.monotonic() + timeout_from_environment()
        except HpcparError:  # nobody can be told any more
            deadline = time.monotonic() + _DEFAULT_TIMEOUT_S
        while any(item.needed_by_others for item in self._items) and time.monotonic() < deadline:
            self.advance()
            time.sleep(_SHORT_SLEEP_S)


ENGINE = ProgressEngine()


def timeout_from_environment() -> float:
    """Seconds a wait may last, from ``HPCPAR_TIMEOUT_S`` (default 600); infinite for 0. Local.

    Raises
    ------
    HpcparError
        When the variable is not a number of seconds.
    """
    text = os.environ.get("HPCPAR_TIMEOUT_S", str(_DEFAULT_TIMEOUT_S))
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0.0:
        raise HpcparError(f"HPCPAR_TIMEOUT_S must be a number of seconds, 0 for no limit, got {text!r}")
    return seconds or float("inf")


class Patience:
    """How long one wait may last, and whom to name when it was too long.

    Parameters
    ----------
    operation
        Named in the error.
    missing
        Called at the deadline; returns the ranks from which nothing was heard.
    where
        Place of this rank, such as ``"rank 0 of 4"``.
    timeout_s
        Seconds; ``None`` reads the environment once the wait turns out to be slow.
    details
        Called at the deadline; a sentence for the error on what is missing, or an empty string.
    """

    nobody_missing = "waits for any rank"

    def __init__(
        self,
        operation: str,
        *,
        missing: Callable[[], Sequence[int]],
        where: str,
        timeout_s: float | None = None,
        details: Callable[[], str] = str,
    ) -> None:
        self.operation = operation
        self._missing = missing
        self._where = where
        self._timeout_s = timeout_s
        self._details = details

    def tick(self, waited_s: float) -> None:
        """Look at the clock, called about every 50 ms of a slow wait. Local.

        Raises
        ------
        StalledError
            At the deadline.
        """
        if self._timeout_s is None:
            self._timeout_s = timeout_from_environment()
        self.on_tick(waited_s, self._timeout_s)
        if waited_s >= self._timeout_s:
            self._give_up(waited_s)

    def on_tick(self, waited_s: float, timeout_s: float) -> None:
        """For subclasses: exchange signs of life, look for dead ranks. Nothing here."""

    @property
    def impatient_at_s(self) -> float:
        """Seconds until the first look at the clock; short deadlines want an early one."""
        return _TICK_S if self._timeout_s is None else min(_TICK_S, self._timeout_s)

    def _give_up(self, waited_s: float) -> None:
        missing = tuple(self._missing())
        names = ("ranks " if len(missing) > 1 else "rank ") + ", ".join(map(str, missing))
        whom = f"waits for {names}" if missing else self.nobody_missing
        raise StalledError(
            self.operation,
            missing,
            f"{self.operation} must end within {self._timeout_s:g} s, got no end after {waited_s:.1f} s: "
            f"{self._where} {whom}. {self._details()}".rstrip()
            + " Ranks that are named are late, stopped, dead, or never called it; HPCPAR_TIMEOUT_S sets "
            "the limit in seconds, 0 for none.",
        )


class DescribedPatience(Patience):
    """A patience that is told at its deadline what was waited for, and from whom.

    Parameters
    ----------
    describe
        Returns the operation for the error and the ranks that owe something.
    where
        Place of this rank.
    """

    nobody_missing = "waits, though nobody owes it anything"

    def __init__(self, describe: Callable[[], tuple[str, Sequence[int]]], where: str) -> None:
        super().__init__("", missing=lambda: describe()[1], where=where)
        self._describe = describe

    def _give_up(self, waited_s: float) -> None:
        self.operation, _ = self._describe()
        super()._give_up(waited_s)


def wait_until(done: Callable[[], bool], patience: Patience, *, sleep_s: float = _LONG_SLEEP_S) -> None:
    """Poll ``done`` until it is true, advancing the engine meanwhile.

    Parameters
    ----------
    done
        Must not wait.
    patience
        How long, and whom to name.
    sleep_s
        Between two polls, once the wait has turned out to be long.

    Raises
    ------
    StalledError
        When ``patience`` runs out. Whatever was waited for is still under way then.
    """
    if done():
        return
    start = time.perf_counter()
    next_tick = patience.impatient_at_s
    while True:
        ENGINE.advance()
        if done():
            return
        waited = time.perf_counter() - start
        if waited < _YIELD_S:
            os.sched_yield()
        else:
            time.sleep(_SHORT_SLEEP_S if waited < _TICK_S else sleep_s)
        if waited >= next_tick:
            patience.tick(waited)
            next_tick = waited + patience.impatient_at_s
