"""A thread that makes progress of what is under way, so that the program need not between its own work.

MPI advances its non-blocking collectives only inside MPI calls; while a long kernel computes, messages stand
still. With a core to spare this thread polls in its place. Without one it takes the core from the
computation, which is why it is an option and not the rule.

It needs ``MPI_THREAD_MULTIPLE``; a lock of what it advances keeps thread and program out of each other's way,
and the thread sleeps on an event while nothing is under way.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Protocol

from hpcpar.comm.mpi import threads_allowed
from hpcpar.errors import HpcparError

__all__ = ["ProgressThread"]

_PAUSE_S = 50e-6


class Advanced(Protocol):
    """What a thread can advance: a reducer, an exchange of parcels."""

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way."""

    def progress(self) -> None:
        """Do what can be done now; never wait. Safe from any thread."""


class ProgressThread:
    """Calls ``progress()`` while something is under way. Local.

    Raises
    ------
    HpcparError
        When MPI does not allow several threads.
    """

    def __init__(self, work: Advanced) -> None:
        if not threads_allowed():
            raise HpcparError(
                "a progress thread must be allowed to call MPI, got a library without MPI_THREAD_MULTIPLE. "
                "Use progress='hooks'"
            )
        self._advanced = work
        self._work = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hpcpar-progress", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """There is something to do. Local."""
        self._work.set()

    def stop(self) -> None:
        """End the thread and wait for it. Local."""
        self._stopping.set()
        self._work.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._work.wait()
            self._work.clear()
            while not (self._stopping.is_set() or self._advanced.is_idle):
                self._advanced.progress()
                os.sched_yield()
                time.sleep(_PAUSE_S)
