"""A failure on one rank never leaves the others waiting.

An exception that nobody catches would end one rank and leave the rest in a collective that cannot complete.
:func:`install_exception_hook` replaces Python's last resort, in the main thread and in all others: print
the rank and the traceback, flush, and ``Abort`` the job, which ends every rank within a second or so.

A process of one rank keeps Python's own behaviour, and so does an interactive session.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import traceback
from types import TracebackType

from hpcpar.comm.mpi import MPI

__all__ = ["abort_job", "install_exception_hook"]


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


def abort_job(rank: int, size: int, error: BaseException, place: str) -> None:
    """Report ``error`` of this rank and end every process of the job. Local, does not return."""
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    head = f"hpcpar: rank {rank} of {size} failed{place}; the job ends.\n"
    try:
        # One write, so that the reports of several ranks do not mix line by line.
        sys.stdout.flush()
        sys.stderr.write(head + text)
        sys.stderr.flush()
        logging.shutdown()
    finally:
        try:
            MPI.COMM_WORLD.Abort(1)
        finally:
            os._exit(1)  # an MPI whose Abort returns, or raises after MPI was finalised
