"""What is in a checkpoint, whether it is undamaged, and its tensors in another program's format."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hpcpar.checkpoint.leaves import nbytes_of
from hpcpar.checkpoint.manifest import Manifest, manifest_from, manifest_text
from hpcpar.checkpoint.reading import LeafReader
from hpcpar.checkpoint.tree import LEAF_KINDS, MAPPINGS, SEQUENCES, Node, items_of, kind_of, value_of
from hpcpar.errors import CheckpointError

__all__ = ["CheckpointInfo", "Entry", "export", "info", "verify"]


@dataclass(frozen=True)
class Entry:
    """One value of a checkpoint.

    Attributes
    ----------
    name
        Its keys, with dots between them.
    kind
        ``tensor``, ``array``, ``scalar``, ``bytes``, or the Python type of anything smaller.
    dtype, shape
        Of tensors and arrays, else empty.
    nbytes
        Of its contents; 0 for what is part of the manifest.
    ranks
        Whose value it is; empty for one that all ranks share.
    value
        Text of what is not a tensor or array.
    """

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    ranks: tuple[int, ...]
    value: str


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint's manifest says.

    Attributes
    ----------
    path
        The folder.
    created
        When it was saved, ISO 8601.
    ranks
        How many saved it.
    versions
        Of the packages that did.
    nbytes
        Of its data files.
    entries
        All that is saved, in order.
    """

    path: Path
    created: str
    ranks: int
    versions: dict[str, str]
    nbytes: int
    entries: tuple[Entry, ...]


def info(path: str | os.PathLike[str]) -> CheckpointInfo:
    """What is in a checkpoint; its data are not read. Local.

    Raises
    ------
    CheckpointError
        When the manifest is missing or damaged.
    """
    folder = Path(path)
    manifest = _manifest(folder)
    nbytes = sum(file.nbytes for file in manifest.files if file is not None)
    entries = tuple(_entry(name, ranks, node) for name, ranks, node in _values(manifest.node))
    return CheckpointInfo(folder, manifest.created, manifest.ranks, dict(manifest.versions), nbytes, entries)


def verify(path: str | os.PathLike[str]) -> CheckpointInfo:
    """Read all data of a checkpoint and compare their checksums. Local.

    Raises
    ------
    CheckpointError
        Names the file that is missing or damaged.
    """
    folder = Path(path)
    manifest = _manifest(folder)
    with LeafReader(folder, manifest) as reader:
        for _, _, node in _values(manifest.node):
            if kind_of(node) in LEAF_KINDS:
                reader.value(node)
                reader.forget()
    return info(folder)


def export(path: str | os.PathLike[str], target: str | os.PathLike[str], *, prefix: str = "") -> list[str]:
    """Write the tensors of a checkpoint to a file of safetensors. Local.

    Parameters
    ----------
    path
        The checkpoint.
    target
        The file; overwritten if it is there.
    prefix
        Only tensors whose names begin with it, such as ``"model."``; it is taken off their names.

    Returns
    -------
    list of str
        The names in the file. Values of single ranks are left out.

    Raises
    ------
    CheckpointError
        When there is no such tensor, the checkpoint is damaged, the file cannot be written, or the package
        ``safetensors`` is missing.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise CheckpointError(
            "export must have the package safetensors, got none. Install it: pip install safetensors"
        ) from error
    folder, target = Path(path), Path(target)
    manifest = _manifest(folder)
    tensors: dict[str, torch.Tensor] = {}
    with LeafReader(folder, manifest) as reader:
        for name, ranks, node in _values(manifest.node):
            if kind_of(node) == "tensor" and not ranks and name.startswith(prefix) and name != prefix:
                tensors[name.removeprefix(prefix)] = torch.as_tensor(reader.value(node))
                reader.forget()  # two names of one tensor are two in the file
    if not tensors:
        raise CheckpointError(f"{folder} must have tensors whose names begin with {prefix!r}, got none")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, str(temporary), metadata={"format": "pt"})
        temporary.replace(target)
    except Exception as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{target} must be writable as safetensors, got {error}") from error
    return list(tensors)


def _manifest(folder: Path) -> Manifest:
    return manifest_from(manifest_text(folder), folder)


def _values(
    node: Node, name: str = "", ranks: tuple[int, ...] = ()
) -> Iterator[tuple[str, tuple[int, ...], Node]]:
    """Name, owners and node of all that is not a container."""
    kind = kind_of(node)
    if kind == "ranks":
        for members, item in node["items"]:
            yield from _values(item, name, tuple(members))
    elif kind in MAPPINGS or kind in SEQUENCES:
        for key, item in items_of(node):
            yield from _values(item, f"{name}.{key}" if name else str(key), ranks)
    else:
        yield name, ranks, node


def _entry(name: str, ranks: tuple[int, ...], node: Node) -> Entry:
    kind = kind_of(node)
    if kind in LEAF_KINDS:
        return Entry(name, kind, str(node["dtype"]), tuple(node["shape"]), nbytes_of(node), ranks, "")
    value: Any = value_of(node)
    return Entry(name, type(value).__name__, "", (), 0, ranks, f"{value!r:.60}")
