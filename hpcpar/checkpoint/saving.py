"""Saving: every rank takes its state apart, all write at once, and one file commits it.

What is written, and by whom, is the business of :mod:`hpcpar.checkpoint.job`. Here it is done at once or,
with ``asynchronous=True``, by a thread: the caller takes the state apart and copies it, and nothing more. The
thread has messages of its own (:mod:`hpcpar.checkpoint.ranks`). A communicator has one save under way at a
time: the next one waits for it, and so does the exit of the process.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcpar.checkpoint.folder import new_generation
from hpcpar.checkpoint.job import SaveJob
from hpcpar.checkpoint.ranks import Alone, BackgroundRanks, FolderRanks, Ranks, ranks_of, together
from hpcpar.checkpoint.retention import check_keep
from hpcpar.checkpoint.snapshot import SnapshotMemory
from hpcpar.checkpoint.tree import Tree, encode
from hpcpar.comm import threads_allowed
from hpcpar.errors import CheckpointError, StalledError

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["Saving", "save"]

_LOG = logging.getLogger(__name__)
_SAVER = "hpcpar.checkpoint"


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
        for the number at its end (``step-100``, ``step-200``), so that this many are left.

    Returns
    -------
    Saving
        To wait for; complete unless ``asynchronous``.

    Raises
    ------
    CheckpointError
        On every rank, when the state cannot be saved by one of them: it holds something else, a disk is full.
        What was saved before is as it was. Also when the previous save, in the background, has failed and
        nobody has waited for it.
    """
    communicator = ranks_of(comm)
    saver = _saver_of(communicator)
    saver.finish()
    ranks: Ranks = Alone() if communicator is None else communicator
    folder = Path(os.path.abspath(path))

    def begin() -> Tree:
        check_keep(folder, keep)
        tree = encode(state)
        folder.mkdir(parents=True, exist_ok=True)
        if asynchronous:
            tree.leaves = saver.memory.take(tree.leaves)
        return tree

    try:
        tree = together(ranks, begin)
        facts = ranks.allgather([new_generation(), os.fspath(path), keep])
        _check_same(facts)
    except CheckpointError:
        with suppress(OSError):
            folder.rmdir()  # if it is empty
        raise
    job = SaveJob(folder, facts[0][0], tree, keep)
    saving = Saving(folder)
    if not asynchronous:
        job.run(ranks)
    else:
        saving._start(job, _background(communicator, job))
        saver.pending = saving
    return saving


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
        self._error: Exception | None = None
        self._is_seen = False

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not. Local."""
        return self._thread is None or not self._thread.is_alive()

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
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                text = f"the save of {self.path} must end within {timeout:g} s, got no end yet"
                raise StalledError("save", (), text)
            self._thread = None
        self._is_seen = True
        if self._error is not None:
            raise self._error
        return self.path

    def _start(self, job: SaveJob, ranks: Alone | BackgroundRanks | FolderRanks) -> None:
        def run() -> None:
            try:
                with _freed_together(ranks):
                    job.run(ranks)
            except Exception as error:
                _LOG.error("saving %s in the background failed: %s", self.path, error)
                self._error = error

        # Not a daemon: the exit of the process waits for it, before MPI ends.
        self._thread = threading.Thread(target=run, name="hpcpar-checkpoint")
        self._thread.start()


class _Saver:
    """What a communicator remembers of its saves."""

    def __init__(self) -> None:
        self.memory = SnapshotMemory()
        self.pending: Saving | None = None

    def finish(self) -> None:
        """Wait for the save that is under way; its error is raised unless somebody has seen it."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        is_known = pending._is_seen
        try:
            pending.wait()
        except Exception:
            if not is_known:
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


def _background(comm: Communicator | None, job: SaveJob) -> Alone | BackgroundRanks | FolderRanks:
    """How a thread talks to those of the other ranks. Collective."""
    if comm is None or comm.size == 1:
        return Alone()
    if threads_allowed():
        return BackgroundRanks(comm.mpi)
    return FolderRanks(job.folder, job.generation, comm.rank, comm.size)


@contextmanager
def _freed_together(ranks: Alone | BackgroundRanks | FolderRanks) -> Iterator[None]:
    """Give back what a thread talks by, when all ranks are known to have come to the end."""
    try:
        yield
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
