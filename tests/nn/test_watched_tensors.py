"""Watched tensors: every way to change a buffer is noticed, and nothing else."""

from __future__ import annotations

import torch

from hpcpar.nn.watched_tensors import WatchedTensors


def test_changes_are_noticed_until_they_are_remembered() -> None:
    tensors = {name: torch.zeros(3) for name in "abcd"} | {"large": torch.zeros(1 << 20)}
    watched = WatchedTensors(lambda: tensors)
    assert watched.changes() == [0.0] * 5
    tensors["a"] += 1
    tensors["b"] = tensors["b"] + 1
    tensors["d"].numpy()[0] = 1.0  # raises no version
    tensors["late"] = torch.zeros(3)
    assert watched.changes() == [1.0, 1.0, 0.0, 1.0, 0.0]
    watched.remember()
    assert watched.changes() == [0.0] * 5
    tensors["large"][5] = 1.0
    del tensors["a"]
    assert watched.changes() == [0.0, 0.0, 0.0, 0.0, 1.0]


def test_batch_norm_statistics_are_noticed() -> None:
    layer = torch.nn.BatchNorm1d(3)
    watched = WatchedTensors(lambda: dict(layer.named_buffers()))
    layer(torch.randn(4, 3))
    assert watched.changes() == [1.0, 1.0, 1.0]
