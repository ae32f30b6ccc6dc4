"""What a dataset and its copies in the worker processes of a ``DataLoader`` tell each other.

A worker gets a copy of the dataset when it starts, by fork or by pickle. Of what happens later it would know
nothing: workers with ``persistent_workers=True`` would repeat the first epoch forever. And the process that
trains would not know that samples are read elsewhere, and would save a position that is wrong. So a few words
lie in memory that all copies share. Each has one writer at a time: the trainer writes between iterations, a
worker at the start of one, and all workers write the same.
"""

from __future__ import annotations

import enum
from typing import Any

import torch

__all__ = ["WorkerBoard", "WorkerUse"]

_EPOCH, _LOADS, _USE, _WORDS = 0, 1, 2, 3


class WorkerUse(enum.IntEnum):
    """How workers have read in this epoch."""

    NONE = 0
    IN_TURN = 1  # batches in the order that one process would have
    BY_PIECES = 2  # each a piece of its own; the order depends on the number of workers


class WorkerBoard:
    """Words that a dataset shares with its copies in worker processes. Local."""

    def __init__(self) -> None:
        self._words = torch.zeros(_WORDS, dtype=torch.int64)
        self._share()
        self._seen_loads = 0

    def announce(self, epoch: int, *, loaded: bool = False) -> None:
        """The trainer is at the beginning of an epoch, or somewhere in it by a state that was loaded."""
        self._seen_loads += loaded
        self._words[_EPOCH], self._words[_LOADS], self._words[_USE] = epoch, self._seen_loads, WorkerUse.NONE

    def read_epoch(self, use: WorkerUse) -> int:
        """A worker begins an iteration; the epoch that the trainer wants.

        Raises
        ------
        RuntimeError
            When a state was loaded since this worker was started.
        """
        if int(self._words[_LOADS]) != self._seen_loads:
            raise RuntimeError(
                "load_state_dict() must be called before a DataLoader starts persistent workers, got a call "
                "after that. Make a new DataLoader"
            )
        self._words[_USE] = use
        return int(self._words[_EPOCH])

    @property
    def use(self) -> WorkerUse:
        """How workers have read since the last announcement."""
        return WorkerUse(int(self._words[_USE]))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._share()  # a copy that stays in the process has workers of its own

    def _share(self) -> None:
        self._words.share_memory_()  # type: ignore[no-untyped-call]
