"""Which checkpoints of a training there are, which one is the newest, and which are no longer needed.

A *series* are folders side by side with the same name but for the number at its end: ``step-100``,
``step-200``. The number tells their order; folders without one are ordered by the time of their save.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from hpcpar.checkpoint.folder import MANIFEST, remove_folder
from hpcpar.checkpoint.manifest import manifest_from, manifest_text
from hpcpar.errors import CheckpointError

__all__ = ["check_keep", "latest", "remove_older"]

_LOG = logging.getLogger(__name__)
_NUMBERED = re.compile(r"(.*?)(\d+)", re.DOTALL)


def latest(folder: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint in a folder. Local.

    Parameters
    ----------
    folder
        In which checkpoints lie side by side; it need not exist.

    Returns
    -------
    Path or None
        The one with the highest number at the end of its name; of those without a number, which come after
        all that have one, the last that was saved. Half-written and damaged ones are passed over.
    """
    found = []
    for path in _folders(Path(folder)):
        numbered = _NUMBERED.fullmatch(path.name)
        created = _created(path)
        if created is not None:
            found.append((int(numbered[2]) if numbered else -1, created, path.name, path))
    return max(found)[-1] if found else None


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

    Those with the lowest numbers go. Only files of checkpoints are removed: what is not committed, and what
    else lies in a folder, stays.
    """
    numbered = _NUMBERED.fullmatch(path.name)
    if numbered is None:
        return
    others = []
    for sibling in _folders(path.parent):
        found = _NUMBERED.fullmatch(sibling.name)
        if found and found[1] == numbered[1] and sibling.name != path.name and _created(sibling) is not None:
            others.append((int(found[2]), sibling))
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
