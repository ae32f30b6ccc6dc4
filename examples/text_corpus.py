"""Real text as one long array of bytes: the standard library's sources, or a folder of one's own.

Files are taken in sorted order, so the corpus depends on their names and content alone, and the
split is by position: the first nine tenths train, the rest validates.

A training batch is a **pure function of seed and step** (`windows_of_step`). No iterator has a
state that would have to be saved, agreed upon between ranks, or wound forward on a restart.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from common import UserError

__all__ = ["cut_windows", "read_corpus", "spread_windows", "split_corpus", "windows_of_step"]

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
TRAINING_SHARE = 0.9
SNIFFED_BYTES = 8192


def read_corpus(folder: Path | None, limit: int | None = None) -> torch.Tensor:
    """Read all text below a folder, or the running Python's standard library, as bytes.

    Parameters
    ----------
    folder : a folder, searched recursively for text files (those without a zero byte near their
        start; hidden ones are skipped), or a single file. None: the standard library's sources,
        without its tests.
    limit : stop after so many bytes.

    Returns
    -------
    uint8 tensor of shape (bytes,). Files are separated by a newline.
    """
    parts: list[bytes] = []
    length = 0
    for path in _standard_library() if folder is None else _text_files(folder):
        content = _read_text(path)
        if content:
            parts.append(content + b"\n")
            length += len(parts[-1])
        if limit is not None and length >= limit:
            break
    if not parts:
        raise UserError(f"--text {folder}: there is no text file")
    return torch.frombuffer(bytearray(b"".join(parts)[:limit]), dtype=torch.uint8)


def split_corpus(corpus: torch.Tensor, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and validation part. Each must hold at least one window of context + 1 bytes."""
    boundary = int(len(corpus) * TRAINING_SHARE)
    parts = corpus[:boundary], corpus[boundary:]
    if min(len(part) for part in parts) < context + 1:
        raise UserError(
            f"the text of {len(corpus)} bytes is too short: a tenth of it, for validation, must hold "
            f"a context of {context} bytes and one more"
        )
    return parts


def windows_of_step(
    seed: int, step: int, batch_size: int, corpus_bytes: int, context: int
) -> npt.NDArray[np.int64]:
    """Where the windows of the global batch of a step start: `batch_size` offsets into the corpus."""
    generator = np.random.default_rng([seed, step])
    return generator.integers(0, corpus_bytes - context, size=batch_size, dtype=np.int64)


def spread_windows(count: int, corpus_bytes: int, context: int) -> npt.NDArray[np.int64]:
    """Offsets of at most `count` windows spread evenly and without overlap, for validation."""
    count = min(count, (corpus_bytes - 1) // context)
    return np.linspace(0, corpus_bytes - context - 1, count).astype(np.int64)


def cut_windows(
    corpus: torch.Tensor, offsets: npt.NDArray[np.int64], context: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, int64 of shape (windows, context): the targets are one byte further."""
    index = torch.from_numpy(offsets).unsqueeze(1) + torch.arange(context + 1)
    windows = corpus[index].long()
    return windows[:, :-1], windows[:, 1:]


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(root.rglob("*.py"))
    return [path for path in files if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts)]


def _text_files(folder: Path) -> list[Path]:
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise UserError(f"--text {folder}: no such folder")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [
        path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def _read_text(path: Path) -> bytes:
    """The content of a file, or nothing if it looks binary."""
    try:
        with path.open("rb") as file:
            head = file.read(SNIFFED_BYTES)
            return b"" if b"\0" in head else head + file.read()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
