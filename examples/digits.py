"""The digits example's data and net.

One rank reads the images and broadcasts them. Order of samples and initial weights are functions of the seed,
so every number of ranks sees the same training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import common
import idx
from hpcpar.comm import Communicator

__all__ = [
    "Dataset",
    "LabelledImages",
    "broadcast_dataset",
    "build_net",
    "endless_batches",
    "epoch_batches",
    "labelled_images",
    "load_digits",
    "load_idx_folder",
]


@dataclass(frozen=True)
class LabelledImages:
    """Images, bytes of shape (count, 1, height, width), and labels, int64 of shape (count,)."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """A training set, a test set and the number of classes."""

    train: LabelledImages
    test: LabelledImages
    classes: int


# ------------------------------------------------------------------------------------------- data


def load_digits() -> tuple[LabelledImages, LabelledImages]:
    """scikit-learn's handwritten digits, every class divided 80 / 20 into training and test set."""
    try:
        from sklearn.datasets import load_digits as bundled_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise common.UserError(
            "the default data need scikit-learn: install it, or give --data DIR"
        ) from error
    pixels, labels = bundled_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        pixels.reshape(-1, 8, 8).astype(np.uint8), labels, test_size=0.2, stratify=labels, random_state=0
    )
    return labelled_images(train_x, train_y), labelled_images(test_x, test_y)


def load_idx_folder(folder: Path) -> tuple[LabelledImages, LabelledImages]:
    """The training and test set of a folder with four IDX files."""
    train = labelled_images(*idx.read_labelled_images(folder, "train"))
    test = labelled_images(*idx.read_labelled_images(folder, "t10k"))
    if train.images.shape[1:] != test.images.shape[1:]:
        raise idx.IdxError(
            f"{folder}: training images are {tuple(train.images.shape[2:])} pixels, "
            f"but test images {tuple(test.images.shape[2:])}"
        )
    return train, test


def labelled_images(images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> LabelledImages:
    """Tensors of bytes, with a channel axis."""
    return LabelledImages(torch.tensor(images).unsqueeze(1), torch.tensor(labels, dtype=torch.int64))


def broadcast_dataset(
    sets: tuple[LabelledImages, LabelledImages] | None, limit: int | None, comm: Communicator
) -> Dataset:
    """Give every rank what rank 0 has read. **Collective.**

    One rank reads the files: a thousand ranks opening the same ones is what file systems hate.
    """
    tensors = [None] * 4 if sets is None else [part for s in sets for part in (s.images, s.labels)]
    train_x, train_y, test_x, test_y = (common.broadcast_tensor(tensor, comm) for tensor in tensors)
    classes = int(max(train_y.max(), test_y.max())) + 1
    train_x, train_y, test_x, test_y = (each[:limit] for each in (train_x, train_y, test_x, test_y))
    return Dataset(LabelledImages(train_x, train_y), LabelledImages(test_x, test_y), classes)


def epoch_batches(samples: int, batch_size: int, seed: int, epoch: int) -> list[torch.Tensor]:
    """The global batches of an epoch: a permutation drawn from seed and epoch, cut into pieces.

    The last batch is as large as what is left. All ranks get the same list.
    """
    order = np.random.default_rng([seed, epoch]).permutation(samples)
    return list(torch.from_numpy(order).split(batch_size))


def endless_batches(samples: int, batch_size: int, seed: Sequence[int]) -> Iterator[torch.Tensor]:
    """Batches of one rank that goes at its own pace: one permutation after the other, without end. Local."""
    generator = np.random.default_rng(seed)
    while True:
        yield from torch.from_numpy(generator.permutation(samples)).split(batch_size)


# ------------------------------------------------------------------------------------------ model


class Standardise(nn.Module):
    """Bytes in, floats out, with mean 0 and variance 1 over the images that it was made from.

    The two figures are buffers: they are saved with the model and `DataParallel` gives all ranks
    those of rank 0.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, images: torch.Tensor) -> None:
        super().__init__()
        values = images.float()
        self.register_buffer("mean", values.mean())
        self.register_buffer("scale", values.std(correction=0).clamp_min(1e-6))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images.float() - self.mean) / self.scale


def build_net(train_images: torch.Tensor, classes: int) -> nn.Sequential:
    """Two convolutions and two linear layers for images of one channel and at least 2 x 2 pixels."""
    return nn.Sequential(
        Standardise(train_images),
        nn.Conv2d(1, 32, 3, padding=1),
        nn.GroupNorm(8, 32),
        nn.GELU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.GroupNorm(8, 64),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 128),
        nn.GELU(),
        nn.Linear(128, classes),
    )
