"""What a manager is given, checked before anything is made of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch.utils.data import DataLoader, IterableDataset

from hpcpar.xla import adapter
from hpcpar.xla.batches import ShortBatch, is_map

__all__ = ["ManagerOptions", "choose_devices"]


@dataclass(frozen=True)
class ManagerOptions:
    """The options of a :class:`~hpcpar.xla.TPUManager`; see there.

    Raises
    ------
    TypeError, ValueError
        When one of them is wrong.
    """

    dataset: Any
    collate_fn: Callable[[list[Any]], Any] | None
    batch_size_per_device: int
    grad_accumulation_steps: int
    prefetch: int
    seed_base: int
    sampler: Iterable[int] | None
    num_workers: int
    short_batch: ShortBatch
    bucket_mb: float

    def __post_init__(self) -> None:
        for name in ("batch_size_per_device", "grad_accumulation_steps", "prefetch"):
            self._check_whole(name, smallest=1)
        self._check_whole("num_workers", smallest=0)
        self._check_whole("seed_base", smallest=0)
        if isinstance(self.dataset, DataLoader):
            raise TypeError(
                "dataset must give single samples, got a DataLoader, which gives batches; pass its dataset, "
                "and its sampler and collate_fn as options"
            )
        if not hasattr(self.dataset, "__iter__") and not hasattr(self.dataset, "__getitem__"):
            raise TypeError(
                f"dataset must be map-style or something to iterate over, got {type(self.dataset).__name__}"
            )
        if self.collate_fn is not None and not callable(self.collate_fn):
            raise TypeError(f"collate_fn must be callable, got {type(self.collate_fn).__name__}")
        if self.sampler is not None and not is_map(self.dataset):
            raise TypeError("a sampler must come with a map-style dataset, got one without indices")
        if self.short_batch not in get_args(ShortBatch):
            raise ValueError(f"short_batch must be one of {get_args(ShortBatch)}, got {self.short_batch!r}")
        if not 0 < self.bucket_mb < math.inf:
            raise ValueError(f"bucket_mb must be a number above 0, got {self.bucket_mb}")
        if self.num_workers and not is_map(self.dataset) and not isinstance(self.dataset, IterableDataset):
            raise TypeError(
                "with num_workers, dataset must be map-style or an IterableDataset that shares its samples "
                f"among workers, got {type(self.dataset).__name__}, of which each would read all"
            )

    def _check_whole(self, name: str, smallest: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
        if value < smallest:
            raise ValueError(f"{name} must be at least {smallest}, got {value}")


def choose_devices(wanted: Sequence[torch.device | str | int] | None) -> list[torch.device]:
    """The devices to use: all of this process, or those that were named. Local.

    Raises
    ------
    TypeError, ValueError
        When one is not a device of this process, is named twice, or none is left.
    """
    local = adapter.local_devices()
    if wanted is None:
        chosen = local
    else:
        names = [wanted] if isinstance(wanted, torch.device | str | int) else wanted
        chosen = [local[0] if _is_bare(name, local) else _find(name, local) for name in names]
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"devices must differ, got {[str(device) for device in chosen]}")
    if not chosen:
        raise ValueError("devices must be at least one, got none")
    return chosen


def _is_bare(name: torch.device | str | int, local: Sequence[torch.device]) -> bool:
    """``"xla"``, without a number: the first."""
    return not isinstance(name, int) and str(name) == local[0].type


def _find(name: torch.device | str | int, local: Sequence[torch.device]) -> torch.device:
    if isinstance(name, int):
        found = local[name : name + 1] if name >= 0 else []
    else:
        found = [device for device in local if str(device) == str(name)]
    if not found:
        raise ValueError(
            f"devices must be of this process, which has {[str(device) for device in local]}, got {name!r}"
        )
    return found[0]
