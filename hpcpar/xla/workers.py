"""The workers of a rank's devices, asked together and waited for with a clock at hand.

Nothing here waits without end: at the deadline (``HPCPAR_TIMEOUT_S``) a :class:`StalledError` says which
device is busy with what. While it waits, the calling thread keeps communication of this process going.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from typing import TypeVar

import torch

from hpcpar.comm.progress import ENGINE, timeout_from_environment
from hpcpar.errors import StalledError
from hpcpar.xla import adapter
from hpcpar.xla.device_worker import DeviceWorker
from hpcpar.xla.feed import Feed
from hpcpar.xla.model_state import ModelState
from hpcpar.xla.replica import Contribution

__all__ = ["Workers"]

T = TypeVar("T")

_log = logging.getLogger(__name__)

_LOOK_S = 0.02  # between two looks at the clock; a result is noticed at once


class Workers:
    """Drives the devices of this rank. Local.

    Parameters
    ----------
    devices
        One worker each.
    make_feed
        Makes what batches come from; a new one for an epoch that begins before the last one has ended.
    where
        Place of this rank, for errors.
    """

    def __init__(self, devices: Sequence[torch.device], make_feed: Callable[[], Feed], where: str) -> None:
        compiling = threading.Lock()
        self._make_feed = make_feed
        self._feed = make_feed()
        self._where = where
        self._all = [
            DeviceWorker(place, device, self._feed, compiling) for place, device in enumerate(devices)
        ]
        self.waited_s = 0.0

    def build(self, state: ModelState, random_states: Sequence[int]) -> None:
        """Make a replica on every device, whose random generators start from ``random_states``.

        Raises
        ------
        Exception
            What the first device that fails has raised.
        StalledError
            At the deadline.
        """
        self._result([w.build(state, own) for w, own in zip(self._all, random_states, strict=True)])

    def load(self, state: ModelState) -> None:
        """Copy parameters and tracked buffers to every device. Raises as :meth:`build`."""
        self._result([worker.load(state) for worker in self._all])

    def start_epoch(self, skip: int) -> None:
        """Begin to read the dataset, after so many samples; an epoch before must have ended, or been left."""
        self._feed.start_epoch(skip)
        for worker in self._all:
            worker.start_epoch(self._feed)

    def leave_epoch(self) -> None:
        """Drop what is left of the epoch under way; afterwards nobody reads.

        Raises
        ------
        StalledError
            At the deadline, when the dataset has not returned by then.
        """
        self._feed.close()
        self._wait_for_feed()
        self._feed = self._make_feed()

    @property
    def taken(self) -> int:
        """Samples that are gone from the epoch, those of failed steps included."""
        return sum(worker.taken for worker in self._all)

    def step(self, batches: int) -> list[Contribution]:
        """Run up to so many batches on every device. Raises as :meth:`build`, when all are through."""
        start = time.perf_counter()
        try:
            return self._result([worker.step(batches) for worker in self._all])
        finally:
            self.waited_s += time.perf_counter() - start

    def random_states(self) -> list[int]:
        """Of the devices' random generators; for devices that are idle."""
        return [adapter.random_state(worker.device) for worker in self._all]

    def set_random_states(self, states: Iterable[int]) -> None:
        """Put the devices' random generators back; for devices that are idle."""
        for worker, state in zip(self._all, states, strict=True):
            adapter.set_random_state(worker.device, state)

    def close(self, patience_s: float) -> None:
        """End all threads; one that is stuck is left behind, with a warning. A second call is fine."""
        self._feed.close()
        for worker in self._all:
            worker.close()
        deadline = time.monotonic() + patience_s
        threads = [*self._feed.threads, *(worker.thread for worker in self._all)]
        # A manager that is forgotten is closed wherever Python happens to notice, even in one of them.
        threads = [thread for thread in threads if thread is not threading.current_thread()]
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        stuck = [thread.name for thread in threads if thread.is_alive()]
        if stuck:
            _log.warning("%s still busy after %g s; left behind", ", ".join(stuck), patience_s)

    def _result(self, futures: list[Future[T]]) -> list[T]:
        start, limit_s = time.monotonic(), timeout_from_environment()
        pending = set(futures)
        while pending := wait(pending, timeout=_LOOK_S).not_done:
            ENGINE.advance()
            if time.monotonic() - start >= limit_s:
                raise self._stalled(pending, futures, limit_s)
        return [future.result() for future in futures]

    def _wait_for_feed(self) -> None:
        start, limit_s = time.monotonic(), timeout_from_environment()
        while busy := [thread for thread in self._feed.threads if thread.is_alive()]:
            busy[0].join(_LOOK_S)
            ENGINE.advance()
            if time.monotonic() - start >= limit_s:
                raise self._late("the dataset of", f"{busy[0].name} busy", limit_s)

    def _stalled(self, pending: set[Future[T]], futures: list[Future[T]], limit_s: float) -> StalledError:
        busy = [
            f"{worker.device} is {worker.doing}"
            for worker, future in zip(self._all, futures, strict=True)
            if future in pending
        ]
        return self._late("the devices of", "; ".join(busy), limit_s)

    def _late(self, what: str, busy: str, limit_s: float) -> StalledError:
        return StalledError(
            "TPUManager",
            (),
            f"{what} a TPUManager must be done within {limit_s:g} s, got {busy} ({self._where}). "
            "HPCPAR_TIMEOUT_S sets the limit in seconds, 0 for none.",
        )
