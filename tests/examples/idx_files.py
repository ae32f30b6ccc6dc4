"""Write IDX files, for tests that read them."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

__all__ = ["idx_bytes", "write_set"]


def idx_bytes(array: np.ndarray) -> bytes:
    """The content of an IDX file with this array of unsigned bytes."""
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def write_set(folder: Path, prefix: str, images: np.ndarray, labels: np.ndarray) -> None:
    """Write the images and labels of a training set (prefix ``train``) or test set (``t10k``)."""
    (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx_bytes(images))
    (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
