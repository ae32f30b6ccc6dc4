"""A queue between two threads that has an end: whoever waits at it is woken when it is closed.

``queue.Queue`` can only be left by a timeout or by an item; here ``close()`` makes every wait, of both sides,
end at once. So no thread of a manager sleeps through its shutdown, and none has to look at a clock.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

__all__ = ["Channel", "ChannelClosedError"]

T = TypeVar("T")


class ChannelClosedError(Exception):
    """The channel was closed while this thread waited at it, or before."""


class Channel(Generic[T]):
    """Holds a limited number of items, first in, first out. Local; safe for any threads.

    Parameters
    ----------
    capacity
        Items that may wait in it; a further one makes :meth:`put` wait.
    """

    def __init__(self, capacity: int) -> None:
        self._items: deque[T] = deque()
        self._capacity = capacity
        self._closed = False
        self._changed = threading.Condition()

    def put(self, item: T) -> None:
        """Append an item, when there is room.

        Raises
        ------
        ChannelClosedError
            When the channel is closed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._items) < self._capacity)
            if self._closed:
                raise ChannelClosedError
            self._items.append(item)
            self._changed.notify_all()

    def get(self) -> T:
        """Take the first item, when there is one.

        Raises
        ------
        ChannelClosedError
            When the channel is closed; what was still in it is dropped.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or bool(self._items))
            if self._closed:
                raise ChannelClosedError
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def close(self) -> None:
        """Drop what is in it and wake who waits; a second call is fine."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()
