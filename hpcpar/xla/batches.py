"""From a dataset to microbatches that all have the same shape, so that one compiled graph serves all of them.

The last batch of a dataset is often short: *m* samples where the others have *B*. A new shape would cost a
compilation, which takes minutes on some devices, for one batch. So it is filled up with samples that it has
already, and what these add to the loss is taken off again. With ``B = q m + r``::

    A   q times all m samples, and the first sample r times more         B samples in all
    C   B times the first sample

    sum of the m losses  =  (B mean(A) - r mean(C)) / q

which holds for gradients as well, since they are linear. So a short batch costs at most two passes through
the graph that is there; one where *m* divides *B*. It is exact, up to rounding, for losses that are means of
samples which do not see each other. Where they do (batch normalization), or where the loss is no such mean
(tokens that are ignored), ``short_batch="drop"`` leaves the short batch out and ``"compile"`` takes it as it
is. With dropout the result is right in expectation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler, default_collate

__all__ = ["Batch", "BatchReader", "Microbatch", "ShortBatch", "is_map"]

T = TypeVar("T")

ShortBatch = Literal["pad", "drop", "compile"]


@dataclass(frozen=True)
class Microbatch:
    """One pass through the model.

    Attributes
    ----------
    data : Any
        What the collate function made.
    weight : float
        By which the mean loss and its gradients are multiplied; the number of samples where nothing was
        padded.
    updates_buffers : bool
        Whether what the pass does to buffers, such as running means, stays.
    """

    data: Any
    weight: float
    updates_buffers: bool = True


@dataclass(frozen=True)
class Batch:
    """Up to ``batch_size_per_device`` samples for one device, as microbatches of full size."""

    samples: int
    parts: tuple[Microbatch, ...]


@dataclass(frozen=True)
class _Collate:
    """The collate function of the loader: makes a :class:`Batch` of a list of samples."""

    collate: Callable[[list[Any]], Any]
    batch_size: int
    pads: bool

    def __call__(self, samples: list[Any]) -> Batch:
        return _unended("the collate function", self._batch, samples)

    def _batch(self, samples: list[Any]) -> Batch:
        count, size = len(samples), self.batch_size
        if count == size or not self.pads:
            return Batch(count, (Microbatch(self.collate(samples), float(count)),))
        times, rest = divmod(size, count)
        first = samples[:1] * rest
        # Copies, made before anything is collated: a collate function may take its samples apart.
        again = [copy.copy(sample) for sample in samples * (times - 1) + first]
        alone = [copy.copy(samples[0]) for _ in range(size)] if rest else []
        parts = [Microbatch(self.collate([*samples, *again]), size / times)]
        if rest:
            parts.append(Microbatch(self.collate(alone), -rest / times, updates_buffers=False))
        return Batch(count, tuple(parts))


class BatchReader:
    """Reads a dataset into batches, one iteration an epoch. Local.

    Parameters
    ----------
    dataset
        Map-style, or anything that can be iterated over; the samples of this rank.
    batch_size
        Samples in a batch, all but the last.
    collate_fn
        Makes a batch of a list of samples; torch's default if None.
    sampler
        Indices into a map-style dataset, in the order in which to read it.
    num_workers
        Processes that read; 0 reads in this one.
    short_batch
        What to do with a last batch of fewer samples.
    seed
        Of the processes that read, which differ, and do so in each epoch.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        *,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        sampler: Iterable[int] | None = None,
        num_workers: int = 0,
        short_batch: ShortBatch = "pad",
        seed: Sequence[int] = (0,),
    ) -> None:
        self.batch_size = batch_size
        self._is_stream = not (is_map(dataset) and (sampler is not None or hasattr(dataset, "__len__")))
        self._source = dataset
        self._order = sampler if sampler is not None else _InOrder(dataset)
        self._collate = _Collate(collate_fn or default_collate, batch_size, short_batch == "pad")
        self._num_workers = num_workers
        self._drops = short_batch == "drop"
        self._seed = seed
        self._epochs = 0

    def batches(self, skip: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, after the first ``skip`` samples, which a map-style dataset does not read.

        An exception of the dataset or of the collate function is raised by ``next()``, and the batch lost.
        """
        order = None
        late = 0  # to be left out of what the loader gives
        if not self._is_stream:
            dataset: Any = _Samples(self._source)
            order = _Rest(self._order, skip)
        elif self._num_workers:  # each process has a part of its own, so nobody but us can count
            dataset, late = self._source, skip
        else:
            dataset = _Stream(self._source, skip)
        self._epochs += 1
        seeds = np.random.SeedSequence([*self._seed, self._epochs]).generate_state(1)
        loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=order,
            collate_fn=self._collate,
            drop_last=self._drops,
            num_workers=self._num_workers,
            # A process that holds devices, or MPI, cannot be forked.
            multiprocessing_context="spawn" if self._num_workers else None,
            # Of its own, or the loader would draw from the global one.
            generator=torch.Generator().manual_seed(int(seeds[0])),
        )
        return _without_first(iter(loader), late, self.batch_size)


def is_map(dataset: Any) -> bool:
    """Whether it has samples by index. An ``IterableDataset`` inherits the method, but has none. Local."""
    return hasattr(dataset, "__getitem__") and not isinstance(dataset, IterableDataset)


def _unended(who: str, function: Callable[[list[Any]], T], argument: list[Any]) -> T:
    """Call what is no iterator. Its StopIteration would end the epoch in silence."""
    try:
        return function(argument)
    except StopIteration as error:
        raise RuntimeError(f"{who} must not raise StopIteration, got {error!r}") from error


def _without_first(batches: Iterator[Batch], samples: int, batch_size: int) -> Iterator[Batch]:
    """``batches`` without those at the beginning that have so many samples."""
    while samples > 0:
        try:
            batch = next(batches)
        except StopIteration:
            break
        except Exception:  # it was raised in the job before, which went on behind it
            samples -= batch_size
        else:
            samples -= batch.samples
    return batches


@dataclass(frozen=True)
class _Samples:
    """A map-style dataset, of which whole batches are asked for."""

    source: Any

    def __getitems__(self, indices: list[Any]) -> Any:
        return _unended("the dataset", self._read, indices)

    def __getitem__(self, index: Any) -> Any:
        return self.__getitems__([index])[0]

    def _read(self, indices: list[Any]) -> Any:
        if hasattr(self.source, "__getitems__"):
            return self.source.__getitems__(indices)
        return [self.source[index] for index in indices]


@dataclass(frozen=True)
class _InOrder:
    """The indices of a dataset, whose length may change between epochs."""

    dataset: Sized

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self.dataset)))


class _Rest(Sampler[int]):
    """The indices of another sampler, after the first few."""

    def __init__(self, order: Iterable[int], first: int) -> None:
        self._order = order
        self._first = first

    def __iter__(self) -> Iterator[int]:
        return islice(iter(self._order), self._first, None)


class _Stream(IterableDataset[Any]):
    """Anything that can be iterated over, after the first few items."""

    def __init__(self, source: Iterable[Any] | Sequence[Any], first: int) -> None:
        self._source = source
        self._first = first

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self._source), self._first, None)
