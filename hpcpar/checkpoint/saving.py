"""Saving: every rank takes its state apart, all write at once, and one file commits it.

What is written, and by whom, is the business of :mod:`hpcpar.checkpoint.job`. Here it is done at once or,
with ``asynchronous=True``, by a thread: the caller takes the state apart and copies it, and nothing more. The
save has messages of its own (:mod:`hpcpar.checkpoint.ranks`). A communicator has one save under way at a
time: the next one waits for it, and so do a load from the same folder, the exit of the process and, for a
minute, its end by an exception.

Whether a thread has come to its end is told by an event that it sets itself: Python 3.11 takes a thread for
ended when a ``join`` of it is interrupted by Ctrl-C, and then its snapshot would be overwritten.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcpar.checkpoint.folder import make_folder, new_generation
from hpcpar.checkpoint.job import SaveJob
from hpcpar.checkpoint.ranks import (
    Alone,
    DuplicateRanks,
    FolderRanks,
    Ranks,
    attempt,
    attempt_and_tell,
    interrupts_as_they_are,
    ranks_of,
)
from hpcpar.checkpoint.retention import check_keep, newest_generation
from hpcpar.checkpoint.snapshot import SnapshotMemory
from hpcpar.checkpoint.tree import Tree, encode
from hpcpar.comm import threads_allowed
from hpcpar.comm.progress import timeout_from_environment
from hpcpar.comm.watchdog import before_abort, leave_in_failure
from hpcpar.errors import CheckpointError, StalledError

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["Saving", "finish_pending", "save"]

_LOG = logging.getLogger(__name__)
_SAVER = "hpcpar.checkpoint"
_LAST_CHANCE_S = 60.0

RanksOfSave = Alone | DuplicateRanks | FolderRanks


def save(
    path: str | os.PathLike[str],
    state: Any,
    comm: Communicator | None = None,
    *,
    asynchronous: bool = False,
    keep: int | None = None,
) -> Saving:
    """Save the state of a training to a folder, in the place of what was saved there before. Collective.

    Parameters
    ----------
    path
        The folder, made if need be; all ranks must see the same one.
    state
        Nested dicts, lists and tuples of tensors, numpy arrays, numbers, strings, bytes and ``None``, and
        objects with a ``state_dict()``: modules, optimizers, schedulers, samplers. Each rank passes its own.
        What is equal on several ranks is written once; keys that only some have are united; values that
        differ are kept for each rank. Mark those that are meant to differ by
        :class:`~hpcpar.checkpoint.PerRank`.
    comm
        The ranks that save. By default all ranks of the job, or this process if it was started alone.
    asynchronous
        Return as soon as the state has been copied to host memory, and write it while training goes on.
    keep
        Afterwards remove the oldest of the checkpoints that lie beside this one and have the same name but
        for the number at its end (``step-100``, ``step-200``), so that this many are left: those that
        were saved last.

    Returns
    -------
    Saving
        To wait for; complete unless ``asynchronous``.

    Raises
    ------
    CheckpointError
        On every rank, when the state cannot be saved by one of them: it holds something else, a disk is full.
        What was saved before is as it was. Also when the previous save, in the background, has failed and
        a rank has not waited for it.
    """
    communicator = ranks_of(comm)
    saver = _saver_of(communicator)
    ranks: Ranks = Alone() if communicator is None else communicator
    folder = Path(os.path.abspath(path)) if os.fspath(path) else Path()
    with interrupts_as_they_are(), saver.given_up_when_stalled():
        job = _begin(saver, ranks, folder, state, asynchronous=asynchronous, keep=keep)
        saving = Saving(folder)
        if asynchronous:
            way = _in_background(communicator, job)
            saver.pending = saving
            saving._start(job, way)
        else:
            with _freed_together(_at_once(communicator)) as way:
                job.run(way)
    return saving


def _begin(
    saver: _Saver, ranks: Ranks, folder: Path, state: Any, *, asynchronous: bool, keep: int | None
) -> SaveJob:
    """Agree on what is to be saved, and take it apart. Collective."""

    def meet() -> list[Any]:
        saver.finish()
        if folder == Path():
            raise CheckpointError("path must be the folder of a checkpoint, got ''")
        check_keep(folder, keep)
        return [new_generation(newest_generation(folder)) if ranks.rank == 0 else "", os.fspath(folder), keep]

    def take_apart() -> Tree:
        tree = encode(state)
        make_folder(folder)
        if asynchronous:
            tree.leaves = saver.memory.take(tree.leaves)
        return tree

    # Before the state: to give theirs, objects may need all ranks.
    facts = attempt_and_tell(ranks, meet)
    _check_same(facts)
    try:
        tree = attempt(ranks, take_apart)
    except CheckpointError:
        with suppress(OSError):
            folder.rmdir()  # if it is empty
        raise
    return SaveJob(folder, facts[0][0], tree, keep)


def finish_pending(path: str | os.PathLike[str]) -> None:
    """Wait for the saves to a folder that this process has under way in the background. Local.

    Their outcome is left for those who have begun them.
    """
    folder = os.path.realpath(path)
    for saving in list(_unfinished()):
        if os.path.realpath(saving.path) == folder:
            saving._await(None)


class Saving:
    """A save that is under way, or complete.

    Attributes
    ----------
    path : Path
        The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._is_seen = False
        self._has_ended = threading.Event()
        self._has_ended.set()
        self._process = os.getpid()

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not. Local."""
        return self._await(0.0)

    def wait(self, timeout: float | None = None) -> Path:
        """Wait for its end. Local; the outcome is the same on all ranks.

        Parameters
        ----------
        timeout
            Seconds.

        Returns
        -------
        Path
            The folder, where the checkpoint is now on the disk.

        Raises
        ------
        CheckpointError
            When it has failed, on every rank.
        StalledError
            When it takes longer than ``timeout``. It goes on.
        """
        if not self._await(timeout):
            text = f"the save of {self.path} must end within {timeout:g} s, got no end yet"
            raise StalledError("save", (), text)
        self._is_seen = True
        _unfinished().discard(self)
        if self._error is not None:
            raise self._error
        return self.path

    def _await(self, timeout: float | None) -> bool:
        """Whether it has ended within this time. In a forked child it has: the thread is the parent's."""
        return os.getpid() != self._process or self._has_ended.wait(timeout)

    def _start(self, job: SaveJob, ranks: RanksOfSave) -> None:
        def run() -> None:
            try:
                with _freed_together(ranks):
                    job.run(ranks)
                _unfinished().discard(self)
            except BaseException as error:
                _LOG.error("saving %s in the background failed: %s", self.path, error)
                self._error = error
            finally:
                self._has_ended.set()

        self._has_ended.clear()
        _unfinished().add(self)
        # Not a daemon: the exit of the process waits for it, before MPI ends.
        self._thread = threading.Thread(target=run, name="hpcpar-checkpoint")
        try:
            self._thread.start()
        except RuntimeError:  # the system has no more threads; the other ranks have begun
            run()


