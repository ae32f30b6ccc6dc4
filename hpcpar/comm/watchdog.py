"""A failure on one rank never leaves the others waiting.

An exception that nobody catches would end one rank and leave the rest in a collective that cannot complete.
:func:`install_exception_hook` replaces Python's last resort, in the main thread and in all others: print
the rank and the traceback, flush, and ``Abort`` the job, which ends every rank within a second or so.

A rank may also leave without an exception: ``sys.exit("no data")`` on rank 0 alone. Python would go on to
``MPI_Finalize`` and wait there, as the other ranks wait in their next collective. So ranks that exit meet
first; one with a failure status waits for the others a few seconds only, then ends the job with that status.
Ranks that all exit, with whatever status, notice nothing. What other ranks still need from this one, such as
its slice of a reduction, is done before it leaves.

A process of one rank keeps Python's own behaviour, and so does an interactive session.
"""

from __future__ import annotations

import atexit
import fcntl
import functools
import logging
import os
import stat
import sys
import termios
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from hpcpar.comm.mpi import MPI
from hpcpar.comm.progress import ENGINE, timeout_from_environment

if TYPE_CHECKING:
    from mpi4py import MPI as MPITypes

__all__ = [
    "abort_job",
    "before_abort",
    "install_exception_hook",
    "install_exit_hook",
    "leave_in_failure",
    "wait_for_readers",
]

_EXIT_GRACE_S = 5.0
_EXIT_POLL_S = 0.005
_READ_GRACE_S = 1.0
_READ_POLL_S = 0.01


def install_exception_hook(rank: int, size: int) -> None:
    """Make an uncaught exception in any thread of this rank end the job. Local."""
    if size == 1 or hasattr(sys, "ps1"):
        return
    process = os.getpid()

    def in_main(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if os.getpid() != process:  # a forked child, such as a data loader's worker, is no rank
            sys.__excepthook__(kind, error, trace)
            return
        abort_job(rank, size, error, "")

    def in_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_type is SystemExit:
            return  # as Python: a thread may end itself
        if os.getpid() != process:
            threading.__excepthook__(args)
            return
        name = args.thread.name if args.thread is not None else "a thread"
        error = args.exc_value if args.exc_value is not None else args.exc_type()
        abort_job(rank, size, error, f" in thread {name!r}")

    sys.excepthook = in_main
    threading.excepthook = in_thread


def install_exit_hook(mpi: MPITypes.Intracomm) -> None:
    """Let the ranks meet before they exit, so that one that leaves in failure ends the job. Collective.

    Parameters
    ----------
    mpi
        All ranks. The hook uses a duplicate, on which nothing else is ever sent.
    """
    if mpi.Get_size() == 1 or hasattr(sys, "ps1"):
        return
    farewell = mpi.Dup()
    process = os.getpid()
    status: list[Any] = [0]
    leave = sys.exit

    def exit(code: Any = None, /) -> NoReturn:
        status[0] = code
        leave(code)

    def depart() -> None:
        if os.getpid() == process and not MPI.Is_finalized():  # a forked child has no part in this
            _depart(farewell, status[0])

    sys.exit = exit
    atexit.register(depart)


def _depart(farewell: MPITypes.Comm, code: Any) -> None:
    """What this rank does at exit: finish what others need, then wait for them as long as is right.

    A rank that succeeded waits without end, since another may have much to write; but not in silence.
    """
    ENGINE.drain()
    failed = code not in (None, 0)
    who = f"rank {farewell.Get_rank()} of {farewell.Get_size()}"
    request = farewell.Ibarrier()
    start, limit_s = time.monotonic(), timeout_from_environment()
    while not request.Test():
        ENGINE.advance()
        time.sleep(_EXIT_POLL_S)
        waited_s = time.monotonic() - start
        if failed and waited_s > _EXIT_GRACE_S:
            _say(f"{who} left with exit status {code!r}, others did not; the job ends.")
            wait_for_readers()
            MPI.COMM_WORLD.Abort(code if isinstance(code, int) else 1)
        if waited_s > limit_s:
            _say(f"{who} has ended and waits since {waited_s:.0f} s for other ranks to end too.")
            limit_s *= 2


def wait_for_readers() -> None:
    """Let the launcher take what was written, since it may drop what it has not read when it ends the job.

    Local. Waits a moment at most: where standard error is a pipe, until it is empty. MPICH's launcher lost
    the only report of one abort in twenty when two ranks aborted at once.
    """
    deadline_s = time.monotonic() + _READ_GRACE_S
    try:
        while _unread(sys.stderr.fileno()) and time.monotonic() < deadline_s:
            time.sleep(_READ_POLL_S)
    except (OSError, ValueError, AttributeError):  # no file behind it, or one that is closed
        return
    time.sleep(_READ_POLL_S)


def _unread(descriptor: int) -> int:
    """Bytes that wait in a pipe; 0 for anything that is none."""
    if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        return 0
    return int.from_bytes(fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)), sys.byteorder)


def _say(text: str) -> None:
    sys.stderr.write(f"hpcpar: {text}\n")
    sys.stderr.flush()


@functools.cache
def before_abort() -> list[Callable[[], None]]:
    """What this process does before it ends the job: append to it what must, and can, end without the others.

    Local. The other ranks are at work still, each in its own part of the program.
    """
    return []


def leave_in_failure(error: BaseException, place: str) -> NoReturn:
    """End this process as failed from a handler of ``atexit``, where exceptions no longer can. Local.

    Handlers that were registered earlier are not called: Python would then end with its own status.
    """
    library = sys.modules.get("mpi4py.MPI")
    if library is not None and library.Is_initialized() and not library.Is_finalized():
        world = library.COMM_WORLD
        if world.Get_size() > 1:
            abort_job(world.Get_rank(), world.Get_size(), error, place)
    _say(f"this process failed{place}: {error}")
    sys.stdout.flush()
    logging.shutdown()
    os._exit(1)


def abort_job(rank: int, size: int, error: BaseException, place: str) -> NoReturn:
    """Report ``error`` of this rank and end every process of the job. Local, does not return."""
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    head = f"hpcpar: rank {rank} of {size} failed{place}; the job ends.\n"
    try:
        # One write, so that the reports of several ranks do not mix line by line.
        sys.stdout.flush()
        sys.stderr.write(head + text)
        sys.stderr.flush()
        for action in before_abort():
            action()
        logging.shutdown()
        wait_for_readers()
    finally:
        try:
            MPI.COMM_WORLD.Abort(1)
        finally:
            os._exit(1)  # an MPI whose Abort returns, or raises after MPI was finalised
