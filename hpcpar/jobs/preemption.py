"""When the job must stop: all ranks learn of it at the same step, save, and leave.

A batch system ends a job at its time limit, or earlier when somebody more important wants the nodes. It says
so by a signal, to some process, some time before. What has to happen then is easy on one rank only: as a
checkpoint is collective, all ranks must take it after the *same* step, and the signal may reach one of them,
in the middle of anything.

::

    rank 0   step 41 | step 42 |      step 43 | requested()? yes   save   leave
    rank 1   step 41 | step 42 |      step 43 | requested()? yes   save   leave
                    signal ^   raised -> goes with the gradients of step 43

The handler only notes the signal. :meth:`Preemption.requested`, called once per step by all ranks, raises a
flag that travels with the next reduction of gradients (:mod:`hpcpar.nn.shared_flag`), or, where no model
carries it, in a non-blocking all-reduce of one number: it is started at one step and complete by the next, so
nobody waits for it. A clock that nears the end of the job counts as a signal, too.

Invariant: whether ``requested()`` is true depends only on reductions that all ranks have completed at this
point of the program, and on nothing that a rank knows alone. To be told costs no collective of its own, so
that ranks which have run out of batches, in ``model.join()``, need not be there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import torch

from hpcpar.comm import MPI, agree, check_alike, world
from hpcpar.errors import HpcparError

if TYPE_CHECKING:
    from hpcpar.comm import Communicator, Request

__all__ = ["REQUEUE_STATUS", "Preemption"]

REQUEUE_STATUS = 75
"""Exit status of a job that wants to go on later; ``EX_TEMPFAIL`` of sysexits.h."""

_LARGEST_SHARE = 0.25  # of the time left: a margin above the whole limit would stop every job at once

logger = logging.getLogger(__name__)


class Flag(Protocol):
    """A bit that a model's reductions carry to all ranks."""

    raised: bool
    seen: bool


