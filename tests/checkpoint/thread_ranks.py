"""Ranks that are threads of one process, for what depends on their number and not on MPI."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hpcpar.checkpoint.folder import new_generation
from hpcpar.checkpoint.job import SaveJob
from hpcpar.checkpoint.tree import encode
from tests.threads import in_threads

__all__ = ["ThreadRanks", "on_ranks", "save_on_ranks"]

_TIMEOUT_S = 30.0


class ThreadRanks:
    """One of them; has the collectives that checkpoints need."""

    def __init__(self, rank: int, size: int, slots: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, size
        self._slots, self._barrier = slots, barrier

    def allgather(self, sendobj: Any) -> list[Any]:
        self._slots[self.rank] = sendobj
        self._barrier.wait(_TIMEOUT_S)
        everything = list(self._slots)
        self._barrier.wait(_TIMEOUT_S)
        return everything

    def gather(self, sendobj: Any, root: int = 0) -> list[Any] | None:
        everything = self.allgather(sendobj)
        return everything if self.rank == root else None

    def scatter(self, sendobj: Sequence[Any] | None, root: int = 0) -> Any:
        return self.allgather(sendobj)[root][self.rank]

    def bcast(self, obj: Any, root: int = 0) -> Any:
        return self.allgather(obj)[root]


def on_ranks(size: int, work: Callable[[Any], Any]) -> list[Any]:
    """What ``work(ranks)`` returns, or raises, on each of so many ranks."""
    slots, barrier = [None] * size, threading.Barrier(size)

    def run(rank: int) -> Any:
        try:
            return [work(ThreadRanks(rank, size, slots, barrier))]
        except Exception as error:
            return [error]

    return [result[0] for result in in_threads(size, run)]


def save_on_ranks(folder: Path, *states: Any) -> list[Any]:
    """Save one state per rank; ``None`` for each, or its error."""
    folder.mkdir(parents=True, exist_ok=True)
    generation = new_generation()
    trees = [encode(state) for state in states]
    return on_ranks(
        len(states), lambda ranks: SaveJob(folder, generation, trees[ranks.rank], None).run(ranks)
    )
