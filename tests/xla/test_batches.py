"""Batches of equal shape: what a short one is filled with adds nothing, from every kind of dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from hpcpar.xla.batches import Batch, BatchReader

pytestmark = pytest.mark.local


class MapStyle(Dataset[int]):
    """Remembers what was read."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        self.read.append(index)
        return index


class Stream(IterableDataset[int]):
    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.length))


class Iterable:
    """Has a length and an iterator, and no indices."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.length))


DATASETS: dict[str, Callable[[int], Any]] = {
    "map": MapStyle,
    "list": lambda length: list(range(length)),
    "range": range,
    "iterable": Iterable,
    "IterableDataset": Stream,
    "generator": lambda length: (index for index in range(length)),
}


def contents(batches: Iterator[Batch]) -> list[list[int]]:
    return [batch.parts[0].data.tolist() for batch in batches]


def real_samples(batches: Iterator[Batch]) -> list[list[int]]:
    """Without those that only fill up."""
    return [batch.parts[0].data.tolist()[: batch.samples] for batch in batches]


@pytest.mark.parametrize("kind", DATASETS)
@pytest.mark.parametrize("skip", [0, 3, 7, 9])
def test_every_kind_of_dataset_is_read_in_order_from_where_it_is_to_begin(kind: str, skip: int) -> None:
    reader = BatchReader(DATASETS[kind](7), 2)
    left = list(range(7))[skip:]
    expected = [left[first : first + 2] for first in range(0, len(left), 2)]
    assert real_samples(reader.batches(skip)) == expected


@pytest.mark.parametrize("kind", [kind for kind in DATASETS if kind != "generator"])
def test_another_epoch_begins_at_the_beginning(kind: str) -> None:
    reader = BatchReader(DATASETS[kind](5), 2)
    assert real_samples(reader.batches(4)) == [[4]]
    assert real_samples(reader.batches()) == [[0, 1], [2, 3], [4]]


def test_sampler_gives_the_order_and_skipped_samples_are_not_read() -> None:
    dataset = MapStyle(6)
    reader = BatchReader(dataset, 2, sampler=[5, 0, 3, 2])
    assert real_samples(reader.batches(1)) == [[0, 3], [2]]
    assert set(dataset.read) == {0, 3, 2}


def test_sampler_needs_no_length_of_the_dataset() -> None:
    class Endless:
        def __getitem__(self, index: int) -> int:
            return index * index

    assert real_samples(BatchReader(Endless(), 2, sampler=[9, 4]).batches()) == [[81, 16]]


def test_dataset_may_have_another_length_in_the_next_epoch() -> None:
    dataset = [0, 1]
    reader = BatchReader(dataset, 2)
    assert real_samples(reader.batches()) == [[0, 1]]
    dataset.append(2)
    assert real_samples(reader.batches()) == [[0, 1], [2]]


def test_reading_leaves_the_global_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    list(BatchReader(range(4), 2).batches())
    assert torch.equal(torch.get_rng_state(), before)


# ---- short batches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [8, 1, 2, 3, 4, 5, 7])
def test_weighted_parts_are_the_sum_over_the_samples_that_are_there(count: int) -> None:
    torch.manual_seed(count)
    model = nn.Linear(3, 1).double()
    inputs = torch.randn(count, 3, dtype=torch.float64)

    def losses(x: Tensor) -> Tensor:
        return model(x).square().squeeze(-1)

    (batch,) = BatchReader(list(inputs), 8).batches()
    assert batch.samples == count
    assert [len(part.data) for part in batch.parts] == [8] * len(batch.parts)
    assert len(batch.parts) == (1 if 8 % count == 0 else 2)
    padded = torch.stack([part.weight * losses(part.data).mean() for part in batch.parts]).sum()
    expected = losses(inputs).sum()
    torch.testing.assert_close(padded, expected)
    torch.testing.assert_close(
        torch.autograd.grad(padded, [*model.parameters()]),
        torch.autograd.grad(expected, [*model.parameters()]),
    )


def test_only_the_part_with_all_samples_updates_buffers() -> None:
    (batch,) = BatchReader(range(5), 8).batches()
    assert batch.parts[0].data.tolist() == [0, 1, 2, 3, 4, 0, 0, 0]
    assert batch.parts[1].data.tolist() == [0] * 8
    assert [part.updates_buffers for part in batch.parts] == [True, False]


def test_short_batch_is_left_out_or_taken_as_it_is() -> None:
    dropped = BatchReader(range(5), 2, short_batch="drop").batches()
    assert contents(dropped) == [[0, 1], [2, 3]]
    *_, last = BatchReader(range(5), 2, short_batch="compile").batches()
    assert (last.samples, last.parts[0].weight, last.parts[0].data.tolist()) == (1, 1.0, [4])


# ---- collating ---------------------------------------------------------------------------------------------


def test_samples_are_collated_as_torch_does_or_by_a_function() -> None:
    pairs = [(torch.tensor([1.0]), {"label": index}) for index in range(3)]
    (batch,) = BatchReader(pairs, 3).batches()
    inputs, labels = batch.parts[0].data
    assert inputs.shape == (3, 1)
    assert labels["label"].tolist() == [0, 1, 2]
    (batch,) = BatchReader(range(3), 3, collate_fn=lambda items: ("sum", sum(items))).batches()
    assert batch.parts[0].data == ("sum", 3)


def test_error_of_a_sample_costs_its_batch_only() -> None:
    class Faulty(MapStyle):
        def __getitem__(self, index: int) -> int:
            if index == 2:
                raise OSError("bad sector")
            return index

    batches = BatchReader(Faulty(6), 2).batches()
    assert next(batches).parts[0].data.tolist() == [0, 1]
    with pytest.raises(OSError, match="bad sector"):
        next(batches)
    assert contents(batches) == [[4, 5]]


def test_a_process_may_read() -> None:
    reader = BatchReader(range(5), 2, num_workers=1)
    assert real_samples(reader.batches(1)) == [[1, 2], [3, 4]]
