"""One logger, ``hpcpar``, on many ranks.

A thousand ranks that each say the same are as useless as a thousand that say nothing. So rank 0 shows what
happens (INFO), the others only what is wrong (WARNING), and every line names its rank::

    12:33:01 rank 3 of 8 WARNING hpcpar.comm.peers: the collaboration takes rank 5 for dead: ...

What all ranks have to say goes to a file per rank when somebody asks for it, by :func:`configure` or by the
environment: ``HPCPAR_LOG_DIR`` names the folder, ``HPCPAR_LOG_LEVEL`` the level there and on the screen.

The library only sets this up, in the first :func:`hpcpar.comm.world`, where the program has not: as long as
the root logger has handlers, or ``hpcpar`` has a level or handlers of its own, nothing is shown twice and
nothing is changed. A program with handlers of its own adds the rank by :class:`RankFilter`.
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


class _Screen(logging.StreamHandler[TextIO]):
    """Standard error as it is at the moment, so that a progress bar may take its place for a while.

    Parameters
    ----------
    gives_way
        Whether to be silent while the root logger has handlers, which show the same records.
    """

    def __init__(self, gives_way: bool) -> None:
        logging.Handler.__init__(self)
        self._gives_way = gives_way

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        """The standard error of now."""
        return sys.stderr

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record in one piece, so that those of several ranks do not mix within a line."""
        if not (self._gives_way and logging.getLogger().handlers):
            super().emit(record)


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
    logger = _set_up(comm.rank, comm.size, _level(level), _level(other_ranks), folder, gives_way=False)
    logger.propagate = False
    return logger


def configure_by_default(rank: int, size: int) -> None:
    """Set up the logger as the environment says, unless the program has done it. Local.

    Raises
    ------
    HpcparError
        When the environment names a level that there is not, or a folder that cannot be written.
    """
    logger = logging.getLogger(LOGGER_NAME)
    if logger.handlers or logger.level != logging.NOTSET:
        return
    level = _level(os.environ.get("HPCPAR_LOG_LEVEL") or "INFO")
    folder = os.environ.get("HPCPAR_LOG_DIR") or None
    _set_up(rank, size, level, max(level, logging.WARNING), folder, gives_way=True)


def _set_up(
    rank: int,
    size: int,
    level: int,
    other_ranks: int,
    folder: str | os.PathLike[str] | None,
    *,
    gives_way: bool,
) -> logging.Logger:
    logger = logging.getLogger(LOGGER_NAME)
    shown = level if rank == 0 else other_ranks
    handlers: list[tuple[logging.Handler, int, str]] = [(_Screen(gives_way), shown, SCREEN_TIME)]
    if folder is not None:
        handlers.append((_file(Path(folder), rank, size), level, FILE_TIME))
    for old in list(logger.handlers):
        logger.removeHandler(old)
        old.close()
    for handler, handled, time_format in handlers:
        handler.setLevel(handled)
        handler.addFilter(RankFilter(rank, size))
        handler.setFormatter(logging.Formatter(FORMAT, time_format))
        logger.addHandler(handler)
    logger.setLevel(min(handled for _, handled, _ in handlers))
    return logger


def _file(folder: Path, rank: int, size: int) -> logging.FileHandler:
    path = folder / f"rank-{rank:0{len(str(size - 1))}d}.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise HpcparError(
            f"a folder of log files must be writable, got {folder}: {error.strerror} (rank {rank} of {size})"
        ) from error


def _level(level: int | str) -> int:
    if isinstance(level, int):
        return level
    known = logging.getLevelNamesMapping()
    if level.upper() not in known:
        names = ", ".join(sorted(known, key=lambda name: known[name]))
        raise HpcparError(f"a level of the log must be one of {names}, got {level!r}")
    return known[level.upper()]
