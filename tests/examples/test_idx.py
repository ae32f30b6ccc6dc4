"""The IDX reader: what it reads, and how it names what is wrong."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

import idx
from tests.examples.idx_files import idx_bytes, write_set


@pytest.fixture
def images() -> np.ndarray:
    return np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)


def test_reads_plain_file(tmp_path: Path, images: np.ndarray) -> None:
    path = tmp_path / "images"
    path.write_bytes(idx_bytes(images))
    np.testing.assert_array_equal(idx.read_idx(path, dimensions=3), images)


def test_reads_gzipped_file(tmp_path: Path, images: np.ndarray) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(idx_bytes(images)))
    np.testing.assert_array_equal(idx.read_idx(path, dimensions=3), images)


@pytest.mark.parametrize("separator", ["-", "."])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_finds_files_under_their_usual_names(
    tmp_path: Path, images: np.ndarray, separator: str, suffix: str
) -> None:
    pack = gzip.compress if suffix else bytes
    labels = np.arange(5, dtype=np.uint8)
    (tmp_path / f"t10k-images{separator}idx3-ubyte{suffix}").write_bytes(pack(idx_bytes(images)))
    (tmp_path / f"t10k-labels{separator}idx1-ubyte{suffix}").write_bytes(pack(idx_bytes(labels)))
    read_images, read_labels = idx.read_labelled_images(tmp_path, "t10k")
    np.testing.assert_array_equal(read_images, images)
    np.testing.assert_array_equal(read_labels, labels)


def test_labels_in_place_of_images_are_a_wrong_magic_number(tmp_path: Path) -> None:
    path = tmp_path / "labels"
    path.write_bytes(idx_bytes(np.arange(5)))
    with pytest.raises(idx.IdxError, match=r"magic number must be 0x00000803.*got 0x00000801"):
        idx.read_idx(path, dimensions=3)


@pytest.mark.parametrize("content", [b"", b"\0\0", b"<html>not found</html>"])
def test_other_content_is_a_wrong_magic_number(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(idx.IdxError, match="magic number"):
        idx.read_idx(path, dimensions=3)


def test_truncated_data_name_both_lengths(tmp_path: Path, images: np.ndarray) -> None:
    path = tmp_path / "images"
    path.write_bytes(idx_bytes(images)[:-7])
    with pytest.raises(idx.IdxError, match=r"truncated.*5 x 4 x 3 = 60 bytes.*has 53"):
        idx.read_idx(path, dimensions=3)


def test_surplus_data_are_an_error(tmp_path: Path, images: np.ndarray) -> None:
    path = tmp_path / "images"
    path.write_bytes(idx_bytes(images) + b"\0")
    with pytest.raises(idx.IdxError, match="too long"):
        idx.read_idx(path, dimensions=3)


def test_truncated_header_is_an_error(tmp_path: Path, images: np.ndarray) -> None:
    path = tmp_path / "images"
    path.write_bytes(idx_bytes(images)[:10])
    with pytest.raises(idx.IdxError, match="truncated in the header, 10 of 16 bytes"):
        idx.read_idx(path, dimensions=3)


def test_truncated_gzip_is_an_error(tmp_path: Path, images: np.ndarray) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(idx_bytes(images))[:-9])
    with pytest.raises(idx.IdxError, match="truncated"):
        idx.read_idx(path, dimensions=3)


def test_plain_file_named_gz_is_an_error(tmp_path: Path, images: np.ndarray) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(idx_bytes(images))
    with pytest.raises(idx.IdxError, match="not a valid gzip file"):
        idx.read_idx(path, dimensions=3)


def test_counts_of_images_and_labels_must_agree(tmp_path: Path, images: np.ndarray) -> None:
    write_set(tmp_path, "train", images, np.arange(4))
    with pytest.raises(idx.IdxError, match=r"has 5 images, but .* 4 labels"):
        idx.read_labelled_images(tmp_path, "train")


def test_empty_set_is_an_error(tmp_path: Path) -> None:
    write_set(tmp_path, "train", np.zeros((0, 4, 3)), np.zeros(0))
    with pytest.raises(idx.IdxError, match="no pixels"):
        idx.read_labelled_images(tmp_path, "train")


def test_missing_file_lists_the_names_it_may_have(tmp_path: Path) -> None:
    with pytest.raises(idx.IdxError, match=r"has no file train-images-idx3-ubyte \(nor .*\.gz"):
        idx.read_labelled_images(tmp_path, "train")


def test_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(idx.IdxError, match="is not a folder"):
        idx.read_labelled_images(tmp_path / "nowhere", "train")
