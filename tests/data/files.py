"""HDF5 files to read in tests, in which a sample's label is its number."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from hypothesis import settings

from hpcpar.data import H5Dataset
from hpcpar.data.progress import Progress

__all__ = ["BOTH", "PROPERTY", "as_rank", "images", "numbers", "write"]

BOTH = ["images", "labels"]
PROPERTY = settings(deadline=None, database=None, derandomize=True)  # a busy machine is no failure


def images(labels: Iterable[int]) -> np.ndarray[Any, Any]:
    """What the samples with these numbers look like."""
    first = np.asarray(list(labels), np.int64).reshape(-1, 1, 1) * 7
    return ((first + np.arange(12).reshape(3, 4)) % 251).astype(np.uint8)


def write(path: Path, samples: int, chunk: int | None = 4, *, first: int = 0, **options: Any) -> Path:
    """A file of small images and labels, the latter with chunks of another length."""
    labels = np.arange(first, first + samples)
    if chunk is None or samples == 0:
        rows: list[dict[str, Any]] = [{}, {}]
    else:
        rows = [{"chunks": (min(chunk, samples), 3, 4), **options}, {"chunks": (min(5, samples),), **options}]
    with h5py.File(path, "w") as file:
        file.create_dataset("images", data=images(labels), **rows[0])
        file.create_dataset("labels", data=labels, **rows[1])
    return path


def as_rank(data: H5Dataset, rank: int, ranks: int) -> H5Dataset:
    """A dataset that was made by one process, as it would be on a rank of several."""
    data._progress = Progress(data.total_samples, rank, ranks)
    return data


def numbers(samples: Iterable[Any]) -> list[int]:
    """The labels of samples or batches of ``BOTH``, which must belong to their images."""
    found: list[int] = []
    for image, label in samples:
        labels = torch.atleast_1d(label).tolist()
        np.testing.assert_array_equal(image.numpy().reshape(-1, 3, 4), images(labels))
        found += labels
    return found
