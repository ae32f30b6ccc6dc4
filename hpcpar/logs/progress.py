"""Progress that suits where it is read: a bar on a terminal, and now and then a line in a log.

A bar redraws itself with carriage returns; in the log of a batch job that makes one line of a megabyte. So a
bar is drawn, by `rich` where it is installed, on a terminal only. Elsewhere the log gets a line at the
beginning of the work, one every ``interval_s`` seconds, and one at the end::

    training: 1200 of 5000 steps (24 %), 31.2 steps/s, 2 min left

Only rank 0 shows anything. Nothing here communicates, so a loop needs no ``if rank == 0``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import Any, Protocol, TypeVar

__all__ = ["Progress", "track"]

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Ranked(Protocol):
    """What is asked of a communicator here."""

    @property
    def rank(self) -> int:
        """Number of this process."""


class Progress:
    """How far some work has come. Local; a context manager.

    Parameters
    ----------
    description
        What is done, such as ``"training"``.
    total
        How many units there are; ``None`` when nobody knows. Where there turn out to be more, nobody did.
    comm
        The ranks, of which only the first shows anything. ``None``: this is the only one.
    unit
        What they are, in the plural.
    interval_s
        Seconds between two lines of a log, at least.
    done
        How many units are done already, by a job that goes on.

    Examples
    --------
    >>> with hpcpar.logs.Progress("training", total=5000, comm=comm) as progress:
    ...     for batch in batches:
    ...         train_step(batch)
    ...         progress.advance()
    """

    def __init__(
        self,
        description: str,
        total: int | None = None,
        comm: Ranked | None = None,
        *,
        unit: str = "steps",
        interval_s: float = 60.0,
        done: int = 0,
    ) -> None:
        self._description, self._unit = description, unit
        self._total, self.done, self._first = total, done, done
        self._interval_s = interval_s
        self._shows = comm is None or comm.rank == 0
        self._bar: Any = None
        self._started_s = self._told_s = time.monotonic()

    @property
    def console(self) -> Any:
        """The `rich` console that prints above the bar, or ``None`` where no bar is drawn. Local."""
        return None if self._bar is None else self._bar.console

    def __enter__(self) -> Progress:
        self._started_s = self._told_s = time.monotonic()
        if self._shows and sys.stderr.isatty() and importlib.util.find_spec("rich") is not None:
            self._bar = _make_bar(self._unit)
            self._task = self._bar.add_task(self._description, total=self._total, completed=self.done)
            self._bar.start()
        elif self._shows:
            of = "" if self._total is None else f"{self._total - self.done} "
            logger.info("%s: %s%s to do", self._description, of, self._unit)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        elif self._shows:
            self._tell("ended" if kind is None else "interrupted")

    def skip(self, units: int) -> None:
        """So many were done before; they do not count for the rate."""
        self.done += units
        self._first += units
        if self._bar is not None:
            self._bar.advance(self._task, units)

    def advance(self, units: int = 1) -> None:
        """So many more are done."""
        self.done += units
        if self._bar is not None:
            self._bar.advance(self._task, units)
        elif self._shows and time.monotonic() - self._told_s >= self._interval_s:
            self._tell("")

    def _tell(self, end: str) -> None:
        self._told_s = time.monotonic()
        passed_s = self._told_s - self._started_s
        rate = (self.done - self._first) / max(passed_s, 1e-9)
        total = self._total if self._total is not None and self.done <= self._total else None
        if total is None:
            text = f"{self.done} {self._unit}"
        else:
            share = f" ({100 * self.done // total} %)" if total else ""
            text = f"{self.done} of {total} {self._unit}{share}"
        if end:
            left = f"{end} after {_duration(passed_s)}"
        elif total is None or rate == 0.0:
            left = f"for {_duration(passed_s)}"
        else:
            left = f"{_duration((total - self.done) / rate)} left"
        logger.info("%s: %s, %.3g %s/s, %s", self._description, text, rate, self._unit, left)


def track(
    items: Iterable[T],
    description: str,
    comm: Ranked | None = None,
    *,
    total: int | None = None,
    unit: str = "steps",
    interval_s: float = 60.0,
) -> Iterator[T]:
    """Go through items and show how far it has come, as :class:`Progress` does. Local."""
    if total is None and isinstance(items, Sized):
        with contextlib.suppress(TypeError):  # a DataLoader has len(), even where its dataset has none
            total = len(items)
    with Progress(description, total, comm, unit=unit, interval_s=interval_s) as progress:
        for item in items:
            yield item
            progress.advance()


def _make_bar(unit: str) -> Any:
    """A bar of `rich` on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,  # lines that go to a file must still go there
    )


def _duration(seconds: float) -> str:
    """In the two largest units: 45 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"
