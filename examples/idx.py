"""Read IDX files, the format of MNIST, Fashion-MNIST, EMNIST and others, plain or gzipped.

A file of unsigned bytes holds, in this order (numbers are big-endian):

    00 00 08 d         magic: two zeros, the type (08: unsigned byte), the number of dimensions d
    d x uint32         the sizes
    product of sizes   the data, the last dimension fastest

The header announces the length of the file. Whatever disagrees, a truncated download or labels
where images should be, is an `IdxError` that names the file and both figures.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common import UserError

__all__ = ["IdxError", "read_idx", "read_labelled_images"]

UNSIGNED_BYTE = 0x08


class IdxError(UserError):
    """A file is missing, is not IDX, or is not what its header or its neighbour says."""


def read_idx(path: Path, dimensions: int) -> npt.NDArray[np.uint8]:
    """Read one IDX file of unsigned bytes.

    Parameters
    ----------
    path : the file; gzipped if its name ends in ``.gz``.
    dimensions : how many dimensions it must have: 3 for images, 1 for labels.

    Raises
    ------
    IdxError : unreadable, wrong magic number, or longer or shorter than its header says.
    """
    content = _read_bytes(path)
    expected = struct.pack(">HBB", 0, UNSIGNED_BYTE, dimensions)
    if content[:4] != expected:
        raise IdxError(
            f"{path}: the magic number must be 0x{expected.hex()} (unsigned bytes, {dimensions} "
            f"dimensions), got 0x{content[:4].hex()}"
        )
    header_bytes = 4 + 4 * dimensions
    if len(content) < header_bytes:
        raise IdxError(f"{path}: truncated in the header, {len(content)} of {header_bytes} bytes")
    sizes = struct.unpack(f">{dimensions}I", content[4:header_bytes])
    data_bytes = len(content) - header_bytes
    if data_bytes != math.prod(sizes):
        fault = "truncated" if data_bytes < math.prod(sizes) else "too long"
        shape = " x ".join(str(size) for size in sizes)
        raise IdxError(
            f"{path}: {fault}, the header announces {shape} = {math.prod(sizes)} bytes of data, "
            f"the file has {data_bytes}"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header_bytes).reshape(sizes)


def read_labelled_images(folder: Path, prefix: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Read ``<prefix>-images-idx3-ubyte`` and ``<prefix>-labels-idx1-ubyte``, each plain or ``.gz``.

    Returns images of shape (count, height, width) and labels of shape (count,).
    """
    images_path = _find(folder, f"{prefix}-images", "idx3-ubyte")
    labels_path = _find(folder, f"{prefix}-labels", "idx1-ubyte")
    images = read_idx(images_path, dimensions=3)
    labels = read_idx(labels_path, dimensions=1)
    if len(images) != len(labels):
        raise IdxError(f"{images_path} has {len(images)} images, but {labels_path} {len(labels)} labels")
    if images.size == 0:
        raise IdxError(f"{images_path}: holds no pixels (shape {images.shape})")
    return images, labels


def _find(folder: Path, stem: str, kind: str) -> Path:
    """The first that exists of the names under which such a file is distributed."""
    if not folder.is_dir():
        raise IdxError(f"{folder} is not a folder")
    names = [f"{stem}{separator}{kind}{suffix}" for separator in "-." for suffix in ("", ".gz")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise IdxError(f"{folder} has no file {names[0]} (nor {', '.join(names[1:])})")


def _read_bytes(path: Path) -> bytes:
    """The content of a file, decompressed if it is gzipped."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rb") as file:
                return file.read()
        return path.read_bytes()
    except EOFError as error:
        raise IdxError(f"{path}: truncated, the compressed stream ends early") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise IdxError(f"{path}: not a valid gzip file ({error})") from error
    except OSError as error:
        raise IdxError(f"{path}: cannot be read ({error.strerror})") from error
