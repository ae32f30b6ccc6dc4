"""Data, batches and model of the digits example. Whole runs are in tests/launched/test_examples.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import digits
import idx
from tests.examples.idx_files import write_set


@pytest.mark.parametrize("batch_size", [1, 7, 64, 100, 1000])
def test_batches_of_an_epoch_hold_every_sample_once(batch_size: int) -> None:
    batches = digits.epoch_batches(100, batch_size, seed=3, epoch=1)
    assert sorted(torch.cat(batches).tolist()) == list(range(100))
    assert all(len(batch) == batch_size for batch in batches[:-1])


def test_batches_are_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return torch.cat(digits.epoch_batches(100, 30, seed, epoch)).tolist()

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)


def test_digits_are_real_images_of_ten_balanced_classes() -> None:
    pytest.importorskip("sklearn")
    train, test = digits.load_digits()
    assert (train.images.shape, test.images.shape) == ((1437, 1, 8, 8), (360, 1, 8, 8))
    assert train.images.dtype == torch.uint8
    assert torch.bincount(test.labels).min() >= 34


def test_test_images_of_another_size_are_an_error(tmp_path: Path) -> None:
    write_set(tmp_path, "train", np.zeros((2, 4, 4)), np.arange(2))
    write_set(tmp_path, "t10k", np.zeros((2, 5, 4)), np.arange(2))
    with pytest.raises(idx.IdxError, match=r"training images are \(4, 4\) pixels, but test images \(5, 4\)"):
        digits.load_idx_folder(tmp_path)


def test_limit_and_classes_reach_every_rank(comm) -> None:
    sets = None
    if comm.rank == 0:
        images = np.arange(20 * 16, dtype=np.uint8).reshape(20, 4, 4)
        sets = (
            digits.labelled_images(images, np.arange(20) % 7),
            digits.labelled_images(images, np.arange(20) % 9),
        )
    dataset = digits.broadcast_dataset(sets, limit=5, comm=comm)
    assert (len(dataset.train), len(dataset.test), dataset.classes) == (5, 5, 9)
    assert dataset.train.labels.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("pixels", [8, 28])
def test_net_treats_each_image_by_itself(pixels: int) -> None:
    images = torch.randint(0, 256, (6, 1, pixels, pixels), dtype=torch.uint8)
    net = digits.build_net(images, classes=10)
    together = net(images)
    one_by_one = torch.cat([net(image) for image in images.split(1)])
    torch.testing.assert_close(together, one_by_one)


def test_empty_slice_of_a_batch_has_zero_gradients() -> None:
    images = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8)
    net = digits.build_net(images, classes=10)
    scores = net(images[:0])
    torch.nn.functional.cross_entropy(scores, torch.zeros(0, dtype=torch.int64), reduction="sum").backward()
    assert all(p.grad is not None and not p.grad.any() for p in net.parameters())


def test_constant_images_stay_finite() -> None:
    images = torch.full((3, 1, 8, 8), 7, dtype=torch.uint8)
    assert digits.build_net(images, classes=2)(images).isfinite().all()