class Preemption:
    """Notices that the job is to stop, and tells all ranks at the same step. Collective to make and to end.

    Parameters
    ----------
    comm
        The ranks, ``hpcpar.comm.world()`` by default.
    model
        A :class:`hpcpar.nn.DataParallel` over the same ranks, trained in every step: its reductions carry
        the flag, also to ranks that :meth:`~hpcpar.nn.DataParallel.join` others. Without one, or with a
        model that does not reduce over all ranks, a non-blocking all-reduce does; then all ranks must call
        :meth:`requested` equally often.
    signals
        Names of the signals that mean "stop soon". SIGTERM is what batch systems send last; which one comes
        first is a choice of the job script.
    margin_s
        Stop this many seconds before the end of the job, which Slurm gives in ``SLURM_JOB_END_TIME``; at
        most a quarter of the time that is left when this is made. ``None``: wait for signals only.

    Attributes
    ----------
    reason : str
        Why the job is to stop, as far as this rank knows; empty until :meth:`requested` is true.
    restarts : int
        How often Slurm has started this job before.

    Raises
    ------
    HpcparError
        On every rank, when one of them makes it in another thread than the main one, to which Python
        delivers signals, or names a signal that the system lacks.
    MismatchError
        When another rank has raised that, or the ranks' arguments differ.

    Notes
    -----
    The signals' earlier handlers come back at the end, and until then they are not called.

    Examples
    --------
    >>> with Preemption(comm, model=model) as preemption:
    ...     for step, (x, y) in enumerate(batches):
    ...         train_step(x, y)
    ...         if preemption.requested():
    ...             hpcpar.checkpoint.save(folder / f"step-{step}", state, comm)
    ...             preemption.leave()
    """

    def __init__(
        self,
        comm: Communicator | None = None,
        *,
        model: Any = None,
        signals: Sequence[str] = ("SIGUSR1", "SIGTERM"),
        margin_s: float | None = 120.0,
    ) -> None:
        comm = world() if comm is None else comm
        agree([comm], "a Preemption", lambda: _check(signals, margin_s))
        check_alike(comm, "a Preemption", [f"signals={tuple(signals)}", f"model given: {model is not None}"])
        self._comm = comm.Dup()
        self._process = os.getpid()
        self._model = model if hasattr(model, "comm") and hasattr(model, "flag") else None
        self._flag: Flag | None = None
        self._lower_flag()
        self._stop_at = _stop_at(margin_s)
        self._noted = ""
        self._sent, self._received = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        self._exchange: Request | None = None
        self._is_requested = False
        self.reason = ""
        self.restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self._before = {
            number: signal.signal(number, self._note) for number in (signal.Signals[name] for name in signals)
        }

    def requested(self, *, now: bool = False) -> bool:
        """Whether the job is to stop; once per step, on all ranks. The same answer on all of them.

        With a model it is what the reductions up to the last one have told, else what ranks knew when they
        called this the last time. Once true it stays true. Collective in effect; waits for nobody, except,
        without a model, for a rank that is a whole step behind.

        Parameters
        ----------
        now
            Ask all ranks, and wait for what they know at this moment. For places where they meet anyway,
            such as the end of an epoch, and for those that come seldom.
        """
        if self._is_requested or self._comm.is_freed:
            return self._is_requested
        if not self._noted and time.time() > self._stop_at:
            self._noted = f"the job ends in {self._ends_in_s():.0f} s"
        if any(self._comm.allgather(bool(self._noted))) if now else self._any_rank():
            self.reason = (
                f"{self._noted or 'another rank says so'} (rank {self._comm.rank} of {self._comm.size})"
            )
            self._is_requested = True
            logger.info("the job is to stop: %s", self.reason)
        return self._is_requested

    def request(self, reason: str) -> None:
        """Ask for a stop for a reason of one's own, such as a file that somebody has made. Local."""
        self._noted = self._noted or reason

    @contextlib.contextmanager
    def shielded(self) -> Iterator[None]:
        """Let processes that are started in this block never get the signals, except SIGTERM. Local.

        A signal that a batch system sends to all processes of a job also reaches those that know nothing of
        it, such as the spawned workers of a data loader, and ends them, and the training with them. This
        process is told of it all the same, at the end of the block at the latest.

        Examples
        --------
        >>> with preemption.shielded():
        ...     batches = iter(loader)  # starts its workers
        """
        signals = [number for number in self._before if number != signal.SIGTERM]  # that is how they end
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def leave(self, status: int = REQUEUE_STATUS) -> NoReturn:
        """End the program on this rank, as all others do, with a status that a job script can test. Local.

        Raises
        ------
        SystemExit
            With ``status``.
        """
        raise SystemExit(status)

    def close(self) -> None:
        """Put the earlier handlers back, free the communicator. Collective."""
        self._restore()
        if self._comm.is_freed:
            return
        if self._exchange is not None:
            self._exchange.Wait()  # all ranks have started as many
            self._exchange = None
        self._lower_flag()
        self._comm.Free()

    def __enter__(self) -> Preemption:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # An error may be this rank's alone: others do not come to free anything together with it.
        if kind is None or (kind is SystemExit and self._is_requested):
            self.close()
        else:
            self._restore()

    # Parts -----------------------------------------------------------------------------------------------

    def _note(self, number: int, frame: FrameType | None) -> None:
        """The handler: between any two instructions of the main thread, so it does nothing but note."""
        if os.getpid() != self._process:  # a forked child, such as a data loader's worker, is no rank
            before = self._before[signal.Signals(number)]
            signal.signal(number, signal.SIG_DFL if before is None else before)
            os.kill(os.getpid(), number)
            return
        self._noted = self._noted or signal.Signals(number).name
        if self._flag is not None:
            self._flag.raised = True  # also of a rank that joins others, and does not ask

    def _restore(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not Python's
        self._before = {}

    def _any_rank(self) -> bool:
        self._flag = self._find_flag()
        if self._flag is None:
            return self._exchanged()
        # What was noted goes out with the next reduction; all ranks have seen the last.
        self._flag.raised = bool(self._noted)
        return self._flag.seen

    def _find_flag(self) -> Flag | None:
        """That of the model, which may change its reductions, or have none."""
        model = self._model
        if model is None or model.comm is None or not 1 < model.comm.size == self._comm.size:
            return None
        flag: Flag | None = model.flag
        return flag

    def _lower_flag(self) -> None:
        """Begin and end with what nobody has said anything to."""
        self._flag = self._find_flag()
        if self._flag is not None:
            self._flag.raised = self._flag.seen = False

    def _exchanged(self) -> bool:
        """Complete the all-reduce of the last call and start another."""
        if self._comm.size == 1:
            return bool(self._noted)
        if self._exchange is not None:
            self._exchange.Wait()
        any_rank = self._exchange is not None and bool(self._received)
        self._sent.fill_(bool(self._noted))
        self._exchange = self._comm.Iallreduce(self._sent, self._received, op=MPI.MAX)
        return any_rank

    def _ends_in_s(self) -> float:
        return float(os.environ["SLURM_JOB_END_TIME"]) - time.time()


def _check(signals: Sequence[str], margin_s: float | None) -> None:
    if threading.current_thread() is not threading.main_thread():
        raise HpcparError(
            "a Preemption must be made in the main thread, to which Python delivers signals, got thread "
            f"{threading.current_thread().name!r}"
        )
    for name in signals:
        if name not in signal.Signals.__members__ or name in ("SIGKILL", "SIGSTOP"):
            raise HpcparError(
                f"signals must be names of signals that a program can handle, such as 'SIGUSR1', got {name!r}"
            )
    if margin_s is not None and not margin_s >= 0:
        raise HpcparError(f"margin_s must be a number of seconds not below 0, or None, got {margin_s!r}")


def _stop_at(margin_s: float | None) -> float:
    """The time on this host's clock to stop at, in seconds since the epoch."""
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    if margin_s is None or not end.isdecimal():
        return float("inf")
    left_s = max(0.0, float(end) - time.time())
    return float(end) - min(margin_s, _LARGEST_SHARE * left_s)
