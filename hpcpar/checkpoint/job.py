"""One save, from the fingerprints to the commit: the same steps in the caller and in a thread.

::

    every rank   fingerprint the leaves      -> allgather digests, gather descriptions
    rank 0       plan                        -> scatter
    every rank   write its file, sync it     -> gather
    rank 0       write the manifest, rename  -> broadcast the outcome

A large state is written while its digests are computed, by a *guess*: that all ranks have the same, as they
mostly do. A rank whose share of the plan turns out to be another one writes its file again.

Whatever fails before the rename, on any rank, fails on all with the same error, and what was committed before
stays as it was. The rename is the commit. After it nothing is an error any more: what is left to do, to sync
the folder and to remove what was replaced, is logged where it fails, and the next save does it.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from hpcpar.checkpoint.data_file import DataFile, write_data_file
from hpcpar.checkpoint.fingerprint import fingerprint, slice_bounds
from hpcpar.checkpoint.folder import LOCK, MANIFEST, data_name, generation_of, locked, our_files, sync_folder
from hpcpar.checkpoint.leaves import as_bytes, value_nbytes
from hpcpar.checkpoint.manifest import Manifest, manifest_from, manifest_text, write_manifest
from hpcpar.checkpoint.plan import Description, Plan, Write, describe, make_plan
from hpcpar.checkpoint.ranks import Ranks, attempt
from hpcpar.checkpoint.retention import remove_older
from hpcpar.checkpoint.tree import Tree
from hpcpar.errors import CheckpointError

__all__ = ["SaveJob"]

_LOG = logging.getLogger(__name__)
_GUESS_BYTES = 16 << 20  # less is written faster than a thread is started
_GUESS_HOLDERS = 1_000_000  # of more leaves, or by more ranks, a plan takes longer than it saves


@dataclass(frozen=True)
class _Share:
    """What this rank writes; rank 0 has the whole plan, too."""

    work: tuple[Write, ...]
    data_bytes: int
    plan: Plan | None


@dataclass(frozen=True)
class _Guess:
    """What this rank writes if all ranks have the same, and a thread that does so already."""

    share: _Share
    written: Future[DataFile | None]


@dataclass(frozen=True)
class SaveJob:
    """What is saved, and where.

    Attributes
    ----------
    folder
        Of the checkpoint. It exists.
    generation
        Of this save, the same on all ranks.
    tree
        This rank's state.
    keep
        How many of the series are left, or ``None``.
    """

    folder: Path
    generation: str
    tree: Tree
    keep: int | None

    def run(self, ranks: Ranks) -> None:
        """Do all of it. Collective.

        Raises
        ------
        CheckpointError
            The same on every rank; nothing of this save is left then.
        """
        try:
            with ThreadPoolExecutor(1) as thread:  # its end is waited for, whatever happens
                guess = self._begin_by_guess(ranks, thread)
                self._write(ranks, self._plan(ranks), guess)
        except CheckpointError:
            self._clean_up(ranks)
            raise

    def _begin_by_guess(self, ranks: Ranks, thread: ThreadPoolExecutor) -> _Guess | None:
        """Let the disk work while digests are computed. Local."""
        leaves = self.tree.leaves
        on_gpu = any(isinstance(leaf, torch.Tensor) and leaf.is_cuda for leaf in leaves)
        sizes = [] if on_gpu else [value_nbytes(leaf) for leaf in leaves]
        if sum(sizes) < _GUESS_BYTES or len(sizes) * ranks.size > _GUESS_HOLDERS:
            return None
        try:
            unknown = [[""] * len(list(slice_bounds(size))) for size in sizes]
            plan = make_plan([describe(self.tree, unknown)] * ranks.size)
            share = _Share(plan.work[ranks.rank], plan.data_bytes[ranks.rank], None)
            return _Guess(share, thread.submit(self._write_data, ranks.rank, share))
        except Exception:  # no plan, or no thread at the exit of the process: the others must hear why, later
            return None

    # ---- the plan -----------------------------------------------------------------------------------------

    def _plan(self, ranks: Ranks) -> _Share:
        description = attempt(ranks, self._describe)
        digests = ranks.allgather(description.digest)
        is_first = digests.index(description.digest) == ranks.rank
        gathered = ranks.gather(description.to_json(complete=is_first))
        plan = attempt(ranks, lambda: _planned(gathered))
        shares = None
        if plan is not None:
            work = [[list(astuple(write)) for write in writes] for writes in plan.work]
            shares = list(zip(work, plan.data_bytes, strict=True))
        mine, data_bytes = ranks.scatter(shares)
        return _Share(tuple(Write(*write) for write in mine), data_bytes, plan)

    def _describe(self) -> Description:
        leaves = self.tree.leaves
        return describe(self.tree, [fingerprint(as_bytes(leaf)) for leaf in leaves])

    # ---- the data, and the commit -------------------------------------------------------------------------

    def _write(self, ranks: Ranks, share: _Share, guess: _Guess | None) -> None:
        file = attempt(ranks, lambda: self._written(ranks.rank, share, guess))
        gathered = ranks.gather(None if file is None else list(astuple(file)))
        plan = share.plan
        attempt(ranks, lambda: None if plan is None else self._commit(gathered or [], plan))

    def _written(self, rank: int, share: _Share, guess: _Guess | None) -> DataFile | None:
        """What the guess has written, if it was right."""
        if guess is None:
            return self._write_data(rank, share)
        if (guess.share.work, guess.share.data_bytes) == (share.work, share.data_bytes):
            return guess.written.result()
        with suppress(CheckpointError):
            guess.written.result()
        self._path(rank).unlink(missing_ok=True)
        return self._write_data(rank, share)

    def _write_data(self, rank: int, share: _Share) -> DataFile | None:
        if not share.work:
            return None
        path = self._path(rank)
        try:
            return write_data_file(
                path, self.generation, rank, self.tree.leaves, share.work, share.data_bytes
            )
        except OSError as error:
            raise CheckpointError(f"{path} must be writable, got {error.strerror or error}") from error

    def _commit(self, written: list[Any], plan: Plan) -> None:
        """On rank 0: write the manifest."""
        files = tuple(None if file is None else DataFile(*file) for file in written)
        versions = {"hpcpar": _version(), "torch": torch.__version__}
        created = datetime.now(UTC).isoformat(timespec="seconds")
        manifest = Manifest(self.generation, len(files), created, versions, plan.node, plan.leaves, files)
        try:
            sync_folder(self.folder)
            with locked(self.folder):
                self._check_visible(files)
                old = self._committed()
                write_manifest(self.folder, manifest)
                self._settle(old)
        except OSError as error:
            text = f"{self.folder / MANIFEST} must be writable, got {error.strerror or error}"
            raise CheckpointError(text) from error
        finally:
            with suppress(OSError):
                (self.folder / f"{self.generation}.manifest").unlink(missing_ok=True)

    def _settle(self, old: str | None) -> None:
        """After the commit: have it reach the disk, and only then remove what it replaces."""
        try:
            sync_folder(self.folder)
            self._remove_old(old)
            if self.keep is not None:
                remove_older(self.folder, self.keep)
        except OSError as error:
            _LOG.warning("%s is saved, but what it replaces may still be there: %s", self.folder, error)

    def _check_visible(self, files: tuple[DataFile | None, ...]) -> None:
        """Whether rank 0 finds the files of all, which it is about to commit."""
        for rank, file in enumerate(files):
            path = self.folder / ("" if file is None else file.name)
            if file is None or (path.is_file() and path.stat().st_size == file.nbytes):
                continue
            raise CheckpointError(
                f"{path} must have the {file.nbytes} bytes that rank {rank} wrote, got "
                f"{path.stat().st_size if path.is_file() else 'no such file'}. All ranks must see one "
                "folder, and no other job may save there"
            )

    def _committed(self) -> str | None:
        """The generation that is committed now."""
        try:
            return manifest_from(manifest_text(self.folder), self.folder).generation
        except CheckpointError:
            return None

    def _remove_old(self, committed: str | None) -> None:
        """Remove files that this save replaces, and those of writers that began before and have died."""
        for path in our_files(self.folder):
            generation = generation_of(path.name)
            if generation is not None and (generation < self.generation or generation == committed):
                with suppress(OSError):
                    path.unlink()

    # ---- after a failure ----------------------------------------------------------------------------------

    def _clean_up(self, ranks: Ranks) -> None:
        """Remove what this save has written, unless it was committed: interrupts come at any moment."""
        if ranks.bcast(self._committed() == self.generation if ranks.rank == 0 else None):
            return
        with suppress(OSError):
            self._path(ranks.rank).unlink(missing_ok=True)
        ranks.allgather(None)
        if ranks.rank == 0:
            self._remove_if_new()

    def _remove_if_new(self) -> None:
        """Remove a folder in which nothing was ever committed."""
        with suppress(OSError):
            if not (self.folder / MANIFEST).exists():
                (self.folder / LOCK).unlink(missing_ok=True)
                self.folder.rmdir()

    def _path(self, rank: int) -> Path:
        return self.folder / data_name(self.generation, rank)


def _planned(gathered: list[Any] | None) -> Plan | None:
    """The plan, on the rank that has the descriptions."""
    return None if gathered is None else make_plan([Description.from_json(item) for item in gathered])


def _version() -> str:
    try:
        return metadata.version("hpcpar")
    except metadata.PackageNotFoundError:
        return "unknown"
