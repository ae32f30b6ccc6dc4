"""A thread that reads ahead into a ring of buffers, while the consumer works on what is there.

::

    reader      free.get() --> read blocks into the slot --> filled.put(slot)
                    ^                                            |
    consumer    free.put(slot) <-- copies samples out of it <-- filled.get()

Invariant: a slot belongs to whom a queue has handed it to. The reader writes only into slots that came out
of ``free``; the consumer reads only the slot that came out of ``filled`` last, and gives it back when it asks
for the next. So what is read is never being overwritten, and no locks are needed besides the queues'.

HDF5 reads and decompresses without the interpreter's lock, so both sides really run at once. One thread is
all that helps: the HDF5 library lets only one in at a time.

The thread knows the queues and not the consumer, so a consumer that is dropped in mid-epoch is collected, and
its end ends the thread. At the exit of the interpreter a finaliser does, before the library goes.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from queue import SimpleQueue

from hpcpar.data.epoch_order import IntArray, ReadTask
from hpcpar.data.h5_files import Array, Field, OpenFiles

__all__ = ["BlockReader", "Part"]

Part = tuple[Sequence[Array], IntArray]  # arrays of all fields, and which rows to hand out in which order


class BlockReader:
    """Reads tasks in a thread. Local.

    Parameters
    ----------
    open_files
        Opens what is read, in the thread; what it returns is closed when the thread ends.
    tasks
        What to read.
    fields
        What a sample consists of.
    rows
        Samples in the largest task's slot.
    slots
        Buffers in the ring, at least two to read while the consumer works.
    """

    def __init__(
        self,
        open_files: Callable[[], AbstractContextManager[OpenFiles]],
        tasks: Iterable[ReadTask],
        fields: Sequence[Field],
        rows: int,
        slots: int,
    ) -> None:
        lines = _Lines()
        for _ in range(slots):
            lines.free.put([field.empty(rows) for field in fields])
        thread = threading.Thread(
            target=_read, args=(lines, open_files, tasks), name="hpcpar-reader", daemon=True
        )
        self._lines = lines
        self._finaliser = weakref.finalize(self, _end, lines, thread, os.getpid())
        thread.start()

    def __iter__(self) -> Iterator[Part]:
        """The parts, in the order of the tasks; each may be used until the next is asked for.

        Raises
        ------
        Exception
            What the reader met.
        """
        while True:
            item = self._lines.filled.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
            self._lines.free.put(item[0])

    def close(self) -> None:
        """End the thread, after the block that it is reading; a second call is fine."""
        self._finaliser()


class _Lines:
    """What the two sides share."""

    def __init__(self) -> None:
        self.free: SimpleQueue[Sequence[Array] | None] = SimpleQueue()
        self.filled: SimpleQueue[Part | BaseException | None] = SimpleQueue()
        self.stopped = threading.Event()


def _read(
    lines: _Lines, open_files: Callable[[], AbstractContextManager[OpenFiles]], tasks: Iterable[ReadTask]
) -> None:
    """Body of the thread."""
    try:
        with open_files() as files:
            for task in tasks:
                slot = lines.free.get()
                if slot is None or not _fill(lines, files, task, slot):
                    return
                lines.filled.put((slot, task.rows))
        lines.filled.put(None)
    except BaseException as error:  # the consumer raises it
        lines.filled.put(error)


def _fill(lines: _Lines, files: OpenFiles, task: ReadTask, slot: Sequence[Array]) -> bool:
    """Read a task into a slot; False when nobody wants it any more."""
    for start, stop, row in task.blocks:
        if lines.stopped.is_set():
            return False
        files.read(start, stop, slot, row)
    return True


def _end(lines: _Lines, thread: threading.Thread, pid: int) -> None:
    if os.getpid() != pid:
        return  # a forked process has the object and not the thread
    lines.stopped.set()
    lines.free.put(None)
    lines.filled.put(
        RuntimeError("a dataset must not be read from after close(), got an iteration that goes on")
    )
    if thread is not threading.current_thread():  # garbage is collected in any thread
        thread.join()
