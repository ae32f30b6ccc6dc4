"""What is in a checkpoint, whether it is undamaged, and its tensors in another program's format."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
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

_LOG = logging.getLogger(__name__)
_MOST_NAMED = 5


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
    entries = tuple(map(_entry, _values(manifest.node)))
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
        for value in _values(manifest.node):
            if kind_of(value.node) in LEAF_KINDS:
                reader.value(value.node)
                reader.forget()
    return info(folder)


def export(
    path: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    prefix: str = "",
    skip_per_rank: bool = False,
) -> list[str]:
    """Write the tensors of a checkpoint to a file of safetensors. Local.

    Parameters
    ----------
    path
        The checkpoint.
    target
        The file; overwritten if it is there.
    prefix
        Only tensors whose names begin with it, such as ``"model."``; it is taken off their names.
    skip_per_rank
        Leave out tensors that differ between ranks though they are not marked by
        :class:`~hpcpar.checkpoint.PerRank`; they are named in a warning. Else they are an error.

    Returns
    -------
    list of str
        The names in the file. Tensors that are marked are left out, and named in a warning.

    Raises
    ------
    CheckpointError
        When there is no such tensor, two have the same name, or one differs between ranks; when the
        checkpoint is damaged, the file cannot be written, or the package ``safetensors`` is missing.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise CheckpointError(
            "export must have the package safetensors, got none. Install it: pip install safetensors"
        ) from error
    folder, target = Path(path), Path(target)
    manifest = _manifest(folder)
    wanted = _exported(folder, manifest, prefix, skip_per_rank)
    tensors: dict[str, torch.Tensor] = {}
    with LeafReader(folder, manifest) as reader:
        for name, node in wanted.items():
            tensors[name.removeprefix(prefix)] = torch.as_tensor(reader.value(node))
            reader.forget()  # two names of one tensor are two in the file
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, str(temporary), metadata={"format": "pt"})
        temporary.replace(target)
    except Exception as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{target} must be writable as safetensors, got {error}") from error
    return list(tensors)


def _exported(folder: Path, manifest: Manifest, prefix: str, skip_per_rank: bool) -> dict[str, Node]:
    """Names and nodes of the tensors that go into the file."""
    found: dict[str, Node] = {}
    left_out: dict[str, bool] = {}
    for value in _values(manifest.node):
        if kind_of(value.node) != "tensor" or not value.name.startswith(prefix) or value.name == prefix:
            continue
        if value.ranks:
            left_out[value.name] = value.is_marked
        elif value.name in found:
            raise CheckpointError(
                f"names of exported tensors must be unique, got {value.name} twice in {folder}: keys may not "
                "contain dots or differ in their type only"
            )
        else:
            found[value.name] = value.node
    different = [name for name, is_marked in left_out.items() if not is_marked]
    if different and not skip_per_rank:
        raise CheckpointError(
            f"exported tensors must be the same on all ranks, got different ones for {_names(different)} in "
            f"{folder}. Leave them out by skip_per_rank (--skip-per-rank)"
        )
    if not found:
        raise CheckpointError(f"{folder} must have tensors whose names begin with {prefix!r}, got none")
    if left_out:
        _LOG.warning("not exported, since they belong to single ranks: %s", _names(list(left_out)))
    return found


def _names(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _manifest(folder: Path) -> Manifest:
    return manifest_from(manifest_text(folder), folder)


@dataclass(frozen=True)
class _Value:
    """All that is not a container: its name, whose it is, its node."""

    name: str
    ranks: tuple[int, ...]
    is_marked: bool
    node: Node


def _values(
    node: Node, name: str = "", ranks: tuple[int, ...] = (), is_marked: bool = False
) -> Iterator[_Value]:
    kind = kind_of(node)
    if kind == "ranks":
        for members, item in node["items"]:
            yield from _values(item, name, tuple(members), is_marked or node["marked"])
    elif kind in MAPPINGS or kind in SEQUENCES:
        for key, item in items_of(node):
            yield from _values(item, f"{name}.{key}" if name else str(key), ranks, is_marked)
    else:
        yield _Value(name, ranks, is_marked, node)


def _entry(value: _Value) -> Entry:
    node, kind = value.node, kind_of(value.node)
    if kind in LEAF_KINDS:
        shape = tuple(node["shape"])
        return Entry(value.name, kind, str(node["dtype"]), shape, nbytes_of(node), value.ranks, "")
    plain: Any = value_of(node)
    return Entry(value.name, type(plain).__name__, "", (), 0, value.ranks, f"{plain!r:.60}")
