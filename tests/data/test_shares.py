from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcpar.data.amplification import read_amplification
from hpcpar.data.epoch_order import EpochOrder, Interleave
from hpcpar.data.progress import Progress
from hpcpar.data.shares import count, cut, piece, remaining, whole_number
from tests.data.files import PROPERTY

pytestmark = pytest.mark.local

lengths = st.integers(0, 60)
some_ranks = st.integers(1, 9)


def positions(spans: list[tuple[int, int]]) -> list[int]:
    return [at for start, end in spans for at in range(start, end)]


@st.composite
def spans_of_work(draw: st.DrawFn) -> list[tuple[int, int]]:
    edges = sorted(draw(st.sets(st.integers(0, 50), max_size=8)))
    return list(zip(edges[::2], edges[1::2], strict=False))


@PROPERTY
@given(spans_of_work(), some_ranks)
def test_pieces_are_all_of_the_work_and_differ_by_one_at_most(
    spans: list[tuple[int, int]], ranks: int
) -> None:
    pieces = [piece(spans, rank, ranks) for rank in range(ranks)]
    assert [at for own in pieces for at in positions(own)] == positions(spans)
    sizes = [count(own) for own in pieces]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1


@PROPERTY
@given(spans_of_work(), some_ranks, st.integers(0, 20))
def test_what_is_left_is_what_nobody_took(spans: list[tuple[int, int]], ranks: int, taken: int) -> None:
    pieces = [positions(piece(spans, rank, ranks)) for rank in range(ranks)]
    left = remaining(spans, ranks, taken)
    assert positions(left) == [at for own in pieces for at in own[taken:]]
    assert all(a[1] != b[0] for a, b in pairwise(left))


@PROPERTY
@given(spans_of_work(), some_ranks, st.integers(0, 20))
def test_the_same_ranks_get_the_ends_of_their_pieces(
    spans: list[tuple[int, int]], ranks: int, taken: int
) -> None:
    left = remaining(spans, ranks, taken)
    for rank in range(ranks):
        assert positions(piece(left, rank, ranks)) == positions(piece(spans, rank, ranks))[taken:]


@PROPERTY
@given(lengths, st.lists(st.tuples(some_ranks, st.integers(0, 12)), max_size=5))
def test_interruptions_lose_and_repeat_nothing(length: int, runs: list[tuple[int, int]]) -> None:
    seen: list[int] = []
    state = Progress(length, 0, 1).state(0)
    for ranks, taken in [*runs, (3, length)]:
        for rank in range(ranks):
            progress = Progress(length, rank, ranks)
            progress.load(state)
            seen += positions(progress.begin().spans)[:taken]
        state = progress.state(taken)
    assert sorted(seen) == list(range(length))


@PROPERTY
@given(lengths, st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=6), max_size=4))
def test_ranks_at_paces_of_their_own_lose_and_repeat_nothing(length: int, runs: list[list[int]]) -> None:
    seen: list[int] = []
    state = Progress(length, 0, 1).state(0)
    for run in [*runs, [length] * 3]:
        taken = []
        for rank, samples in enumerate(run):
            progress = Progress(length, rank, len(run))
            progress.load(state)
            own = positions(progress.begin().spans)[:samples]
            seen += own
            taken.append(len(own))
        state = progress.state(taken)
    assert sorted(seen) == list(range(length))
    assert state["taken"] == max(taken)  # they have come to the end together


