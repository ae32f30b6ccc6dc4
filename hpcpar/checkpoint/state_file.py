"""One state in one HDF5 file: nested dicts, lists and tuples of tensors, numbers, strings.

::

    /structure        JSON text: the state, with {"$": "tensor", "n": 3} in the place of a tensor
    /tensors/0, 1...  their contents; types that HDF5 lacks (the 16-bit and 8-bit floats) as integers

A file is written under a temporary name, synced, and renamed, so a crash leaves the file before or the new
one and never half of one. Every tensor has a checksum. Reading builds numbers, strings and tensors only:
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
import torch

from hpcpar.errors import CheckpointError

__all__ = ["read_state", "write_state"]

_FORMAT = "hpcpar state 1"
_MARK = "$"
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def write_state(path: str | os.PathLike[str], state: Any) -> None:
    """Write a state to a file, in the place of one that is there. Local.

    Parameters
    ----------
    path
        Of the file; its folder is made if need be.
    state
        Dicts (keys are strings, numbers, booleans or ``None``), lists and tuples of tensors, numbers,
        strings, booleans and ``None``. Tensors on a GPU are copied to the host, and come back on the host.

    Raises
    ------
    CheckpointError
        When something else is in the state, or the file cannot be written.
    """
    path = Path(path)
    tensors: list[torch.Tensor] = []
    structure = _encode(state, tensors, "state")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(temporary, "w") as file:
            file.attrs["format"] = _FORMAT
            text = json.dumps(structure).encode()
            file["structure"] = np.frombuffer(text, dtype=np.uint8)
            for number, tensor in enumerate(tensors):
                file[f"tensors/{number}"] = _as_array(tensor)
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
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
            return _decode(structure, file, path)
    except CheckpointError:
        raise
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} must be a whole state of hpcpar, got {error}") from error


def _encode(value: Any, tensors: list[torch.Tensor], where: str) -> Any:
    """The structure of a value; its tensors go into the list."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        array = _as_array(value)
        return {
            _MARK: "tensor",
            "n": len(tensors) - 1,
            "dtype": str(value.dtype).removeprefix("torch."),
            "shape": list(value.shape),
            "crc": zlib.crc32(array.tobytes()),
        }
    if isinstance(value, (list, tuple)):
        items = [_encode(item, tensors, f"{where}[{place}]") for place, item in enumerate(value)]
        return items if isinstance(value, list) else {_MARK: "tuple", "items": items}
    if isinstance(value, dict):
        for key in value:
            if not (key is None or isinstance(key, (bool, int, float, str))):
                raise CheckpointError(f"a key of {where} must be a string or number, got {key!r}")
        pairs = [[key, _encode(item, tensors, f"{where}[{key!r}]")] for key, item in value.items()]
        return {_MARK: "dict", "items": pairs}
    raise CheckpointError(
        f"{where} must be made of dicts, lists, tuples, tensors, numbers and strings, got a "
        f"{type(value).__name__}"
    )


def _decode(structure: Any, file: h5py.File, path: Path) -> Any:
    if isinstance(structure, list):
        return [_decode(item, file, path) for item in structure]
    if not isinstance(structure, dict):
        return structure
    kind = structure[_MARK]
    if kind == "tuple":
        return tuple(_decode(item, file, path) for item in structure["items"])
    if kind == "dict":
        return {key: _decode(item, file, path) for key, item in structure["items"]}
    if kind != "tensor":
        raise CheckpointError(f"{path} must be of a version that this hpcpar knows, got a part {kind!r}")
    array = file[f"tensors/{structure['n']}"][()]
    if zlib.crc32(array.tobytes()) != structure["crc"]:
        raise CheckpointError(f"{path} must be undamaged, got a wrong checksum of tensor {structure['n']}")
    dtype = getattr(torch, structure["dtype"])
    return torch.from_numpy(array.reshape(-1)).view(dtype).reshape(structure["shape"])


def _as_array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The contents in one dimension, as integers of the same width where numpy lacks the type."""
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    try:
        return flat.numpy()
    except TypeError:
        return flat.view(_INTEGERS[flat.dtype.itemsize]).numpy()


def _sync(path: Path) -> None:
    """Have the system write a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
