r"""The feed: two threads that keep every device in data while it computes.

::

    dataset --reader--> [ up to `prefetch` batches on the host ] --uploader--> [ 2 on device 0 ]
                                                                          \--> [ 2 on device 1 ]

The reader reads, collates and pads; the uploader deals the batches to the devices in turn, batch *k* to
device *k* modulo their number, and copies them there ahead of use. So what each device gets depends on the
dataset alone and not on who is faster.

An epoch ends with a :class:`Ended` for every device. An exception of the dataset or of the collate function
travels as a :class:`Failed` in the place of its batch, and reading goes on behind it, where the dataset can.
Invariant: every wait of these threads, and of who waits for them, ends when the feed is closed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from hpcpar.xla import adapter
from hpcpar.xla.batches import Batch, BatchReader
from hpcpar.xla.channel import Channel, ChannelClosedError

__all__ = ["DeviceBatch", "DeviceMicrobatch", "Ended", "Failed", "Feed", "as_exception"]

_ON_DEVICE = 2


@dataclass(frozen=True)
class DeviceMicrobatch:
    """A :class:`~hpcpar.xla.batches.Microbatch` whose tensors are on a device, the two numbers included."""

    data: Any
    weight: torch.Tensor
    updates_buffers: torch.Tensor


@dataclass(frozen=True)
class DeviceBatch:
    """A :class:`~hpcpar.xla.batches.Batch` on a device."""

    samples: int
    parts: tuple[DeviceMicrobatch, ...]


@dataclass(frozen=True)
class Ended:
    """In the place of a batch: there is no other in this epoch."""


@dataclass(frozen=True)
class Failed:
    """In the place of a batch: what was raised instead, and how many samples are lost with it."""

    error: Exception
    samples: int = 0


class Feed:
    """Batches of a dataset on the devices, ahead of their use. Local.

    Parameters
    ----------
    reader
        Of this rank's samples.
    devices
        To be fed in turn.
    prefetch
        Batches that may wait on the host.
    dtype
        Of the weights on the devices.
    """

    def __init__(
        self, reader: BatchReader, devices: Sequence[torch.device], prefetch: int, dtype: torch.dtype
    ) -> None:
        self._reader = reader
        self._devices = list(devices)
        self._dtype = dtype
        self._read: Channel[Batch | Ended | Failed] = Channel(prefetch)
        self._ready: list[Channel[DeviceBatch | Ended | Failed]] = [Channel(_ON_DEVICE) for _ in devices]
        self._epochs: Channel[int] = Channel(1)
        self._threads = [
            threading.Thread(target=self._run, args=(work,), name=f"hpcpar xla {name}", daemon=True)
            for name, work in (("reader", self._keep_reading), ("uploader", self._keep_uploading))
        ]

    def start_epoch(self, skip: int = 0) -> None:
        """Begin to read, when the epoch before has ended, after the first ``skip`` samples."""
        self._epochs.put(skip)
        for thread in self._threads:
            if thread.ident is None:
                thread.start()

    def take(self, place: int) -> DeviceBatch | Ended | Failed:
        """The next batch of a device, when it is there. After an :class:`Ended`, an epoch must be started.

        Raises
        ------
        ChannelClosedError
            When the feed is closed.
        """
        return self._ready[place].get()

    def close(self) -> None:
        """End the threads at their next wait; a second call is fine. Does not wait for them."""
        self._epochs.close()
        self._read.close()
        for channel in self._ready:
            channel.close()

    @property
    def threads(self) -> list[threading.Thread]:
        """Those that were started."""
        return [thread for thread in self._threads if thread.ident is not None]

    def _run(self, work: Any) -> None:
        try:
            work()
        except ChannelClosedError:
            return  # which is how close() ends a thread

    def _keep_reading(self) -> None:
        while True:
            skip = self._epochs.get()
            for item in self._read_epoch(skip):
                self._read.put(item)
            self._read.put(Ended())

    def _read_epoch(self, skip: int) -> Iterator[Batch | Failed]:
        try:
            batches = self._reader.batches(skip)
        except BaseException as error:
            yield Failed(as_exception(error, "the dataset"))
            return
        while True:
            try:
                item: Batch | Failed = next(batches)
            except StopIteration:
                return
            except BaseException as error:
                item = Failed(as_exception(error, "the dataset"), self._reader.batch_size)
            yield item

    def _keep_uploading(self) -> None:
        turn = 0
        while True:
            item = self._read.get()
            if isinstance(item, Ended):
                for channel in self._ready:
                    channel.put(item)
                turn = 0
                continue
            self._ready[turn].put(self._on_device(item, turn))
            turn = (turn + 1) % len(self._devices)

    def _on_device(self, item: Batch | Failed, turn: int) -> DeviceBatch | Failed:
        if isinstance(item, Failed):
            return item
        try:
            return upload_batch(item, self._devices[turn], self._dtype)
        except Exception as error:
            return Failed(error, item.samples)


def as_exception(error: BaseException, who: str) -> Exception:
    """An error that can be handed to another thread: ``SystemExit`` and its like are meant for their own."""
    if isinstance(error, Exception):
        return error
    wrapped = RuntimeError(f"{who} must not end a thread of its manager, got {error!r}")
    wrapped.__cause__ = error
    return wrapped


def upload_batch(batch: Batch, device: torch.device, dtype: torch.dtype) -> DeviceBatch:
    """Copy a batch to a device, in one transfer, with weights of type ``dtype``. Local.

    Tensors are found in nested tuples, lists and dicts; whatever else is in there is passed on as it is.
    """
    contents = [
        (part.data, torch.tensor(part.weight, dtype=dtype), torch.tensor(part.updates_buffers))
        for part in batch.parts
    ]
    leaves, structure = pytree.tree_flatten(contents)
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    copies = adapter.upload([leaves[place] for place in places], device)
    for place, copy in zip(places, copies, strict=True):
        leaves[place] = copy
    parts = pytree.tree_unflatten(leaves, structure)
    return DeviceBatch(batch.samples, tuple(DeviceMicrobatch(*part) for part in parts))
