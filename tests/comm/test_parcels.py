"""Parcels arrive as they were sent, described once, and what is sent is neither changed nor kept."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hpcpar.comm import Communicator, Incoming, ParcelExchange, wait_for_peers
from hpcpar.errors import CommunicatorFreedError, StalledError
from tests.comm.samples import LAYOUTS, SHAPE, noise, same

pytestmark = pytest.mark.mpi(min_size=2)

MANY = 400_000
"""Elements of float64: far beyond what any MPI sends eagerly."""
DTYPES = (
    torch.bool,
    torch.int16,
    torch.int64,
    torch.uint32,
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex32,
    torch.complex64,
)


@pytest.fixture
def exchange(comm: Communicator) -> Iterator[ParcelExchange]:
    made = ParcelExchange(comm)
    yield made
    made.free()


class Ring:
    """Every rank sends to its right neighbour, and gets replies from there."""

    def __init__(self, comm: Communicator, exchange: ParcelExchange) -> None:
        self.comm, self.exchange = comm, exchange
        self.left, self.right = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size

    def wait(self, incoming: Incoming) -> None:
        def done() -> bool:
            self.exchange.progress()
            return incoming.test()

        wait_for_peers(done, self.comm, lambda: ("parcel", [incoming.source]))

    def settle(self) -> None:
        wait_for_peers(lambda: self.exchange.is_sent, self.comm, lambda: ("sends", []))

    def pass_on(
        self,
        tensors: Sequence[Tensor],
        *,
        tag: int = 0,
        label: bytes = b"",
        context: object = None,
        late: bool = False,
    ) -> tuple[list[Tensor], bytes]:
        """Send a parcel to the right, and return what came from the left, which was the like.

        The receive is posted before its parcel is sent, or, with ``late``, when the parcel is under way.
        """
        if not late:
            incoming = self.exchange.expect(self.left, tag, context)
            self.comm.Barrier()
        self.exchange.send(self.right, tag, tensors, label, context)
        if late:
            self.comm.Barrier()
            incoming = self.exchange.expect(self.left, tag, context)
        self.wait(incoming)
        self.settle()
        self.comm.Barrier()  # at most one parcel of a key is under way
        assert incoming.description is not None
        return [tensor for tensor in incoming.tensors if tensor is not None], incoming.description.label


@pytest.fixture
def ring(comm: Communicator, exchange: ParcelExchange) -> Ring:
    return Ring(comm, exchange)


def assert_same(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert same(one, other), (one, other)


# ---- contents ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True])
def test_every_dtype_and_layout_arrives_described_and_plain(ring: Ring, late: bool) -> None:
    for layout in LAYOUTS:
        for step in range(3):

            def parcel(rank: int, layout=layout, step: int = step) -> list[Tensor]:
                return [layout(noise(dtype, SHAPE, 10 * rank + step)) for dtype in DTYPES]

            got, label = ring.pass_on(parcel(ring.comm.rank), label=b"all", late=late)
            assert_same(got, parcel(ring.left))
            assert label == b"all"
    assert ring.exchange.described_sent == 1  # layouts are the sender's business


def test_scalars_empty_tensors_and_empty_parcels_arrive(ring: Ring) -> None:
    parcels: list[list[Tensor]] = [
        [],
        [torch.tensor(3.5)],
        [torch.empty(0)],
        [torch.empty(0, 4), torch.empty(3, 0, 2, dtype=torch.int64)],
        [torch.tensor(True), torch.empty(0), torch.arange(5)],
    ]
    for tag, parcel in enumerate(parcels):
        for _ in range(3):
            got, _ = ring.pass_on(parcel, tag=tag)
            assert_same(got, parcel)
    assert ring.exchange.described_sent == len(parcels)


@pytest.mark.parametrize("late", [False, True])
def test_large_tensors_arrive(ring: Ring, late: bool) -> None:
    for step in range(3):
        parcel = [torch.full((MANY,), float(10 * ring.comm.rank + step)).double(), torch.arange(MANY)]
        got, _ = ring.pass_on(parcel, late=late)
        assert_same(got, [torch.full((MANY,), float(10 * ring.left + step)).double(), torch.arange(MANY)])


def test_blocks_beyond_the_count_limit_arrive(chunked: Communicator) -> None:
    exchange = ParcelExchange(chunked)
    ring = Ring(chunked, exchange)
    for step in range(3):
        parcel = [torch.arange(23) + step, noise(torch.bfloat16, (8, 2), step), torch.empty(0)]
        got, _ = ring.pass_on(parcel)
        assert_same(got, parcel)
        back = exchange.expect_reply(ring.right, 0, [(t.dtype, t.shape) for t in parcel])
        exchange.reply(ring.left, 0, [parcel[0], None, parcel[2]])
        ring.wait(back)
        assert back.tensors[1] is None
        assert_same([t for t in back.tensors if t is not None], [parcel[0], parcel[2]])
    ring.settle()
    exchange.free()


def test_tensors_of_a_described_parcel_can_be_changed_one_by_one(ring: Ring) -> None:
    """They came in one message; autograd must not take a change of one for a change of all."""
    (first, second), _ = ring.pass_on([torch.ones(3), torch.ones(3)])
    version = second._version
    first.add_(1.0)
    assert second.tolist() == [1.0] * 3
    assert second._version == version


# ---- descriptions ------------------------------------------------------------------------------------------


def test_only_the_first_parcel_is_described(ring: Ring) -> None:
    for step in range(4):
        ring.pass_on([torch.zeros(2), torch.zeros(3)])
        assert ring.exchange.described_sent == 1
        assert ring.exchange.messages_sent == 1 + 2 * step
    assert ring.exchange.bytes_sent > 3 * 20


@pytest.mark.parametrize("change", ["shape", "dtype", "label", "fewer", "more", "rank", "none"])
@pytest.mark.parametrize("late", [False, True])
def test_changed_parcel_is_described_again_in_one_message(ring: Ring, change: str, late: bool) -> None:
    before = [torch.zeros(2, 3), torch.ones(4)]
    after = {
        "shape": [torch.full((3, 2), 2.0), torch.ones(4)],
        "dtype": [torch.full((2, 3), 2, dtype=torch.int32), torch.ones(4)],
        "label": before,
        "fewer": [torch.full((2, 3), 2.0)],
        "more": [*before, torch.full((5,), 2.0)],
        "rank": [torch.full((6,), 2.0), torch.ones(4)],
        "none": [],
    }[change]
    label = b"another" if change == "label" else b"one"
    for _ in range(2):
        ring.pass_on(before, label=b"one", late=late)
    sent = ring.exchange.messages_sent
    for repetition in range(3):
        got, got_label = ring.pass_on(after, label=label, late=late)
        assert_same(got, after)
        assert got_label == label
        assert ring.exchange.described_sent == 2
        assert ring.exchange.messages_sent == sent + 1 + repetition * max(1, len(after))
    got, got_label = ring.pass_on(before, label=b"one", late=late)  # only the last one is remembered
    assert_same(got, before)
    assert ring.exchange.described_sent == 3


def test_cancelled_receive_takes_no_later_parcel(ring: Ring) -> None:
    """What was posted for a plain parcel must be gone when a described one has come in its place."""
    ring.pass_on([torch.zeros(4), torch.zeros(4)])
    for step in range(1, 6):
        size = 4 if step % 2 else 9
        parcel = [torch.full((size,), float(step)), torch.full((size,), float(-step))]
        for _ in range(2):  # described, then plain
            assert_same(ring.pass_on(parcel)[0], parcel)
    assert ring.exchange.described_sent == 5


def test_contexts_keep_descriptions_of_their_own(ring: Ring) -> None:
    for step in range(3):
        for context, size in ("train", 4), ("evaluate", 7):
            parcel = [torch.full((size,), float(step))]
            got, label = ring.pass_on(parcel, label=context.encode(), context=context)
            assert_same(got, parcel)
            assert label == context.encode()
    assert ring.exchange.described_sent == 2


def test_tags_beyond_the_bound_wrap_round(ring: Ring) -> None:
    ring.exchange._tags = 3
    for step in range(3):
        for tag in (0, 2, 3, 7, 3_000_000_001):
            got, _ = ring.pass_on([torch.tensor([tag, step])], tag=tag)
            assert_same(got, [torch.tensor([tag, step])])
    assert ring.exchange.described_sent == 5


def test_parcels_of_different_tags_overtake_each_other(ring: Ring) -> None:
    for step in range(3):
        expected = [ring.exchange.expect(ring.left, tag) for tag in range(5)]
        for tag in (3, 1, 4, 0, 2):
            ring.exchange.send(ring.right, tag, [torch.tensor([tag, step])], b"")
        for tag in (2, 4, 0, 3, 1):
            ring.wait(expected[tag])
            assert_same([t for t in expected[tag].tensors if t is not None], [torch.tensor([tag, step])])
        ring.comm.Barrier()
    ring.settle()
    assert ring.exchange.is_idle


# ---- replies -----------------------------------------------------------------------------------------------


def test_replies_come_back_without_descriptions(ring: Ring) -> None:
    tensors = [torch.zeros(3), torch.zeros(2, 2, dtype=torch.bfloat16), torch.zeros(0), torch.zeros(())]
    specs = [(tensor.dtype, tensor.shape) for tensor in tensors]
    for step in range(3):
        expected = ring.exchange.expect_reply(ring.right, 5, specs)
        mine = [torch.full_like(tensor, 10 * ring.comm.rank + step) for tensor in tensors]
        ring.exchange.reply(ring.left, 5, mine)
        ring.wait(expected)
        assert_same(
            [t for t in expected.tensors if t is not None],
            [torch.full_like(tensor, 10 * ring.right + step) for tensor in tensors],
        )
    ring.settle()
    assert ring.exchange.described_sent == 0


def test_reply_may_be_none_in_any_place(ring: Ring) -> None:
    specs = [(torch.float32, torch.Size([3])), (torch.float64, torch.Size([2, 2]))]
    values = [torch.ones(3), torch.ones(2, 2, dtype=torch.float64)]
    for missing in ((), (0,), (1,), (0, 1)):
        expected = ring.exchange.expect_reply(ring.right, 1, specs)
        reply = [None if place in missing else value for place, value in enumerate(values)]
        ring.exchange.reply(ring.left, 1, reply)
        ring.wait(expected)
        assert [tensor is None for tensor in expected.tensors] == [place in missing for place in range(2)]
        assert_same(
            [t for t in expected.tensors if t is not None], [value for value in reply if value is not None]
        )
    ring.settle()


def test_replies_and_parcels_of_one_tag_do_not_mix(ring: Ring) -> None:
    spec = (torch.float32, torch.Size([2]))
    for step in range(3):
        back = ring.exchange.expect_reply(ring.right, 0, [spec])
        ring.exchange.reply(ring.left, 0, [torch.full((2,), -1.0 - step)])
        got, _ = ring.pass_on([torch.full((2,), float(step))])
        ring.wait(back)
        assert_same(got, [torch.full((2,), float(step))])
        assert_same([t for t in back.tensors if t is not None], [torch.full((2,), -1.0 - step)])


# ---- lifetime ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("described", [True, False])
def test_sent_tensors_live_until_they_are_sent_and_no_longer(ring: Ring, described: bool) -> None:
    if not described:
        ring.pass_on([torch.zeros(MANY)])
    tensor = torch.full((MANY,), float(ring.comm.rank))
    storage = weakref.ref(tensor.untyped_storage())
    ring.exchange.send(ring.right, 0, [tensor], b"")
    del tensor
    gc.collect()
    overwriting = [torch.full((MANY,), float("nan")) for _ in range(4)]
    ring.comm.Barrier()  # nobody has asked for it yet
    incoming = ring.exchange.expect(ring.left, 0)
    ring.wait(incoming)
    assert_same([t for t in incoming.tensors if t is not None], [torch.full((MANY,), float(ring.left))])
    ring.settle()
    assert storage() is None
    assert overwriting[-1].isnan().all()


def test_received_tensors_belong_to_the_receiver_alone(ring: Ring) -> None:
    for _ in range(2):
        (got,), _ = ring.pass_on([torch.zeros(MANY)])
        storage = weakref.ref(got.untyped_storage())
        del got
        assert storage() is None


def test_exchange_is_idle_and_sent_when_nothing_is_under_way(ring: Ring) -> None:
    assert ring.exchange.is_idle
    assert ring.exchange.is_sent
    ring.pass_on([torch.zeros(MANY)])
    incoming = ring.exchange.expect(ring.left, 0)
    assert not ring.exchange.is_idle
    assert ring.exchange.is_sent
    ring.comm.Barrier()
    ring.exchange.progress()
    assert not incoming.test()
    ring.comm.Barrier()
    ring.exchange.send(ring.right, 0, [torch.ones(MANY)], b"")
    ring.wait(incoming)
    ring.settle()
    assert ring.exchange.is_sent
    assert ring.exchange.is_idle


def test_late_parcel_is_named_at_the_deadline(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCPAR_TIMEOUT_S", "0.2")
    incoming = ring.exchange.expect(ring.left, 0)
    with pytest.raises(StalledError, match=r"parcel must end within 0\.2 s") as caught:
        ring.wait(incoming)
    assert caught.value.waiting_for == (ring.left,)
    monkeypatch.setenv("HPCPAR_TIMEOUT_S", "30")
    ring.comm.Barrier()
    ring.exchange.send(ring.right, 0, [torch.ones(2)], b"")
    ring.wait(incoming)
    ring.settle()


def test_abandoned_exchange_waits_for_nobody(comm: Communicator, tmp_path: Path) -> None:
    """Messages that have begun, and whose sender does nothing for them any more."""
    exchange = ParcelExchange(comm)
    ring = Ring(comm, exchange)
    ring.pass_on([torch.zeros(MANY)], tag=1)
    folder = Path(comm.bcast(str(tmp_path)))
    expected = [exchange.expect(ring.left, tag) for tag in (0, 1, 3)]
    expected.append(exchange.expect_reply(ring.left, 2, [(torch.float32, torch.Size([MANY]))]))
    comm.Barrier()
    if comm.rank == 0:
        exchange.send(ring.right, 0, [torch.ones(MANY)], b"described")
        exchange.send(ring.right, 1, [torch.ones(MANY)], b"")
        exchange.reply(ring.right, 2, [torch.ones(MANY)])
        exchange.abandon()
        (folder / "sent").touch()
    # Not by messages from here on, which would move the others along.
    poll(lambda: (folder / "sent").exists())
    for _ in range(50):
        exchange.progress()
    del expected
    exchange.abandon()
    assert exchange.is_idle
    (folder / str(comm.rank)).touch()
    poll(lambda: all((folder / str(rank)).exists() for rank in range(comm.size)))
    comm.Barrier()
    exchange.free(communicators=False)  # messages may be left in them


def poll(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20.0
    while not done():
        assert time.monotonic() < deadline, "another rank hangs"
        time.sleep(0.002)


def test_freed_exchange_says_so(comm: Communicator) -> None:
    exchange = ParcelExchange(comm)
    Ring(comm, exchange).pass_on([torch.zeros(3)])
    exchange.free()
    exchange.free()
    with pytest.raises(CommunicatorFreedError):
        exchange.send((comm.rank + 1) % comm.size, 0, [torch.zeros(3)], b"")
