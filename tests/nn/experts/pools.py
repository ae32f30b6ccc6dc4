"""Functions and pools for tests of task pools."""

from __future__ import annotations

import threading
from typing import Any

import torch

from hpcpar.nn.experts.task_pool import Request, TaskPool

__all__ = ["Recorder", "passive", "rows", "run_all"]

LONG = 60.0


class Recorder:
    """A function that remembers its batches."""

    def __init__(self) -> None:
        self.batches: list[torch.Tensor] = []
        self.requests: list[tuple[Request, ...]] = []
        self.threads: set[str] = set()

    def __call__(self, x: torch.Tensor, requests: tuple[Request, ...] = ()) -> torch.Tensor:
        self.batches.append(x)
        self.requests.append(requests)
        self.threads.add(threading.current_thread().name)
        if (x == 13).any():
            raise ValueError("unlucky")
        return x * 2

    @property
    def sizes(self) -> list[int]:
        return [len(batch) for batch in self.batches]


def passive(function: Any, **options: Any) -> TaskPool:
    options = {"name": "pool", "max_batch_size": 4, "timeout": LONG, "start": False, **options}
    return TaskPool(function, **options)


def rows(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(-1, 1)


def run_all(pool: TaskPool) -> None:
    while pool.process_batch():
        continue
