"""The manifest: the one file that makes a checkpoint of a folder.

It has the structure of the state, where the slices of every leaf are, and what the data files look like, as
JSON with a checksum. It comes to be by rename, after everything that it names is on the disk. So a checkpoint
is whole or not there, and whatever is in the folder beside it does not matter.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from hpcpar.checkpoint.data_file import DataFile
from hpcpar.checkpoint.folder import MANIFEST, generation_of
from hpcpar.checkpoint.plan import Piece
from hpcpar.checkpoint.tree import Node
from hpcpar.errors import CheckpointError

__all__ = ["Manifest", "manifest_from", "manifest_text", "write_manifest"]

_FORMAT = "hpcpar checkpoint"
_VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """What is known of a checkpoint.

    Attributes
    ----------
    generation
        Which save this is.
    ranks
        How many saved it.
    created
        When, in ISO 8601.
    versions
        Of hpcpar and torch.
    node
        Structure of the state.
    leaves
        The slices of each leaf.
    files
        The data of each rank; ``None`` for one that has written nothing.
    """

    generation: str
    ranks: int
    created: str
    versions: Mapping[str, str]
    node: Node
    leaves: tuple[tuple[Piece, ...], ...]
    files: tuple[DataFile | None, ...]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Commit. Local, on rank 0.

    Raises
    ------
    OSError
        When it cannot be written; then what was committed before still is. The last that is done is the
        rename, so what fails later is not a failure of the commit.
    """
    body = {
        "generation": manifest.generation,
        "ranks": manifest.ranks,
        "created": manifest.created,
        "versions": dict(manifest.versions),
        "files": [None if file is None else list(astuple(file)) for file in manifest.files],
        "leaves": [[list(astuple(piece)) for piece in leaf] for leaf in manifest.leaves],
        "state": manifest.node,
    }
    document = {"format": _FORMAT, "version": _VERSION, "checksum": _checksum(body), "checkpoint": body}
    temporary = folder / f"{manifest.generation}.manifest"
    with open(temporary, "w", encoding="ascii") as file:
        file.write(json.dumps(document))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / MANIFEST)


def manifest_text(folder: Path) -> str:
    """The text of a checkpoint's manifest. Local.

    Raises
    ------
    CheckpointError
        When there is none.
    """
    path = folder / MANIFEST
    try:
        return path.read_text(encoding="ascii")
    except (FileNotFoundError, NotADirectoryError) as error:
        what = "a folder without one: its writer has not finished" if folder.is_dir() else "no such folder"
        if folder.is_file():
            what = "a file in the place of the folder"
        raise CheckpointError(f"{path} must be the manifest of a checkpoint, got {what}") from error
    except OSError as error:
        raise CheckpointError(f"{path} must be readable, got {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} must be undamaged, got {error}") from error


def manifest_from(text: str, folder: Path) -> Manifest:
    """The manifest that :func:`manifest_text` has read. Local.

    Raises
    ------
    CheckpointError
        When it is damaged, not one of ours, or from a later version of hpcpar.
    """
    path = folder / MANIFEST
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} must be undamaged, got {error}") from error
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise CheckpointError(f"{path} must be the manifest of a checkpoint of hpcpar, got another file")
    version = document.get("version")
    if isinstance(version, int) and version > _VERSION:
        raise CheckpointError(
            f"{path} must be of version {_VERSION} or older, got {version}. Load it with a later hpcpar"
        )
    body: Any = document.get("checkpoint")
    if version != _VERSION or document.get("checksum") != _checksum(body):
        raise CheckpointError(f"{path} must be undamaged, got a wrong checksum")
    try:
        files = tuple(None if file is None else DataFile(*file) for file in body["files"])
        if not all(file is None or generation_of(file.name) == body["generation"] for file in files):
            raise ValueError("names of data files that no checkpoint has")
        return Manifest(
            body["generation"],
            body["ranks"],
            body["created"],
            body["versions"],
            body["state"],
            tuple(tuple(Piece(*piece) for piece in leaf) for leaf in body["leaves"]),
            files,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} must be undamaged, got {error!r}") from error


def _checksum(body: Any) -> int:
    return zlib.crc32(json.dumps(body).encode())
