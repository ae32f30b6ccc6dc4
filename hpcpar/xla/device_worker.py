"""A device worker: the thread that drives one device.

It owns the device's replica, and runs what it is asked to in order: load parameters, make a step. The thread
that asks gets a future, so it can look at the clock, at other ranks, and for Ctrl-C, while this one may be
stuck in a dataset, a compiler or a device. What it is busy with is known in words, for whoever gives up.
"""

from __future__ import annotations

import contextlib
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from hpcpar.xla import adapter
from hpcpar.xla.channel import Channel, ChannelClosedError
from hpcpar.xla.feed import DeviceBatch, Ended, Failed, Feed, as_exception
from hpcpar.xla.model_state import ModelState
from hpcpar.xla.replica import Contribution, Replica

__all__ = ["DeviceWorker"]


class DeviceWorker:
    """Drives one device in a thread of its own. Local.

    Parameters
    ----------
    place
        Of the device among those of this rank.
    device
        To be driven.
    feed
        Where its batches come from.
    compiling
        Held by a worker while it traces something new; the others then find it compiled.

    Attributes
    ----------
    has_ended : bool
        Whether there is nothing more to come for this device in the epoch.
    taken : int
        Samples that it has taken from the epoch.
    doing : str
        What it is busy with.
    """

    def __init__(self, place: int, device: torch.device, feed: Feed, compiling: threading.Lock) -> None:
        self.device = device
        self.doing = "nothing"
        self._place = place
        self._feed = feed
        self._compiling = compiling
        self._replica: Replica | None = None
        self._has_run = False
        self.has_ended = True
        self.taken = 0
        self._orders: Channel[tuple[Future[Any], Callable[[], Any]]] = Channel(4)
        self.thread = threading.Thread(target=self._run, name=f"hpcpar {device}", daemon=True)
        self.thread.start()

    def build(self, state: ModelState, random_state: int) -> Future[None]:
        """Make the replica; the device's random generator starts from ``random_state``."""

        def work() -> None:
            self.doing = "copying the model"
            adapter.set_random_state(self.device, random_state)
            self._replica = Replica(state, self.device)

        return self._order(work)

    def load(self, state: ModelState) -> Future[None]:
        """Copy parameters and buffers to the replica."""

        def work() -> None:
            self.doing = "receiving parameters"
            self._built.load(state)

        return self._order(work)

    def step(self, batches: int) -> Future[Contribution]:
        """Run up to so many batches, fewer at the end of the data, through the replica."""
        return self._order(lambda: self._step(batches))

    def start_epoch(self, feed: Feed) -> None:
        """A feed, which may be another one, has been told to begin; for a worker that is idle."""
        self._feed, self.has_ended, self.taken = feed, False, 0

    def close(self) -> None:
        """End the thread when it is through with what it does; what waits to be done is dropped."""
        self._orders.close()

    @property
    def _built(self) -> Replica:
        assert self._replica is not None
        return self._replica

    def _step(self, batches: int) -> Contribution:
        samples, used, taken = 0, frozenset[int](), 0
        try:
            for number in range(1, batches + 1):
                taken = number
                batch = self._next_batch(number)
                if batch is None:
                    break
                self.doing = f"running the model on batch {number} of a step"
                used |= self._run_batch(batch, is_first=not samples)
                samples += batch.samples
        except Exception:
            # A step that fails loses its batches, so that the next one begins with the same on every device.
            for number in range(taken + 1, batches + 1):
                with contextlib.suppress(Exception):
                    self._next_batch(number)
            raise
        if not samples:
            return Contribution()
        self.doing = "computing"
        return Contribution(self._built.take(), samples, used)

    def _run_batch(self, batch: DeviceBatch, *, is_first: bool) -> frozenset[int]:
        used = frozenset[int]()
        for part in batch.parts:
            try:
                with contextlib.nullcontext() if self._has_run else self._compiling:
                    used |= self._built.add(part, is_first=is_first)
            except BaseException as error:
                clear_frames(error)
                raise
            self._has_run, is_first = True, False
        return used

    def _next_batch(self, number: int) -> DeviceBatch | None:
        if self.has_ended:
            return None
        self.doing = f"waiting for batch {number} of a step from the dataset"
        item = self._feed.take(self._place)
        if isinstance(item, Ended):
            self.has_ended = True
            return None
        self.taken += item.samples
        if isinstance(item, Failed):
            raise item.error
        return item

    def _order(self, work: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._orders.put((future, work))
        return future

    def _run(self) -> None:
        adapter.use_device(self.device)
        while True:
            try:
                future, work = self._orders.get()
            except ChannelClosedError:
                return
            try:
                result = work()
            except BaseException as error:  # goes to whoever asked
                future.set_exception(as_exception(error, "the model"))
            else:
                future.set_result(result)
            self.doing = "nothing"
            del future, work  # and what they hold, while this thread waits


def clear_frames(error: BaseException) -> None:
    """Let go of what the functions had that an error has ended, and those of the errors that led to it.

    Tensors of an unfinished graph would come into the next one for as long as these frames live.
    """
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop()
        if current is not None and id(current) not in seen:
            seen.add(id(current))
            traceback.clear_frames(current.__traceback__)
            waiting += [current.__cause__, current.__context__]
