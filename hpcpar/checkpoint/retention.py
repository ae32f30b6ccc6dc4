"""Which checkpoints of a training there are, which one is the newest, and which are no longer needed.

A *series* are folders side by side with the same name but for the number at its end: ``step-100``,
``step-200``. Their order is that in which they were saved: a training that has gone back to an earlier step
goes on from what it saves then, not from what it has left behind. Generations tell it, which grow from save
to save of a series, even if clocks do not; the number decides between copies.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from hpcpar.checkpoint.folder import MANIFEST, generation_of, remove_folder
from hpcpar.checkpoint.manifest import manifest_from, manifest_text
from hpcpar.checkpoint.ranks import together
from hpcpar.errors import CheckpointError

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["check_keep", "latest", "newest_generation", "remove_older"]

_LOG = logging.getLogger(__name__)
_NUMBERED = re.compile(r"(.*?)(\d+)", re.DOTALL)


def latest(folder: str | os.PathLike[str], comm: Communicator | None = None) -> Path | None:
    """The newest complete checkpoint in a folder. Collective with ``comm``, else Local.

    Parameters
    ----------
    folder
        In which checkpoints lie side by side; it need not exist.
    comm
        The ranks that want to know. All get rank 0's answer, even if another one is saved meanwhile.

    Returns
    -------
    Path or None
        The one that was saved last, whatever its number. Half-written and damaged ones are passed over.
    """
    if comm is None:
        return _latest(Path(folder))
    found = together(comm, lambda: _latest(Path(folder)) if comm.rank == 0 else None)
    text = comm.bcast(None if found is None else os.fspath(found))
    return None if text is None else Path(text)


def _latest(folder: Path) -> Path | None:
    found = []
    for path in _folders(folder):
        created = _created(path)
        if created is not None:
            found.append((_age(created, path), path))
    return max(found)[-1] if found else None


def newest_generation(path: Path) -> str:
    """The last generation that has files in a folder, or in others of its series, else ``""``. Local."""
    numbered = _NUMBERED.fullmatch(path.name)
    prefix = numbered[1] if numbered else path.name
    newest = ""
    with suppress(OSError):
        siblings = [path] if numbered is None else _of_series(path.parent, prefix)
        for sibling in siblings:
            with suppress(OSError):
                newest = max([newest, *(generation_of(name) or "" for name in os.listdir(sibling))])
    return newest


def _of_series(parent: Path, prefix: str) -> list[Path]:
    """Folders of a series, whatever is in them."""
    found = []
    for name in os.listdir(parent):
        numbered = _NUMBERED.fullmatch(name)
        if numbered and numbered[1] == prefix:
            found.append(parent / name)
    return found


def _age(created: str, path: Path) -> tuple[str, int, str]:
    """Larger for what was saved later."""
    numbered = _NUMBERED.fullmatch(path.name)
    return created, int(numbered[2]) if numbered else -1, path.name


def check_keep(path: Path, keep: int | None) -> None:
    """Whether ``keep`` makes sense for this path. Local.

    Raises
    ------
    CheckpointError
        When it is no positive number, or the name does not end in a number.
    """
    if keep is None:
        return
    if type(keep) is not int or keep < 1:
        raise CheckpointError(f"keep must be at least 1, or None to keep all, got {keep!r}")
    if not _NUMBERED.fullmatch(path.name):
        raise CheckpointError(
            f"the name of a checkpoint must end in a number for keep={keep} to know its series, got "
            f"{path.name!r}. Use names like step-100"
        )


def remove_older(path: Path, keep: int) -> None:
    """Remove checkpoints of the series of ``path`` until ``keep`` are left, itself included. Local.

    Those that were saved first go. Only files of checkpoints are removed: what is not committed, and what
    else lies in a folder, stays.
    """
    numbered = _NUMBERED.fullmatch(path.name)
    if numbered is None:
        return
    others = []
    for sibling in _folders(path.parent):
        found = _NUMBERED.fullmatch(sibling.name)
        if not found or found[1] != numbered[1] or sibling.name == path.name:
            continue
        created = _created(sibling)
        if created is not None:
            others.append((_age(created, sibling), sibling))
    for _, sibling in sorted(others, reverse=True)[keep - 1 :]:
        try:
            left = remove_folder(sibling)
        except OSError as error:
            _LOG.warning("an old checkpoint cannot be removed: %s", error)
            continue
        if left:
            _LOG.warning(
                "%s stays, without its checkpoint: it has other files, such as %s", sibling, left[0].name
            )


def _folders(parent: Path) -> Iterator[Path]:
    """Folders that have a manifest; links to folders are left alone."""
    try:
        entries = sorted(os.scandir(parent), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False) and (Path(entry.path) / MANIFEST).is_file():
            yield Path(entry.path)


def _created(path: Path) -> str | None:
    """The generation of a checkpoint, which grows with time, if its files look whole."""
    try:
        manifest = manifest_from(manifest_text(path), path)
        files = [file for file in manifest.files if file is not None]
        whole = all((path / file.name).stat().st_size == file.nbytes for file in files)
    except (CheckpointError, OSError):
        return None
    return manifest.generation if whole else None
