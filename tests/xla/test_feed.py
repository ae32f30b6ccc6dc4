"""The feed deals batches to devices, reads no further ahead than it may, and ends when it is told to."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from hpcpar.xla.batches import Batch, BatchReader, Microbatch
from hpcpar.xla.channel import ChannelClosedError
from hpcpar.xla.feed import DeviceBatch, Ended, Failed, Feed, upload_batch
from tests.threads import in_threads

pytestmark = pytest.mark.local

GIVE_UP_S = 20.0


@pytest.fixture
def make(devices: list[torch.device]) -> Iterator[Callable[..., Feed]]:
    feeds: list[Feed] = []

    def make_feed(dataset: Any, *, prefetch: int = 4, **options: Any) -> Feed:
        feed = Feed(BatchReader(dataset, 1, **options), devices[:2], prefetch, torch.float32)
        feeds.append(feed)
        return feed

    yield make_feed
    for feed in feeds:
        feed.close()


def take_all(feed: Feed, place: int) -> list[Any]:
    """What a device gets in an epoch, as plain numbers; errors as themselves."""
    found: list[Any] = []
    while not isinstance(item := feed.take(place), Ended):
        found.append(item.error if isinstance(item, Failed) else item.parts[0].data.tolist()[0])
    return found


def wait_until(is_true: Callable[[], bool]) -> None:
    end = time.monotonic() + GIVE_UP_S
    while not is_true() and time.monotonic() < end:
        time.sleep(1e-3)


def join(feed: Feed) -> None:
    for thread in feed.threads:
        thread.join(GIVE_UP_S)
        assert not thread.is_alive(), thread.name


def test_devices_are_dealt_batches_in_turn_and_all_told_of_the_end(make: Callable[..., Feed]) -> None:
    feed = make(range(5), prefetch=8)
    for skip, expected in ((0, [[0, 2, 4], [1, 3]]), (0, [[0, 2, 4], [1, 3]]), (3, [[3], [4]])):
        feed.start_epoch(skip)
        assert in_threads(2, lambda place: take_all(feed, place)) == expected


def test_error_takes_the_place_of_its_batch_and_reading_goes_on(make: Callable[..., Feed]) -> None:
    def refuse_two(items: list[int]) -> torch.Tensor:
        if 2 in items:
            raise ValueError("not this one")
        return torch.tensor(items)

    feed = make(range(5), collate_fn=refuse_two, prefetch=8)
    feed.start_epoch()
    (first, error, last), others = in_threads(2, lambda place: take_all(feed, place))
    assert (first, last, str(error)) == (0, 4, "not this one")
    assert others == [1, 3]


def test_dataset_that_cannot_even_begin_is_an_error_and_an_end(make: Callable[..., Feed]) -> None:
    class Closed:
        def __iter__(self) -> Iterator[int]:
            raise PermissionError("closed")

    feed = make(Closed())
    feed.start_epoch()
    assert isinstance(take_all(feed, 0)[0], PermissionError)
    assert take_all(feed, 1) == []


def test_dataset_is_read_no_further_ahead_than_agreed(make: Callable[..., Feed]) -> None:
    read: list[int] = []

    def stream() -> Iterator[int]:
        while True:
            read.append(len(read))
            yield read[-1]

    feed = make(stream(), prefetch=3)
    feed.start_epoch()
    # On the host, on two devices, and one in the hand of each thread.
    ahead = 3 + 2 * 2 + 2
    for taken in range(1, 5):
        feed.take((taken - 1) % 2)
        wait_until(lambda: len(read) >= ahead + taken)  # noqa: B023 - called at once
    feed.close()
    join(feed)
    assert len(read) == ahead + 4


def test_closing_wakes_who_waits_and_ends_threads_whose_queues_are_full(make: Callable[..., Feed]) -> None:
    feed = make(itertools.count(), prefetch=1)
    feed.start_epoch()
    feed.take(0)
    feed.close()
    feed.close()
    join(feed)
    with pytest.raises(ChannelClosedError):
        feed.take(1)


def test_closing_does_not_wait_for_a_dataset_that_blocks(make: Callable[..., Feed]) -> None:
    go_on = threading.Event()

    def stream() -> Iterator[int]:
        go_on.wait(GIVE_UP_S)
        yield 0

    feed = make(stream())
    feed.start_epoch()
    reader, uploader = feed.threads
    feed.close()
    uploader.join(GIVE_UP_S)
    assert (uploader.is_alive(), reader.is_alive()) == (False, True)
    go_on.set()
    join(feed)


def test_feed_that_was_never_used_has_no_threads(make: Callable[..., Feed]) -> None:
    assert make(range(3)).threads == []


def test_tensors_are_uploaded_from_wherever_they_are_and_the_rest_is_passed_on(device: torch.device) -> None:
    data = {"a": (torch.ones(2), [torch.tensor(3)]), "name": "b", "number": 4, "none": None}
    uploaded = upload_batch(Batch(2, (Microbatch(data, 2.0, False),)), device, torch.float64)
    assert isinstance(uploaded, DeviceBatch)
    (part,) = uploaded.parts
    assert (part.data["name"], part.data["number"], part.data["none"]) == ("b", 4, None)
    tensor, (nested,) = part.data["a"]
    assert tensor.device.type == nested.device.type == device.type
    assert (tensor.tolist(), nested.item()) == ([1.0, 1.0], 3)
    assert (part.weight.dtype, part.weight.item()) == (torch.float64, 2.0)
    assert part.updates_buffers.item() is False