@PROPERTY
@given(lengths, some_ranks, st.integers(1, 9), st.integers(0, 9), st.booleans())
def test_ranks_in_step_tell_the_same_up_to_the_end(
    length: int, ranks: int, batch: int, steps: int, drop_last: bool
) -> None:
    told, left = [], 0
    for rank in range(ranks):
        progress = Progress(length, rank, ranks)
        cursor = progress.begin()
        own = count(cursor.spans)
        whole = own // batch if drop_last else -(-own // batch)
        for _ in range(min(steps, whole)):
            cursor.advance(batch, whole_only=drop_last)
        if steps > whole:
            cursor.end()
        told.append(progress.state(progress.taken()))
        left += max(own - min(steps, whole) * batch, 0)
    assert all(state["taken"] == told[0]["taken"] for state in told) or steps * batch < -(-length // ranks)
    if not drop_last:
        other = Progress(length, 0, 1)
        other.load(told[0])
        assert count(other.share()) == left


@pytest.mark.parametrize(
    "change",
    [
        {"spans": [[0, 10], [0, 10]]},
        {"spans": [[0, 6], [5, 10]]},
        {"spans": [[5, 10], [0, 5]]},
        {"spans": [[4, 4]]},
        {"spans": [[0, 11]]},
        {"ranks": 0},
        {"taken": -1},
        {"taken": [1, 1, 1]},
        {"taken": [1, -1]},
        {"epoch": 0.5},
    ],
)
def test_states_that_cannot_be_are_refused(change: dict[str, Any]) -> None:
    state = Progress(10, 0, 2).state(3)
    progress = Progress(10, 0, 2)
    with pytest.raises(ValueError, match="must"):
        progress.load({**state, **change})
    assert progress.state(3) == state


@PROPERTY
@given(spans_of_work(), st.integers(-3, 60), st.integers(-3, 60))
def test_cut_counts_positions(spans: list[tuple[int, int]], first: int, last: int) -> None:
    assert positions(cut(spans, first, last)) == positions(spans)[max(first, 0) : max(last, 0)]


@PROPERTY
@given(st.integers(0, 80), st.integers(1, 4), st.integers(1, 7))
def test_workers_take_batches_in_turn(samples: int, workers: int, group: int) -> None:
    everything = np.arange(samples)
    split = samples // 3  # a sequence comes in pieces
    shares = []
    for worker in range(workers):
        own = Interleave(worker, workers, group)
        rows = [*own.select(0, everything[:split]), *own.select(split, everything[split:])]
        assert len(rows) == own.count(samples)
        shares.append(rows)
    turns = [
        at
        for start in range(0, samples, group)
        for at in shares[start // group % workers][start // group // workers * group :][:group]
    ]
    assert turns == everything.tolist()


@PROPERTY
@given(
    st.lists(st.integers(1, 7), max_size=12), st.integers(1, 5), st.booleans(), st.integers(0, 3), some_ranks
)
def test_an_epoch_has_every_sample_once(
    sizes: list[int], window: int, shuffle: bool, epoch: int, ranks: int
) -> None:
    bounds = np.cumsum([0, *sizes])
    order = EpochOrder(bounds, window, shuffle=shuffle, seed=5, epoch=epoch)
    whole = [at for task in order.tasks([(0, sum(sizes))]) for at in task.samples.tolist()]
    assert sorted(whole) == list(range(sum(sizes)))
    shares = [piece([(0, sum(sizes))], rank, ranks) for rank in range(ranks)]
    parts = [at for share in shares for task in order.tasks(share) for at in task.samples.tolist()]
    assert parts == whole  # the order does not know how many ranks there are
    if not shuffle:
        assert whole == list(range(sum(sizes)))


def test_a_task_reads_the_blocks_that_it_needs_and_no_others() -> None:
    order = EpochOrder(np.array([0, 4, 8, 12, 14]), 3, shuffle=True, seed=0, epoch=0)
    for task in order.tasks([(0, 2), (5, 13)]):
        slot = np.full(order.largest_window, -1)
        for start, stop, row in task.blocks:
            slot[row : row + stop - start] = np.arange(start, stop)
        np.testing.assert_array_equal(slot[task.rows], task.samples)
        assert all(np.isin(task.samples, np.arange(start, stop)).any() for start, stop, _ in task.blocks)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        epoch_order = EpochOrder(np.arange(0, 101, 4), 5, shuffle=True, seed=seed, epoch=epoch)
        return [at for task in epoch_order.tasks([(0, 100)]) for at in task.samples.tolist()]

    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_set_epoch_keeps_what_was_loaded_for_this_epoch() -> None:
    progress = Progress(10, 0, 2)
    progress.set_epoch(3)
    progress.begin()
    state = progress.state(progress.taken(2))
    other = Progress(10, 0, 2)
    other.load(state)
    assert not other.set_epoch(3)
    cursor = other.begin()
    assert cursor.spans == [(2, 5)]
    cursor.advance(3)
    assert other.begin().spans == [(2, 5)]  # the one before was given up
    other.begin().end()
    assert other.begin(keep=True).spans == [(2, 5)]
    other.begin().end()
    assert other.share() == [(0, 5)] == other.begin().spans  # an epoch is continued once
    other.load(state)
    assert other.set_epoch(4)
    assert other.begin().spans == [(0, 5)]


def test_what_is_no_whole_number_is_refused() -> None:
    for value in (-1, 1.5, "3", None):
        with pytest.raises(ValueError, match="must be a whole number from 0"):
            whole_number("epoch", value)
    assert whole_number("epoch", np.int32(4)) == 4


@pytest.mark.parametrize(
    ("blocks", "window", "ranks"), [(40, 4, 1), (40, 4, 3), (40, 4, 16), (64, 1, 7), (9, 4, 5)]
)
def test_amplification_is_what_the_order_reads(blocks: int, window: int, ranks: int) -> None:
    bounds = np.arange(blocks + 1) * 25
    samples = int(bounds[-1])
    for shuffle in (True, False):
        order = EpochOrder(bounds, window, shuffle=shuffle, seed=0, epoch=0)
        shares = [piece([(0, samples)], rank, ranks) for rank in range(ranks)]
        read = sum(b - a for share in shares for task in order.tasks(share) for a, b, _ in task.blocks)
        expected = read_amplification(samples, blocks, window, ranks, shuffle=shuffle)
        assert read / samples == pytest.approx(expected, rel=0.05)
    assert read_amplification(0, 0, 4, ranks, shuffle=True) == 1.0