@functools.cache
def _unfinished() -> set[Saving]:
    """Saves of this process in the background that are under way, or have failed and nobody knows."""
    atexit.register(_finish_at_exit)
    before_abort().append(_finish_before_abort)
    return set()


def _finish_at_exit() -> None:
    """Wait where Python did not, because of a Ctrl-C, and tell by the exit status what nobody has heard."""
    for saving in list(_unfinished()):
        saving._await(None)
        if saving._error is not None and saving._process == os.getpid():
            leave_in_failure(saving._error, f" to save {saving.path} in the background")


def _finish_before_abort() -> None:
    """Another part of the program has failed: the ranks' threads save what they have, if they can soon."""
    end = time.monotonic() + min(_LAST_CHANCE_S, timeout_from_environment())
    for saving in list(_unfinished()):
        if saving._thread is not threading.current_thread() and not saving.done:
            _LOG.warning("the job ends after the save of %s, or without it in a minute", saving.path)
            saving._await(max(0.0, end - time.monotonic()))


class _Saver:
    """What a communicator remembers of its saves."""

    def __init__(self) -> None:
        self.memory = SnapshotMemory()
        self.pending: Saving | None = None
        self.stalled: StalledError | None = None

    def finish(self) -> None:
        """Wait for the save that is under way; its error is raised unless this rank has seen it."""
        pending = self.pending
        if pending is None:
            return
        is_known = pending._is_seen
        try:
            pending.wait()
        except Exception:
            if not is_known:
                raise
        finally:
            if pending.done:  # not so after a Ctrl-C: the thread needs the snapshot still
                self.pending = None

    @contextmanager
    def given_up_when_stalled(self) -> Iterator[None]:
        """Save no more by a communicator in which ranks are at different places."""
        if self.stalled is not None:
            raise CheckpointError(
                f"ranks that save must come to each save together, got an earlier one where {self.stalled}. "
                "Save with a new communicator"
            )
        try:
            yield
        except StalledError as error:
            self.stalled = error
            raise


def _saver_of(comm: Communicator | None) -> _Saver:
    if comm is None:
        return _saver_of_process()
    saver = comm.attachments.setdefault(_SAVER, _Saver())
    if not isinstance(saver, _Saver):
        raise CheckpointError(f"attachments[{_SAVER!r}] must be left alone, got {saver!r}")
    return saver


@functools.cache
def _saver_of_process() -> _Saver:
    return _Saver()


def _at_once(comm: Communicator | None) -> RanksOfSave:
    """How ranks talk while they write. Collective."""
    return Alone() if comm is None or comm.size == 1 else DuplicateRanks(comm.mpi, beside=False)


def _in_background(comm: Communicator | None, job: SaveJob) -> RanksOfSave:
    """How a thread talks to those of the other ranks. Collective."""
    if comm is None or comm.size == 1:
        return Alone()
    if threads_allowed():
        return DuplicateRanks(comm.mpi, beside=True)
    return FolderRanks(job.folder, job.generation, comm.rank, comm.size)


@contextmanager
def _freed_together(ranks: RanksOfSave) -> Iterator[RanksOfSave]:
    """Give back what a save talks by, when all ranks are known to have come to the end."""
    try:
        yield ranks
    except CheckpointError:
        ranks.free()
        raise
    ranks.free()


def _check_same(facts: list[list[Any]]) -> None:
    """Whether all ranks mean the same checkpoint."""
    for rank, (_, *wanted) in enumerate(facts):
        if wanted != facts[0][1:]:
            raise CheckpointError(
                "path and keep of a checkpoint must be the same on all ranks, got "
                f"{facts[0][1:]} on rank 0 and {wanted} on rank {rank}"
            )
