"""One logger, ``hpcpar``, on many ranks.

A thousand ranks that each say the same are as useless as a thousand that say nothing. So rank 0 shows what
happens (INFO), the others only what is wrong (WARNING), and every line names its rank::

    12:33:01 rank 3 of 8 WARNING hpcpar.comm.peers: the collaboration takes rank 5 for dead: ...

What all ranks have to say goes to a file per rank when somebody asks for it, by :func:`configure` or by the
environment: ``HPCPAR_LOG_DIR`` names the folder, ``HPCPAR_LOG_LEVEL`` the level there and on the screen.

The library only sets this up, in the first :func:`hpcpar.comm.world`, where the program has not: it leaves a
logger ``hpcpar`` alone that has a level or handlers of its own. While the root logger has handlers, these get
the records that they would get without us, and nothing else is shown. A program with handlers of its own adds
the rank by :class:`RankFilter`.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Protocol, TextIO

from hpcpar.errors import HpcparError

__all__ = ["RankFilter", "configure", "configure_by_default"]

LOGGER_NAME = "hpcpar"
FORMAT = "%(asctime)s rank %(rank)d of %(world_size)d %(levelname)s %(name)s: %(message)s"
FILE_TIME = "%Y-%m-%d %H:%M:%S"
SCREEN_TIME = "%H:%M:%S"


class Ranks(Protocol):
    """What is asked of a communicator here."""

    @property
    def rank(self) -> int:
        """Number of this process."""

    @property
    def size(self) -> int:
        """How many there are."""


class RankFilter(logging.Filter):
    """Gives each record ``rank`` and ``world_size``, for formats of a program's own. Local.

    Examples
    --------
    >>> handler.addFilter(hpcpar.logs.RankFilter(comm.rank, comm.size))
    >>> handler.setFormatter(logging.Formatter("[%(rank)d] %(message)s"))
    """

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self._rank, self._size = rank, size

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record pass."""
        record.rank, record.world_size = self._rank, self._size
        return True


class _DefaultLevel(int):
    """A level that no program has asked for."""


class _Screen(logging.StreamHandler[TextIO]):
    """Standard error as it is at the moment, so that a progress bar may take its place for a while."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)  # that of the base class would set the stream

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        """The standard error of now."""
        return sys.stderr


class _DefaultScreen(_Screen):
    """The screen, until the program sets up logging of its own: then all is left to that."""

    def emit(self, record: logging.LogRecord) -> None:
        """Show a record, in one piece, so that those of several ranks do not mix within a line."""
        if not logging.getLogger().handlers:
            super().emit(record)
            return
        logger = logging.getLogger(LOGGER_NAME)
        logger.removeHandler(self)
        if isinstance(logger.level, _DefaultLevel):
            logger.setLevel(logging.NOTSET)


class _RootOrScreen(_Screen):
    """The root logger's handlers if it has any, else the screen; beside a file, whose level is lower."""

    def __init__(self, shown: int) -> None:
        super().__init__()
        self._shown = shown

    def emit(self, record: logging.LogRecord) -> None:
        """Give a record to whoever shows it."""
        root = logging.getLogger()
        if root.handlers:
            if root.isEnabledFor(record.levelno) or _is_asked_for(record):
                root.callHandlers(record)
        elif record.levelno >= self._shown:
            super().emit(record)


def _is_asked_for(record: logging.LogRecord) -> bool:
    """Whether the program has set the level of the record's logger, or of one above it; it let this pass."""
    logger: logging.Logger | None = logging.getLogger(record.name)
    while logger is not None and logger.name != LOGGER_NAME and logger.level == logging.NOTSET:
        logger = logger.parent
    return logger is not None and not isinstance(logger.level, _DefaultLevel)


def configure(
    comm: Ranks,
    *,
    level: int | str = "INFO",
    other_ranks: int | str = "WARNING",
    folder: str | os.PathLike[str] | None = None,
) -> logging.Logger:
    """Set up the logger ``hpcpar`` of this rank, in the place of what was set up before. Local.

    Parameters
    ----------
    comm
        The ranks; asked for ``rank`` and ``size`` only.
    level
        What rank 0 shows on standard error, and every rank writes to its file.
    other_ranks
        What the other ranks show.
    folder
        Where to write a file per rank, ``rank-003.log``; appended to when the job was started again.
        ``None``: nowhere.

    Returns
    -------
    logging.Logger
        The logger. Its records do not go on to the root logger's handlers.

    Raises
    ------
    HpcparError
        For a level that there is not, or a folder that cannot be written.
    """
    level, shown = _level(level), _level(level if comm.rank == 0 else other_ranks)
    screen = _Screen()
    screen.setLevel(shown)
    handlers: list[logging.Handler] = [screen]
    if folder is not None:
        try:
            handlers.append(_file(Path(folder), level, comm.rank, comm.size))
        except OSError as error:
            raise HpcparError(
                f"a folder of log files must be writable, got {folder}: {error.strerror} "
                f"(rank {comm.rank} of {comm.size})"
            ) from error
    logger = _set_up(handlers, shown if folder is None else min(shown, level), comm.rank, comm.size)
    logger.propagate = False
    return logger


def configure_by_default(rank: int, size: int) -> None:
    """Set up the logger as the environment says, unless the program has done it. Local.

    A file that cannot be written is worth a warning, and not the end of the job.

    Raises
    ------
    HpcparError
        When the environment names a level that there is not.
    """
    logger = logging.getLogger(LOGGER_NAME)
    if logger.handlers or logger.level != logging.NOTSET:
        return
    level = _level(os.environ.get("HPCPAR_LOG_LEVEL") or "INFO")
    shown = level if rank == 0 else max(level, logging.WARNING)
    root = logging.getLogger()
    folder = os.environ.get("HPCPAR_LOG_DIR") or None
    if folder is None:
        if not root.handlers:
            _set_up([_DefaultScreen()], _DefaultLevel(shown), rank, size)
        return
    handlers: list[logging.Handler] = [_RootOrScreen(shown)]
    problem = None
    try:
        handlers.append(_file(Path(folder), level, rank, size))
    except OSError as error:
        problem = f"HPCPAR_LOG_DIR must be a folder that can be written, got {folder}: {error.strerror}"
    lowest = min(level, root.level) if root.handlers else level
    _set_up(handlers, _DefaultLevel(lowest), rank, size)
    logger.propagate = False  # the handler hands the root logger's what they are to have
    if problem is not None:
        logger.warning("%s. This rank writes no file", problem)


def _set_up(handlers: list[logging.Handler], level: int, rank: int, size: int) -> logging.Logger:
    logger = logging.getLogger(LOGGER_NAME)
    for old in list(logger.handlers):
        logger.removeHandler(old)
        old.close()
    for handler in handlers:
        handler.addFilter(RankFilter(rank, size))
        time_format = FILE_TIME if isinstance(handler, logging.FileHandler) else SCREEN_TIME
        handler.setFormatter(logging.Formatter(FORMAT, time_format))
        logger.addHandler(handler)
    logger.setLevel(level)
    return logger


def _file(folder: Path, level: int, rank: int, size: int) -> logging.FileHandler:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank-{rank:0{len(str(size - 1))}d}.log"
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setLevel(level)
    return handler


def _level(level: object) -> int:
    if isinstance(level, int):
        return level
    known = {name: value for name, value in logging.getLevelNamesMapping().items() if value > 0}
    if not isinstance(level, str) or level.upper() not in known:
        names = ", ".join(sorted(known, key=lambda name: known[name]))
        raise HpcparError(f"a level of the log must be one of {names}, got {level!r}")
    return known[level.upper()]
