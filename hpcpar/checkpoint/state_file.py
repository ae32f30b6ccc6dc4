"""One state in one HDF5 file: nested dicts, lists and tuples of tensors, numbers, strings.

::

    /structure        JSON text: the state, with {"$": "tensor", "n": 3, ...} in the place of a tensor
    /checksums        of the leaves
    /leaves/0, 1...   their contents, as bytes

A file is written under a temporary name, synced, and renamed, so a crash leaves the file before or the new
one and never half of one. Every leaf has a checksum. Reading builds numbers, strings and tensors only:
nothing in a file is executed or unpickled, wherever it came from.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpcpar.checkpoint.folder import sync
from hpcpar.checkpoint.leaves import as_bytes, empty_leaf, finished, memory_of
from hpcpar.checkpoint.tree import Node, decode, encode
from hpcpar.errors import CheckpointError

__all__ = ["read_state", "write_state"]

_FORMAT = "hpcpar state 2"


def write_state(path: str | os.PathLike[str], state: Any) -> None:
    """Write a state to a file, in the place of one that is there. Local.

    Parameters
    ----------
    path
        Of the file; its folder is made if need be.
    state
        Dicts (keys are strings, numbers, booleans or ``None``), lists and tuples of tensors, arrays, numbers,
        strings, booleans and ``None``. Tensors on a GPU are copied to the host, and come back on the host.

    Raises
    ------
    CheckpointError
        When something else is in the state, or the file cannot be written.
    """
    path = Path(path)
    tree = encode(state)
    if tree.parts:
        raise CheckpointError("a state in one file must be of one rank, got a PerRank in it")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(temporary, "w", locking=False) as file:
            file.attrs["format"] = _FORMAT
            file["structure"] = np.frombuffer(json.dumps(tree.node).encode(), dtype=np.uint8)
            checksums = []
            for number, leaf in enumerate(tree.leaves):
                data = as_bytes(leaf).numpy()
                checksums.append(zlib.crc32(memory_of(data)))
                file[f"leaves/{number}"] = data
            file["checksums"] = np.array(checksums, dtype=np.uint32)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{path} must be writable, got {error}") from error


def read_state(path: str | os.PathLike[str]) -> Any:
    """The state that :func:`write_state` wrote. Local.

    Raises
    ------
    CheckpointError
        When the file is missing, truncated, damaged, or not one of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} must be a file, got nothing of that name")
    try:
        with h5py.File(path, "r", locking=False) as file:
            if file.attrs.get("format") != _FORMAT:
                raise CheckpointError(f"{path} must be a state of hpcpar, got another HDF5 file")
            structure = json.loads(file["structure"][()].tobytes())
            values: dict[int, Any] = {}

            def leaf(node: Node) -> Any:
                if node["n"] not in values:
                    values[node["n"]] = _read_leaf(file, node, path)
                return values[node["n"]]

            return decode(structure, leaf)
    except CheckpointError:
        raise
    except (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path} must be a whole state of hpcpar, got {error}") from error


def _read_leaf(file: h5py.File, node: Node, path: Path) -> Any:
    value, memory = empty_leaf(node)
    data = file[f"leaves/{node['n']}"][()]
    if data.nbytes != memory.numel() or zlib.crc32(data) != file["checksums"][node["n"]]:
        raise CheckpointError(f"{path} must be undamaged, got a wrong checksum of leaf {node['n']}")
    memory.numpy()[...] = data
    return finished(node, value)
