"""A channel hands on in order, holds no more than it may, and its end wakes whoever waits."""

from __future__ import annotations

import threading

import pytest

from hpcpar.xla.channel import Channel, ChannelClosedError
from tests.threads import in_threads

pytestmark = pytest.mark.local


def test_items_leave_in_the_order_in_which_they_came() -> None:
    channel: Channel[int] = Channel(3)
    for item in range(3):
        channel.put(item)
    assert [channel.get() for _ in range(3)] == [0, 1, 2]


def test_a_full_channel_makes_whoever_puts_wait() -> None:
    channel: Channel[int] = Channel(2)
    got, most = [], 0

    def work(place: int) -> None:
        nonlocal most
        for item in range(200):
            if place:
                channel.put(item)
            else:
                most = max(most, len(channel._items))
                got.append(channel.get())

    in_threads(2, work)
    assert got == list(range(200))
    assert most <= 2


@pytest.mark.parametrize("side", ["put", "get"])
def test_closing_wakes_whoever_waits(side: str) -> None:
    channel: Channel[int] = Channel(1)
    if side == "put":
        channel.put(0)
    is_there = threading.Event()

    def work(place: int) -> None:
        if place:
            is_there.wait()
            channel.close()
            return
        is_there.set()
        with pytest.raises(ChannelClosedError):
            channel.put(1) if side == "put" else channel.get()

    in_threads(2, work)


def test_a_closed_channel_has_dropped_its_items_and_takes_none() -> None:
    channel: Channel[int] = Channel(2)
    channel.put(0)
    channel.close()
    channel.close()
    with pytest.raises(ChannelClosedError):
        channel.get()
    with pytest.raises(ChannelClosedError):
        channel.put(1)
